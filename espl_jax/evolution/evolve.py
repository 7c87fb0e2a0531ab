"""One generation: what crossover and mutation make of an iteration's rollouts."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from espl_jax.evolution.crossover import crossover
from espl_jax.evolution.guards import Guards
from espl_jax.evolution.mutation import mutate
from espl_jax.evolution.population import Added, Population
from espl_jax.evolution.ratings import ranking
from espl_jax.evolution.reflection import Offspring
from espl_jax.types import Reflect, Rollouts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
    """How prompts change.

    Attributes:
      form: `principles` edits the list, `prose` the text by search and replace.
      guards: what is accepted of the edits proposed.
      opening: whether the beginning of every reply is written for the reflector.
      constrained: whether edits are kept to their schema, where the reflector can.
      crossover_prob: chance of a crossover where at least two distinct prompts ran.
      crossover_sigma, mutation_sigma: what the children's uncertainty grows by.
      tie_margin: mean rewards this close tie, and win no problem.
    """

    form: str = "principles"
    guards: Guards = Guards()
    opening: bool = True
    constrained: bool = True
    crossover_prob: float = 0.2
    crossover_sigma: float = 1.0
    mutation_sigma: float = 1.0
    tie_margin: float = 0.01


def evolve(
    population: Population,
    rollouts: Rollouts,
    reflect: Reflect,
    rng: np.random.Generator,
    settings: Evolution = Evolution(),
) -> dict[str, Offspring]:
    """Perhaps a crossover, then a mutation of the iteration's best prompt (Zhang et al. 2026, section 3).

    Args:
      population: with the ratings after the iteration's game.
      rollouts: the iteration's.
      reflect: conversations in, replies out.
      rng: draws whether there is a crossover; one number whatever comes of it.
      settings: how prompts change.

    Returns:
      operator -> Offspring, in the order in which children enter: crossover first.
    """
    parents = [population.get(prompt.id) for prompt in rollouts.distinct()]
    values = rollouts.score_matrix().mean(axis=1)
    best = ranking([parent.id for parent in parents], values, settings.tie_margin)[0][0]
    shared = {name: getattr(settings, name) for name in ("form", "guards", "opening", "constrained")}
    offspring = {}
    if rng.random() < settings.crossover_prob and len(parents) > 1:
        offspring["crossover"] = crossover(
            parents,
            rollouts,
            reflect,
            tie_margin=settings.tie_margin,
            crossover_sigma=settings.crossover_sigma,
            **shared,
        )
    offspring["mutation"] = mutate(
        population.get(best), rollouts, reflect, mutation_sigma=settings.mutation_sigma, **shared
    )
    return offspring


def outcome(offspring: Mapping[str, Offspring], added: Added) -> dict[str, Any]:
    """What came of a generation, for the record of its iteration.

    Args:
      offspring: what `evolve` returned.
      added: what the population did with the children.

    Returns:
      `children`, ids; `no_child`, operator -> reason; `drops`, how often each reason dropped or changed an
      edit, over all operators.
    """
    drops: collections.Counter[str] = collections.Counter()
    for each in offspring.values():
        drops.update(each.drops)
    none = {operator: each.reason for operator, each in offspring.items() if each.reason}
    return {
        "children": [child.id for child in added.accepted],
        "no_child": none | {child.operator: reason for child, reason in added.rejected},
        "drops": dict(drops),
    }
