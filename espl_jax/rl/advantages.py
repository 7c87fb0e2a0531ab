"""Advantages of rollouts over a baseline (Zhang et al. 2026, arXiv 2602.14697, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax.choices import BASELINES, NORMALIZATIONS

EPSILON = 1e-6
"""Added to a standard deviation before dividing by it."""


def advantages(
    rewards: jax.Array | np.ndarray,
    baseline: str = "per_prompt",
    prompt_ids: jax.Array | np.ndarray | None = None,
    normalize: str = "none",
) -> jax.Array:
    """Rewards less the baseline; by default not divided by their standard deviation, as in the paper.

    Args:
      rewards: float [M, B, N].
      baseline: `per_prompt`, the mean over the rollouts of the same system prompt and problem; or
        `marginalized`, the mean over all system prompts' rollouts of the problem.
      prompt_ids: int [M]; slots with the same number hold copies of one prompt and are pooled. All
        different by default.
      normalize: `none`; `std`, divided by the standard deviation of the rewards that the baseline is the mean
        of (GRPO, Shao et al. 2024, arXiv 2402.03300); or `batch_std`, divided by that of all rewards (Liu et
        al. 2025, arXiv 2508.08221), which leaves the problems' weights to one another as they are. Standard
        deviations are those of the population, the root of the mean square, plus `EPSILON`.

    Returns:
      float32 [M, B, N]; exactly zero for a group whose rewards are all equal.

    Raises:
      ValueError: for an unknown baseline or normalization, or rewards of another rank.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r} is unknown; choose one of {BASELINES}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize={normalize!r} is unknown; choose one of {NORMALIZATIONS}")
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 3:
        raise ValueError(f"rewards of shape {rewards.shape}: need [num_prompts, batch_size, group_size]")
    slots = rewards.shape[0]
    ids = jnp.arange(slots) if prompt_ids is None else jnp.asarray(prompt_ids)
    same = ids[:, None] == ids[None, :] if baseline == "per_prompt" else jnp.ones((slots, slots), bool)
    # Differences first: a group of equal rewards gives exact zeros, whatever the mean would round to.
    gaps = rewards[:, :, :, None, None] - rewards.transpose(1, 0, 2)[None, :, None]  # [M, B, N, M', N']
    gaps = jnp.where(same[:, None, None, :, None], gaps, 0.0)
    centered = gaps.sum(axis=(3, 4)) / (same.sum(axis=1) * rewards.shape[2])[:, None, None]
    if normalize == "batch_std":
        return centered / (rewards.std() + EPSILON)
    if normalize == "std":
        squares = jnp.square(centered).mean(axis=2)  # [M, B]
        pooled = jnp.where(same[:, :, None], squares, 0.0).sum(axis=1) / same.sum(axis=1)[:, None]
        return centered / (jnp.sqrt(pooled)[:, :, None] + EPSILON)
    return centered
