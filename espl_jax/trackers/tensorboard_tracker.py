"""TensorBoard: event files in the folder `tensorboard` of the work directory."""

from __future__ import annotations

from pathlib import Path

from espl_jax.storage import durable, folders
from espl_jax.trackers.base import Had, Point, TrackedRun
from espl_jax.trackers.event_files import config_record, is_results, point_record, records, version_record

FOLDER = "tensorboard"


class TensorBoard:
    """Writes a new event file after every start, in a bucket after every checkpoint.

    A record holds a whole point, and the last record of a killed process is cut off if it is incomplete. The
    event files therefore never have a part of a point, nor a point twice.
    """

    fix = "check that the work directory can be written"

    def __init__(self, run: TrackedRun):
        self._run = run
        self._folder = folders.open_folder(run.workdir)
        self._number = 0
        self._log = None

    def open(self) -> Had:
        self._folder.make(FOLDER)
        iteration, results, described = 0, 0, False
        names = [name for name in self._folder.names(FOLDER) if "tfevents" in name]
        for name in names:
            content = self._folder.read(f"{FOLDER}/{name}") or b""
            whole = 0
            for event, whole in records(content):  # noqa: B007 (the last end is used below)
                if is_results(event):
                    results = max(results, event.step)
                elif event.step:
                    iteration = max(iteration, event.step)
                described |= event.HasField("summary")
            path = self._folder.path / FOLDER / name
            if whole < len(content) and isinstance(path, Path):
                durable.cut_back(path, whole)
        self._number = len(names)
        if not described:
            self._append(config_record(self._run.id, self._run.config))
        return Had(iteration, results)

    def log(self, point: Point) -> None:
        self._append(point_record(point))

    def close(self, finished: bool) -> None:
        if self._log:
            self._log.close()
            self._log = None

    def _append(self, record: bytes) -> None:
        name = f"{FOLDER}/events.out.tfevents.{self._number:010d}.{self._run.id}"
        if folders.is_remote(self._run.workdir):  # objects cannot grow
            self._folder.write(name, version_record() + record)
            self._number += 1
            return
        if self._log is None:
            self._log = self._folder.log(name)
            self._log.append(version_record())
        self._log.append(record)
        self._log.sync()
