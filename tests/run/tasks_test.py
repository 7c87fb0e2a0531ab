import dataclasses

import pytest

from espl_jax.environments.arithmetic import Arithmetic
from espl_jax.environments.math import Math
from espl_jax.environments.search import Search
from espl_jax.run.tasks import environment_of, has_turns, make_environment, tools_of
from espl_jax.types import Grade, Problem
from tests.support import fakes


@dataclasses.dataclass
class Echo:
    """An environment of the user's own: right if the reply says the answer so many times."""

    times: int = 1

    def user_message(self, problem):
        return problem.text

    def grade(self, problems, replies):
        counts = [reply.count(p.answer) for p, reply in zip(problems, replies, strict=True)]
        return [Grade(count / self.times, count >= self.times) for count in counts]


def halved(problem, reply, grade):
    return grade.reward / 2


def test_environments_by_name():
    assert make_environment("math", "expression", "Go.", {}) == Math("expression", "Go.")
    assert make_environment("arithmetic", "boxed", None, {}) == Arithmetic("boxed")
    assert make_environment(f"{__name__}:Echo", "", None, {"times": 3}) == Echo(3)


def test_a_run_has_the_environment_of_its_configuration():
    boxed = {"environment__answer_format": "boxed", "environment__instruction": "Box it."}
    assert environment_of(fakes.config(**boxed)) == Arithmetic("boxed", "Box it.")
    own = {"environment__name": f"{__name__}:Echo", "environment__options": '{"times": 2}'}
    environment = environment_of(fakes.config(**own, environment__reward=f"{__name__}:halved"))
    assert environment.environment == Echo(2)
    assert environment.grade([Problem("p", "", "a")], ["aa"]) == [Grade(0.5, True)]


def test_math_takes_its_limits():
    limits = {"timeout": 2.0, "workers": 1, "memory_mib": 300}
    changes = {f"environment__math__{name}": value for name, value in limits.items()}
    environment = environment_of(fakes.config(environment__name="math", **changes))
    assert {name: getattr(environment, name) for name in limits} == limits


def test_search_takes_its_settings_and_an_encyclopedia_has_its_own_passages():
    fields = {"passages": 2, "max_turns": 3, "timeout": 5.0, "max_passage_words": 9, "concurrency": 4}
    changes = {f"environment__search__{name}": value for name, value in fields.items()}
    changes |= {"environment__search__rewards__f1": 0.5, "data__train": "encyclopedia:people=20"}
    environment = environment_of(fakes.config(environment__name="search", **changes))
    assert isinstance(environment, Search)
    assert {name: getattr(environment, name) for name in fields} == fields
    assert environment.rewards["f1"] == 0.5 and environment.rewards["exact_match"] == 1.0
    ((found, *_),) = environment.retriever.search(["a city"], 1)
    assert found.title and found.text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (f"{__name__}:Echo", {"often": 2}, r"environment\.options=.*unexpected keyword argument 'often'"),
        (f"{__name__}:Ecco", {}, "has no attribute 'Ecco'"),
        ("search", {}, "no passages to search; give a retriever"),
        ("search", {"retriever": "wikipedia"}, "retriever='wikipedia' is neither a server nor a file"),
        ("search", {"retriever": "http://x/retrieve", "turns": 3}, "unexpected keyword argument 'turns'"),
    ],
)
def test_what_an_environment_does_not_take_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_environment(name, "boxed", None, options, problems="addition:digits=1,count=3")


@pytest.mark.parametrize(
    ("changes", "turns"),
    [
        ({}, False),
        ({"environment__name": "math"}, False),
        # Nothing is opened: there is no such server.
        ({"environment__name": "search", "environment__search__retriever": "http://localhost:1/r"}, True),
        ({"environment__name": "tests.run.tasks_test:Echo"}, False),
        ({"environment__name": "tests.support.fakes:Talker"}, True),
    ],
)
def test_whether_rollouts_have_turns(changes, turns):
    assert has_turns(fakes.config(**changes)) == turns


@pytest.mark.parametrize(
    ("name", "tools"),
    [
        ("arithmetic", ()),
        ("search", Search.tools),
        ("tests.run.tasks_test:Echo", ()),
        ("tests.support.fakes:Talker", ()),
        ("tests.support.fakes:Caller", fakes.Caller.tools),
    ],
)
def test_the_tools_of_a_run(name, tools):
    changes = {"environment__name": name, "environment__search__retriever": "http://localhost:1/r"}
    assert tools_of(fakes.config(**changes)) == tools
