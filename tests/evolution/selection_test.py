"""Selection frequencies against exact probabilities; the newest member; padding."""

import collections
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from espl_jax.evolution.population import start
from espl_jax.evolution.selection import deployed, select, softmax, uniform
from espl_jax.types import SystemPrompt


def population_of(*mus, sigma=1.0):
    roots = [SystemPrompt(text=f"prompt {i}", mu=mu, sigma=sigma) for i, mu in enumerate(mus)]
    return start(roots, max_size=len(mus))


def ids(members):
    return tuple(member.id for member in members)


def fits(counts, probabilities, draws):
    """Whether a chi-square test does not reject the probabilities."""
    assert sum(probabilities.values()) == pytest.approx(1)
    observed = [counts[outcome] for outcome in probabilities]
    expected = [draws * p for p in probabilities.values()]
    return sum(observed) == draws and scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def sequential(weights, count):
    """Exact probabilities of every ordered draw without replacement."""
    result = {}
    for order in itertools.permutations(range(len(weights)), count):
        left, p = sum(weights), 1.0
        for i in order:
            p, left = p * weights[i] / left, left - weights[i]
        result[tuple(f"p{i}" for i in order)] = p
    return result


@pytest.mark.parametrize("temperature", [0.7, None])
def test_softmax_follows_the_sequential_law(temperature):
    members = population_of(0.1, 0.9, 0.4, 1.6).members
    scores = [member.mu + 1.5 * member.sigma for member in members]
    scale = max(1.0, *scores) if temperature is None else temperature
    rng, draws = np.random.default_rng(0), 6000
    counts = collections.Counter(
        ids(softmax(members, 2, rng, optimism=1.5, temperature=temperature)) for _ in range(draws)
    )
    assert fits(counts, sequential([math.exp(score / scale) for score in scores], 2), draws)


def test_uniform_gives_every_order_the_same_chance():
    rng, draws = np.random.default_rng(1), 6000
    members = population_of(0.0, 50.0, 100.0).members
    counts = collections.Counter(ids(uniform(members, 2, rng)) for _ in range(draws))
    assert fits(counts, sequential([1.0] * 3, 2), draws)


def test_selection_of_one_is_always_the_newest():
    rng = np.random.default_rng(2)
    for strategy in ("softmax", "uniform"):
        for _ in range(20):
            assert ids(select(population_of(9.0, 5.0, 1.0), 1, strategy, rng)) == ("p2",)


def test_the_newest_replaces_the_weakest_chosen():
    # At this temperature the order of scores decides: p0 and p1 are drawn, and p1 gives way to p3.
    population = population_of(40.0, 30.0, 20.0, 10.0)
    chosen = select(population, 2, "softmax", np.random.default_rng(3), temperature=1e-3)
    assert ids(chosen) == ("p0", "p3")


def test_frequencies_with_the_newest_forced_in():
    # Two of three, uniformly: {0,1} becomes {0,2} as p1 is the weaker, so p0 is in with 1/3 + 1/3.
    population = population_of(9.0, 1.0, 5.0)
    rng, draws = np.random.default_rng(4), 3000
    counts = collections.Counter(frozenset(ids(select(population, 2, "uniform", rng))) for _ in range(draws))
    assert fits(counts, {frozenset({"p0", "p2"}): 2 / 3, frozenset({"p1", "p2"}): 1 / 3}, draws)


def test_too_few_candidates_are_padded_with_copies_of_the_newest():
    chosen = select(population_of(1.0, 2.0), 5, "uniform", np.random.default_rng(5))
    assert sorted(ids(chosen)[:2]) == ["p0", "p1"]
    assert ids(chosen)[2:] == ("p1",) * 3


def test_only_the_window_can_be_chosen():
    population = population_of(99.0, 1.0, 2.0, 3.0)
    chosen = select(population, 3, "softmax", np.random.default_rng(6), window=2, temperature=0.01)
    assert ids(chosen) == ("p3", "p2", "p3")


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_scores_are_safe(temperature):
    population = population_of(1e8, -1e8, 0.0)
    with np.errstate(all="raise", under="ignore"):
        chosen = select(population, 2, "softmax", np.random.default_rng(7), temperature=temperature)
    assert len(set(ids(chosen))) == 2


def test_the_same_generator_gives_the_same_selection():
    population = population_of(1.0, 2.0, 3.0, 4.0, 5.0)
    for strategy in ("softmax", "uniform"):
        first, second = (select(population, 3, strategy, np.random.default_rng(8)) for _ in range(2))
        assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "greedy"}, "greedy.*softmax"),
        ({"count": 0}, "count=0"),
        ({"window": 0}, "window=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_select_names_what_is_wrong(arguments, message):
    settings = {"count": 1, "strategy": "softmax", "rng": np.random.default_rng(9), **arguments}
    with pytest.raises(ValueError, match=message):
        select(population_of(1.0), **settings)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # p2 was never rated, so that nothing is known of it; mu - 2 sigma is 19 for p0 and 24 for p1.
        ("espl", "p1"),
        ("evolution", "p1"),
        # Only the root was played.
        ("rl", "p0"),
        # Nobody is rated, and the newest has taken the place of the others.
        ("reflection", "p2"),
    ],
)
def test_deployed(mode, expected):
    population = population_of(25, 25, 25).with_ratings({"p0": (25.0, 3.0), "p1": (28.0, 2.0)})
    assert deployed(population, mode).id == expected
