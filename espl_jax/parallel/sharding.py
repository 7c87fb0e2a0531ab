"""The mesh, and which logical axis goes to which mesh axes in which phase of an iteration."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "expert")

_ROWS = ("data", "fsdp", "expert")

RULES: dict[str, dict[str, tuple[tuple[str, ...], ...]]] = {
    "training": {
        "rows": (_ROWS,),
        "tokens": (_ROWS,),
        "residual": ((*_ROWS, "tensor"), _ROWS),
        "heads": (("tensor",),),
        "kv_heads": (("tensor",),),
        "mlp": (("tensor",),),
        "vocab": (("tensor",),),
        "embed": (("fsdp",),),
        "lookup": (("data", "expert"),),
    },
    "sampling": {
        "rows": (_ROWS,),
        "tokens": (("data", "expert"),),
        "residual": (("data", "expert"),),
        "heads": (("tensor", "fsdp"), ("tensor",)),
        "kv_heads": (("tensor", "fsdp"), ("tensor",)),
        "mlp": (("tensor", "fsdp"), ("tensor",)),
        "vocab": (("tensor", "fsdp"), ("tensor",)),
        "lookup": (("data", "expert"),),
    },
}
"""For each phase, logical axis -> mesh axes: the first choice of which none is taken by an earlier axis of
the same array (in the order of this table), and which divides. An axis without a rule is replicated.

Besides the axes of weights there are `rows` (of rollouts and their caches), `tokens` (of activations),
`residual` (of the residual stream, which is stored for every layer and needs no device's whole share until a
product uses it) and `lookup` (of embeddings just looked up, whose `embed` axis lies as the table's does).

In training, weights are spread over `fsdp` and gathered layer by layer. In sampling that would be done for
every token, so there the layers' products are divided between the devices of `fsdp` too, and small
activations move instead; caches lie by rows in both."""


def make_mesh(
    sizes: dict[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh | None:
    """A mesh over all devices of the run, or None where it has one; or over the devices given.

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
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # No axes of the slice make up one of these, such as 2 on a v6e:4x4: a part of one does.
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(arranged, MESH_AXES, axis_types=types)


def named(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], phase: str = "training"
) -> NamedSharding:
    """The sharding of an array with these logical axes; an axis that does not divide stays whole."""
    spec: list[tuple[str, ...] | None] = [None] * len(shape)
    taken: set[str] = set()
    for axis, choices in RULES[phase].items():
        if axis not in axes:
            continue
        place = axes.index(axis)
        for names in choices:
            if taken.isdisjoint(names) and shape[place] % math.prod(mesh.shape[x] for x in names) == 0:
                spec[place] = names
                taken.update(names)
                break
    # One name by itself, as the compiler writes it.
    return NamedSharding(mesh, PartitionSpec(*(s[0] if s and len(s) == 1 else s for s in spec)))


def mesh_of(x: jax.Array) -> Any:
    """The mesh that an array being traced lies on, to write constraints for; None where there is none to
    divide it between: one device, or a part of the program that sees one device's share already."""
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


def constrain(x: jax.Array, axes: Sequence[str | None], phase: str) -> jax.Array:
    """Tells the compiler where an array of a traced program lies; the identity without a mesh."""
    mesh = mesh_of(x)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, named(mesh, axes, x.shape, phase))


def move(x: jax.Array, to: Sequence[str | None], back: Sequence[str | None], phase: str) -> jax.Array:
    """Tells the compiler that an array of a traced program lies by the axes `to`, and its gradient by `back`;
    the identity without a mesh."""
    mesh = mesh_of(x)
    if mesh is None:
        return x
    return _moved(x, *(named(mesh, axes, x.shape, phase) for axes in (to, back)))


def gather(weight: jax.Array, axes: Sequence[str]) -> jax.Array:
    """A weight of the training phase as its product needs it: whole along `fsdp`.

    Its gradient is summed into the parts again, so that no device ever holds a whole one.
    """
    mesh = mesh_of(weight)
    if mesh is None:
        return weight
    parts = named(mesh, axes, weight.shape)
    whole = named(mesh, [None if axis == "embed" else axis for axis in axes], weight.shape)
    return _moved(weight, whole, parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, to: NamedSharding, back: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, to)


_moved.defvjp(
    lambda x, to, back: (_moved(x, to, back), None),
    lambda to, back, _, g: (jax.lax.with_sharding_constraint(g, back),),
)


def _put(x: Any, sharding: NamedSharding) -> Any:
    """Moves an array there; a mere shape is told where its array would be, to compile for."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if jax.process_count() > 1 and getattr(x, "is_fully_addressable", True):
        # Every process has this array. device_put would compare them first, by sending them around.
        return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)
    return jax.device_put(x, sharding)


def place(tree: Any, declared: Any, mesh: Mesh | None, phase: str = "training") -> Any:
    """Puts params on the mesh as their declarations (with `.axes`) say; the identity without a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda weight, x: _put(x, named(mesh, weight.axes, x.shape, phase)), declared, tree)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Puts a whole copy of every array on each device; the identity without a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def row_shards(mesh: Mesh | None) -> int:
    """Into how many parts rows are sharded: devices along the axes of `rows`."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in _ROWS)


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


def constrain_everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Tells the compiler that each device has a whole copy of these arrays; the identity without a mesh."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


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
                return PartitionSpec(_ROWS)
            return cache_sharding(mesh, x.shape, everywhere=kind == "everywhere").spec

        return jax.tree.map(one, x)

    def run(*arguments: Any) -> Any:
        specs = tuple(spec(kind, x) for kind, x in zip(inputs, arguments, strict=True))
        result = spec(output, arguments[inputs.index(output)])
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)(
            *arguments
        )

    return run
