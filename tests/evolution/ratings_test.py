"""TrueSkill updates and children's ratings against hand values and published ones."""

import itertools
import math
import statistics

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from trueskillthroughtime import Game, Gaussian, Player

from espl_jax.evolution.population import start
from espl_jax.evolution.ratings import (
    SYSTEMS,
    crossover_rating,
    inflate,
    mutation_rating,
    ranking,
    rate,
    trueskill_game,
)
from espl_jax.types import SystemPrompt


def population_of(count):
    return start([SystemPrompt(text=f"prompt {i}") for i in range(count)], max_size=count)


def ratings_of(population):
    return [(member.mu, member.sigma) for member in population.members]


def test_three_fresh_players_without_ties():
    population = rate(population_of(3), ["p0", "p1", "p2"], [0.9, 0.5, 0.1])
    expected = [(31.675, 6.656), (25.000, 6.208), (18.325, 6.656)]
    for (mu, sigma), (want_mu, want_sigma) in zip(ratings_of(population), expected, strict=True):
        assert mu == pytest.approx(want_mu, abs=5e-4)
        assert sigma == pytest.approx(want_sigma, abs=5e-4)


def two_player_win(mu, sigma):
    """The closed form for two equal players, win and no draw: Herbrich et al. 2006."""
    beta, tau, draw = 25 / 6, 25 / 300, 0.10
    variance = sigma**2 + tau**2
    c = math.sqrt(2 * beta**2 + 2 * variance)
    low, high = 0.0, 10.0
    while high - low > 1e-14:  # the normal quantile of (draw + 1) / 2, by bisection
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) < draw else (low, middle)
    margin = low * math.sqrt(2) * beta / c
    density = math.exp(-(margin**2) / 2) / math.sqrt(2 * math.pi)
    v = density / (0.5 * math.erfc(margin / math.sqrt(2)))
    w = v * (v - margin)
    return mu + variance / c * v, mu - variance / c * v, math.sqrt(variance * (1 - variance / c**2 * w))


def test_two_players_match_the_closed_form():
    population = rate(population_of(2), ["p1", "p0"], [0.2, 0.6])
    up, down, sigma = two_player_win(25.0, 25 / 3)
    assert ratings_of(population) == [pytest.approx((up, sigma)), pytest.approx((down, sigma))]


def test_two_players_that_tie_match_the_closed_form():
    """A draw between equals: v = 0, and w from the mass of the margin around zero."""
    beta, tau, sigma = 25 / 6, 25 / 300, 25 / 3
    variance = sigma**2 + tau**2
    c = math.sqrt(2 * beta**2 + 2 * variance)
    normal = statistics.NormalDist()
    margin = normal.inv_cdf(0.55) * math.sqrt(2) * beta / c
    w = 2 * margin * normal.pdf(margin) / (normal.cdf(margin) - normal.cdf(-margin))
    population = rate(population_of(2), ["p0", "p1"], [0.5, 0.5])
    want = (25.0, math.sqrt(variance * (1 - variance / c**2 * w)))
    assert ratings_of(population) == [pytest.approx(want, abs=1e-4)] * 2


