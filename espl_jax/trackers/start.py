"""Starts the trackers of a run."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from espl_jax.choices import TRACKERS
from espl_jax.parallel import processes
from espl_jax.storage import folders
from espl_jax.trackers.base import TrackedRun, Tracker
from espl_jax.trackers.follower import Follower
from espl_jax.trackers.secrets import hyperparameters

DRAIN_SECONDS, INTERRUPTED_SECONDS = 120.0, 15.0
"""How long a finished run, and a run that an error or Ctrl-C ends, waits for its trackers."""

Make = Callable[[TrackedRun], Tracker]


def tracker_of(name: str) -> Make:
    """Imports a tracker. Its package is imported only here, when a configuration names it."""
    match name:
        case "tensorboard":
            from espl_jax.trackers.tensorboard_tracker import TensorBoard as found
        case "wandb":
            from espl_jax.trackers.wandb_tracker import WeightsAndBiases as found
        case "trackio":
            from espl_jax.trackers.trackio_tracker import Trackio as found
        case "mlflow":
            from espl_jax.trackers.mlflow_tracker import MLflow as found
        case _:
            raise ValueError(f"trackers={name!r}: choose from {', '.join(TRACKERS)}")
    return found


@contextlib.contextmanager
def tracking(
    config: Mapping[str, Any],
    workdir: str,
    say: Callable[[str], None],
    *,
    make: Callable[[str], Make] = tracker_of,
    drain: float = DRAIN_SECONDS,
) -> Iterator[Callable[[], None]]:
    """Runs the trackers that the field `trackers` names, in the first process of a run.

    Args:
      config: the configuration of the run.
      workdir: its work directory, which must be held.
      say: prints a line.
      make: returns the class of a tracker; replaced in tests.
      drain: seconds to wait for the trackers at the end.

    Yields:
      A function to call after each checkpoint and after the results; it returns at once and never raises.
    """
    names: Sequence[str] = config["trackers"] if processes.is_first() else ()
    identifying = threading.Lock()

    def connect(name: str) -> Tracker:
        with identifying:
            tracked = _tracked_run(config, workdir)
        return make(name)(tracked)

    followers = [Follower(name, functools.partial(connect, name), workdir, say) for name in names]
    for follower in followers:
        follower.start()

    def update() -> None:
        for follower in followers:
            follower.update()

    finished = False
    try:
        update()
        yield update
        finished = True
    finally:
        for follower in followers:
            follower.stop(finished)
        deadline = time.monotonic() + (drain if finished else min(drain, INTERRUPTED_SECONDS))
        for follower in followers:
            follower.join(deadline)


def _tracked_run(config: Mapping[str, Any], workdir: str) -> TrackedRun:
    """Describes the run; draws its id when it is first tracked, and stores it before any tracker sees it."""
    folder = folders.open_folder(workdir)
    if not (known := folder.read("trackers/id")):
        folder.make("trackers")
        known = uuid.uuid4().hex[:12].encode()
        folder.write("trackers/id", known)
    name = config["tracking"]["name"] or PurePosixPath(workdir).name
    return TrackedRun(known.decode(), config["tracking"]["project"], name, workdir, hyperparameters(config))
