"""A run in progress, as passed to the functions of the loop."""

from __future__ import annotations

import dataclasses

from espl_jax.console.progress import Progress
from espl_jax.parallel.ahead import OFF, CompileAhead
from espl_jax.run.config import Config
from espl_jax.run.parts import Parts
from espl_jax.storage.workdir import WorkDir


@dataclasses.dataclass(frozen=True)
class Job:
    """A run in progress.

    Attributes:
      config: the run's configuration.
      parts: its immutable parts.
      workdir: its work directory.
      progress: its progress display.
      ahead: compiles programs in the background.
    """

    config: Config
    parts: Parts
    workdir: WorkDir
    progress: Progress
    ahead: CompileAhead = OFF
