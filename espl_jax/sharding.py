"""The mesh, and which logical axis goes to which mesh axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def make_mesh(
    sizes: dict[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """A mesh over all devices of this machine, or None where it has one; or over the devices given.

    Args:
      sizes: devices along each of `MESH_AXES`, 1 by default; one of them may be -1 and takes the rest. All
        devices go to `fsdp` by default.
      devices: those of a TPU topology, to compile for.

    Raises:
      ValueError: for an unknown axis, or sizes whose product is not the number of devices.
    """
    here = devices is None
    devices = jax.devices() if here else list(devices)
    sizes = {"fsdp": -1} if sizes is None else dict(sizes)
    if unknown := set(sizes) - set(MESH_AXES):
        raise ValueError(f"mesh axes {sorted(unknown)} are unknown; choose from {MESH_AXES}")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if -1 in shape:
        shape[shape.index(-1)] = max(1, len(devices) // math.prod(size for size in shape if size != -1))
    if math.prod(shape) != len(devices) or min(shape) < 1:
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} does not hold the {len(devices)} devices; "
            "give sizes whose product is their number, one of them may be -1"
        )
    if here and len(devices) == 1:
        return None
    return jax.make_mesh(
        tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


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


def row_parts(mesh: Mesh | None) -> int:
    """Into how many parts rows are sharded: devices along the axes of `rows`."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in RULES["rows"])


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Shards arrays over the data axes by their first dimension; the identity without a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _put(x, named(mesh, ("rows",) + (None,) * (x.ndim - 1), x.shape)), tree)


def cache_sharding(mesh: Mesh, shape: tuple[int, ...], everywhere: bool = False) -> NamedSharding:
    """Where keys or values [L, K, rows, ., .] lie: by kv heads, and by rows unless `everywhere`."""
    return named(mesh, (None, "kv_heads", None if everywhere else "rows", None, None), shape)


def constrain_cache(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Tells the compiler that keys or values of rows lie as `cache_sharding` says."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, cache_sharding(mesh, x.shape))


def over_parts(
    function: Callable[..., Any], mesh: Mesh | None, inputs: Sequence[str], output: str
) -> Callable[..., Any]:
    """Runs a function on each part of the rows by itself, without communication.

    Args:
      function: of arrays or tuples of them, a part of each.
      mesh: None calls the function as it is, with all rows as one part.
      inputs: for each argument `slots` (caches of rows), `everywhere` (caches that every part sees whole) or
        `rows` (sharded by the first dimension).
      output: the same for the result.
    """
    if mesh is None:
        return function

    def spec(kind: str, x: Any) -> Any:
        def one(x: Any) -> PartitionSpec:
            if kind == "rows":
                return PartitionSpec(RULES["rows"])
            return cache_sharding(mesh, x.shape, everywhere=kind == "everywhere").spec

        return jax.tree.map(one, x)

    def run(*arguments: Any) -> Any:
        specs = tuple(spec(kind, x) for kind, x in zip(inputs, arguments, strict=True))
        result = spec(output, arguments[inputs.index(output)])
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)(
            *arguments
        )

    return run


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Puts a TrainBatch on the mesh: the shared levels on every device, rollouts sharded by problem."""
    if mesh is None:
        return batch

    def put(x: Any) -> jax.Array:
        per_rollout = x.ndim >= 3 and x.shape[:3] == batch.advantages.shape
        axes = (None, "rows") if per_rollout else ()
        return _put(x, named(mesh, axes + (None,) * (x.ndim - len(axes)), x.shape))

    return jax.tree.map(put, batch)
