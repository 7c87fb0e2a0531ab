"""The mesh, and the rules that map logical axes to mesh axes in each phase of an iteration."""

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
        "experts": (("expert",),),
        "expert_mlp": (("tensor",),),
        "shared_mlp": (("tensor",),),
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
        "experts": (("expert",),),
        "expert_mlp": (("tensor", "fsdp"), ("tensor",)),
        "shared_mlp": (("tensor", "fsdp"), ("tensor",)),
        "vocab": (("tensor", "fsdp"), ("tensor",)),
        "lookup": (("data", "expert"),),
        "draws": ((*_ROWS, "tensor"), _ROWS),
    },
}
"""For each phase, logical axis -> choices of mesh axes. An axis takes the first choice that divides its size
and whose mesh axes are not used by another axis of the array (axes are assigned in the order of this table).
An axis without a rule is replicated.

Besides the axes of weights there are `rows` (rollouts and their caches), `tokens` (activations in matmuls),
`residual` (the residual stream, which is stored for every layer and therefore sharded further between
matmuls), `lookup` (embeddings just looked up, whose `embed` axis is sharded like the table's) and `draws`
(the logits that tokens are drawn from, of all rows and positions).

In training, weights are sharded over `fsdp` and all-gathered layer by layer. Sampling would have to gather
them for every token, so there `fsdp` acts as additional tensor parallelism, and small activations are moved
instead. Caches are sharded by rows in both phases."""


def make_mesh(
    sizes: dict[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh | None:
    """Returns a mesh over the given devices, or over all devices of the run; None if the run has only one.

    Args:
      sizes: mesh axis -> number of devices, 1 for missing axes; one of them may be -1 and takes the rest. By
        default all devices go to `fsdp`.
      devices: devices of a TPU topology, for ahead-of-time compilation.

    Raises:
      ValueError: if an axis is unknown, or the product of the sizes is not the number of devices.
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
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} does not match the {len(devices)} devices; "
            "give sizes whose product is that number (one of them may be -1)"
        )
    if here and len(devices) == 1:
        return None
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # No physical axes of the slice have this size, such as 2 on a v6e:4x4: split a physical axis.
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(arranged, MESH_AXES, axis_types=types)


def named(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], phase: str = "training"
) -> NamedSharding:
    """Returns the sharding of an array with these logical axes; indivisible axes are not sharded."""
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
    # A single name instead of a tuple of one, as the compiler writes it.
    return NamedSharding(mesh, PartitionSpec(*(s[0] if s and len(s) == 1 else s for s in spec)))


def mesh_of(x: jax.Array) -> Any:
    """Returns the mesh of a traced array, for sharding constraints; None on a single device or inside
    `shard_map`."""
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


def axes_of(
    mesh: Any, axes: Sequence[str | None], shape: Sequence[int], phase: str
) -> tuple[tuple[str, ...], ...]:
    """Returns the mesh axes over which each dimension is sharded by `named`; empty if it is not sharded."""
    spec = named(mesh, axes, shape, phase).spec
    return tuple((each,) if isinstance(each, str) else tuple(each or ()) for each in spec)


def splits(x: jax.Array, dimension: int, axis: str, phase: str) -> bool:
    """Returns whether a dimension of a traced array, of this logical axis, is sharded in a phase."""
    mesh = mesh_of(x)
    if mesh is None:
        return False
    (names,) = axes_of(mesh, (axis,), (x.shape[dimension],), phase)
    return any(mesh.shape[name] > 1 for name in names)


def constrain(x: jax.Array, axes: Sequence[str | None], phase: str) -> jax.Array:
    """Constrains the sharding of a traced array; the identity without a mesh."""
    mesh = mesh_of(x)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, named(mesh, axes, x.shape, phase))


def move(x: jax.Array, to: Sequence[str | None], back: Sequence[str | None], phase: str) -> jax.Array:
    """Constrains a traced array to the axes `to` and its cotangent to `back`; the identity without a mesh."""
    mesh = mesh_of(x)
    if mesh is None:
        return x
    return _moved(x, *(named(mesh, axes, x.shape, phase) for axes in (to, back)))


def gather(weight: jax.Array, axes: Sequence[str]) -> jax.Array:
    """All-gathers a weight along `fsdp` for its matmul in the training phase.

    The gradient is reduce-scattered to the weight's sharding, so that no device holds all of it.
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
    """Puts an array on devices with a sharding; a `ShapeDtypeStruct` gets the sharding as an attribute."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if jax.process_count() > 1 and getattr(x, "is_fully_addressable", True):
        # Every process has this array. device_put would first compare the copies across processes.
        return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)
    return jax.device_put(x, sharding)


def place(tree: Any, declared: Any, mesh: Mesh | None, phase: str = "training") -> Any:
    """Shards params by the logical axes of their declarations (`.axes`); the identity without a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda weight, x: _put(x, named(mesh, weight.axes, x.shape, phase)), declared, tree)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Replicates arrays over all devices; the identity without a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def row_shards(mesh: Mesh | None) -> int:
    """Returns the number of row shards: the product of the mesh axes of `rows`; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in _ROWS)


def replicas(mesh: Mesh | None) -> int:
    """Returns how many copies of dense weights there are while sampling; each serves its part of the rows."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["expert"]


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Shards the first dimension of arrays over the axes of `rows`; the identity without a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _put(x, named(mesh, ("rows",) + (None,) * (x.ndim - 1), x.shape)), tree)


def cache_sharding(mesh: Mesh, shape: tuple[int, ...], everywhere: bool = False) -> NamedSharding:
    """Returns the sharding of keys or values [L, K, rows, ., .], or of their scales [L, K, rows, .]: by kv
    heads, and by rows unless `everywhere`.

    The rules are those of the training phase in both phases.
    """
    axes = (None, "kv_heads", None if everywhere else "rows", None, None)
    return named(mesh, axes[: len(shape)], shape)


def constrain_cache(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Constrains keys or values of rows to `cache_sharding`; the identity without a mesh."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, cache_sharding(mesh, x.shape))


def constrain_everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Constrains arrays to be replicated; the identity without a mesh."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def over_parts(
    function: Callable[..., Any], mesh: Mesh | None, inputs: Sequence[str], output: str
) -> Callable[..., Any]:
    """Wraps a function with `shard_map`, to run on each row shard separately, without communication.

    Args:
      function: takes arrays or tuples of them, one shard of each.
      mesh: None returns the function unchanged, with all rows in one shard.
      inputs: kind of each argument: `slots` (caches sharded by rows), `everywhere` (caches not sharded by
        rows) or `rows` (sharded by the first dimension).
      output: kind of the result, which has the structure and shapes of the first argument of that kind.
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
