"""What updates make smaller."""

from __future__ import annotations

import dataclasses
import functools

import jax

from espl_jax.rl.losses import Loss


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature"],
    meta_fields=["loss", "kl_coef", "kl_estimator"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What updates make smaller: a loss, and a penalty for leaving the reference policy.

    Under jit the temperature is an operand; the rest is static.

    Attributes:
      loss: kind, bounds and aggregation. Where it needs old logprobs and the batch has none, this is the
        batch's only update, and they are the logprobs themselves, without gradient.
      temperature: of sampling; logits are divided by it here too.
      kl_coef: weight of KL(policy || reference), summed over a rollout's tokens.
      kl_estimator: `exact`, over the whole vocabulary, or one of `rl.kl`, weighted by policy over sampler.
    """

    loss: Loss = Loss()
    temperature: float | jax.Array = 1.0
    kl_coef: float = 0.0
    kl_estimator: str = "exact"
