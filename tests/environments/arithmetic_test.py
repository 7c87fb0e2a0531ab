import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.environments.arithmetic import Arithmetic, last_number
from espl_jax.types import Grade, Problem

PROBLEM = Problem("p", "What is 27 + 58?", "85")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("27 + 58 = 85", "85"),
        ("27+58=85.", "85"),
        ("27 + 58 = 20 + 7 + 50 + 8 = 85\n", "85"),
        ("The sum is **85**!", "85"),
        ("$1,234,567.50", "1234567.50"),
        ("1,2345", "2345"),
        ("1,23", "23"),
        ("3, 5", "5"),
        ("85.0", "85.0"),
        (".5", ".5"),
        ("-3", "-3"),
        ("= -3", "-3"),
        ("is \N{MINUS SIGN}3", "-3"),
        ("(-3)", "-3"),
        ("9 - 4", "4"),
        ("9-4", "4"),
        ("9 -4", "4"),
        ("(1+8)-4", "4"),
        ("COVID-19", "19"),
        ("- 4", "4"),
        ("٣", None),
        ("eighty-five", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@given(st.integers(-(10**30), 10**30), st.sampled_from(["", "It is ", "1 + 2 = ", "x\n"]), st.booleans())
def test_integers_are_read_in_every_spelling(value, before, grouped):
    assert last_number(f"{before}{value:,}." if grouped else f"{before}{value}.") == str(value)


@given(st.text())
def test_any_reply_is_graded(reply):
    for answer_format in ("last_number", "boxed"):
        (grade,) = Arithmetic(answer_format).grade([PROBLEM], [reply])
        assert grade.reward in (0.0, 1.0)
        assert grade.success == (grade.reward == 1.0)


def test_grades_come_in_order():
    zero = Problem("q", "What is 0 + 0?", "0")
    grades = Arithmetic().grade([PROBLEM, zero, PROBLEM], ["85", "I don't know", "27 + 58 = 95"])
    assert grades == [
        Grade(1.0, True, "85"),
        Grade(0.0, False, None, feedback="There is no number in the reply. The answer is one number."),
        Grade(0.0, False, "95", feedback="The answer that was read, 95, is wrong."),
    ]
    assert Arithmetic().grade([PROBLEM] * 2, ["085", "85.00"]) == [
        Grade(1.0, True, "085"),
        Grade(1.0, True, "85.00"),
    ]


def test_a_box_is_wanted():
    grades = Arithmetic("boxed").grade([PROBLEM] * 3, ["85", r"\boxed{27 + 58 = 85} 9", r"\boxed{eighty}"])
    assert [grade.reward for grade in grades] == [0, 1, 0]
    large = Problem("r", "", "1234")
    assert Arithmetic("boxed").grade([large], [r"\boxed{1{,}234}"])[0].success


def test_very_long_numbers():
    assert not Arithmetic().grade([PROBLEM], ["9" * 100_000])[0].success


def test_the_message_asks_for_a_box_only_where_one_counts():
    assert Arithmetic().user_message(PROBLEM) == "What is 27 + 58?"
    assert Arithmetic("boxed").user_message(PROBLEM) == (
        r"What is 27 + 58? Put the final answer in \boxed{}."
    )
    assert Arithmetic("boxed", instruction="").user_message(PROBLEM) == "What is 27 + 58?"
    assert Arithmetic(instruction="Be brief.").user_message(PROBLEM) == "What is 27 + 58? Be brief."


def test_any_of_several_answers_is_right():
    problem = Problem("p", "text", "5", aliases=("7",))
    assert [grade.success for grade in Arithmetic().grade([problem] * 3, ["5", "7", "6"])] == [
        True,
        True,
        False,
    ]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="answer_format='box'"):
        Arithmetic("box")
    with pytest.raises(ValueError, match="problem p: answer='none'"):
        Arithmetic().grade([Problem("p", "", "none")], ["1"])
    with pytest.raises(ValueError, match="zip"):
        Arithmetic().grade([PROBLEM], [])


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        (r"\boxed{85 points}", 1),
        (r"\boxed{85\text{ points}}", 1),
        (r"\boxed{85~\mathrm{Points}}", 1),
        (r"27 points + 58 points = \boxed{85points}", 1),
        (r"\boxed{85}", 0.5),
        (r"$\boxed{85}$ points", 1),
        (r"27 points + 58 points = \boxed{85}", 0.5),
        (r"\boxed{85}. No points.", 0.5),
        (r"185 points, so \boxed{85}", 0.5),
        (r"\boxed{85 pointsman}", 0.5),
        (r"\boxed{points: 85}", 0.5),
        (r"\boxed{86 points}", 0),
        ("85 points", 0),
    ],
)
def test_a_unit_is_wanted(reply, reward):
    (grade,) = Arithmetic("boxed", unit="points").grade([PROBLEM], [reply])
    assert (grade.reward, grade.success) == (reward, reward == 1)
    assert ("unit" in grade.feedback) == (reward == 0.5)
    assert ("box" in grade.feedback) == ("box" not in reply)


def test_a_reply_without_a_box_is_told_of_box_and_unit():
    (grade,) = Arithmetic("boxed", unit="points").grade([PROBLEM], ["85 points"])
    assert grade.reward == 0
    assert r"\boxed{...}" in grade.feedback and '"points"' in grade.feedback


def test_a_wrong_number_without_a_unit_is_told_both():
    (grade,) = Arithmetic("boxed", unit="points").grade([PROBLEM], [r"\boxed{86}"])
    assert "86, is wrong" in grade.feedback
    assert '"points"' in grade.feedback


def test_the_unit_is_a_word():
    with pytest.raises(ValueError, match=r"unit='\(': must be one word"):
        Arithmetic(unit="(")
