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
    """Returns rewards minus a baseline; by default without dividing by a standard deviation, as in the paper.

    Args:
      rewards: float [M, B, N].
      baseline: `per_prompt`, the mean over the rollouts of the same system prompt and problem; or
        `marginalized`, the mean over the rollouts of all system prompts on the problem.
      prompt_ids: int [M]; entries with the same id are copies of one prompt, and their rollouts are pooled.
        All different by default.
      normalize: `none`; `std`, which divides by the standard deviation of the rewards that the baseline
        averages (GRPO, Shao et al. 2024, arXiv 2402.03300); or `batch_std`, which divides by the standard
        deviation of all rewards (Liu et al. 2025, arXiv 2508.08221) and so keeps the relative weights of
        problems. Standard deviations are population ones (ddof=0), plus `EPSILON`.

    Returns:
      float32 [M, B, N]; exactly zero for a group whose rewards are all equal.

    Raises:
      ValueError: if the baseline or normalization is unknown, or rewards are not of rank 3.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r} is unknown; choose one of {BASELINES}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize={normalize!r} is unknown; choose one of {NORMALIZATIONS}")
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 3:
        raise ValueError(f"rewards.shape={rewards.shape}: pass [num_prompts, batch_size, group_size]")
    slots = rewards.shape[0]
    ids = jnp.arange(slots) if prompt_ids is None else jnp.asarray(prompt_ids)
    same = ids[:, None] == ids[None, :] if baseline == "per_prompt" else jnp.ones((slots, slots), bool)
    # Subtract before averaging: a group of equal rewards gives exact zeros, however its mean is rounded.
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
