"""The work directory of a run: append-only logs, checkpoints, and resume after a kill at any instant.

    config.json                        the configuration of the run
    metrics.jsonl, rollouts.jsonl ...  append-only logs, one JSON object per line
    population.json ...                derived from the state, for people to read; replaced atomically
    checkpoints/00000012/arrays/       params and optimizer state: any pytree of jax arrays, saved by orbax
    checkpoints/00000012/state.json    everything else, as plain JSON values: population, cursor, ...
    checkpoints/00000012/COMMIT        written last: log lengths, names of the arrays, hashes of all files

COMMIT is the marker of a finished checkpoint. When the directory is opened, checkpoints without a complete
COMMIT are removed and logs are truncated to the lengths in the newest COMMIT. The work after that checkpoint
is repeated, with the same results.

A bucket (`gs://bucket/folder`) has the same layout, with two differences. A log is a folder of parts:

    metrics.jsonl/000000000000         the lines of the first checkpoint
    metrics.jsonl/000000004711         those of the next; the name is the offset of its first byte

New lines become visible at each checkpoint and report; the parts, sorted by name, form the log. And buckets
have no locks: opening the directory takes it over, and the previous process fails at its next write. A local
folder is locked, and the second process fails.

With several processes, each writes its shards of the arrays. The first process does everything else, and
shares what it reads and its errors with the others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import jax
from absl import logging

from espl_jax.parallel import processes
from espl_jax.storage import arrays as storage_arrays
from espl_jax.storage import commits, folders
from espl_jax.storage.json_values import differences, plain

LOGS = ("metrics", "rollouts", "problems", "reflections", "lineage", "evaluations")

T = TypeVar("T")


class WorkDir:
    """The work directory of a run, held by one run until `close` or the end of the process.

    Opening it removes what an interrupted process left unfinished; `restore` then returns the state of the
    newest checkpoint. If a run has several processes, all of them open it and call the same methods in the
    same order with the same values; only `append` and `close` do not synchronize.

    Args:
      path: the directory, local (or on a file system shared by all processes) or in a bucket (`gs://`);
        created if missing.
      config: the run's configuration as nested dicts of plain values. It must equal that of the run already
        in the directory.
      may_change: dotted names of fields, or groups of fields, that may differ between the two.
      logs: names of the logs that `append` accepts.
      keep: number of checkpoints to keep.

    Raises:
      RuntimeError: if another run holds the directory, or some processes of this run do not see it.
      ImportError: for a bucket, if gcsfs is not installed.
      ValueError: if the directory belongs to a run with another configuration, or a log is shorter than
        recorded in the newest checkpoint.

    Attributes:
      path: the directory.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: dict[str, Any],
        *,
        may_change: Collection[str] = (),
        logs: Sequence[str] = LOGS,
        keep: int = 2,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep}: a run needs a checkpoint to resume from; give at least 1")
        self.keep = keep
        self._storage = folders.open_folder(path)
        self.path = self._storage.path
        self._logs = {log: self._storage.log(f"{log}.jsonl") for log in logs}
        self._failure: Exception | None = None
        config = plain(config, "config")
        processes.decide(lambda: self._open(config, may_change))
        try:
            there = self._storage.read("config.json")
            processes.agree(f"config.json in {self.path}, which all processes have to see,", there)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the logs and releases the directory. In a bucket, writes the lines since the last `save`."""
        if processes.is_first():
            try:
                for log in self._logs.values():
                    log.close()
            finally:
                self._storage.release()

    def append(self, log: str, record: dict[str, Any]) -> None:
        """Appends one line to `<log>.jsonl`.

        Readers see it at once, or in a bucket after the next `save` or `write_made`; the next `save` makes it
        permanent. Floats round-trip bit for bit; numpy and jax values become plain numbers and lists. With
        several processes, the first one writes; if that fails, the next `save`, `read` or write of a file
        raises the error in all of them.

        Raises:
          ValueError: for an undeclared log, or a NaN or infinity in the record.
          TypeError: for a value that JSON does not support.
        """
        if log not in self._logs:
            raise ValueError(
                f"log {log!r} is not one of {tuple(self._logs)}; declare it in WorkDir(logs=...)"
            )
        line = json.dumps(plain(record, log), sort_keys=True, separators=(",", ":")) + "\n"
        if not processes.is_first() or self._failure:
            return
        try:
            self._logs[log].append(line.encode())
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self._failure = error  # raised in all processes at the next synchronization

    def write_json(self, name: str, value: Any) -> None:
        """Replaces the file `name` with `value` as JSON, atomically.

        The file is not part of a checkpoint: write it again from the state after `restore`.
        """
        self.write_text(name, json.dumps(plain(value, name), sort_keys=True, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replaces the file `name` with a text, like `write_json`."""
        self._first(lambda: self._storage.write(name, text.encode()))

    def write_made(self, name: str, make: Callable[[], str]) -> None:
        """Replaces the file `name` with the text that `make` returns, which is called in the first process.

        The lines appended so far are visible to readers before `make` is called, also in a bucket.
        """

        def write() -> None:
            for log in self._logs.values():
                log.sync()
            self._storage.write(name, make().encode())

        self._first(write)

    def read(self, log: str) -> list[dict[str, Any]]:
        """Returns the records of a log so far."""
        return self.reduce(log, list)

    def reduce(self, log: str, make: Callable[[Iterator[dict[str, Any]]], T]) -> T:
        """Returns what `make` makes of the records of a log so far; it is called in the first process."""
        return self._first(lambda: make(json.loads(line) for line in self._logs[log].lines()))

    def save(self, iteration: int, arrays: Any, state: dict[str, Any]) -> None:
        """Saves a checkpoint of the state after `iteration` iterations, and makes the logs permanent.

        With several processes, each returns once the checkpoint is complete.

        Args:
          iteration: iterations done; larger than that of any checkpoint in the directory.
          arrays: any pytree of jax arrays, sharded or not; may be empty. With several processes, every array
            is sharded over all of them.
          state: plain JSON values; tuples are restored as lists.
        """
        text = json.dumps(plain(state, "state"), sort_keys=True).encode()
        leaves, _ = storage_arrays.named_leaves(arrays)
        storage_arrays.check_shared(leaves)
        self._first(lambda: self._begin(iteration))
        path = self.path / commits.folder_of(iteration) / "arrays"
        storage_arrays.save(path, leaves)
        files = storage_arrays.hashes(path)
        self._first(lambda: self._commit(iteration, text, storage_arrays.describe(leaves), files))

    def restore(self, abstract_arrays: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint.

        Args:
          abstract_arrays: the pytree that was saved, with a `jax.ShapeDtypeStruct` (or an array) for each
            leaf. Leaves are restored onto their shardings. A leaf without a sharding goes to the default
            device, uncommitted, like a new array. With several processes every leaf needs a sharding over all
            of them.

        Returns:
          `(iteration, arrays, state)`, or None if there is no checkpoint.

        Raises:
          ValueError: if a file of the checkpoint is damaged (the message names the file and the previous
            checkpoint), or if its arrays have other names, shapes or dtypes.
        """

        def newest() -> tuple[int, dict[int, dict[str, Any]], bytes] | None:
            committed = commits.committed(self._storage)
            return _state_of(self._storage, committed) if committed else None

        found = self._first(newest)
        return _with_arrays(self._storage, found, abstract_arrays) if found else None

    def _first(self, act: Callable[[], T]) -> T:
        """Runs `act` in the first process and shares the result, or raises its earlier failure."""

        def act_or_fail() -> T:
            if self._failure:
                raise self._failure
            return act()

        return processes.decide(act_or_fail)

    def _open(self, config: dict[str, Any], may_change: Collection[str]) -> None:
        # Checked before the directory is taken over or logs are truncated: a wrong configuration must not
        # interrupt a run in a bucket or lose log lines.
        self._check_config(config, may_change)
        self._storage.hold()
        try:
            self._check_config(config, may_change)
            text = json.dumps(config, sort_keys=True, indent=2) + "\n"
            self._storage.write("config.json", text.encode())
            self._storage.make("checkpoints")
            self._recover()
        except BaseException:
            self._storage.release()
            raise

    def _check_config(self, config: dict[str, Any], may_change: Collection[str]) -> None:
        there = json.loads(self._storage.read("config.json") or "null")
        if there is not None and (lines := differences(there, config, may_change)):
            its_own = "its own configuration"
            if any("(absent)" in line for line in lines):
                its_own += ", and with the version of espl_jax that began it if that has other fields"
            raise ValueError(
                f"{self.path} holds a run with a different configuration:\n" + "\n".join(lines) + "\n"
                f"Use another --workdir, or resume the run with {its_own}."
            )

    def _recover(self) -> None:
        committed = commits.committed(self._storage)
        lengths = committed[max(committed)]["logs"] if committed else {}
        for name, log in self._logs.items():
            log.cut_back(lengths.get(name, 0))
        for iteration in commits.iterations(self._storage):
            if iteration not in committed:
                logging.info(
                    "Removing the unfinished checkpoint %s", self.path / commits.folder_of(iteration)
                )
                self._remove(iteration)
        self._remove_old()

    def _begin(self, iteration: int) -> None:
        newest = max(commits.committed(self._storage), default=-1)
        if iteration <= newest:
            raise ValueError(
                f"iteration={iteration}: {self.path} already has a checkpoint of iteration {newest}"
            )
        self._storage.check_held()
        if iteration in commits.iterations(self._storage):  # left by a `save` that failed in this process
            self._remove(iteration)
        self._storage.make(commits.folder_of(iteration))

    def _commit(self, iteration: int, state: bytes, arrays: dict[str, str], files: dict[str, str]) -> None:
        for log in self._logs.values():
            log.sync()
        folder = commits.folder_of(iteration)
        self._storage.write(f"{folder}/state.json", state)
        commit = {
            "iteration": iteration,
            "logs": {name: log.length() for name, log in self._logs.items()},
            "arrays": arrays,
            "files_sha256": files,
            "state_sha256": hashlib.sha256(state).hexdigest(),
        }
        commit["sha256"] = commits.hash_of(commit)
        self._storage.write(f"{folder}/COMMIT", json.dumps(commit, sort_keys=True).encode())
        self._remove_old()

    def _remove_old(self) -> None:
        for iteration in sorted(commits.committed(self._storage))[: -self.keep]:
            self._remove(iteration)

    def _remove(self, iteration: int) -> None:
        # The marker first, so that a partly removed checkpoint does not look complete.
        self._storage.remove(f"{commits.folder_of(iteration)}/COMMIT")
        self._storage.remove(commits.folder_of(iteration))


def read_checkpoint(
    path: str | os.PathLike[str], abstract_arrays: Any, iteration: int | None = None
) -> tuple[int, Any, dict[str, Any]] | None:
    """Reads a checkpoint without holding the directory: nothing is locked, truncated or written.

    A run may be using the directory at the same time.

    Args:
      path: the work directory.
      abstract_arrays: as for `WorkDir.restore`, or a subtree of it; other arrays are not loaded.
      iteration: of the checkpoint; None for the newest one.

    Returns:
      As `WorkDir.restore`.

    Raises:
      ValueError: if there are checkpoints, but none of that iteration. Otherwise as `WorkDir.restore`.
    """
    folder = folders.open_folder(path)
    while committed := processes.decide(lambda: commits.committed(folder)):
        if iteration is not None and iteration not in committed:
            kept = ", ".join(map(str, sorted(committed)))
            raise ValueError(
                f"iteration={iteration}: {folder.path} has no checkpoint of it; choose one of {kept} (a run "
                "keeps the last checkpoint_keep)"
            )
        try:
            found = processes.decide(lambda committed=committed: _state_of(folder, committed, iteration))
            return _with_arrays(folder, found, abstract_arrays, partial=True)
        except Exception:
            # If the run has meanwhile replaced the checkpoint with a newer one, read that.
            is_newest = max(commits.committed(folder), default=-1) == max(committed)
            if iteration is not None or jax.process_count() > 1 or is_newest:
                raise
    return None


def read_log(path: str | os.PathLike[str], log: str) -> list[bytes]:
    """Returns the lines of a log as JSON texts. The run may be writing: the last line may be incomplete."""
    return list(folders.open_log(folders.parse(path) / f"{log}.jsonl").lines())


def _state_of(
    folder: folders.Folder, committed: dict[int, dict[str, Any]], iteration: int | None = None
) -> tuple[int, dict[int, dict[str, Any]], bytes]:
    """Returns (iteration, all COMMITs by iteration, state.json) of a checkpoint; None: of the newest one."""
    if iteration is None:
        iteration = max(committed)
    text = folder.read(f"{commits.folder_of(iteration)}/state.json") or b""
    if hashlib.sha256(text).hexdigest() != committed[iteration]["state_sha256"]:
        raise ValueError(commits.damaged(folder, iteration, "state.json", committed))
    return iteration, committed, text


def _with_arrays(
    folder: folders.Folder,
    found: tuple[int, dict[int, dict[str, Any]], bytes],
    abstract_arrays: Any,
    partial: bool = False,
) -> tuple[int, Any, dict[str, Any]]:
    """Loads the arrays of a checkpoint: all of them, or with `partial` those in `abstract_arrays`."""
    iteration, committed, text = found
    path, commit = folder.path / commits.folder_of(iteration), committed[iteration]
    leaves, treedef = storage_arrays.named_leaves(abstract_arrays)
    wanted = storage_arrays.describe(leaves)
    saved = {name: x for name, x in commit["arrays"].items() if name in wanted or not partial}
    storage_arrays.check_same(path, saved, wanted)
    storage_arrays.check_shared(leaves)
    if leaves and (name := storage_arrays.damaged(path / "arrays", commit["files_sha256"])):
        raise ValueError(commits.damaged(folder, iteration, f"arrays/{name}", committed))
    return iteration, treedef.unflatten(storage_arrays.load(path / "arrays", leaves)), json.loads(text)
