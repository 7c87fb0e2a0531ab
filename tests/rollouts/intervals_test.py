"""Intervals over problems: worked examples, properties and coverage."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.rollouts import intervals
from espl_jax.rollouts.evaluation import pass_at_k
from espl_jax.rollouts.intervals import interval

TRIES = 1000
"""Simulated evaluations of each kind; a coverage of 0.95 is then known within 0.007 (standard error)."""

# What chance of success problems have: spread evenly, mostly hard, solved or not, all alike, rarely solved.
KINDS = {"even": (1, 1), "hard": (0.1, 2), "either": (0.2, 0.2), "alike": (300, 700), "rare": (0.05, 4.95)}


def coverage(kind, problems, samples, k):
    """Returns the coverage of the interval of pass@k, whose true value is the mean of 1 - (1 - p)^k."""
    a, b = KINDS[kind]
    rng = np.random.default_rng([problems, samples, k, list(KINDS).index(kind)])
    truth = 1 - scipy.special.beta(a, b + k) / scipy.special.beta(a, b)
    values = np.array([pass_at_k(c, samples, k) for c in range(samples + 1)])
    drawn = values[rng.binomial(samples, rng.beta(a, b, (TRIES, problems)))]
    ends = [intervals.of_share(row, problems * samples / k) for row in drawn]
    return np.mean([low <= truth <= high for low, high in ends])


@pytest.mark.parametrize(
    "kind", ["hard", "either", *(pytest.param(x, marks=pytest.mark.slow) for x in ("even", "alike", "rare"))]
)
def test_coverage_of_shares(kind):
    settings = [(b, n, k) for b in (10, 30, 100) for n, k in ((1, 1), (4, 1), (4, 2), (4, 4), (16, 4))]
    found = {each: coverage(kind, *each) for each in settings}
    assert min(found.values()) > 0.89, found
    assert np.mean(list(found.values())) > 0.94, found


def test_the_usual_interval_would_not_hold():
    """Shows why shares need `of_share`: on hard problems, `of_mean` is far too narrow."""
    rng = np.random.default_rng(0)
    drawn = rng.binomial(4, rng.beta(0.1, 2, (TRIES, 30))) / 4
    ends = [intervals.of_mean(row) for row in drawn]
    assert np.mean([low <= 0.1 / 2.1 <= high for low, high in ends]) < 0.9


def test_coverage_of_means_without_bounds():
    rng = np.random.default_rng(0)
    ends = [intervals.of_mean(row) for row in rng.normal(3, 2, (TRIES, 8))]
    assert np.mean([low <= 3 <= high for low, high in ends]) == pytest.approx(0.95, abs=0.02)


def test_mean_by_hand():
    # Student's quantile of three degrees of freedom is 3.18245; the deviation of 1, 2, 3, 6 is 2.16025.
    half = 3.182446 * 2.160247 / 2
    assert intervals.of_mean(np.array([1, 2, 3, 6])) == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert intervals.of_mean(np.array([4.0])) is None


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_zeros_and_ones_have_wilsons_interval(values):
    assert intervals.of_share(np.array(values), 7 * len(values)) == interval(sum(values), len(values))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(1, 16))
def test_shares_stay_in_bounds_around_their_mean(values, trials):
    low, high = intervals.of_share(np.array(values), trials * len(values))
    mean = np.mean(values)
    assert 0 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= 1
    if len(values) > 1 and len(set(values)) > 1:
        assert low < high


def test_more_samples_of_the_same_problems_never_count_as_more_problems():
    """Problems that are solved always or never: their samples add nothing."""
    solved = np.array([0.999, 0.001] * 20)
    few, many = intervals.of_share(solved, 40 * 4), intervals.of_share(solved, 40 * 400)
    assert few == many
    assert few == pytest.approx(interval(20, 40), abs=0.02)


def test_alike_problems_count_by_their_samples_at_most():
    alike = np.full(10, 0.5)
    low, high = intervals.of_share(alike, 40)
    t = scipy.stats.t.ppf(0.975, 9)
    assert (low, high) == pytest.approx(interval(20, 40, t))
    assert high - low < np.ptp(interval(5, 10))


@pytest.mark.parametrize("values", [(1, 1, 1 - 1e-14), (0, 1e-14, 0), (1e-200, 0), (1 - 1e-16, 1, 1, 1)])
def test_values_that_are_alike_but_for_rounding(values):
    """The effective number of trials is that of equal problems: the number of samples."""
    worth = 4 * len(values)
    expected = interval(round(values[0]) * worth, worth, scipy.stats.t.ppf(0.975, len(values) - 1))
    assert intervals.of_share(np.array(values), worth) == pytest.approx(expected, abs=1e-12)


def test_what_is_not_a_share_is_refused():
    with pytest.raises(ValueError, match=r"values from -1 to 2: shares must be between 0 and 1"):
        intervals.of_share(np.array([2, -1]), 2)


def crossed(seeds, problems, sd, rng):
    """Success of two methods, float [2, S, B], whose chances vary between seeds and between problems."""
    logits = rng.normal(0, 1, problems) + rng.normal(0, sd, (2, seeds, 1))
    return (rng.random((2, seeds, problems)) < scipy.special.expit(logits)).astype(float)


@pytest.mark.parametrize(("seeds", "sd"), [(3, 1.5), (5, 0), (5, 0.5), (10, 1.5)])
def test_coverage_over_seeds_and_problems(seeds, sd):
    rng = np.random.default_rng(seeds)
    differences, shares = [], []
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    truth = weights @ scipy.special.expit(np.sqrt(1 + sd**2) * nodes) / weights.sum()
    for _ in range(500):
        one, other = crossed(seeds, 50, sd, rng)
        low, high = intervals.of_mean(one - other)
        differences.append(low <= 0 <= high)
        low, high = intervals.of_share(one, one.size)
        shares.append(low <= truth <= high)
    assert np.mean(differences) > 0.92 and np.mean(shares) > 0.91


def test_mean_over_seeds_and_problems_by_hand():
    """Seeds have means 1 and 3, problems 1, 2 and 3, and nothing is left for single values."""
    values = np.array([[0.0, 1, 2], [2, 3, 4]])
    seeds, problems = 2 / 2, 1 / 3
    freedom = (seeds + problems) ** 2 / (seeds**2 / 1 + problems**2 / 2)
    half = scipy.stats.t.ppf(0.975, freedom) * (seeds + problems) ** 0.5
    assert intervals.of_mean(values) == pytest.approx((2 - half, 2 + half))


def test_one_seed_is_an_interval_over_problems():
    values = np.array([0.25, 0.5, 1, 0])
    assert intervals.of_mean(values[None]) == intervals.of_mean(values)
    assert intervals.of_share(values[None], 16) == intervals.of_share(values, 16)
    assert intervals.of_share(values[:, None], 16) == intervals.of_share(values, 16)


def test_seeds_that_agree_on_all_are_worth_one():
    assert intervals.of_share(np.zeros((3, 50)), 150) == interval(0, 50)


def test_paired_differences_know_that_problems_are_the_same():
    """Methods that differ on one problem in ten differ for certain, however hard the others are."""
    rates = np.tile(np.arange(200) % 2, (3, 1)).astype(float)
    better = rates.copy()
    better[:, ::10] = 1
    low, high = intervals.of_mean(better - rates)
    assert 0.05 < low < 0.1 < high < 0.15
    assert intervals.difference(better - rates) == f"+10.0 points [{100 * low:+.1f}, {100 * high:+.1f}]"


def test_differences_stay_within_what_success_rates_can_differ():
    found = intervals.difference(np.array([[1.0, 1, 1, 0.8], [1, 1, 1, 1]]))
    assert found.startswith("+97.5 points [") and found.endswith(", +100.0]")
