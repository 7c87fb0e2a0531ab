import pytest

from espl_jax.data.problems import ProblemSet, check_disjoint, hold_out
from espl_jax.types import Problem


def problem_set(*texts: str, name: str = "a set") -> ProblemSet:
    return ProblemSet(tuple(Problem(id=f"{name}-{t}", text=t, answer="1") for t in texts), name)


def test_empty_and_repeated_ids_are_refused():
    with pytest.raises(ValueError, match="some file has no problems"):
        ProblemSet((), "some file")
    with pytest.raises(ValueError, match="'p' occurs twice"):
        ProblemSet((Problem("p", "x", "1"), Problem("p", "y", "2")), "some file")


def test_hold_out_divides_and_keeps_the_order():
    whole = problem_set(*"abcdefghij")
    train, validation = hold_out(whole, 3, seed=5)
    assert (len(train), len(validation)) == (7, 3)
    assert sorted(train.problems + validation.problems, key=whole.problems.index) == list(whole.problems)
    assert list(train.problems) == sorted(train.problems, key=whole.problems.index)
    assert hold_out(whole, 3, seed=5) == (train, validation)
    assert hold_out(whole, 3, seed=6) != (train, validation)
    check_disjoint(train=train, validation=validation)


@pytest.mark.parametrize("count", [0, 2, 3])
def test_hold_out_leaves_something_on_both_sides(count):
    with pytest.raises(ValueError, match=f"count={count} of the 2 problems of a set"):
        hold_out(problem_set("a", "b"), count, seed=0)


def test_disjoint_by_text_and_by_id():
    train = problem_set("What is 1 + 1?", "b", name="train set")
    check_disjoint(train=train, validation=problem_set("c"), test=problem_set("d"))
    with pytest.raises(ValueError, match=r"'other-.*' of test \(other\) has the same text as .* of train"):
        check_disjoint(train=train, test=problem_set("c", "what is  1 + 1?\n", name="other"))
    same_id = ProblemSet((Problem("train set-b", "else", "1"),), "other")
    with pytest.raises(ValueError, match=r"'train set-b' of test .* has the same id"):
        check_disjoint(train=train, validation=problem_set("c"), test=same_id)
