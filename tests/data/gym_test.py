"""Data specs of reasoning-gym."""

import subprocess
import sys

import pytest

from espl_jax import gym
from espl_jax.data import specs
from espl_jax.data.load import load
from espl_jax.data.problems import check_disjoint
from espl_jax.data.statements import comparable

SPLITS = ("train", "validation", "test")


def test_specs_are_parsed_without_the_package():
    (source,) = specs.parse("reasoning_gym:leg_counting:count=200,min_animals=2")
    assert (source.kind, source.place, source.name) == ("reasoning_gym", "leg_counting", "leg_counting")
    assert source.options == {"count": "200", "min_animals": "2"}
    assert len(specs.parse("reasoning_gym:gcd:count=2 + reasoning_gym:countdown:count=2,operators=+|-")) == 2
    with pytest.raises(ValueError, match=r"'reasoning_gym': not a data spec; .* reasoning_gym:leg_counting:"):
        specs.parse("reasoning_gym")
    with pytest.raises(ValueError, match="invalid or repeated option 'count=3'"):
        specs.parse("reasoning_gym:gcd:count=2,count=3")


def test_the_package_is_imported_only_where_it_is_used():
    code = (
        "import sys; from espl_jax.run.tasks import make_environment; "
        "make_environment('reasoning_gym', 'tag', None, {}); assert 'reasoning_gym' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


class TestProblems:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip("reasoning_gym")

    def test_a_problem_is_the_entry_of_its_id(self):
        problems = load("reasoning_gym:leg_counting:count=20,min_animals=2,seed=7").problems
        assert len(problems) == 20
        import reasoning_gym

        made = reasoning_gym.create_dataset("leg_counting", min_animals=2, seed=7, size=1000)
        for problem in problems:
            task, index = gym.parse_id(problem.id)
            assert problem.id == f"reasoning_gym:leg_counting:min_animals=2,seed=7#{index}"
            assert made[index] == gym.entry(task, index)
            assert (problem.text, problem.answer) == (made[index]["question"].strip(), made[index]["answer"])

    def test_tasks_with_many_answers_have_none(self):
        assert {problem.answer for problem in load("reasoning_gym:graph_color:count=3").problems} == {""}

    @pytest.mark.parametrize(
        "options", ["leg_counting:count=40", "gcd:count=25,max_value=30,seed=3", "tower_of_hanoi:count=10"]
    )
    def test_splits_are_disjoint(self, options):
        spec = f"reasoning_gym:{options}"
        splits = {split: load(spec, split) for split in SPLITS}
        check_disjoint(**splits)
        assert splits == {split: load(spec, split) for split in SPLITS}
        assert load(f"{spec},split=test", "train").problems == load(spec, "test").problems
        texts = [comparable(problem.text) for split in splits.values() for problem in split.problems]
        assert len(set(texts)) == len(texts)

    def test_more_problems_keep_the_first_ones(self):
        few, many = (load(f"reasoning_gym:gcd:count={count}").problems for count in (5, 50))
        assert many[:5] == few

    def test_tasks_are_joined(self):
        joined = load("reasoning_gym:gcd:count=5 + reasoning_gym:lcm:count=5 + addition:digits=1,count=3")
        assert len(joined) == 13
        with pytest.raises(ValueError, match="has the same text as"):
            load("reasoning_gym:gcd:count=5 + reasoning_gym:gcd:count=6")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                "leg_count:count=3",
                "data='reasoning_gym:leg_count:count=3': unknown task 'leg_count'; did you",
            ),
            ("gcd", "data='reasoning_gym:gcd': missing option count; write count=200"),
            ("gcd:count=0", "invalid option 'count=0': give an integer, at least 1"),
            ("gcd:count=3,seed=-1", "invalid option 'seed=-1': give an integer, at least 0"),
            ("gcd:count=3,split=dev", "split='dev' is unknown; choose one of train, validation, test"),
            ("gcd:count=3,max_valu=5", "unknown option 'max_valu'; did you mean max_value"),
            (
                "tower_of_hanoi:count=500",
                "count=500: only .. different problems of the train split were found among .* entries; lower",
            ),
        ],
    )
    def test_errors_name_the_spec_and_the_option(self, options, message):
        with pytest.raises(ValueError, match=message):
            load(f"reasoning_gym:{options}")
