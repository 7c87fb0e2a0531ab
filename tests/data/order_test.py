import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.data.order import Cursor, next_batch
from espl_jax.data.problems import ProblemSet
from espl_jax.types import Problem


def problem_set(size):
    return ProblemSet(tuple(Problem(str(i), f"problem {i}", "1") for i in range(size)), "a set")


def batches(problems, cursor, batch_size, count):
    drawn = []
    for _ in range(count):
        batch, cursor = next_batch(problems, cursor, batch_size)
        drawn.append([problem.id for problem in batch])
    return drawn, cursor


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers(0, 2**31))
def test_epochs_are_permutations_and_batches_hold_no_repeats(sizes, seed):
    size, batch_size = sizes
    count = -(-4 * size // batch_size)
    drawn, cursor = batches(problem_set(size), Cursor(seed), batch_size, count)
    assert cursor == Cursor(seed, count * batch_size)
    assert all(len(set(batch)) == batch_size for batch in drawn)
    stream = [i for batch in drawn for i in batch]
    for epoch in range(4):
        assert len(set(stream[epoch * size : (epoch + 1) * size])) == size


@given(st.integers(0, 20), st.integers(0, 5))
def test_resuming_anywhere_gives_the_same_batches(done, seed):
    problems = problem_set(7)
    whole, _ = batches(problems, Cursor(seed), 5, 26)
    _, cursor = batches(problems, Cursor(seed), 5, done)
    rest, _ = batches(problems, Cursor(**vars(cursor)), 5, 26 - done)
    assert rest == whole[done:]


def test_a_cursor_in_the_middle_of_a_batch_still_draws_no_repeats():
    for position in range(40):
        drawn, _ = batches(problem_set(9), Cursor(1, position), 8, 10)
        assert all(len(set(batch)) == 8 for batch in drawn)


def test_epochs_and_seeds_differ():
    problems = problem_set(50)
    (one, two), _ = batches(problems, Cursor(0), 50, 2)
    (other,), _ = batches(problems, Cursor(1), 50, 1)
    assert one != two
    assert one != other
    assert one != [p.id for p in problems.problems]


@pytest.mark.parametrize("batch_size", [0, 4])
def test_impossible_batches_are_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}: a set has 3 problems"):
        next_batch(problem_set(3), Cursor(0), batch_size)
