"""The objective that updates minimize."""

from __future__ import annotations

import dataclasses
import functools

import jax

from espl_jax.rl.losses import Loss


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature"],
    meta_fields=["loss", "kl_coef", "kl_estimator", "replay_routing"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The objective that updates minimize: a policy-gradient loss plus a KL penalty to the reference policy.

    Under jit the temperature is a traced value; the other fields are static.

    Attributes:
      loss: kind, clip range and aggregation. If it needs old logprobs and the batch has none, the update
        counts as the first of its batch and uses the current logprobs, without gradient.
      temperature: the sampling temperature, by which the trainer divides its logits too.
      kl_coef: coefficient of KL(policy || reference), summed over the tokens of a rollout.
      kl_estimator: `exact`, over the whole vocabulary, or an estimator of `rl.kl`, weighted by the importance
        ratio of policy over sampler.
      replay_routing: whether each token is processed by the experts that the sampler chose for it (routing
        replay, Ma et al. 2025, arXiv 2510.11370), where the batch has them.
    """

    loss: Loss = Loss()
    temperature: float | jax.Array = 1.0
    kl_coef: float = 0.0
    kl_estimator: str = "exact"
    replay_routing: bool = False
