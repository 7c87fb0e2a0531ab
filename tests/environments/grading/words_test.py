import pytest

from espl_jax.environments.grading.words import read_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Yes.", "yes"),
        (r"\text{There are no real solutions}", "none"),
        (r"\emptyset", "none"),
        ("no", "no"),
        ("Does not exist", "dne"),
        (r"\text{the circle}", "circle"),
        ("(C)", "C"),
        ("xyz", ""),
        ("silent", "silent"),
        (r"\text{red or blue}", ""),
        (r"\sin", ""),
        (r"5 \text{ cm}", ""),
        ("", ""),
    ],
)
def test_read_words(text, words):
    assert read_words(text) == words
