"""Ratings of system prompts: an iteration is one free-for-all game (Zhang et al. 2026, section 3).

By TrueSkill as in the paper (Herbrich, Minka and Graepel, "TrueSkill: a Bayesian skill rating system", 2006),
or by OpenSkill's Plackett-Luce model (Weng and Lin, "A Bayesian approximation method for online ranking",
JMLR 2011), which no patent covers. Both have mu 25 and sigma 25/3 at first, beta 25/6, and tau 25/300, which
is added to the players' uncertainty before the update, to theirs alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import trueskill
from openskill.models import PlackettLuce

from espl_jax.evolution.population import Population
from espl_jax.types import SystemPrompt

Rating = tuple[float, float]
"""(mu, sigma)."""

FIRST: Rating = (25.0, 25 / 3)
_BETA, _TAU = 25 / 6, 25 / 300
_TRUESKILL = trueskill.TrueSkill(*FIRST, beta=_BETA, tau=_TAU, draw_probability=0.10)
_OPENSKILL = PlackettLuce(*FIRST, beta=_BETA, tau=_TAU)

# 0.61 - 0.60 is a little more than 0.01 in binary.
_ROUNDING = 1e-9


def exceeds(value: float, other: float, margin: float) -> bool:
    """Whether `value` is above `other` by more than `margin`, rounding errors aside."""
    return value - other > margin + _ROUNDING


def ranking(
    member_ids: Sequence[str], values: Sequence[float], tie_margin: float = 0.01
) -> tuple[tuple[str, ...], ...]:
    """Ranks members by value: groups of tied ids, best group first.

    Neighbouring values that differ by at most `tie_margin` tie, and ties chain. Within a group the order is
    that of `member_ids`, so that `ranking(...)[0][0]` is *the* best prompt, ties for the first place broken
    by selection order. An id given more than once (copies of a prompt in several slots) counts once, with
    the mean of its values.

    Args:
      member_ids: ids in order of selection, [M].
      values: mean reward of each over the whole batch, [M].
      tie_margin: in units of reward.

    Raises:
      ValueError: the lengths differ, or a value is not finite.
    """
    means = _means(member_ids, values)
    groups: list[list[str]] = []
    for member_id in sorted(means, key=means.__getitem__, reverse=True):
        if groups and not exceeds(means[groups[-1][-1]], means[member_id], tie_margin):
            groups[-1].append(member_id)
        else:
            groups.append([member_id])
    selected = list(means)
    return tuple(tuple(sorted(group, key=selected.index)) for group in groups)


def _means(member_ids: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Mean value of each id, in order of selection. Raises ValueError as `ranking` does."""
    if len(member_ids) != len(values):
        raise ValueError(f"{len(member_ids)} member_ids but {len(values)} values: give one value for each")
    pooled: dict[str, list[float]] = {}
    for member_id, value in zip(member_ids, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"the value of {member_id!r} is {value}: it must be finite")
        pooled.setdefault(member_id, []).append(float(value))
    return {member_id: float(np.mean(numbers)) for member_id, numbers in pooled.items()}


def trueskill_game(ratings: Sequence[Rating], ranks: Sequence[int]) -> list[Rating]:
    """TrueSkill's ratings after a game, draw probability 0.10. Equal ranks are draws."""
    after = _TRUESKILL.rate([(_TRUESKILL.create_rating(*rating),) for rating in ratings], ranks=list(ranks))
    return [(rating.mu, rating.sigma) for (rating,) in after]


def openskill_game(ratings: Sequence[Rating], ranks: Sequence[int]) -> list[Rating]:
    """OpenSkill's ratings after a game, Plackett-Luce. Equal ranks are draws."""
    teams = [[_OPENSKILL.rating(mu=mu, sigma=sigma)] for mu, sigma in ratings]
    after = _OPENSKILL.rate(teams, ranks=[float(rank) for rank in ranks])
    return [(rating.mu, rating.sigma) for (rating,) in after]


