"""Saves and restores the arrays of a checkpoint, any pytree of jax arrays, with orbax, from all processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from espl_jax.parallel import processes
from espl_jax.storage import durable
from espl_jax.storage.folders import AnyPath

_AT_ONCE = 8  # files that a process hashes concurrently
_UNREADABLE = ""


def named_leaves(tree: Any) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:  # pyright: ignore[reportInvalidTypeForm]
    """Returns (leaves by path, treedef): orbax does not support all containers of optimizer states."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, treedef


def describe(leaves: dict[str, Any]) -> dict[str, str]:
    """Returns name -> dtype and shape, such as `float32[8, 2]`."""
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in leaves.items()}


def check_same(folder: os.PathLike[str], saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises ValueError with the first differences unless the saved arrays match the wanted ones.

    Args:
      folder: the checkpoint, for the message.
      saved, wanted: as returned by `describe`.
    """
    differences = [
        f"  {name}: {saved.get(name, '(absent)')} saved, {wanted.get(name, '(absent)')} now"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        more = f"\n  and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(
            f"the arrays in {folder} do not match this model and optimizer:\n"
            + "\n".join(differences[:5])
            + f"{more}\nUse another --workdir, or the version of the code that saved them."
        )


def check_shared(leaves: dict[str, Any]) -> None:
    """Raises ValueError if there are several processes and an array is not sharded over all of them.

    Args:
      leaves: arrays, or abstract arrays with shardings, by name.
    """
    if jax.process_count() == 1:
        return
    for name, leaf in leaves.items():
        sharding = getattr(leaf, "sharding", None)
        if sharding is None or sharding.is_fully_addressable:
            raise ValueError(
                f"{name} is only on the devices of this process; with {jax.process_count()} processes, shard "
                "every array of a checkpoint over a mesh of all devices"
            )


def save(path: AnyPath, leaves: dict[str, Any]) -> None:
    """Writes arrays; each process writes its own shards. Returns once all processes have written theirs."""
    if leaves:
        with durable.disk_full_explained(path):
            ocp.save(os.fspath(path), leaves)


def hashes(path: AnyPath) -> dict[str, str]:
    """Returns the SHA-256 of every file that `save` wrote, by path below `path`; processes share the work.

    Raises:
      OSError: if a file cannot be read.
    """
    found = _hashes(path, processes.decide(lambda: _files(path)))
    if unreadable := [name for name, digest in found.items() if digest == _UNREADABLE]:
        raise OSError(f"{path / unreadable[0]} cannot be read back; check the disk")
    return found


def damaged(path: AnyPath, saved: dict[str, str]) -> str | None:
    """Finds a file that differs from what was saved.

    Args:
      path: folder of the arrays.
      saved: the result of `hashes` after saving.

    Returns:
      The name of the first file that is truncated, changed or missing, or None.
    """
    now = _hashes(path, sorted(saved))
    return next((name for name in now if now[name] != saved[name]), None)


def _files(path: AnyPath, prefix: str = "") -> list[str]:
    """Returns the names of all files below a folder, local or in a bucket."""
    names: list[str] = []
    for each in sorted(path.iterdir()) if path.is_dir() else ():
        names += _files(each, f"{prefix}{each.name}/") if each.is_dir() else [prefix + each.name]
    return names


def _hashes(path: AnyPath, names: Sequence[str]) -> dict[str, str]:
    def digest(name: str) -> bytes:
        try:
            with (path / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()  # pyright: ignore[reportArgumentType]
        except OSError:
            return b""

    share = range(jax.process_index(), len(names), jax.process_count())
    found = np.zeros((len(names), hashlib.sha256().digest_size), np.uint8)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for i, each in zip(share, pool.map(digest, [names[i] for i in share]), strict=True):
            found[i, : len(each)] = np.frombuffer(each, np.uint8)
    rows = zip(names, processes.total(found), strict=True)
    return {name: row.tobytes().hex() if row.any() else _UNREADABLE for name, row in rows}


def load(path: AnyPath, leaves: dict[str, Any]) -> list[jax.Array]:
    """Reads the arrays onto the shardings of `leaves`, in their order.

    A leaf without a sharding goes to the default device, uncommitted, so that jax can move it to
    the device of other operands. With several processes every leaf has a sharding (`check_shared`).
    """
    if not leaves:
        return []
    free = {name for name, leaf in leaves.items() if getattr(leaf, "sharding", None) is None}
    if jax.process_count() == 1:
        free |= {name for name, leaf in leaves.items() if not getattr(leaf, "committed", True)}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=default if name in free else leaf.sharding
        )
        for name, leaf in leaves.items()
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # the caller has checked which leaves are missing
    with context:
        arrays = ocp.load(os.fspath(path), abstract)
    return [jax.device_put(np.asarray(arrays[name])) if name in free else arrays[name] for name in leaves]
