"""The interface of experiment trackers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, Protocol

import numpy as np

Hyperparameter = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What identifies and describes a run to a tracker.

    Attributes:
      id: the same after every resume; stored in the work directory.
      project: groups runs.
      name: for people to read; several runs may have the same one.
      workdir: the work directory, a local folder or `gs://`.
      config: the configuration, flattened to `group.field`, without credentials.
    """

    id: str
    project: str
    name: str
    workdir: str
    config: Mapping[str, Hyperparameter]


@dataclasses.dataclass(frozen=True)
class Point:
    """What a tracker logs at a step.

    Attributes:
      kind: `iteration`, or `results` for the test at the end of a run.
      step: the iteration, counted from 1. Results have the step of the last iteration.
      scalars: `group/name` -> value.
      histograms: `group/name` -> values `[rollouts]`, float64.
      texts: `group/name` -> plain text, part of which a model wrote.
    """

    kind: Literal["iteration", "results"]
    step: int
    scalars: Mapping[str, float]
    histograms: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Had:
    """The points that a tracker has.

    Attributes:
      iteration: it has the points of this iteration and of all before it; 0 for none.
      results: iteration of the newest results that it has; 0 for none.
    """

    iteration: int = 0
    results: int = 0


class Tracker(Protocol):
    """Receives the points of a run in order. One thread makes all calls; any of them may raise.

    Logging is at most once: after `open` returns, points that the tracker has are not logged again. A tracker
    whose writes of one point are not atomic completes a partial point when the point is logged again.

    Attributes:
      fix: what to check if a call fails, for the warning.
    """

    fix: str

    def open(self) -> Had | None:
        """Starts the run, or resumes it under the same id, and reads back which points the tracker has.

        Returns:
          The points that are stored, or None if the tracker cannot tell.
        """
        ...

    def log(self, point: Point) -> None:
        """Logs all of a point."""
        ...

    def close(self, finished: bool) -> None:
        """Flushes and ends the connection.

        Args:
          finished: whether the run is complete; otherwise it was interrupted and may resume.
        """
        ...
