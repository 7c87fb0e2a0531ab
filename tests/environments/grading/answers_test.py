import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.environments.grading.answers import readings


def show(answer):
    """An answer in few letters: kind or value, with what belongs to it."""
    if answer.kind in ("value", "words"):
        return answer.text + (f" <{answer.unit}{answer.scale}>" if answer.unit or answer.scale else "")
    return (
        f"{answer.kind}{answer.text if answer.kind == 'tuple' else ''}[{'; '.join(map(show, answer.items))}]"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x = 5", "5"),
        ("a + b = 2 + 3 = 5", "5"),
        (r"\sqrt{2} \approx 1.41", r"\sqrt{2}"),
        ("x=1 or x=2", "list[1; 2]"),
        (r"1 \pm \sqrt{2}", r"list[1 +\sqrt{2}; 1 -\sqrt{2}]"),
        (r"\{1, \pm 2\}", "set[1; 2; -2]"),
        (r"(\pm 1, 2)", "list[tuple()[1; 2]; tuple()[-1; 2]]"),
        ("(1,2),(3,4)", "list[tuple()[1; 2]; tuple()[3; 4]]"),
        (r"1 < x \le 2", "tuple(][1; 2]"),
        (r"x \ge 2", r"tuple[)[2; \infty]"),
        ("3 > x", r"tuple()[-\infty; 3]"),
        (r"x<1 \text{ or } x>2", r"union[tuple()[-\infty; 1]; tuple()[2; \infty]]"),
        (r"[1,2) \cup \{3\}", "union[tuple[)[1; 2]; set[3]]"),
        (r"x+y<1", "x+y<1"),
        (r"5 \text{ cm}^2", "5 <cm^2>"),
        ("5 square feet", "5 <ft^2>"),
        (r"\$5", "5 <dollar>"),
        (r"50\%", "50 <percent>"),
        (r"30^\circ", "30 <degree>"),
        (r"4^{\text{th}}", "4"),
        ("5m", "5m"),
        ("sin x", "sin x"),
        (r"\text{No real solutions}", "none"),
        (r"\{\}", "none"),
        ("(C)", "C"),
        ("yes", "yes"),
        ("f(1, 2)", "f(1, 2)"),
        (r"\mathbb{R}", r"tuple()[-\infty; \infty]"),
        ("", "list[]"),
    ],
)
def test_reading(text, shown):
    assert [show(reading) for reading in readings(text)] == [shown]


def test_thousands_have_two_readings():
    assert [show(reading) for reading in readings("1,234")] == ["1234", "list[1; 234]"]
    assert [show(reading) for reading in readings("12,34")] == ["list[12; 34]"]


def test_names_of_several_unknowns_are_kept():
    (answer,) = readings("x=1, y=2")
    assert [item.left for item in answer.items] == ["x", "y"]
    (answer,) = readings("x_1=1, x_2=2")
    assert [item.left for item in answer.items] == ["", ""]


@pytest.mark.parametrize(
    ("text", "naming"),
    [
        ("x = 4", "name"),
        ("x_{1} = 4", "name"),
        ("f(2) = 4", "name"),
        ("(x, y) = (1, 2)", "name"),
        (r"\text{Area} = 4", "name"),
        ("AB = 4", "name"),
        ("a + b = 4", "expression"),
        ("2 + 2 = 4", "expression"),
        ("x^2 = 4", "equation"),
        ("2x = 4", "equation"),
        ("4", ""),
    ],
)
def test_what_is_on_the_left(text, naming):
    assert readings(text)[0].naming == naming


@given(st.text(alphabet="\\{}()[]12,.;=<>x ±∪|$%^_", max_size=60))
def test_whatever_is_written(text):
    assert all(reading.kind for reading in readings(text))
