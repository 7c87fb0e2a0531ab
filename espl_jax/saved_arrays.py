"""The arrays of a checkpoint: any pytree of jax arrays, by orbax, written and read by all processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from espl_jax import durable


def named_leaves(tree: Any) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:
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


def save(path: Path, leaves: dict[str, Any]) -> None:
    """Writes arrays, each process those shards that it has; returns in every process when all are written."""
    if leaves:
        with durable.disk_full_explained(path):
            ocp.save(path, leaves)


def load(path: Path, leaves: dict[str, Any]) -> list[jax.Array]:
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
        arrays = ocp.load(path, abstract)
    return [jax.device_put(np.asarray(arrays[name])) if name in free else arrays[name] for name in leaves]
