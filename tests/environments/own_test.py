import dataclasses

import pytest

from espl_jax.environments.arithmetic import Arithmetic
from espl_jax.environments.own import find, with_reward
from espl_jax.types import Grade, Problem
from tests.support.fakes import Talker

PROBLEMS = [Problem("a", "1 + 1?", "2"), Problem("b", "1 + 2?", "3")]


def length(problem, reply, grade):
    return len(reply) / 4 + grade.reward


def test_names_what_is_there():
    assert find("tests.environments.own_test:length").__name__ == "length"
    assert find("espl_jax.environments.arithmetic:Arithmetic") is Arithmetic


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no_such_module:f", "'no_such_module:f': No module named 'no_such_module'; run from its folder"),
        ("math:no_such", "'math:no_such': module 'math' has no attribute 'no_such'; correct the name"),
    ],
)
def test_says_what_is_missing(spec, words):
    with pytest.raises(ValueError, match=words):
        find(spec)


def test_another_reward_leaves_everything_else():
    environment = with_reward(Arithmetic(), length)
    assert environment.user_message(PROBLEMS[0]) == "1 + 1?"
    wrong = "The answer that was read, 4, is wrong."
    assert environment.grade(PROBLEMS, ["2", "it is 4"]) == [
        Grade(1.25, True, "2"),
        Grade(1.75, False, "4", feedback=wrong),
    ]
    assert not hasattr(environment, "respond") and not hasattr(environment, "begin")


def test_a_dialogue_stays_one():
    environment = with_reward(Talker(), lambda problem, transcript, grade: len(transcript))
    message = {"role": "assistant", "content": "a"}
    assert environment.respond(PROBLEMS[0], [message]) == [{"role": "user", "content": "2 e 1"}]
    assert [grade.reward for grade in environment.grade(PROBLEMS[:1], [[message] * 3])] == [3.0]
    assert environment.tools == ()


def test_a_reward_that_is_no_number_names_the_problem():
    environment = with_reward(Arithmetic(), lambda *_: float("nan"))
    with pytest.raises(ValueError, match=r"environment\.reward gave nan for problem a"):
        environment.grade(PROBLEMS, ["1", "2"])


def test_it_can_be_copied():
    environment = with_reward(Arithmetic(), length)
    assert dataclasses.replace(environment).environment == Arithmetic()
