"""TrueSkill ratings of system prompts: an iteration is one free-for-all game (Zhang et al. 2026, section 3).

Herbrich, Minka and Graepel, "TrueSkill: a Bayesian skill rating system", 2006.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import trueskill

from espl_jax.evolution.population import Population
from espl_jax.types import SystemPrompt

_TRUESKILL = trueskill.TrueSkill(mu=25.0, sigma=25 / 3, beta=25 / 6, tau=25 / 300, draw_probability=0.10)

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
    if len(member_ids) != len(values):
        raise ValueError(f"{len(member_ids)} member_ids but {len(values)} values: give one value for each")
    pooled: dict[str, list[float]] = {}
    for member_id, value in zip(member_ids, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"the value of {member_id!r} is {value}: it must be finite")
        pooled.setdefault(member_id, []).append(float(value))
    means = {member_id: float(np.mean(numbers)) for member_id, numbers in pooled.items()}

    groups: list[list[str]] = []
    for member_id in sorted(means, key=means.__getitem__, reverse=True):
        if groups and not exceeds(means[groups[-1][-1]], means[member_id], tie_margin):
            groups[-1].append(member_id)
        else:
            groups.append([member_id])
    selected = list(means)
    return tuple(tuple(sorted(group, key=selected.index)) for group in groups)


def rate(
    population: Population, member_ids: Sequence[str], values: Sequence[float], tie_margin: float = 0.01
) -> Population:
    """One TrueSkill game among the prompts of an iteration.

    mu 25 and sigma 25/3 at first, beta 25/6, tau 25/300 (added to the players' uncertainty before the update,
    to theirs alone), draw probability 0.10.

    Args:
      population: the living members, among them all of `member_ids`.
      member_ids, values, tie_margin: as in `ranking`.

    Returns:
      The population with the players' new ratings; unchanged with fewer than two distinct players.

    Raises:
      KeyError: an id that is not alive. ValueError: as in `ranking`.
    """
    groups = ranking(member_ids, values, tie_margin)
    ranks = {member_id: rank for rank, group in enumerate(groups) for member_id in group}
    players = [population.get(member_id) for member_id in ranks]
    if len(players) < 2:
        return population
    games = [(trueskill.Rating(player.mu, player.sigma),) for player in players]
    after = _TRUESKILL.rate(games, ranks=[ranks[player.id] for player in players])
    return population.with_ratings(
        {player.id: (rating.mu, rating.sigma) for player, (rating,) in zip(players, after, strict=True)}
    )


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
