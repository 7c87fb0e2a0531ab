"""One generation: what crossover and mutation make of an iteration's rollouts."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espl_jax.evolution.crossover import crossover
from espl_jax.evolution.edits import describe, edit_from_json
from espl_jax.evolution.mutation import mutate
from espl_jax.evolution.population import Added, Population
from espl_jax.evolution.ratings import ranking
from espl_jax.evolution.reflection import Offspring, Rejected
from espl_jax.evolution.settings import Evolution
from espl_jax.types import Reflect, Rollouts


def evolve(
    population: Population,
    rollouts: Rollouts,
    reflect: Reflect,
    rng: np.random.Generator,
    settings: Evolution = Evolution(),
    rejected: Sequence[Rejected] = (),
) -> dict[str, Offspring]:
    """Perhaps a crossover, then a mutation of the iteration's best prompt (Zhang et al. 2026, section 3).

    Args:
      population: with the ratings after the iteration's game.
      rollouts: the iteration's.
      reflect: conversations in, replies out.
      rng: draws whether there is a crossover, then what is reflected on.
      settings: how prompts change.
      rejected: edits that were refused in earlier iterations, the newest last.

    Returns:
      operator -> Offspring, in the order in which children enter: crossover first.
    """
    parents = [population.get(prompt.id) for prompt in rollouts.distinct()]
    values = rollouts.score_matrix().mean(axis=1)
    best = ranking([parent.id for parent in parents], values, settings.tie_margin)[0][0]
    offspring = {}
    if rng.random() < settings.crossover_prob and len(parents) > 1:
        offspring["crossover"] = crossover(parents, rollouts, reflect, settings)
    offspring["mutation"] = mutate(
        population.get(best),
        rollouts,
        reflect,
        settings,
        rng=rng,
        members=population.members,
        rejected=[*rejected, *worse_than_parent(population, best)],
    )
    return offspring


def worse_than_parent(population: Population, parent_id: str) -> list[Rejected]:
    """Returns the edits of the parent's mutations that ranked below it where both played, oldest first."""
    ranks = {result["iteration"]: result["rank"] for result in population.get(parent_id).tournaments}
    found = []
    for member in population.members:
        if member.operator != "mutation" or member.parents != (parent_id,):
            continue
        games = [result for result in member.tournaments if result["iteration"] in ranks]
        if games and games[-1]["rank"] > ranks[games[-1]["iteration"]]:
            edits = [
                edit_from_json(_without_candidate(edit)) for edit in member.edits if edit["op"] != "rewrite"
            ]
            found += [Rejected(describe(edit), "it made the prompt worse") for edit in edits]
    return found


def _without_candidate(edit: Mapping[str, Any]) -> dict[str, Any]:
    """The edit without the candidate's number that a recorded add has."""
    return {name: value for name, value in edit.items() if edit["op"] != "add" or name != "id"}


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
