import pytest

from espl_jax.environments.grading.units import take_off_unit


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"5 \text{ square centimeters}", ("5", "cm^2", "")),
        ("5cm", ("5", "cm", "")),
        ("5 apples", ("5", "apple", "")),
        ("5m", ("5m", "", "")),
        (r"5 \text{ or more}", (r"5 \text{ or more}", "", "")),
        (r"-\$5", ("-5", "dollar", "")),
        (r"12.5\%", ("12.5", "", "percent")),
        ("30 degrees", ("30", "", "degree")),
        (r"\sin 30^\circ", (r"\sin (\frac{30 \pi}{180})", "", "")),
        ("22nd", ("22", "", "")),
        ("+3", ("3", "", "")),
        ("", ("", "", "")),
    ],
)
def test_take_off_unit(text, parts):
    assert take_off_unit(text) == parts
