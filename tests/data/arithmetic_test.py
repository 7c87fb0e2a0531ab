import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.data.arithmetic import SPLITS, addition
from espl_jax.data.load import load
from espl_jax.data.problems import check_disjoint


def operands(problem):
    return tuple(int(n) for n in re.fullmatch(r"What is (\d+) \+ (\d+)\?", problem.text).groups())


def pairs(problem_set):
    return [tuple(sorted(operands(problem))) for problem in problem_set.problems]


@pytest.mark.parametrize(("digits", "sizes"), [(1, (33, 11, 11)), (2, (2457, 819, 819))])
def test_splits_divide_all_unordered_pairs(digits, sizes):
    lowest = 0 if digits == 1 else 10
    everything = {(a, b) for a in range(lowest, 10**digits) for b in range(a, 10**digits)}
    seeds = {"train": 3, "validation": 1, "test": 2}
    sets = {s: addition(digits, n, s, seeds[s]) for s, n in zip(SPLITS, sizes, strict=True)}
    drawn = [pair for split in sets.values() for pair in pairs(split)]
    assert len(drawn) == len(everything)
    assert set(drawn) == everything
    check_disjoint(**sets)


@given(st.integers(1, 9), st.integers(1, 11), st.sampled_from(sorted(SPLITS)), st.integers(0, 2**32))
def test_problems_are_right_and_repeatable(digits, count, split, seed):
    problems = addition(digits, count, split, seed)
    assert len(problems) == len(set(pairs(problems))) == count
    assert problems == addition(digits, count, split, seed)
    for problem in problems.problems:
        assert problem.answer == str(sum(operands(problem)))
        assert digits == 1 or all(len(str(number)) == digits for number in operands(problem))


def test_seeds_and_orders_differ():
    assert addition(2, 20, seed=0) != addition(2, 20, seed=1)
    ordered = [operands(p)[0] <= operands(p)[1] for p in addition(2, 200).problems]
    assert 60 < sum(ordered) < 140


def test_every_split_holds_every_last_digit():
    for split, size in zip(SPLITS, (2457, 819, 819), strict=True):
        last = [(a % 10, b % 10) for a, b in pairs(addition(2, size, split))]
        assert len(set(last)) == 100


def test_impossible_wishes_are_refused():
    with pytest.raises(ValueError, match="count=34: the train split has 33 of the 55 unordered pairs"):
        addition(1, 34)
    with pytest.raises(ValueError, match="count=0"):
        addition(1, 0)
    with pytest.raises(ValueError, match="split='dev'"):
        addition(1, 1, split="dev")
    with pytest.raises(ValueError, match="digits=0"):
        addition(0, 1)


def test_load_reads_the_specification():
    assert load("addition:digits=2,count=5") == addition(2, 5)
    assert load("addition:digits=2, count=5", split="test", seed=4) == addition(2, 5, "test", 4)
    assert load("addition:digits=2,count=5,split=test,seed=9", seed=4) == addition(2, 5, "test", 9)
    for spec, message in [
        ("addition:digits=2", "missing option count"),
        ("addition:digits=2,count=5,size=4", "invalid option 'size=4'"),
        ("addition:digits=two,count=5", "invalid option 'digits=two'"),
        ("addition:", "invalid or repeated option ''"),
        ("sums.txt", r"data='sums.txt': not a data spec"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(spec)
