from espl_jax.environments.retrievers.words import Stems, stems_of


def test_folded_stemmed_and_without_common_words():
    assert stems_of("The Connections of Zoë's SISTERS, born in 1712!", Stems()) == [
        "connect",
        "zoe",
        "sister",
        "born",
        "1712",
    ]


def test_unicode():
    assert stems_of("Straße_naïve ＡＢＣ", Stems()) == ["strass", "naiv", "abc"]
    assert stems_of("Œuvre Ωmega", Stems()) == ["œuvr", "ωmega"]


def test_nothing():
    assert stems_of("", Stems()) == stems_of(" ?! of the _", Stems()) == []
