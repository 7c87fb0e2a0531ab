"""Runs the prefix tree of a `TrainBatch`: the shared levels once, the rollouts in microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from espl_jax.models.attention import KVCache, of_owners
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params
from espl_jax.models.transformer import Level, forward
from espl_jax.types import TrainBatch

Arrays = dict[str, tuple[jax.Array, jax.Array]]
"""Keys and values of the shared levels, by name of the level."""

Places = dict[str, tuple[jax.Array, jax.Array]]
"""`start` and `length` of the nodes of the shared levels, by name of the level."""


def shared_levels(params: Params, batch: TrainBatch, decoder: DecoderConfig) -> tuple[Arrays, Places]:
    """Runs the levels above the rollouts; a level without tokens is left out."""
    arrays, places = {}, {}

    def run(name: str, tokens: jax.Array, lengths: jax.Array, ancestors: Sequence[KVCache]) -> None:
        cache = forward(params, decoder, tokens, lengths, ancestors).cache
        arrays[name], places[name] = (cache.key, cache.value), (cache.start, cache.length)

    if batch.system_tokens.shape[1]:
        run("system", batch.system_tokens, batch.system_lengths, ())
    if batch.problem_tokens.shape[2]:
        above = _ancestors(arrays, places, {"system": batch.problem_system.reshape(-1)})
        run("problem", _flat(batch.problem_tokens), _flat(batch.problem_lengths), above)
    return arrays, places


def _ancestors(
    arrays: Arrays, places: Places, owners: dict[str, jax.Array], problem_parts: int = 1
) -> list[KVCache]:
    """Returns the caches of the existing levels for rows with these owners.

    Problem owners are indices within the shard.
    """
    return [
        KVCache(*arrays[name], *places[name], owners[name], problem_parts if name == "problem" else 1)
        for name in ("system", "problem")  # outermost first; jax sorts dict keys
        if name in arrays
    ]


def rollout_level(
    params: Params,
    arrays: Arrays,
    places: Places,
    batch: TrainBatch,
    micro: dict[str, jax.Array],
    decoder: DecoderConfig,
    replay: bool = False,
) -> Level:
    """Runs the rollouts of a microbatch over the shared levels, with the sampler's experts if `replay`."""
    shards, problem = batch.inputs.shape[0], micro["rollout_problem"]
    system = of_owners(_flat(batch.problem_system), problem, shards)
    ancestors = _ancestors(arrays, places, {"system": system, "problem": problem}, shards)
    routing = jnp.moveaxis(micro["routing"], 2, 0) if replay and "routing" in micro else None
    return forward(params, decoder, micro["inputs"], ancestors=ancestors, replay=routing)


def _flat(x: jax.Array) -> jax.Array:
    """[D, R, ...] -> [D * R, ...]."""
    return x.reshape(-1, *x.shape[2:])


def microbatches(batch: TrainBatch, size: int) -> dict[str, jax.Array]:
    """Splits the arrays of the rollouts into J microbatches: [J, D * size, ...], `size` rows per shard."""
    names = ("rollout_problem", "inputs", "targets", "mask", "sampler_logprobs", "cutoffs", "advantages")
    arrays = {name: getattr(batch, name) for name in (*names, "old_logprobs", "routing")}

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return {name: cut(x) for name, x in arrays.items() if x is not None}


def sum_over_microbatches(function: Callable[[Any], Any], batch: TrainBatch, size: int) -> Any:
    """Sums the function's result over microbatches, in float32, and casts the sum to the result's dtypes.

    Microbatches whose mask is empty are skipped.
    """
    micros = microbatches(batch, size)
    first = jax.tree.map(lambda x: x[0], micros)
    if batch.inputs.shape[1] == size:
        return function(first)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

    def add(total: Any, micro: dict[str, jax.Array]) -> tuple[Any, None]:
        added = jax.lax.cond(
            micro["mask"].any(), lambda: jax.tree.map(jnp.add, total, function(micro)), lambda: total
        )
        return added, None

    total, _ = jax.lax.scan(add, zeros, micros)
    return jax.tree.map(lambda x, shape: x.astype(shape.dtype), total, shapes)
