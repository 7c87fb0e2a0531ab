import threading
import time

import pytest

from espl_jax.data.jsonl import read_jsonl
from espl_jax.environments.math import Math
from espl_jax.types import Grade, Problem


def successes(gold, *replies, environment=None):
    problem = Problem("p", "text", gold)
    grades = (environment or Math()).grade([problem] * len(replies), replies)
    return [grade.success for grade in grades]


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("17", r"\boxed{17}", r"\boxed{18}"),
        (r"\frac{1}{12}", r"\boxed{\dfrac1{12}}", r"\boxed{\frac{12}{1}}"),
        (r"\frac{1}{12}", r"\boxed{x = 1/12}", r"\boxed{}"),
        (r"\frac{3 \sqrt{7}}{7}", r"$\boxed{\frac{3}{\sqrt{7}}}$", r"\boxed{1.1339}"),
        (r"2^{5} \cdot 6!", r"\boxed{6! \cdot 2^{5}}", r"\boxed{2^{6} \cdot 6!}"),
        (r"1+\sqrt{2}, 1-\sqrt{2}", r"\boxed{1-\sqrt{2}, 1+\sqrt{2}}", r"\boxed{1+\sqrt{2}}"),
        (r"1, -1", r"\boxed{\pm 1}", r"\boxed{1}"),
        ("-9", r"\boxed{3}, no, \boxed{-9}", r"\boxed{-9}, no, \boxed{3}"),
        ("5", r"\boxed{\boxed{5}}", "5"),
        ("1,234", r"\boxed{1234}", r"\boxed{234}"),
    ],
)
def test_equivalent_answers(gold, right, wrong):
    assert successes(gold, right, wrong) == [True, False]


def test_grades_say_what_was_read():
    problem = Problem("p", "text", "5")
    assert Math().grade([problem] * 3, [r"\boxed{10/2}", "5", r"\boxed{6}"]) == [
        Grade(1.0, True, "10/2"),
        Grade(0.0, False, None),
        Grade(0.0, False, "6"),
    ]


def test_any_final_expression():
    environment = Math("expression")
    replies = ["The answer is $1/12$.", r"\boxed{\frac{1}{12}}", "The answer is 3.", "Who knows?"]
    assert successes(r"\frac{1}{12}", *replies, environment=environment) == [True, True, False, False]
    assert environment.grade([Problem("p", "", "7")], ["Thus, the answer is 7."])[0].answer == "7"


def test_the_message_asks_for_a_box_only_where_one_counts():
    problem = Problem("p", "Find $x$.", "1")
    assert Math().user_message(problem) == "Find $x$.\n\nPut the final answer in \\boxed{}."
    assert Math(instruction="Be brief.").user_message(problem) == "Find $x$.\n\nBe brief."
    assert Math("expression").user_message(problem) == "Find $x$."


def test_monstrous_answers_cost_no_more_than_the_time_limit():
    start = time.monotonic()
    replies = [r"\boxed{7^{10^9}}", r"\boxed{" + "(" * 3000 + "}", r"\boxed{7^{10^9}}", "\\boxed{\x00\ud800}"]
    assert successes("5", *replies, environment=Math(timeout=1)) == [False] * 4
    assert time.monotonic() - start < 8


def test_refuses_to_run_without_its_time_limit():
    caught = []

    def grade():
        try:
            successes("5", r"\boxed{5}")
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="answer_format='box'"):
        Math("box")
    with pytest.raises(ValueError, match=r"timeout=0\.5"):
        Math(timeout=0.5)


def test_real_answers_are_equivalent_to_themselves_alone(shared):
    problems = read_jsonl(shared / "data" / "hmmt_feb_2025.jsonl").problems
    right = Math().grade(problems, [rf"so \boxed{{\displaystyle {p.answer}}}" for p in problems])
    wrong = Math().grade(problems, [rf"so \boxed{{{p.answer} + 1}}" for p in problems])
    assert [grade.success for grade in right] == [True] * 30
    assert [grade.success for grade in wrong] == [False] * 30
