"""The work directory of a run: append-only logs, checkpoints, and resume after a kill at any instant.

    config.json                        of the run that the directory belongs to
    metrics.jsonl, rollouts.jsonl ...  append-only logs, one JSON object a line
    population.json ...                derived from the state, for people to read; replaced whole
    checkpoints/00000012/arrays/       params, optimizer state: any pytree of jax arrays, by orbax
    checkpoints/00000012/state.json    everything else: population, cursors, keys as plain JSON values
    checkpoints/00000012/COMMIT        written last: log lengths, names of the arrays, hashes of all files

The marker alone decides: a checkpoint without a whole COMMIT does not exist and is removed when the directory
is next opened, and logs are cut back to the lengths in the newest COMMIT. What was done after it is done
again, with the same results.

In a bucket (`gs://bucket/folder`) the same names hold the same, with two differences. A log is a folder:

    metrics.jsonl/000000000000         the lines of the first checkpoint
    metrics.jsonl/000000004711         those of the next, named by the place of their first byte in the log

so new lines can be seen when a checkpoint is made, and the parts in the order of their names are the log.
And nothing can be locked: whoever opens the directory takes it over, and the process that had it is refused
at its next write. A folder of this machine is locked, and the second process is refused.

Of several processes, all write their parts of the arrays, and the first one does all the rest: what it finds
in the directory, and its errors, are everyone's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import jax
from absl import logging

from espl_jax.parallel import processes
from espl_jax.storage import arrays as storage_arrays
from espl_jax.storage import folders
from espl_jax.storage.json_values import differences, plain

LOGS = ("metrics", "rollouts", "reflections", "lineage", "evaluations")

T = TypeVar("T")


class WorkDir:
    """One run's directory, held by one run until `close` or its death.

    Opening it undoes whatever an interrupted process left unfinished; `restore` then gives the state of the
    newest checkpoint. Where a run has several processes, all of them open it and call the same methods in the
    same order with the same values; `append` and `close` alone wait for nobody.

    Args:
      path: the directory, of this machine (or one that all processes see) or in a bucket (`gs://`); made if
        it is not there.
      config: the run's configuration as nested dicts of plain values. It must equal that of the run already
        in the directory.
      may_change: dotted names of fields (or of groups of fields) that may differ between the two.
      logs: names of the logs that `append` will be given.
      keep: checkpoints to keep, the newest ones.

    Raises:
      RuntimeError: another run holds the directory, or not all processes of this one see it.
      ImportError: for a bucket, without the package that reads it.
      ValueError: the directory belongs to a run with another configuration, or a log is shorter than the
        newest checkpoint says.

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
            raise ValueError(f"keep is {keep}: a run needs at least 1 checkpoint to resume from")
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
        """Closes the logs and gives up the directory.

        In a bucket, the lines since the last `save` are written now.
        """
        if processes.is_first():
            try:
                for log in self._logs.values():
                    log.close()
            finally:
                self._storage.release()

    def append(self, log: str, record: dict[str, Any]) -> None:
        """Adds one line to `<log>.jsonl`.

        Others can read it at once, or in a bucket after the next `save`, with which it becomes permanent.
        Floats read back bit for bit; numpy and jax values become plain numbers and lists. Of several
        processes the first one writes; if it cannot, the next `save`, `read`, `write_json` or `write_text`
        raises that error in all of them.

        Raises:
          ValueError: an undeclared log, or a NaN or infinity in the record (named).
          TypeError: a value that JSON does not have (named).
        """
        if log not in self._logs:
            raise ValueError(f"log {log!r} is not one of {tuple(self._logs)}: name it in WorkDir(logs=...)")
        line = json.dumps(plain(record, log), sort_keys=True, separators=(",", ":")) + "\n"
        if not processes.is_first() or self._failure:
            return
        try:
            self._logs[log].append(line.encode())
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self._failure = error  # the others learn of it when they next meet this process

    def write_json(self, name: str, value: Any) -> None:
        """Replaces the file `name` of the directory by `value`: readers see the old text or the new one.

        No part of a checkpoint: write it from the state again after `restore`.
        """
        self.write_text(name, json.dumps(plain(value, name), sort_keys=True, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replaces the file `name` by a text, as `write_json` does."""
        self._first(lambda: self._storage.write(name, text.encode()))

    def read(self, log: str) -> list[dict[str, Any]]:
        """The lines of a log so far; none where nothing was appended."""
        return self._first(lambda: [json.loads(line) for line in self._logs[log].lines()])

    def save(self, iteration: int, arrays: Any, state: dict[str, Any]) -> None:
        """Makes everything up to now permanent, as the state after `iteration` iterations.

        Of several processes, each returns when all of it is.

        Args:
          iteration: iterations done; larger than that of any checkpoint in the directory.
          arrays: any pytree of jax arrays, sharded or not; may be empty. With several processes each is laid
            out over all of them.
          state: plain JSON values; tuples come back as lists.
        """
        text = json.dumps(plain(state, "state"), sort_keys=True).encode()
        leaves, _ = storage_arrays.named_leaves(arrays)
        storage_arrays.check_shared(leaves)
        self._first(lambda: self._begin(iteration))
        path = self.path / _folder(iteration) / "arrays"
        storage_arrays.save(path, leaves)
        files = storage_arrays.hashes(path)
        self._first(lambda: self._commit(iteration, text, storage_arrays.describe(leaves), files))

    def restore(self, abstract_arrays: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint.

        Args:
          abstract_arrays: the pytree that was saved, with a `jax.ShapeDtypeStruct` (or an array) for each
            leaf. Leaves are restored onto their shardings; one without a sharding goes to the default
            device, uncommitted, as a fresh array does. With several processes every leaf needs one that is
            laid out over all of them.

        Returns:
          `(iteration, arrays, state)`, or None where nothing was saved yet.

        Raises:
          ValueError: a file of the checkpoint is damaged (named, with the checkpoint before it), or its
            arrays have other names, shapes or dtypes.
        """
        newest = self._first(lambda: _newest(self._storage, _committed(self._storage)))
        return _with_arrays(self._storage, newest, abstract_arrays) if newest else None

    def _first(self, act: Callable[[], T]) -> T:
        """What the first process makes of it, or what it failed at before."""

        def act_or_fail() -> T:
            if self._failure:
                raise self._failure
            return act()

        return processes.decide(act_or_fail)

    def _open(self, config: dict[str, Any], may_change: Collection[str]) -> None:
        # Before anything is taken or cut back: the wrong configuration must not cost a run in a bucket its
        # directory, or the directory its logs.
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
            raise ValueError(
                f"{self.path} holds a run with another configuration:\n" + "\n".join(lines) + "\n"
                "Use another --workdir, or the configuration of that run to resume it."
            )

    def _recover(self) -> None:
        committed = _committed(self._storage)
        lengths = committed[max(committed)]["logs"] if committed else {}
        for name, log in self._logs.items():
            log.cut_back(lengths.get(name, 0))
        for iteration in _iterations(self._storage):
            if iteration not in committed:
                logging.info("Removing the unfinished checkpoint %s", self.path / _folder(iteration))
                self._remove(iteration)
        self._remove_old()

    def _begin(self, iteration: int) -> None:
        newest = max(_committed(self._storage), default=-1)
        if iteration <= newest:
            raise ValueError(f"cannot save iteration {iteration}: {self.path} already has iteration {newest}")
        self._storage.check_held()
        if iteration in _iterations(self._storage):  # a `save` that failed in this process
            self._remove(iteration)
        self._storage.make(_folder(iteration))

    def _commit(self, iteration: int, state: bytes, arrays: dict[str, str], files: dict[str, str]) -> None:
        for log in self._logs.values():
            log.sync()
        folder = _folder(iteration)
        self._storage.write(f"{folder}/state.json", state)
        commit = {
            "iteration": iteration,
            "logs": {name: log.length() for name, log in self._logs.items()},
            "arrays": arrays,
            "files_sha256": files,
            "state_sha256": hashlib.sha256(state).hexdigest(),
        }
        commit["sha256"] = _hash_of_commit(commit)
        self._storage.write(f"{folder}/COMMIT", json.dumps(commit, sort_keys=True).encode())
        self._remove_old()

    def _remove_old(self) -> None:
        for iteration in sorted(_committed(self._storage))[: -self.keep]:
            self._remove(iteration)

    def _remove(self, iteration: int) -> None:
        # The marker first: half a checkpoint must not look like one.
        self._storage.remove(f"{_folder(iteration)}/COMMIT")
        self._storage.remove(_folder(iteration))


def read_checkpoint(
    path: str | os.PathLike[str], abstract_arrays: Any
) -> tuple[int, Any, dict[str, Any]] | None:
    """Reads the newest checkpoint of a directory without taking it: nothing is locked, cut back or written.

    A run may go on in the directory meanwhile.

    Args:
      path: of the work directory.
      abstract_arrays: as for `WorkDir.restore`, or a part of it: what is left out is not loaded.

    Returns, Raises:
      As `WorkDir.restore`.
    """
    folder = folders.open_folder(path)
    while committed := processes.decide(lambda: _committed(folder)):
        try:
            newest = processes.decide(lambda found=committed: _newest(folder, found))
            assert newest is not None
            return _with_arrays(folder, newest, abstract_arrays, partial=True)
        except Exception:
            # Gone while it was read, because the run has made newer ones? Then these can be read.
            if jax.process_count() > 1 or max(_committed(folder), default=-1) == max(committed):
                raise
    return None


def read_log(path: str | os.PathLike[str], log: str) -> list[bytes]:
    """The lines of a log, as JSON texts, of a run that may be going on; the last may not be whole."""
    return list(folders.open_log(folders.parse(path) / f"{log}.jsonl").lines())


def _folder(iteration: int) -> str:
    return f"checkpoints/{iteration:08d}"


def _iterations(folder: folders.Folder) -> list[int]:
    """Of the checkpoints, finished or not."""
    return [int(name) for name in folder.names("checkpoints") if re.fullmatch(r"\d{8}", name)]


def _committed(folder: folders.Folder) -> dict[int, dict[str, Any]]:
    """What COMMIT says, by iteration. A marker cut short by a kill does not parse, and does not count.

    Raises:
      ValueError: a marker is whole, but not what was written, or of another version of the package.
    """
    committed = {}
    for iteration in _iterations(folder):
        text = folder.read(f"{_folder(iteration)}/COMMIT") or b""
        with contextlib.suppress(json.JSONDecodeError):
            committed[iteration] = json.loads(text.decode("ascii", errors="replace"))
    for iteration, commit in committed.items():
        if "sha256" not in commit:
            raise ValueError(
                f"{folder.path / _folder(iteration)} was written by another version of espl_jax, without "
                "hashes: read it with that version"
            )
        if commit["sha256"] != _hash_of_commit(commit):
            raise ValueError(_damaged(folder, iteration, "COMMIT", committed))
    return committed


def _hash_of_commit(commit: dict[str, Any]) -> str:
    """Of all that it says but this hash."""
    said = {name: value for name, value in commit.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _damaged(folder: folders.Folder, iteration: int, file: str, committed: Collection[int]) -> str:
    """What to say of a file of a checkpoint whose hash is not the one that was written down."""
    other = max(set(committed) - {iteration}, default=None)
    rest = "start from the beginning" if other is None else f"resume from iteration {other}"
    return (
        f"{folder.path / _folder(iteration) / file} is damaged: its hash is not the one in COMMIT. Remove "
        f"{folder.path / _folder(iteration)} to {rest}."
    )


def _newest(
    folder: folders.Folder, committed: dict[int, dict[str, Any]]
) -> tuple[int, dict[int, dict[str, Any]], bytes] | None:
    """Iteration of the newest of the committed checkpoints, what COMMIT says in each, and its state.json."""
    if not committed:
        return None
    iteration = max(committed)
    text = folder.read(f"{_folder(iteration)}/state.json") or b""
    if hashlib.sha256(text).hexdigest() != committed[iteration]["state_sha256"]:
        raise ValueError(_damaged(folder, iteration, "state.json", committed))
    return iteration, committed, text


def _with_arrays(
    folder: folders.Folder,
    newest: tuple[int, dict[int, dict[str, Any]], bytes],
    abstract_arrays: Any,
    partial: bool = False,
) -> tuple[int, Any, dict[str, Any]]:
    """That checkpoint, with all of its arrays or those of them that are asked for."""
    iteration, committed, text = newest
    path, commit = folder.path / _folder(iteration), committed[iteration]
    leaves, treedef = storage_arrays.named_leaves(abstract_arrays)
    wanted = storage_arrays.describe(leaves)
    saved = {name: x for name, x in commit["arrays"].items() if name in wanted or not partial}
    storage_arrays.check_same(path, saved, wanted)
    storage_arrays.check_shared(leaves)
    if leaves and (name := storage_arrays.damaged(path / "arrays", commit["files_sha256"])):
        raise ValueError(_damaged(folder, iteration, f"arrays/{name}", committed))
    return iteration, treedef.unflatten(storage_arrays.load(path / "arrays", leaves)), json.loads(text)
