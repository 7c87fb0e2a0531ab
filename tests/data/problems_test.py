import datasets
import numpy as np
import pytest

from espl_jax.data.problems import ProblemSet, check_disjoint, choose, hold_out, join
from espl_jax.types import Problem


def problem_set(*texts: str, name: str = "a set") -> ProblemSet:
    return ProblemSet(tuple(Problem(id=f"{name}-{t}", text=t, answer="1") for t in texts), name)


def test_empty_and_repeated_ids_are_refused():
    with pytest.raises(ValueError, match="some file: no problems"):
        ProblemSet((), "some file")
    with pytest.raises(ValueError, match="repeated id 'p'"):
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
    with pytest.raises(ValueError, match=rf"count={count}: .* of the 2 problems of a set"):
        hold_out(problem_set("a", "b"), count, seed=0)


def test_copies_are_not_torn_apart():
    whole = problem_set("a", "A.", "b", " c", "C", "d")
    for seed in range(20):
        train, validation = hold_out(whole, 2, seed)
        assert {p.text for p in validation.problems} == {"b", "d"}
        check_disjoint(train=train, validation=validation)
    with pytest.raises(
        ValueError, match=r"count=3: .* problems of a set, of which only 2 have a unique statement"
    ):
        hold_out(whole, 3, seed=0)


def test_disjoint_by_text_and_by_id():
    train = problem_set("What is 1 + 1?", "b", name="train set")
    check_disjoint(train=train, validation=problem_set("c"), test=problem_set("d"))
    with pytest.raises(ValueError, match=r"'other-.*' of test \(other\) has the same text as .* of train"):
        check_disjoint(train=train, test=problem_set("c", "what is  1 + 1?\n", name="other"))
    same_id = ProblemSet((Problem("train set-b", "else", "1"),), "other")
    with pytest.raises(ValueError, match=r"'train set-b' of test .* has the same id"):
        check_disjoint(train=train, validation=problem_set("c"), test=same_id)


def test_the_same_problem_set_in_type_differently_is_found():
    one = r"Let $x$ be in $\left(0, \frac{1}{2}\right)$. Find $f'(x)$."
    other = r"let x be in \((0,\dfrac{1}{2})\); find  \(f'(x)\)"
    with pytest.raises(ValueError, match=r"of test .* has the same text as .* of train"):
        check_disjoint(train=problem_set(one), test=problem_set("another", other, name="other"))


def test_a_part_is_chosen_by_shuffling_then_skipping_then_counting():
    whole = problem_set(*"abcdef")
    shuffled = [whole.problems[i] for i in np.random.default_rng(42).permutation(6)]
    assert list(choose(whole, shuffle=42, skip=1, count=3).problems) == shuffled[1:4]
    assert choose(whole) == whole
    assert [p.text for p in choose(whole, skip=4).problems] == ["e", "f"]
    for skip, count in ((6, None), (0, 0), (4, 3)):
        with pytest.raises(ValueError, match=f"skip={skip}.*a set has 6 problems"):
            choose(whole, skip=skip, count=count)


def test_the_permutation_is_the_one_of_datasets():
    texts = [str(i) for i in range(50)]
    rows = datasets.Dataset.from_dict({"text": texts}).shuffle(seed=7)["text"]
    assert [p.text for p in choose(problem_set(*texts), shuffle=7).problems] == list(rows)


def test_joined_sets_keep_their_order_and_make_ids_distinct():
    def numbered(*texts, name):
        return ProblemSet(tuple(Problem(f"train_{i}", t, "1") for i, t in enumerate(texts)), name)

    joined = join([("nq", numbered("a", "b", name="NQ")), ("hotpot", numbered("c", name="HotpotQA"))])
    assert [(p.id, p.text) for p in joined.problems] == [
        ("nq-train_0", "a"),
        ("train_1", "b"),
        ("hotpot-train_0", "c"),
    ]
    assert joined.name == "NQ + HotpotQA"
    with pytest.raises(ValueError, match="'train_0' of two has the same text as 'train_1' of one"):
        join([("one", numbered("a", "b", name="one")), ("two", numbered(" B", name="two"))])
