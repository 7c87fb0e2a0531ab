"""What an iteration adds to the logs of the work directory, beside its record in `metrics`."""

from __future__ import annotations

from collections.abc import Mapping

from espl_jax.evolution import lineage
from espl_jax.evolution.population import Added
from espl_jax.evolution.reflection import Offspring
from espl_jax.rollouts.records import records
from espl_jax.storage.workdir import WorkDir
from espl_jax.types import Rollouts


def write(
    workdir: WorkDir, iteration: int, rollouts: Rollouts, offspring: Mapping[str, Offspring], added: Added
) -> None:
    """Appends to `rollouts`, `reflections` and `lineage`.

    Args:
      workdir: of the run.
      iteration: counted from 1.
      rollouts: the iteration's, each a line.
      offspring: operator -> what it came to; each of its conversations is a line.
      added: what the population did with the children; a line for each member that entered or left.
    """
    for each in records(rollouts):
        workdir.append("rollouts", {"iteration": iteration, **each})
    for operator, each in offspring.items():
        for transcript in each.transcripts:
            workdir.append("reflections", {"iteration": iteration, "operator": operator, **transcript})
    for event, members in (("born", added.accepted), ("left", added.evicted)):
        for member in members:
            workdir.append("lineage", lineage.entry(event, member, iteration))
