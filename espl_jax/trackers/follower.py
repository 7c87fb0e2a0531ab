"""Feeds a tracker from the work directory, in a separate thread."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from espl_jax.storage import commits, folders
from espl_jax.trackers.base import Tracker
from espl_jax.trackers.points import results_point
from espl_jax.trackers.reading import Reading
from espl_jax.trackers.secrets import redacted


@dataclasses.dataclass(frozen=True)
class Note:
    """What `trackers/<name>.json` in the work directory says about a tracker.

    Attributes:
      iteration, results: as in `Had`, by what this package has sent. Counts only if the tracker cannot tell.
      offsets: bytes of the logs up to that iteration.
      failures: calls that have failed since the run began.
      error: the last failure; empty if the tracker has recovered.
    """

    iteration: int = 0
    results: int = 0
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)
    failures: int = 0
    error: str = ""


class Follower:
    """Keeps a tracker up to date with the newest checkpoint, without stopping or delaying the run.

    The thread holds no queue: it reads the points from the logs, up to the lengths in the newest COMMIT. If a
    call fails, the connection is closed. At the next checkpoint, the tracker is opened again, which reads
    back what it has, and gets the rest.

    Args:
      name: of the tracker.
      make: creates it; called in the thread.
      workdir: the work directory.
      say: prints a line.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], workdir: str, say: Callable[[str], None]):
        self.name = name
        self._make, self._workdir, self._say = make, workdir, say
        self._folder = folders.open_folder(workdir)
        self._tracker: Tracker | None = None
        self._reading: Reading | None = None
        self._note = Note()
        self._warned = self._finished = self._stopping = False
        self._wake = threading.Condition()
        self._due = False
        # A daemon, so that a call that never returns does not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def update(self) -> None:
        """Wakes the thread, after a checkpoint or at the end of the run; returns at once."""
        with self._wake:
            self._due = True
            self._wake.notify()

    def stop(self, finished: bool) -> None:
        """Tells the thread to send the rest, close the tracker and end.

        Args:
          finished: whether the run is complete.
        """
        with self._wake:
            self._stopping, self._finished, self._due = True, finished, True
            self._wake.notify()

    def join(self, deadline: float) -> None:
        """Waits for the end of the thread until a time of `time.monotonic`, and reports what is missing."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        note, waiting = self._note, self._thread.is_alive()
        if waiting or note.error:
            why = "did not finish in time" if waiting else f"failed {note.failures} times"
            self._say(
                f"Tracker {self.name} {why}; it has the iterations up to {note.iteration}. The same command "
                "sends the rest."
            )

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._due)
                self._due, stopping = False, self._stopping
            self._guarded(self._catch_up)
            if stopping:
                if self._note.error:  # once more, since there is no later checkpoint
                    self._guarded(self._catch_up)
                self._guarded(self._close)
                return

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (Exception, SystemExit) as error:
            self._failed(error)

    def _catch_up(self) -> None:
        committed = commits.committed(self._folder)
        if not committed:
            return
        if self._tracker is None or self._reading is None:
            self._open()
        tracker, reading = self._tracker, self._reading
        assert tracker and reading
        for point in reading.points(committed[max(committed)]["logs"]):
            tracker.log(point)
            self._write(iteration=point.step, error="")
        self._write(iteration=reading.iteration, offsets=reading.offsets(), error="")
        results = json.loads(self._folder.read("results.json") or "null")
        # Results of an earlier end, before num_iterations was raised, have been logged then.
        if results and results["iteration"] == max(committed) > self._note.results:
            tracker.log(results_point(results))
            self._write(results=results["iteration"])

    def _open(self) -> None:
        noted = json.loads(self._folder.read(f"trackers/{self.name}.json") or "{}")
        self._note = Note(**{k: v for k, v in noted.items() if k in Note.__dataclass_fields__})
        tracker = self._tracker = self._make()
        had = tracker.open()
        if had is not None:
            offsets = self._note.offsets if had.iteration >= self._note.iteration else {}
            self._write(iteration=had.iteration, results=had.results, offsets=offsets)
        self._reading = Reading(self._workdir, self._note.iteration, self._note.offsets)

    def _close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker:
            tracker.close(self._finished)

    def _failed(self, error: BaseException) -> None:
        said = redacted(" ".join(f"{type(error).__name__}: {error}".split()))[:500].rstrip(".: ")
        fix = self._tracker.fix if self._tracker else "check that the package is installed"
        with contextlib.suppress(Exception):
            self._write(failures=self._note.failures + 1, error=said)
        tracker, self._tracker, self._reading = self._tracker, None, None
        if not self._warned:
            self._warned = True
            self._say(
                f"Tracker {self.name} failed: {said}. The run continues, and the tracker gets the missing "
                f"points after a later checkpoint; {fix}."
            )
        with contextlib.suppress(Exception, SystemExit):
            if tracker:
                tracker.close(False)

    def _write(self, **changes: Any) -> None:
        changed = dataclasses.replace(self._note, **changes)
        if changed != self._note:
            self._note = changed
            text = json.dumps(dataclasses.asdict(changed), sort_keys=True) + "\n"
            self._folder.write(f"trackers/{self.name}.json", text.encode())
