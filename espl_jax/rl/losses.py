"""Policy-gradient losses over tokens, as sums and counts, so that microbatches add up exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp

KINDS = ("importance_sampling",)


def policy_gradient_loss(
    logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    kind: str = "importance_sampling",
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The loss whose gradient is that of equation 3 of Zhang et al. 2026, before the division by N M B.

    `importance_sampling` sums `exp(logprob - sampler_logprob) * advantage` over the tokens of each rollout.
    On policy the ratio is one up to rounding, and the gradient that of `advantage * log pi(rollout)`.

    Args:
      logprobs: float32 [R, T], under the params being trained and truncated as when sampling.
      sampler_logprobs: float32 [R, T], under the distribution drawn from.
      advantages: float32 [R].
      mask: bool [R, T], True for tokens that the policy drew. Elsewhere the inputs may hold anything, NaN
        included.
      kind: one of `KINDS`.

    Returns:
      (loss_sum float32 [], count float32 [], metrics): the negated objective summed over rollouts; how many
      rollouts have a token under the mask; sums over tokens of `ratio`, `log_ratio_abs` and `tokens`.

    Raises:
      ValueError: for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"loss kind={kind!r} is unknown; choose one of {KINDS}")
    # Select before computing: what lies outside the mask reaches neither the value nor the gradient.
    log_ratio = jnp.where(mask, logprobs, 0.0) - jnp.where(mask, sampler_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    objective = jnp.where(mask, ratio * advantages[:, None], 0.0)
    metrics = {
        "tokens": mask.sum().astype(jnp.float32),
        "ratio": jnp.where(mask, ratio, 0.0).sum(),
        "log_ratio_abs": jnp.abs(log_ratio).sum(),
    }
    return -objective.sum(), mask.any(axis=1).sum().astype(jnp.float32), jax.lax.stop_gradient(metrics)
