"""The prefix tree of a `TrainBatch`: its shared levels, run once, and its rollouts in microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from espl_jax.models.attention import KVCache, of_owners
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import Params, forward
from espl_jax.types import TrainBatch

Arrays = dict[str, tuple[jax.Array, jax.Array]]
"""Keys and values of the shared levels, by the level's name."""

Places = dict[str, tuple[jax.Array, jax.Array]]
"""`start` and `length` of their nodes."""


def shared_levels(params: Params, batch: TrainBatch, config: DecoderConfig) -> tuple[Arrays, Places]:
    """Runs the levels above the rollouts, those that the batch has."""
    arrays, places = {}, {}

    def run(name: str, tokens: jax.Array, lengths: jax.Array, ancestors: Sequence[KVCache]) -> None:
        _, cache = forward(params, config, tokens, lengths, ancestors)
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
    """The levels there are, for rows with these owners. Problems are counted within their shard."""
    return [
        KVCache(*arrays[name], *places[name], owners[name], problem_parts if name == "problem" else 1)
        for name in ("system", "problem")  # outermost first; dicts lose their order on the way through jax
        if name in arrays
    ]


def hidden_states(
    params: Params,
    arrays: Arrays,
    places: Places,
    batch: TrainBatch,
    micro: dict[str, jax.Array],
    config: DecoderConfig,
) -> jax.Array:
    """float [rows, T, D] of a microbatch's rollouts over the shared levels."""
    shards, problem = batch.inputs.shape[0], micro["rollout_problem"]
    system = of_owners(_flat(batch.problem_system), problem, shards)
    ancestors = _ancestors(arrays, places, {"system": system, "problem": problem}, shards)
    return forward(params, config, micro["inputs"], ancestors=ancestors)[0]


def _flat(x: jax.Array) -> jax.Array:
    """[D, R, ...] -> [D * R, ...]."""
    return x.reshape(-1, *x.shape[2:])


def microbatches(batch: TrainBatch, size: int) -> dict[str, jax.Array]:
    """The rollouts' arrays [J, D * size, ...], `size` of each shard in each of J microbatches."""
    names = ("rollout_problem", "inputs", "targets", "mask", "sampler_logprobs", "cutoffs", "advantages")
    arrays = {name: getattr(batch, name) for name in (*names, "old_logprobs")}

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return {name: cut(x) for name, x in arrays.items() if x is not None}


def sum_over_microbatches(function: Callable[[Any], Any], batch: TrainBatch, size: int) -> Any:
    """What the function gives for each microbatch, summed in float32 and then rounded to what it gives.

    Microbatches without a token that counts are skipped.
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
