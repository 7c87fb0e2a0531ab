"""Tasks of reasoning-gym: their options, and their entries by id."""

import sys

import pytest

from espl_jax import gym
from espl_jax.gym import Task, parse_id

pytest.importorskip("reasoning_gym")


def config(name, **options):
    return gym.dataset(Task(name, tuple(sorted(options.items())), 1)).config


def test_an_id_holds_the_task_and_the_index():
    task = Task("leg_counting", (("min_animals", "2"),), 1)
    assert task.id(17) == "reasoning_gym:leg_counting:min_animals=2,seed=1#17"
    assert parse_id(task.id(17)) == (task, 17)
    assert parse_id("reasoning_gym:gcd:seed=0#3") == (Task("gcd"), 3)
    joined = Task("countdown", (("max_value", "9"), ("operators", "+|-|*")), 5)
    assert parse_id(joined.id(0)) == (joined, 0)


@pytest.mark.parametrize(
    "problem_id", ["addition-1+2", "reasoning_gym:gcd#1", "reasoning_gym:gcd:seed=x#1", ""]
)
def test_other_ids_are_refused(problem_id):
    with pytest.raises(ValueError, match="the id names no entry of reasoning_gym; use a data spec such as"):
        parse_id(problem_id)


def test_options_have_the_types_of_the_configuration():
    legs = config("leg_counting", min_animals="2", max_animals="5")
    assert (legs.min_animals, legs.max_animals, legs.seed) == (2, 5, 1)
    assert config("binary_alternation", p_solvable="0.25").p_solvable == 0.25
    assert config("path_star", reversed="True").reversed is True
    assert config("path_star", reversed="false").reversed is False
    assert config("caesar_cipher", delimiter="!").delimiter == "!"
    assert config("basic_arithmetic", format_style="natural", operators="+|-").operators == ["+", "-"]
    assert config("countdown", operators="+|*").operators == ("+", "*")
    weights = config("complex_arithmetic", operations="+|-", operations_weights="0.5|0.5")
    assert (weights.operations, weights.operations_weights) == (("+", "-"), [0.5, 0.5])
    assert config("calendar_arithmetic", tasks="is_leap_year").tasks == ["is_leap_year"]
    assert config("word_sorting", transformation="uppercase").transformation.value == "uppercase"
    assert config("rearc", diff_ub="0.1").diff_ub == 0.1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("leg_count", {}, "unknown task 'leg_count'; did you mean leg_counting"),
        ("star", {}, "unknown task 'star'; did you mean path_star"),
        ("xyz", {}, "unknown task 'xyz'; choose one of ab, acre, .*zebra_puzzles"),
        ("composite", {}, "unknown task 'composite'"),
        (
            "leg_counting",
            {"min_animal": "2"},
            "unknown option 'min_animal'; did you mean min_animals or max_animals; the options of "
            "leg_counting are count, seed, split, min_animals, max_animals, min_instances, max_instances",
        ),
        ("leg_counting", {"size": "2"}, "unknown option 'size'; the options"),
        ("leg_counting", {"min_animals": "two"}, "invalid option 'min_animals=two'"),
        ("leg_counting", {"min_animals": "50"}, "max_animals must be >= min_animals; correct the options"),
        ("path_star", {"reversed": "2"}, "invalid option 'reversed=2': give true or false"),
        ("basic_arithmetic", {"format_style": "x"}, "'format_style=x': choose one of simple, natural"),
        ("word_sorting", {"transformation": "x"}, "invalid option 'transformation=x'"),
        ("rearc", {"board_format_opts": "x"}, "'board_format_opts' cannot be set in a data spec"),
    ],
)
def test_errors_name_the_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        config(name, **options)


def test_entries_without_order_need_a_fixed_hash_seed():
    if sys.flags.hash_randomization:
        with pytest.raises(ValueError, match="start it with PYTHONHASHSEED=0"):
            gym.dataset(Task("ransom_note"))
    else:
        assert gym.entry(Task("ransom_note"), 0)["question"]


def test_large_indices_are_taken_from_larger_sets():
    assert gym.entry(Task("gsm_symbolic"), 1000) == gym.entry(Task("gsm_symbolic"), 1000)
    assert gym.entry(Task("gsm_symbolic"), 1000)["metadata"]["source_index"] == 1000


def test_a_task_that_cannot_generate_is_an_error(monkeypatch):
    class Broken:
        def __getitem__(self, index):
            raise ZeroDivisionError("no")

    monkeypatch.setattr(gym, "_source", lambda task, index: Broken())
    with pytest.raises(ValueError, match="reasoning_gym:gcd:seed=987#4: no entry can be generated"):
        gym.entry(Task("gcd", seed=987), 4)


def test_a_missing_package_names_the_extra(monkeypatch):
    gym.package.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'espl_jax\[gym\]'"):
        gym.package()
