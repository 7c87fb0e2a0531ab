"""What every function of a run that is under way is given."""

from __future__ import annotations

import dataclasses

from espl_jax.console.progress import Progress
from espl_jax.run.config import Config
from espl_jax.run.parts import Parts
from espl_jax.storage.workdir import WorkDir


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is under way.

    Attributes:
      config: of the run.
      parts: what it is made of.
      workdir: where it writes.
      progress: where it shows what it does.
    """

    config: Config
    parts: Parts
    workdir: WorkDir
    progress: Progress
