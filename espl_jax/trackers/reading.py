"""Reads from the logs of a work directory what a checkpoint has made permanent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from espl_jax.evolution.population import prompt_from_json
from espl_jax.storage import folders
from espl_jax.trackers.base import Point
from espl_jax.trackers.points import iteration_point
from espl_jax.types import SystemPrompt

Offsets = Mapping[str, int]
"""Log -> bytes of it that have been read."""

_LOCAL_CHUNK, _BUCKET_CHUNK = 1 << 20, 1 << 28  # a read in a bucket transfers a whole part of the log


class Reading:
    """Reads iterations in order, each once, and each log from where the last reading ended.

    Args:
      path: the work directory.
      after: the iteration after which to begin.
      offsets: where a reading after that iteration, or an earlier one, may begin; if the logs have changed
        since, they are read from their beginning.

    Attributes:
      iteration: the last iteration that was read.
    """

    def __init__(self, path: str | os.PathLike[str], after: int = 0, offsets: Offsets | None = None):
        self._path = path
        self.iteration = after
        self._offsets = {"metrics": 0, "rollouts": 0, **(offsets or {})}
        self._lineage = 0
        self._prompts: dict[str, SystemPrompt] = {}

    def offsets(self) -> dict[str, int]:
        """Returns where the next reading begins."""
        return dict(self._offsets)

    def points(self, lengths: Offsets) -> Iterator[Point]:
        """Yields the points of the iterations after the last one that was read.

        Args:
          lengths: the permanent length of each log in bytes.
        """
        if not self._valid(lengths):
            self._offsets = {"metrics": 0, "rollouts": 0}
        for line, _ in self._lines("lineage", self._lineage, lengths):
            self._enter(json.loads(line))
            self._lineage += len(line)
        rollouts = _Rollouts(self._lines("rollouts", self._offsets["rollouts"], lengths))
        begin = self._offsets["rollouts"]
        for line, end in self._lines("metrics", self._offsets["metrics"], lengths):
            metrics = json.loads(line)
            of_iteration, read = rollouts.of(metrics["iteration"])
            if metrics["iteration"] > self.iteration:
                yield iteration_point(metrics, of_iteration, self._prompts)
                self.iteration = metrics["iteration"]
            self._offsets = {"metrics": end, "rollouts": begin + read}

    def _enter(self, entry: dict[str, Any]) -> None:
        if entry.pop("event") != "left":
            entry.pop("at")
            self._prompts[entry["id"]] = prompt_from_json(entry)

    def _valid(self, lengths: Offsets) -> bool:
        """Returns whether the next lines of both logs belong to the next iteration or an earlier one."""
        for log, begin in self._offsets.items():
            if begin > lengths.get(log, 0):
                return False
            content = folders.open_log(folders.parse(self._path) / f"{log}.jsonl")
            if begin and content.read(begin - 1, 1) != b"\n":
                return False
        line = next(self._lines("metrics", self._offsets["metrics"], lengths), None)
        return line is None or json.loads(line[0])["iteration"] <= self.iteration + 1

    def _lines(self, log: str, begin: int, lengths: Offsets) -> Iterator[tuple[bytes, int]]:
        """Yields the lines of a log from an offset on, each with the offset of its end."""
        end = lengths.get(log, 0)
        path = folders.parse(self._path) / f"{log}.jsonl"
        chunk = _BUCKET_CHUNK if folders.is_remote(path) else _LOCAL_CHUNK
        content, rest = folders.open_log(path), b""
        while begin < end:
            read = content.read(begin, min(chunk, end - begin))
            if not read:
                raise OSError(f"{path} has {begin} bytes, but its checkpoint says {end}; was it changed?")
            begin += len(read)
            *lines, rest = (rest + read).split(b"\n")
            position = begin - len(rest) - sum(len(line) + 1 for line in lines)
            for line in lines:
                position += len(line) + 1
                yield line + b"\n", position


class _Rollouts:
    """Groups the lines of `rollouts.jsonl` by iteration; each line is parsed once and then forgotten."""

    def __init__(self, lines: Iterator[tuple[bytes, int]]):
        self._lines = lines
        self._next: tuple[int, tuple[int, float], int] | None = None
        self._read = 0

    def of(self, iteration: int) -> tuple[list[tuple[int, float]], int]:
        """Returns (length, reward) of an iteration's rollouts, and the bytes read up to their end."""
        found = []
        while (following := self._peek()) and following[0] <= iteration:
            if following[0] == iteration:
                found.append(following[1])
            self._read += following[2]
            self._next = None
        return found, self._read

    def _peek(self) -> tuple[int, tuple[int, float], int] | None:
        if self._next is None and (line := next(self._lines, None)):
            record = json.loads(line[0])
            measured = len(record["tokens"]), float(record["reward"])
            self._next = record["iteration"], measured, len(line[0])
        return self._next
