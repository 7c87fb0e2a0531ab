"""What an environment of the user's own returns is checked against the contract."""

import dataclasses

import numpy as np
import pytest

from espl_jax.environments.base import checked_grades, checked_messages, checked_tools, checked_user_message
from espl_jax.environments.own import with_reward
from espl_jax.types import Grade, Problem

PROBLEMS = [Problem("a", "1 + 1?", "2"), Problem("b", "1 + 2?", "3")]
GOOD = Grade(1.0, True, "2")


@dataclasses.dataclass
class Fixed:
    """Says the same whatever it is asked."""

    returned: object

    def user_message(self, problem):
        return self.returned

    def respond(self, problem, transcript):
        return self.returned

    def grade(self, problems, replies):
        return self.returned


@pytest.mark.parametrize(
    "grades",
    [
        [GOOD, Grade(0, False)],
        (GOOD, Grade(np.float32(0.5), np.bool_(True), None, {"guesses": np.int64(3)})),
        [GOOD, Grade(True, True)],
    ],
)
def test_grades_as_they_should_be(grades):
    assert checked_grades(Fixed(grades), PROBLEMS, ["2", "3"]) == list(grades)


@pytest.mark.parametrize(
    ("grades", "words"),
    [
        (
            [GOOD],
            "1 grades for 2 replies to problems 'a' to 'b'; it must return a list with one Grade",
        ),
        ([GOOD] * 3, "3 grades for 2 replies"),
        (None, "None for 2 replies"),
        (1.0, "1.0 for 2 replies"),
        ([GOOD, 0.5], "0.5 and not a Grade .* for problem 'b'"),
        ([GOOD, None], "None and not a Grade"),
        (
            [GOOD, Grade(float("nan"), False)],
            "the reward nan, which must be a finite number, for problem 'b'",
        ),
        ([GOOD, Grade(1e39, False)], r"the reward 1e\+39, which"),
        ([Grade(None, False), GOOD], "the reward None, .* for problem 'a'"),
        ([Grade("1", False), GOOD], "the reward '1', which must be a finite number"),
        ([GOOD, Grade(1.0, None)], "the success None, which must be True or False"),
        ([GOOD, Grade(1.0, True, 5)], "the answer 5, which must be text or None"),
        ([GOOD, Grade(1.0, True, "5", {"turns": float("inf")})], "the metric 'turns': inf"),
        ([GOOD, Grade(1.0, True, "5", None)], "the metrics None"),
    ],
)
def test_other_grades_are_refused_by_environment_and_problem(grades, words):
    for environment in (Fixed(grades), with_reward(Fixed(grades), lambda *_: 1.0)):
        with pytest.raises(
            ValueError, match=rf"^tests\.environments\.base_test:Fixed\.grade returned .*{words}"
        ):
            checked_grades(environment, PROBLEMS, ["2", "3"])


@pytest.mark.parametrize("reward", [None, "one", float("inf"), [1.0]])
def test_rewards_of_a_function_are_numbers(reward):
    environment = with_reward(Fixed([GOOD, GOOD]), lambda problem, *_: reward if problem.id == "b" else 1)
    with pytest.raises(ValueError, match=r"environment\.reward gave .* for problem b; make it give a finite"):
        environment.grade(PROBLEMS, ["2", "3"])


def test_user_messages_are_text():
    assert checked_user_message(Fixed("2 + 2?"), PROBLEMS[0]) == "2 + 2?"
    with pytest.raises(
        ValueError, match=r"Fixed\.user_message returned None for problem 'a'; it must return"
    ):
        checked_user_message(Fixed(None), PROBLEMS[0])


@pytest.mark.parametrize("messages", [None, [], [{"role": "user", "content": "no"}]])
def test_responses_as_they_should_be(messages):
    assert checked_messages(Fixed(messages), PROBLEMS[0], messages) == tuple(messages or ())


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Higher.", "'Higher.'"),
        (["Higher."], "'Higher.'"),
        ([None], "None"),
        ([{"role": "user"}], r"\{'role': 'user'\}"),
        ([{"role": "system", "content": "Higher."}], r"\{'content': 'Higher.', 'role': 'system'\}"),
        ({"role": "user", "content": "Higher."}, r"\{'content': 'Higher.', 'role': 'user'\}"),
    ],
)
def test_other_responses_are_refused(messages, words):
    message = rf"Fixed\.respond returned {words} for problem 'a'; it must return None, or a list of messages"
    with pytest.raises(ValueError, match=message):
        checked_messages(Fixed(messages), PROBLEMS[0], messages)


def test_texts_are_of_whole_characters():
    half = r".* for problem 'a' has '\\ud800' at character 3, half of a surrogate pair; write"
    with pytest.raises(ValueError, match=rf"Fixed\.user_message: {half}"):
        checked_user_message(Fixed("2+\ud800"), PROBLEMS[0])
    messages = [{"role": "user", "content": "No"}, {"role": "user", "content": "no\ud800"}]
    with pytest.raises(ValueError, match=rf"Fixed\.respond: {half}"):
        checked_messages(Fixed(messages), PROBLEMS[0], messages)
    for grade in (Grade(1.0, True, "5 \ud800"), Grade(1.0, True, "5", {"a \ud800": 1})):
        with pytest.raises(ValueError, match=rf"Fixed\.grade: {half}"):
            checked_grades(Fixed([grade, GOOD]), PROBLEMS, ["2", "3"])


class WithTools(Fixed):
    @property
    def tools(self):
        return self.returned


def test_tools_are_schemas_of_functions():
    tool = {"type": "function", "function": {"name": "search"}}
    assert checked_tools(WithTools([tool])) == [tool]
    assert checked_tools(Fixed(None)) == checked_tools(WithTools(None)) == ()
    lacking = [{"name": "x"}, "search", {"function": {"name": 3}}, {"function": {"name": "a\ud800"}}]
    for wrong in (*([tool, each] for each in lacking), [{**tool, "type": int}], tool, "search"):
        with pytest.raises(ValueError, match=r"WithTools\.tools has .*; it must be a list of schemas"):
            checked_tools(WithTools(wrong))