def test_two_hundred_tournaments_match_an_independent_implementation():
    """TrueSkill Through Time (Landfried and Mocskos 2025) has the same model of one game."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(200):
        count = int(rng.integers(2, 7))
        ratings = [(float(rng.uniform(15, 35)), float(rng.uniform(1, 25 / 3))) for _ in range(count)]
        # The best first: for other orders the package hands some posteriors to the wrong players.
        ranks = sorted(rng.integers(0, max(2, count - 1), count).tolist())
        players = [
            [Player(Gaussian(mu, math.hypot(sigma, 25 / 300)), beta=25 / 6, gamma=0.0)]
            for mu, sigma in ratings
        ]
        theirs = Game(players, [-rank for rank in ranks], p_draw=0.10).posteriors()
        for (mu, sigma), ((other,),) in zip(
            trueskill_game(ratings, ranks), zip(theirs, strict=True), strict=True
        ):
            worst = max(worst, abs(mu - other.mu), abs(sigma - other.sigma))
        if len(set(ranks)) == count:  # whatever the order of the players
            order = rng.permutation(count)
            shuffled = trueskill_game([ratings[i] for i in order], [ranks[i] for i in order])
            assert shuffled == [pytest.approx(trueskill_game(ratings, ranks)[i]) for i in order]
    print(f"largest difference of a mu or sigma: {worst:.1e}")
    assert worst < 1e-3


def test_openskill_by_hand():
    """Weng and Lin 2011, algorithm 4, for two fresh players: every sum of strengths has two members."""
    sigma, beta, tau = 25 / 3, 25 / 6, 25 / 300
    variance = sigma**2 + tau**2
    c = math.sqrt(2 * (variance + beta**2))
    omega, delta = variance / c * 0.5, (math.sqrt(variance) / c) * variance / c**2 * 0.25
    population = rate(population_of(2), ["p0", "p1"], [0.9, 0.1], system="openskill")
    low = math.sqrt(variance * (1 - delta))
    assert ratings_of(population) == [
        pytest.approx((25 + omega, low)),
        pytest.approx((25 - omega, low)),
    ]


@pytest.mark.parametrize("system", SYSTEMS)
def test_both_systems_behave_alike(system):
    better = rate(population_of(3), ["p2", "p0", "p1"], [0.9, 0.5, 0.5], system=system)
    # TrueSkill compares neighbours in a chain, so that two who tie are not quite alike in it.
    assert better.get("p2").mu > 25 > better.get("p0").mu == pytest.approx(better.get("p1").mu, abs=0.01)
    assert all(member.sigma < 25 / 3 for member in better.members)


def test_drift_makes_everybody_less_certain():
    population = population_of(3).with_ratings({"p0": (30.0, 3.0), "p1": (20.0, 8.3)})
    after = inflate(population, 4.0)
    assert ratings_of(after) == [(30.0, 5.0), (20.0, 25 / 3), (25.0, 25 / 3)]
    assert inflate(population, 0.0) == population


def test_only_players_change():
    before = population_of(4)
    after = rate(before, ["p3", "p1"], [0.0, 1.0])
    assert after.get("p0") == before.get("p0")
    assert after.get("p2") == before.get("p2")
    assert after.get("p1").mu > 25 > after.get("p3").mu
    assert [len(member.tournaments) for member in after.members] == [0, 1, 0, 1]


def test_ties_within_the_margin_are_draws():
    tied = rate(population_of(2), ["p0", "p1"], [0.61, 0.60])  # 0.61 - 0.60 > 0.01 in binary
    assert tied.get("p0").mu == pytest.approx(tied.get("p1").mu)
    apart = rate(population_of(2), ["p0", "p1"], [0.62, 0.60])
    assert apart.get("p0").mu > apart.get("p1").mu + 1


def test_fewer_than_two_distinct_members_change_nothing():
    population = population_of(2)
    assert rate(population, ["p1", "p1"], [1.0, 0.0]) is population
    assert rate(population, [], []) is population


def test_copies_are_pooled():
    population = population_of(2)
    pooled = rate(population, ["p0", "p1", "p1"], [0.5, 0.0, 0.8])
    assert pooled == rate(population, ["p0", "p1"], [0.5, 0.4])


def test_rate_names_what_is_wrong():
    with pytest.raises(KeyError, match="p7"):
        rate(population_of(2), ["p0", "p7"], [0.0, 1.0])
    with pytest.raises(ValueError, match="'p1' is nan"):
        rate(population_of(2), ["p0", "p1"], [0.0, float("nan")])
    with pytest.raises(ValueError, match=r"system='elo' is unknown: choose one of .*openskill"):
        rate(population_of(2), ["p0", "p1"], [0.0, 1.0], system="elo")
    with pytest.raises(ValueError, match="one value for each"):
        rate(population_of(2), ["p0", "p1"], [0.0])


def test_ranking_chains_ties_and_breaks_them_by_selection_order():
    groups = ranking(["a", "b", "c", "d"], [0.500, 0.508, 0.516, 0.600])
    assert groups == (("d",), ("a", "b", "c"))  # a and c differ by 0.016, chained through b
    assert ranking(["z", "a"], [0.7, 0.7]) == (("z", "a"),)
    assert ranking(["a", "b"], [0.3, 0.305])[0][0] == "a"


@hypothesis.given(st.lists(st.sampled_from([0.0, 0.1, 0.105, 0.4, 0.9]), min_size=1, max_size=6))
def test_ranking_is_an_ordered_partition(values):
    ids = [f"p{i}" for i in range(len(values))]
    groups = ranking(ids, values)
    assert sorted(member for group in groups for member in group) == sorted(ids)
    for better, worse in itertools.pairwise(groups):
        assert min(values[ids.index(i)] for i in better) > max(values[ids.index(i)] for i in worse) + 0.01


def test_mutation_rating_by_hand():
    assert mutation_rating(SystemPrompt(mu=31.0, sigma=4.0), 3.0) == (31.0, 5.0)


def test_crossover_rating_by_hand():
    parents = [SystemPrompt(mu=30.0, sigma=2.0), SystemPrompt(mu=20.0, sigma=4.0)]
    # Weights 1/4 and 1/16: mu = (7.5 + 1.25) / 0.3125 = 28, variance = 3.2, and 1 for the child.
    mu, sigma = crossover_rating(parents, 1.0)
    assert mu == pytest.approx(28.0)
    assert sigma == pytest.approx(math.sqrt(4.2))
