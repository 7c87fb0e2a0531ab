"""Selection frequencies against exact probabilities; the newest member; padding."""

import collections
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from espl_jax.evolution.population import start
from espl_jax.evolution.selection import STRATEGIES, lucb, select, softmax, ucb, uniform
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
    rng, draws = np.random.default_rng(0), 20_000
    counts = collections.Counter(
        ids(softmax(members, 2, rng, optimism=1.5, temperature=temperature)) for _ in range(draws)
    )
    assert fits(counts, sequential([math.exp(score / scale) for score in scores], 2), draws)


def test_uniform_gives_every_order_the_same_chance():
    rng, draws = np.random.default_rng(1), 20_000
    members = population_of(0.0, 50.0, 100.0).members
    counts = collections.Counter(ids(uniform(members, 2, rng)) for _ in range(draws))
    assert fits(counts, sequential([1.0] * 3, 2), draws)


def rated_population(*ratings):
    """Members of these (mu, sigma)."""
    roots = [SystemPrompt(text=f"prompt {i}", mu=mu, sigma=sigma) for i, (mu, sigma) in enumerate(ratings)]
    return start(roots, max_size=len(ratings))


RATINGS = ((30.0, 1.0), (20.0, 8.0), (28.0, 3.0), (10.0, 2.0), (29.0, 2.5))
"""Scores mu + 2 sigma: 32, 36, 34, 14, 34; lower bounds mu - 2 sigma: 28, 4, 22, 6, 24."""


def test_ucb_takes_the_highest_scores():
    members = rated_population(*RATINGS).members
    assert ids(ucb(members, 3, None, optimism=2.0)) == ("p1", "p2", "p4")  # of equals the older first
    assert ids(ucb(members, 1, None, optimism=0.0)) == ("p0",)


def test_lucb_takes_the_champion_and_then_challengers():
    members = rated_population(*RATINGS).members
    assert ids(lucb(members, 1, None, optimism=2.0)) == ("p0",)
    assert ids(lucb(members, 3, None, optimism=2.0)) == ("p0", "p1", "p2")
    assert ids(lucb(members, 9, None, optimism=2.0)) == ("p0", "p1", "p2", "p4", "p3")


def test_the_champion_of_lucb_stays_where_the_newest_comes_in():
    population = rated_population((30.0, 0.1), (20.0, 8.0), (28.0, 3.0), (1.0, 1.0))
    rng = np.random.default_rng(0)
    # The champion's score, 30.2, is the lowest of the three chosen; the weaker challenger gives way.
    assert ids(select(population, 3, "lucb", rng)) == ("p0", "p1", "p3")
    assert ids(select(population, 3, "ucb", rng)) == ("p1", "p2", "p3")
    assert ids(select(population, 1, "lucb", rng)) == ("p3",)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_newest_is_always_there_and_nobody_twice(strategy, count):
    population, rng = rated_population(*RATINGS, (0.0, 0.5)), np.random.default_rng(2)
    for _ in range(200):
        chosen = ids(select(population, count, strategy, rng, temperature=5.0))
        assert "p5" in chosen and len(set(chosen)) == count


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fewer_candidates_than_slots_are_padded_with_the_newest(strategy):
    chosen = ids(select(rated_population(*RATINGS), 7, strategy, np.random.default_rng(5), window=3))
    assert sorted(chosen[:3]) == ["p2", "p3", "p4"]
    assert chosen[3:] == ("p4",) * 4


def test_frequencies_of_softmax_with_the_newest_forced_in():
    """Exact probabilities of the sets of two of four after the exchange, by enumeration."""
    population, temperature = population_of(3.0, 1.0, 2.0, 0.0), 1.5
    scores = [member.mu + 2 * member.sigma for member in population.members]
    exact = collections.Counter()
    for order, p in sequential([math.exp(score / temperature) for score in scores], 2).items():
        chosen = list(order)
        if "p3" not in chosen:
            chosen[max((0, 1), key=lambda i: (-scores[int(chosen[i][1])], i))] = "p3"
        exact[frozenset(chosen)] += p
    rng, draws = np.random.default_rng(10), 20_000
    counts = collections.Counter(
        frozenset(ids(select(population, 2, "softmax", rng, temperature=temperature))) for _ in range(draws)
    )
    assert fits(counts, exact, draws)


def test_selection_of_one_is_always_the_newest():
    rng = np.random.default_rng(2)
    for strategy in STRATEGIES:
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
    rng, draws = np.random.default_rng(4), 20_000
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
