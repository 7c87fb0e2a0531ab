"""Metrics of the routing in mixtures of experts: load, entropy, and agreement of sampler and trainer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from espl_jax.models.experts import Routing

LOAD = "expert_load"
"""Name of the sums from which `load_metrics` makes metrics."""


def routing_sums(
    routing: Routing, count: int, mask: jax.Array, sampler: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Returns sums over tokens of a microbatch.

    Args:
      routing: of the trainer, each array [L, R, T, ...].
      count: E, number of experts of a layer.
      mask: bool [R, T], the tokens that count.
      sampler: int [R, T, L, A], the sampler's choices; negative where unknown.

    Returns:
      `router_entropy`, float32 [], mean over layers, in nats; `expert_load`, float32 [L, E], tokens that
      prefer each expert; with `sampler` also `routing_disagreements`, float32 [], the fraction of the
      sampler's choices that are not among the trainer's.
    """
    chosen = jax.nn.one_hot(routing.choices, count, dtype=jnp.float32).sum(-2)  # [L, R, T, E]
    sums = {
        "router_entropy": jnp.where(mask, routing.entropy.mean(0), 0.0).sum(),
        LOAD: jnp.einsum("lrte,rt->le", chosen, mask.astype(jnp.float32)),
    }
    if sampler is not None:
        theirs = jnp.moveaxis(sampler, 2, 0)[..., None]  # [L, R, T, A, 1]
        agrees = (theirs == routing.choices[..., None, :]).any(-1) | (theirs[..., 0] < 0)
        sums["routing_disagreements"] = jnp.where(mask, (~agrees).mean((0, 3)), 0.0).sum()
    return sums


def load_metrics(load: jax.Array, active: int) -> dict[str, jax.Array]:
    """Returns the load of the busiest and the least busy expert, relative to an even load, mean over layers.

    Args:
      load: float32 [L, E], fraction of the tokens that prefer each expert.
      active: A, number of experts that process a token.
    """
    relative = load * load.shape[1] / active
    return {"expert_load_max": relative.max(1).mean(), "expert_load_min": relative.min(1).mean()}
