"""The work directory of a run: append-only logs, checkpoints, and resume after a kill at any instant.

    config.json                        of the run that the directory belongs to
    metrics.jsonl, rollouts.jsonl ...  append-only logs, one JSON object a line
    population.json ...                derived from the state, for people to read; replaced whole
    checkpoints/00000012/arrays/       params, optimizer state: any pytree of jax arrays, by orbax
    checkpoints/00000012/state.json    everything else: population, cursors, keys as plain JSON values
    checkpoints/00000012/COMMIT        written last: log lengths, names of the arrays, hash of state.json

The marker alone decides: a checkpoint without a whole COMMIT does not exist and is removed when the directory
is next opened, and logs are cut back to the lengths in the newest COMMIT. What was done after it is done
again, with the same results. Checkpoints rely on no rename, so that object stores can hold them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from espl_jax import durable

LOGS = ("metrics", "rollouts", "reflections", "lineage", "evaluations")


class WorkDir:
    """One run's directory, held by one process until `close` or its death.

    Opening it undoes whatever an interrupted process left unfinished; `restore` then gives the state of the
    newest checkpoint.

    Args:
      path: the directory; made if it is not there.
      config: the run's configuration as nested dicts of plain values. It must equal that of the run already
        in the directory.
      may_change: dotted names of fields (or of groups of fields) that may differ between the two.
      logs: names of the logs that `append` will be given.
      keep: checkpoints to keep, the newest ones.

    Raises:
      RuntimeError: another process holds the directory.
      ValueError: the directory belongs to a run with another configuration, or a log is shorter than the
        newest checkpoint says.
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
        if "://" in os.fspath(path):
            raise ValueError(f"workdir {path}: only folders of this machine can be written yet; name one")
        if keep < 1:
            raise ValueError(f"keep is {keep}: a run needs at least 1 checkpoint to resume from")
        self.path = Path(path).expanduser().absolute()  # orbax refuses relative paths
        self.keep = keep
        self._logs = tuple(logs)
        self._open_logs: dict[str, BinaryIO] = {}
        self._checkpoints = self.path / "checkpoints"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = durable.lock(self.path)
        try:
            # Before anything is cut back: the wrong configuration must not cost the directory its logs.
            _check_config(self.path, plain(config, "config"), may_change)
            self.write_json("config.json", config)
            self._recover()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the logs and gives up the directory."""
        for file in self._open_logs.values():
            file.close()
        self._open_logs.clear()
        self._lock.close()

    def append(self, log: str, record: dict[str, Any]) -> None:
        """Adds one line to `<log>.jsonl`, where others can read it at once.

        The line becomes permanent with the next `save`. Floats read back bit for bit; numpy and jax values
        become plain numbers and lists.

        Raises:
          ValueError: an undeclared log, or a NaN or infinity in the record (named).
          TypeError: a value that JSON does not have (named).
        """
        if log not in self._logs:
            raise ValueError(f"log {log!r} is not one of {self._logs}: name it in WorkDir(logs=...)")
        path = self.path / f"{log}.jsonl"
        line = json.dumps(plain(record, log), sort_keys=True, separators=(",", ":")) + "\n"
        with durable.disk_full_explained(path):
            if log not in self._open_logs:
                self._open_logs[log] = open(path, "ab")  # noqa: SIM115 (closed by `close`)
            self._open_logs[log].write(line.encode())
            self._open_logs[log].flush()

    def write_json(self, name: str, value: Any) -> None:
        """Replaces the file `name` of the directory by `value`: readers see the old text or the new one.

        No part of a checkpoint: write it from the state again after `restore`.
        """
        self.write_text(name, json.dumps(plain(value, name), sort_keys=True, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replaces the file `name` by a text, as `write_json` does."""
        durable.replace(self.path / name, text.encode())

    def read(self, log: str) -> list[dict[str, Any]]:
        """The lines of a log so far; none where nothing was appended."""
        path = self.path / f"{log}.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def save(self, iteration: int, arrays: Any, state: dict[str, Any]) -> None:
        """Makes everything up to now permanent, as the state after `iteration` iterations.

        Args:
          iteration: iterations done; larger than that of any checkpoint in the directory.
          arrays: any pytree of jax arrays, sharded or not; may be empty.
          state: plain JSON values; tuples come back as lists.
        """
        newest = max(_committed(self._checkpoints), default=-1)
        if iteration <= newest:
            raise ValueError(f"cannot save iteration {iteration}: {self.path} already has iteration {newest}")
        folder = self._folder(iteration)
        if folder.exists():  # a `save` that failed in this process
            self._remove(folder)
        text = json.dumps(plain(state, "state"), sort_keys=True).encode()
        leaves, _ = _named_leaves(arrays)
        with durable.disk_full_explained(folder):
            for file in self._open_logs.values():
                os.fsync(file.fileno())
            folder.mkdir()
            if leaves:
                ocp.save(folder / "arrays", leaves)
            durable.write(folder / "state.json", text)
            commit = {
                "iteration": iteration,
                "logs": {log: durable.size(self.path / f"{log}.jsonl") for log in self._logs},
                "arrays": {name: _describe(leaf) for name, leaf in leaves.items()},
                "state_sha256": hashlib.sha256(text).hexdigest(),
            }
            for each in (folder, self._checkpoints, self.path):
                durable.sync_folder(each)
            durable.write(folder / "COMMIT", json.dumps(commit, sort_keys=True).encode())
            durable.sync_folder(folder)
        self._remove_old()

    def restore(self, abstract_arrays: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint.

        Args:
          abstract_arrays: the pytree that was saved, with a `jax.ShapeDtypeStruct` (or an array) for each
            leaf. Leaves are restored onto their shardings; one without a sharding goes to the default
            device, uncommitted, as a fresh array does.

        Returns:
          `(iteration, arrays, state)`, or None where nothing was saved yet.

        Raises:
          ValueError: the checkpoint is damaged, or its arrays have other names, shapes or dtypes.
        """
        committed = _committed(self._checkpoints)
        return _read_newest(self._checkpoints, committed, abstract_arrays) if committed else None

    def _folder(self, iteration: int) -> Path:
        return _folder(self._checkpoints, iteration)

    def _recover(self) -> None:
        committed = _committed(self._checkpoints)
        lengths = committed[max(committed)]["logs"] if committed else {}
        for log in self._logs:
            durable.cut_back(self.path / f"{log}.jsonl", lengths.get(log, 0))
        for folder in self._checkpoints.glob("[0-9]" * 8):
            if int(folder.name) not in committed:
                logging.info("Removing the unfinished checkpoint %s", folder)
                self._remove(folder)
        self._remove_old()

    def _remove_old(self) -> None:
        for iteration in sorted(_committed(self._checkpoints))[: -self.keep]:
            self._remove(self._folder(iteration))

    def _remove(self, folder: Path) -> None:
        # The marker first: half a checkpoint must not look like one.
        (folder / "COMMIT").unlink(missing_ok=True)
        durable.sync_folder(folder)
        shutil.rmtree(folder)


def read_checkpoint(
    path: str | os.PathLike[str], abstract_arrays: Any
) -> tuple[int, Any, dict[str, Any]] | None:
    """Reads the newest checkpoint of a directory without taking it: nothing is locked, cut back or written.

    A run may go on in the directory meanwhile.

    Args:
      path: of the work directory.
      abstract_arrays: as for `WorkDir.restore`, or a part of it: of what is left out nothing is read.

    Returns, Raises:
      As `WorkDir.restore`.
    """
    checkpoints = Path(path).expanduser().absolute() / "checkpoints"
    while committed := _committed(checkpoints):
        try:
            return _read_newest(checkpoints, committed, abstract_arrays, partial=True)
        except Exception:
            # Gone while it was read, because the run has made newer ones? Then these can be read.
            if max(_committed(checkpoints), default=-1) == max(committed):
                raise
    return None


def plain(value: Any, where: str) -> Any:
    """`value` as JSON values that read back exactly: numpy and jax values become numbers and lists.

    Args:
      value: dicts with string keys, lists, tuples, strings, numbers, booleans, None, arrays.
      where: what to call the value in an error.

    Raises:
      ValueError: a NaN or infinity. TypeError: anything else that JSON does not have. Both name the field.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not np.isfinite(value):
            raise ValueError(f"{where} is {value}: a run with such a number in it cannot be trusted; stopped")
        return float(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON keys are strings, so use {str(key)!r}")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist(), where)
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON does not have: convert it first")


def _check_config(path: Path, config: dict[str, Any], may_change: Collection[str]) -> None:
    if not (path / "config.json").exists():
        return
    old, new = _fields(json.loads((path / "config.json").read_bytes())), _fields(config)
    differences = [
        f"  {field}: {old.get(field, '(absent)')} there, {new.get(field, '(absent)')} now"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
        and not any(field == free or field.startswith(f"{free}.") for free in may_change)
    ]
    if differences:
        raise ValueError(
            f"{path} holds a run with another configuration:\n" + "\n".join(differences) + "\n"
            "Use another --workdir, or the configuration of that run to resume it."
        )


def _fields(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name -> value as JSON text."""
    fields = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            fields |= _fields(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = json.dumps(value)
    return fields


def _folder(checkpoints: Path, iteration: int) -> Path:
    return checkpoints / f"{iteration:08d}"


def _committed(checkpoints: Path) -> dict[int, dict[str, Any]]:
    """What COMMIT says, by iteration. A marker cut short by a kill does not parse, and does not count."""
    committed = {}
    for folder in checkpoints.glob("[0-9]" * 8):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            text = (folder / "COMMIT").read_text(encoding="ascii", errors="replace")
            committed[int(folder.name)] = json.loads(text)
    return committed


def _read_newest(
    checkpoints: Path, committed: dict[int, dict[str, Any]], abstract_arrays: Any, partial: bool = False
) -> tuple[int, Any, dict[str, Any]]:
    """The newest of the committed checkpoints, or those of its arrays that are asked for."""
    iteration = max(committed)
    folder, commit = _folder(checkpoints, iteration), committed[iteration]
    path = folder / "state.json"
    text = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(text).hexdigest() != commit["state_sha256"]:
        older = max(committed.keys() - {iteration}, default=None)
        rest = "start from the beginning" if older is None else f"resume from iteration {older}"
        raise ValueError(f"{path} is damaged: its hash is not the one in COMMIT. Remove {folder} to {rest}.")
    leaves, treedef = _named_leaves(abstract_arrays)
    wanted = {name: _describe(leaf) for name, leaf in leaves.items()}
    saved = {name: x for name, x in commit["arrays"].items() if name in wanted or not partial}
    _check_arrays(folder, saved, wanted)
    return iteration, treedef.unflatten(_load(folder / "arrays", leaves)), json.loads(text)


def _named_leaves(tree: Any) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:
    """Leaves by path. Saved flat, since orbax does not know every container that optimizers are made of."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, treedef


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _check_arrays(folder: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    differences = [
        f"  {name}: {saved.get(name, '(absent)')} there, {wanted.get(name, '(absent)')} now"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        more = f"\n  and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(
            f"the arrays in {folder} are not those of this model and optimizer:\n"
            + "\n".join(differences[:5])
            + f"{more}\nUse another --workdir, or the version of the code that saved them."
        )


def _load(path: Path, leaves: dict[str, Any]) -> list[jax.Array]:
    """Reads the arrays onto the shardings of `leaves`, in their order."""
    if not leaves:
        return []
    # An array that no sharding was asked for is uncommitted: jax then moves it to where its partners are.
    free = {name for name, leaf in leaves.items() if not getattr(leaf, "committed", True)}
    free |= {name for name, leaf in leaves.items() if getattr(leaf, "sharding", None) is None}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=default if name in free else leaf.sharding
        )
        for name, leaf in leaves.items()
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # whether some may be left out has been decided above
    with context:
        arrays = ocp.load(path, abstract)
    return [jax.device_put(np.asarray(arrays[name])) if name in free else arrays[name] for name in leaves]
