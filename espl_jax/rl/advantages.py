"""Advantages of rollouts over a baseline (Zhang et al. 2026, arXiv 2602.14697, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BASELINES = ("per_prompt", "marginalized")


def advantages(
    rewards: jax.Array, baseline: str = "per_prompt", prompt_ids: jax.Array | None = None
) -> jax.Array:
    """Rewards less the baseline, not divided by their standard deviation.

    Args:
      rewards: float [M, B, N].
      baseline: `per_prompt`, the mean over the rollouts of the same system prompt and problem; or
        `marginalized`, the mean over all system prompts' rollouts of the problem.
      prompt_ids: int [M]; slots with the same number hold copies of one prompt and are pooled. All
        different by default.

    Returns:
      float32 [M, B, N]; exactly zero for a group whose rewards are all equal.

    Raises:
      ValueError: for an unknown baseline or rewards of another rank.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r} is unknown; choose one of {BASELINES}")
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 3:
        raise ValueError(f"rewards of shape {rewards.shape}: need [num_prompts, batch_size, group_size]")
    slots = rewards.shape[0]
    ids = jnp.arange(slots) if prompt_ids is None else jnp.asarray(prompt_ids)
    same = ids[:, None] == ids[None, :] if baseline == "per_prompt" else jnp.ones((slots, slots), bool)
    # Differences first: a group of equal rewards gives exact zeros, whatever the mean would round to.
    gaps = rewards[:, :, :, None, None] - rewards.transpose(1, 0, 2)[None, :, None]  # [M, B, N, M', N']
    gaps = jnp.where(same[:, None, None, :, None], gaps, 0.0)
    return gaps.sum(axis=(3, 4)) / (same.sum(axis=1) * rewards.shape[2])[:, None, None]