SYSTEMS = {"trueskill": trueskill_game, "openskill": openskill_game}


def rate(
    population: Population,
    member_ids: Sequence[str],
    values: Sequence[float],
    tie_margin: float = 0.01,
    system: str = "trueskill",
    iteration: int = 0,
) -> Population:
    """One game among the prompts of an iteration.

    Args:
      population: the living members, among them all of `member_ids`.
      member_ids, values, tie_margin: as in `ranking`.
      system: a name in `SYSTEMS`.
      iteration: recorded in the players' `tournaments`.

    Returns:
      The population with the players' new ratings; unchanged with fewer than two distinct players.

    Raises:
      KeyError: an id that is not alive. ValueError: an unknown system, or as in `ranking`.
    """
    means = _means(member_ids, values)
    before = {
        member_id: (population.get(member_id).mu, population.get(member_id).sigma) for member_id in means
    }
    ranks, after = game(before, member_ids, values, tie_margin, system)
    if not after:
        return population
    rated = []
    for member_id, (mu, sigma) in after.items():
        player = population.get(member_id)
        result = {"iteration": iteration, "value": means[member_id], "rank": ranks[member_id]}
        result |= {"players": len(after), "mu": mu, "sigma": sigma}
        rated.append(
            dataclasses.replace(player, mu=mu, sigma=sigma, tournaments=(*player.tournaments, result))
        )
    return population.replace(rated)


def game(
    ratings: Mapping[str, Rating],
    member_ids: Sequence[str],
    values: Sequence[float],
    tie_margin: float = 0.01,
    system: str = "trueskill",
) -> tuple[dict[str, int], dict[str, Rating]]:
    """Ranks (from 0) and ratings after a game of the distinct `member_ids`; none for fewer than two.

    Raises:
      ValueError: an unknown system, or as in `ranking`.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system={system!r} is unknown: choose one of {sorted(SYSTEMS)}")
    groups = ranking(member_ids, values, tie_margin)
    ranks = {member_id: rank for rank, group in enumerate(groups) for member_id in group}
    if len(ranks) < 2:
        return {}, {}
    after = SYSTEMS[system]([ratings[member_id] for member_id in ranks], list(ranks.values()))
    return ranks, dict(zip(ranks, after, strict=True))


def inflate(population: Population, drift_sigma: float) -> Population:
    """Every member less certain by `drift_sigma`, since the weights that it was rated under have moved.

    sigma' = sqrt(sigma^2 + drift_sigma^2), at most the 25/3 of a prompt that nobody has seen.
    """
    return population.with_ratings(
        {member.id: (member.mu, drifted(member.sigma, drift_sigma)) for member in population.members}
    )


def drifted(sigma: float, drift_sigma: float) -> float:
    """One member's sigma after `inflate`."""
    return max(sigma, min(math.hypot(sigma, drift_sigma), FIRST[1])) if drift_sigma else sigma


def mutation_rating(parent: SystemPrompt, mutation_sigma: float = 1.0) -> tuple[float, float]:
    """A mutated child's (mu, sigma): mu of the parent, sigma' = sqrt(sigma^2 + mutation_sigma^2)."""
    return parent.mu, math.hypot(parent.sigma, mutation_sigma)


def crossover_rating(parents: Sequence[SystemPrompt], crossover_sigma: float = 1.0) -> tuple[float, float]:
    """A crossover child's (mu, sigma), weighted by precision.

    mu' = sum(mu / sigma^2) / sum(1 / sigma^2), sigma' = sqrt(1 / sum(1 / sigma^2) + crossover_sigma^2).
    """
    precision = sum(parent.sigma**-2 for parent in parents)
    mu = sum(parent.mu * parent.sigma**-2 for parent in parents) / precision
    return mu, math.sqrt(1 / precision + crossover_sigma**2)
