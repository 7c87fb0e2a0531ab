"""Mean reward, accuracy with its interval, and unbiased pass@k."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.rollouts.evaluation import Evaluation, pass_at_k, summarize
from espl_jax.rollouts.intervals import interval
from espl_jax.types import Rollouts


def graded(success, rewards=None):
    """Rollouts [M, B, N] of which only the grades matter."""
    success = np.array(success, bool)
    rewards = np.array(success if rewards is None else rewards, np.float32)
    fields = {field.name: None for field in dataclasses.fields(Rollouts)}
    return Rollouts(**{**fields, "rewards": rewards, "success": success})


@pytest.mark.parametrize(
    ("successes", "samples", "k", "expected"),
    [
        (0, 5, 3, 0.0),
        (5, 5, 1, 1.0),
        (1, 4, 1, 0.25),
        (1, 4, 2, 0.5),
        (2, 4, 2, 5 / 6),
        (2, 4, 3, 1.0),
        (3, 10, 4, 5 / 6),
    ],
)
def test_pass_at_k_by_hand(successes, samples, k, expected):
    assert pass_at_k(successes, samples, k) == pytest.approx(expected)


@given(st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_success(data):
    samples = data.draw(st.integers(1, 8))
    successes, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    drawn = [i < successes for i in range(samples)]
    subsets = list(itertools.combinations(drawn, k))
    assert pass_at_k(successes, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("successes", "samples", "k"), [(0, 3, 0), (0, 3, 4), (4, 3, 1), (-1, 3, 1)])
def test_pass_at_k_refuses_the_impossible(successes, samples, k):
    with pytest.raises(ValueError, match=f"k={k}, samples={samples}, successes={successes}"):
        pass_at_k(successes, samples, k)


def test_summary_by_hand():
    success = [[[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1]] * 3]
    rewards = [[[2, 2, 0, 0], [0.5, 0, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1]] * 3]
    first, second = summarize(graded(success, rewards))
    assert first.accuracy == pytest.approx(0.25) and first.reward == pytest.approx(5.5 / 12)
    assert first.pass_at == pytest.approx({"1": 0.25, "2": (5 / 6 + 0 + 0.5) / 3, "4": 2 / 3})
    # Means of the problems 0.5, 0, 0.25: variance 1 / 16, so that three problems are worth
    # 3 * 0.25 * 0.75 / (1 / 16) = 9 trials; Student's quantile of two degrees of freedom is 4.30265.
    nine_trials = interval(0.25 * 9, 9, 4.302653)
    assert (first.low, first.high) == pytest.approx(nine_trials, abs=1e-6)
    assert first.pass_at_interval["1"] == (first.low, first.high)
    # With as many draws as samples each problem counts once: two of three.
    assert first.pass_at_interval["4"] == interval(2, 3)
    # Rewards above 1 have no bounds: Student's interval of the means 1, 0.125 and 0.25.
    half = 4.302653 * np.std([1, 0.125, 0.25], ddof=1) / math.sqrt(3)
    assert first.reward_interval == pytest.approx((first.reward - half, first.reward + half), abs=1e-6)
    # All problems alike say nothing of their spread: as if each had been tried once.
    assert (second.accuracy, second.low, second.high) == (1.0, *interval(3, 3))
    assert second.reward_interval == interval(3, 3)
    assert (first.num_problems, first.num_samples) == (3, 4)


def test_one_sample_a_problem_has_wilsons_interval():
    (one,) = summarize(graded([[[1], [0], [1], [1], [0]]]))
    assert (one.low, one.high) == one.reward_interval == interval(3, 5)
    assert one.pass_at == {"1": pytest.approx(0.6)}
    assert str(one) == f"60.0% [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def test_many_samples_of_one_problem_are_one_problem():
    (one,) = summarize(graded([[[1, 0, 0]]]))
    assert (one.low, one.high) == pytest.approx(interval(1 / 3, 1))
    assert list(one.pass_at) == ["1", "2"]
    (odd,) = summarize(graded([[[1, 0, 0]]], [[[3, 0, 0]]]))
    assert odd.reward_interval is None


def test_it_survives_json():
    (one,) = summarize(graded([[[1, 0], [0, 0]]]))
    read = Evaluation(**json.loads(json.dumps(dataclasses.asdict(one))))
    assert str(read) == str(one) and list(read.pass_at) == ["1", "2"]


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=6)
    )
)
def test_summary_holds_together(success):
    (one,) = summarize(graded([success]))
    assert 0 <= one.low <= one.accuracy + 1e-12 and one.accuracy - 1e-12 <= one.high <= 1
    assert one.pass_at["1"] == pytest.approx(one.accuracy)
    values = list(one.pass_at.values())
    assert values == sorted(values)
    for k, (low, high) in one.pass_at_interval.items():
        assert 0 <= low <= one.pass_at[k] + 1e-12 and one.pass_at[k] - 1e-12 <= high <= 1
