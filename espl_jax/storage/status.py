"""The status of a run, `status.json`: what it does at this moment, for `python -m espl_jax.watch`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from espl_jax.storage import folders

NAME = "status.json"
_LOCAL_SECONDS, _BUCKET_SECONDS = 5.0, 30.0
_GONE_SECONDS, _SILENT_SECONDS = 15.0, 60.0


@dataclasses.dataclass(frozen=True)
class Status:
    """What a run does.

    Attributes:
      state: `running`, `finished`, or `stopped` by an error or a signal. After a kill it stays `running`.
      phases: the current phase, and the phases in it.
      iteration: iterations done.
      num_iterations: iterations of the whole run.
      since: seconds since the epoch at which the phase began.
      begun: the same for the iteration.
      alive: when this was written.
      every: longest time until it is written again, in seconds.
      pid, host: of the process.
    """

    state: Literal["running", "finished", "stopped"] = "running"
    phases: tuple[str, ...] = ("loading",)
    iteration: int = 0
    num_iterations: int = 0
    since: float = 0.0
    begun: float = 0.0
    alive: float = 0.0
    every: float = _LOCAL_SECONDS
    pid: int = 0
    host: str = ""

    def lost(self, now: float) -> bool:
        """Returns whether the process has gone without saying so."""
        age = now - self.alive
        if self.state != "running" or age < _GONE_SECONDS:
            return False
        # A busy machine can delay the file. A process in another container may have the same host name and
        # not be visible.
        return age > _SILENT_SECONDS + self.every or (
            self.host == socket.gethostname() and not _exists(self.pid)
        )


def read(workdir: str | os.PathLike[str]) -> Status | None:
    """Returns the status of a run; None if it has none, or has one of another version."""
    try:
        saved: dict[str, Any] = json.loads(folders.open_folder(workdir).read(NAME) or "null")
        return Status(**{**saved, "phases": tuple(saved["phases"])})
    except (ValueError, TypeError, KeyError):
        return None


class StatusWriter:
    """Keeps `status.json` up to date from a thread, so that a slow disk or bucket delays nothing.

    The file is replaced atomically but not fsynced, and is not part of a checkpoint. In a bucket, it is
    written every 30 seconds only. Errors are ignored.

    Args:
      workdir: the work directory, which must be held.
      num_iterations: iterations of the whole run.
    """

    def __init__(self, workdir: str | os.PathLike[str], num_iterations: int):
        self._folder = folders.open_folder(workdir)
        self._remote = folders.is_remote(workdir)
        now = time.time()
        self._status = Status(
            num_iterations=num_iterations,
            since=now,
            begun=now,
            every=_BUCKET_SECONDS if self._remote else _LOCAL_SECONDS,
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        self._changed = threading.Condition()
        self._due = self._ends = False
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self._thread.start()

    def show(self, phases: Sequence[str], iteration: int) -> None:
        """Notes the current phases and the iterations done; returns at once."""
        now, before = time.time(), self._status
        begun = now if iteration != before.iteration else before.begun
        with self._changed:
            self._status = dataclasses.replace(
                before, phases=tuple(phases), iteration=iteration, since=now, begun=begun
            )
            self._due = True
            if not self._remote:
                self._changed.notify()

    def close(self, finished: bool) -> None:
        """Writes how the run ended, and ends the thread."""
        with self._changed:
            state = "finished" if finished else "stopped"
            self._status = dataclasses.replace(self._status, state=state, phases=())
            self._due = self._ends = True
            self._changed.notify()
        self._thread.join(_BUCKET_SECONDS)

    def _run(self) -> None:
        ends = False
        while not ends:
            with self._changed:
                self._due, ends = False, self._ends
                status = dataclasses.replace(self._status, alive=time.time())
            with contextlib.suppress(Exception):
                self._write(json.dumps(dataclasses.asdict(status)).encode())
            with self._changed:
                if not (self._ends or (self._due and not self._remote)):
                    self._changed.wait(self._status.every)

    def _write(self, content: bytes) -> None:
        path = self._folder.path / NAME
        if not isinstance(path, Path):
            self._folder.write(NAME, content)
            return
        new = path.with_name(f".{NAME}.new")
        new.write_bytes(content)
        os.replace(new, path)


Show = Callable[[Sequence[str], int], None]


@contextlib.contextmanager
def written(workdir: str | os.PathLike[str], num_iterations: int, first: bool) -> Iterator[Show]:
    """Writes the status of a run until the block ends.

    Args:
      workdir, num_iterations: as in `StatusWriter`.
      first: whether this is the first process of the run; others write nothing.

    Yields:
      `StatusWriter.show`.
    """
    if not first:
        yield lambda phases, iteration: None
        return
    writer, finished = StatusWriter(workdir, num_iterations), False
    try:
        yield writer.show
        finished = True
    finally:
        writer.close(finished)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
