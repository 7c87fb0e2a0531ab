import threading

import pytest

from espl_jax.environments import boxed
from espl_jax.environments import math as module
from espl_jax.environments.math import Math
from espl_jax.types import Grade, Problem
from tests.environments.answers import hostile

GOLD = r"\frac{41}{7}"
"""No hostile answer is equal to it."""


@pytest.fixture(scope="module")
def environment():
    environment = Math(timeout=30)
    yield environment
    environment.close()


def successes(environment, gold, *replies):
    problem = Problem("p", "text", gold)
    return [grade.success for grade in environment.grade([problem] * len(replies), replies)]


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("17", r"\boxed{17}", r"\boxed{18}"),
        (r"\frac{1}{12}", r"\boxed{\dfrac1{12}}", r"\boxed{\frac{12}{1}}"),
        (r"\frac{1}{12}", r"\boxed{x = 1/12}", r"\boxed{}"),
        (r"1, -1", r"\boxed{\pm 1}", r"\boxed{1}"),
        ("-9", r"\boxed{3}, no, \boxed{-9}", r"\boxed{-9}, no, \boxed{3}"),
        ("5", r"\boxed{\boxed{5}}", "5"),
        ("1,234", r"\boxed{1234}", r"\boxed{234}"),
    ],
)
def test_the_last_box_counts(environment, gold, right, wrong):
    assert successes(environment, gold, right, wrong) == [True, False]


def test_grades_say_what_was_read(environment):
    problem = Problem("p", "text", "5")
    assert environment.grade([problem] * 3, [r"\boxed{10/2}", "5", r"\boxed{6}"]) == [
        Grade(1.0, True, "10/2"),
        Grade(0.0, False, None, feedback=boxed.NO_BOX),
        Grade(0.0, False, "6", feedback="The answer that was read, 6, is wrong."),
    ]


def test_any_of_several_answers_is_right(environment):
    problem = Problem("p", "text", "5", aliases=(r"\frac{7}{2}",))
    replies = [r"\boxed{5}", r"\boxed{3.5}", r"\boxed{4.5}"]
    assert [grade.success for grade in environment.grade([problem] * 3, replies)] == [True, True, False]


def test_any_final_expression():
    environment = Math("expression", timeout=30, workers=1)
    replies = ["The answer is $1/12$.", r"\boxed{\frac{1}{12}}", "The answer is 3.", "Who knows?"]
    assert successes(environment, r"\frac{1}{12}", *replies) == [True, True, False, False]
    assert environment.grade([Problem("p", "", "7")], ["Thus, the answer is 7."])[0].answer == "7"
    long = "The answer is 3. " * 100_000 + "The answer is 7."
    assert successes(environment, "7", long) == [True]
    environment.close()


def test_begun_or_not_grades_are_the_same(environment):
    problems = [Problem(gold, "", gold) for gold in ("5", r"\frac{1}{2}", GOLD)]
    replies = [r"\boxed{10/2}", r"\boxed{0.5}", r"\boxed{41}"]
    plain = environment.grade(problems, replies)
    begun = Math(timeout=30, workers=1)
    threads = [
        threading.Thread(target=begun.begin, args=pair) for pair in zip(problems, replies, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun.grade(problems, replies) == plain
    assert [grade.success for grade in plain] == [True, True, False]
    begun.close()


def test_what_is_plain_needs_no_process(monkeypatch):
    monkeypatch.setattr(module.CachedWorkers, "submit", None)
    long = "5" * (module.LONGEST_ANSWER + 1)
    replies = [r"\boxed{5}", r"\boxed{ 6 }", "nothing", rf"\boxed{{{long}}}", "{" * 1_000_000]
    assert successes(Math(), "5", *replies) == [True, False, False, False, False]
    assert successes(Math(), long, rf"\boxed{{{long}}}") == [True]
    (grade,) = Math().grade([Problem("p", "", "5")], [rf"\boxed{{{long}}}"])
    assert len(grade.answer) == module.LONGEST_ANSWER


def test_the_message_asks_for_a_box_only_where_one_counts():
    problem = Problem("p", "Find $x$.", "1")
    assert Math().user_message(problem) == "Find $x$.\n\nPut the final answer in \\boxed{}."
    assert Math(instruction="Be brief.").user_message(problem) == "Find $x$.\n\nBe brief."
    assert Math("expression").user_message(problem) == "Find $x$."


@pytest.mark.slow
def test_hostile_answers_cost_themselves_alone(tmp_path):
    """Every kind, at a short limit: all wrong, nothing run, and what comes after is graded as before."""
    marker = tmp_path / "marker"
    replies = [reply for _, reply in hostile.replies(marker=str(marker), each=1)]
    environment = Math(timeout=0.3)
    problem = Problem("p", "", GOLD)
    grades = environment.grade([problem] * len(replies), replies)
    assert [reply for reply, grade in zip(replies, grades, strict=True) if grade.success] == []
    assert not marker.exists()
    environment.close()


@pytest.mark.slow
@pytest.mark.parametrize("answer_format", ["boxed", "expression"])
def test_hundreds_of_hostile_answers_at_the_default_limit(tmp_path, answer_format):
    marker = tmp_path / "marker"
    replies = [reply for _, reply in hostile.replies(marker=str(marker))]
    assert len(replies) > 200
    environment = Math(answer_format)
    grades = environment.grade([Problem("p", "", GOLD)] * len(replies), replies)
    assert not any(grade.success for grade in grades)
    assert not marker.exists()
    assert successes(environment, "5", r"\boxed{10/2}", r"\boxed{11/2}") == [True, False]
    environment.close()


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="answer_format='box'"):
        Math("box")
    with pytest.raises(ValueError, match="timeout=0"):
        Math(timeout=0)
    with pytest.raises(ValueError, match="workers=0"):
        Math(workers=0)
    with pytest.raises(ValueError, match="memory_mib=100"):
        Math(memory_mib=100)
