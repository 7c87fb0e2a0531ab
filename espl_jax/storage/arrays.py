"""The arrays of a checkpoint: any pytree of jax arrays, by orbax, written and read by all processes."""

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

_AT_ONCE = 8  # files that a process hashes side by side
_UNREADABLE = ""


def named_leaves(tree: Any) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:  # pyright: ignore[reportInvalidTypeForm]
    """Leaves by path. Saved flat, since orbax does not know every container that optimizers are made of."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, treedef


def describe(leaves: dict[str, Any]) -> dict[str, str]:
    """Name -> dtype and shape, as in `float32[8, 2]`."""
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in leaves.items()}


def check_same(folder: os.PathLike[str], saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises ValueError, naming the first differences, unless the saved arrays are those that are wanted.

    Args:
      folder: what to call the checkpoint.
      saved, wanted: as `describe` gives them.
    """
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


def check_shared(leaves: dict[str, Any]) -> None:
    """Raises ValueError if there are several processes and an array is not laid out over all of them.

    Args:
      leaves: arrays, or their abstract values with shardings, by name.
    """
    if jax.process_count() == 1:
        return
    for name, leaf in leaves.items():
        sharding = getattr(leaf, "sharding", None)
        if sharding is None or sharding.is_fully_addressable:
            raise ValueError(
                f"{name} is laid out over this process alone: with {jax.process_count()} processes, every "
                "array of a checkpoint needs a sharding over a mesh of them all"
            )


def save(path: AnyPath, leaves: dict[str, Any]) -> None:
    """Writes arrays, each process those shards that it has; returns in every process when all are written."""
    if leaves:
        with durable.disk_full_explained(path):
            ocp.save(os.fspath(path), leaves)


def hashes(path: AnyPath) -> dict[str, str]:
    """SHA-256 of every file that `save` wrote, by its name below `path`; each process reads its share.

    Raises:
      OSError: a file cannot be read.
    """
    found = _hashes(path, processes.decide(lambda: _files(path)))
    if unreadable := [name for name, digest in found.items() if digest == _UNREADABLE]:
        raise OSError(f"{path / unreadable[0]} cannot be read back; look at the disk that it is on")
    return found


def damaged(path: AnyPath, saved: dict[str, str]) -> str | None:
    """Looks for a file whose content is not what was saved.

    Args:
      path: of the arrays.
      saved: what `hashes` gave then.

    Returns:
      The name of the first one, cut short, changed or gone, or None.
    """
    now = _hashes(path, sorted(saved))
    return next((name for name in now if now[name] != saved[name]), None)


def _files(path: AnyPath, prefix: str = "") -> list[str]:
    """Names below a folder, of this machine or in a bucket."""
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

    One without a sharding goes to the default device, uncommitted: jax then moves it to where its partners
    are. With several processes there is none (`check_shared`).
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
    context.pytree.loading.partial_load = True  # whether some may be left out has been decided before
    with context:
        arrays = ocp.load(os.fspath(path), abstract)
    return [jax.device_put(np.asarray(arrays[name])) if name in free else arrays[name] for name in leaves]
