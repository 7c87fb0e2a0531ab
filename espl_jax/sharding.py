"""The mesh, and which logical axis goes to which mesh axis."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Logical axis -> mesh axes. An axis without a rule is replicated."""


def make_mesh(sizes: dict[str, int] | None = None) -> Mesh | None:
    """A mesh over all devices, or None where there is one device.

    Args:
      sizes: devices along each of `MESH_AXES`, 1 by default; one of them may be -1 and takes the rest. All
        devices go to `fsdp` by default.

    Raises:
      ValueError: for an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.device_count()
    sizes = {"fsdp": -1} if sizes is None else dict(sizes)
    if unknown := set(sizes) - set(MESH_AXES):
        raise ValueError(f"mesh axes {sorted(unknown)} are unknown; choose from {MESH_AXES}")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if -1 in shape:
        shape[shape.index(-1)] = max(1, devices // math.prod(size for size in shape if size != -1))
    if math.prod(shape) != devices or min(shape) < 1:
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} does not hold the {devices} devices of this "
            "machine; give sizes whose product is their number, one of them may be -1"
        )
    if devices == 1:
        return None
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def named(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array with these logical axes; an axis that does not divide stays whole."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        rule = RULES.get(axis) if axis else None
        names = (rule,) if isinstance(rule, str) else rule or ()
        fits = names and size % math.prod(mesh.shape[name] for name in names) == 0
        spec.append(rule if fits else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _put(x: Any, sharding: NamedSharding) -> Any:
    """Moves an array there; a mere shape is told where its array would be, to compile for."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.device_put(x, sharding)


def place(tree: Any, declared: Any, mesh: Mesh | None) -> Any:
    """Puts params on the mesh as their declarations (with `.axes`) say; the identity without a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda weight, x: _put(x, named(mesh, weight.axes, x.shape)), declared, tree)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Puts a whole copy of every array on each device; the identity without a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Shards rows over the data axes: dimension 0, or 2 of caches [L, K, rows, C, H], and their kv heads."""
    if mesh is None:
        return tree

    def put(x: jax.Array) -> jax.Array:
        axes = (None, "kv_heads", "rows", None, None) if x.ndim == 5 else ("rows",) + (None,) * (x.ndim - 1)
        return _put(x, named(mesh, axes, x.shape))

    return jax.tree.map(put, tree)


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Puts a TrainBatch on the mesh: the shared levels on every device, rollouts sharded by problem."""
    if mesh is None:
        return batch

    def put(x: Any) -> jax.Array:
        per_rollout = x.ndim >= 3 and x.shape[:3] == batch.advantages.shape
        axes = (None, "rows") if per_rollout else ()
        return _put(x, named(mesh, axes + (None,) * (x.ndim - len(axes)), x.shape))

    return jax.tree.map(put, batch)
