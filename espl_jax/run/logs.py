"""Writes the logs of an iteration, except for `metrics`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from espl_jax.evolution import lineage
from espl_jax.evolution.population import Added
from espl_jax.evolution.reflection import Offspring
from espl_jax.rollouts.records import records
from espl_jax.storage.workdir import WorkDir
from espl_jax.types import Rollouts


def write(
    workdir: WorkDir,
    iteration: int,
    rollouts: Rollouts,
    offspring: Mapping[str, Offspring],
    added: Added,
    *,
    token_logprobs: bool = False,
    trainer_logprobs: np.ndarray | None = None,
) -> None:
    """Appends to the logs `rollouts`, `problems`, `reflections` and `lineage`.

    Args:
      workdir: the run's work directory.
      iteration: counted from 1.
      rollouts: the iteration's rollouts, one line each; and one for each of its problems.
      offspring: operator -> its outcome; one line for each of its conversations.
      added: the members that entered and left the population, one line each.
      token_logprobs, trainer_logprobs: as for `records`.
    """
    for each in records(rollouts, token_logprobs, trainer_logprobs):
        workdir.append("rollouts", {"iteration": iteration, **each})
    for problem in rollouts.problems:
        named = {"id": problem.id, "text": problem.text, "answer": problem.answer}
        workdir.append("problems", {"iteration": iteration, **named})
    for operator, each in offspring.items():
        for transcript in each.transcripts:
            workdir.append("reflections", {"iteration": iteration, "operator": operator, **transcript})
    for event, members in (("born", added.accepted), ("left", added.evicted)):
        for member in members:
            workdir.append("lineage", lineage.entry(event, member, iteration))
