"""The optax chain of the policy-gradient step."""

from __future__ import annotations

import optax


def make_optimizer(
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    max_grad_norm: float = 1.0,
    warmup_steps: int = 0,
) -> optax.GradientTransformation:
    """Adam with gradients clipped by their global norm; the defaults are the paper's settings.

    Args:
      learning_rate: after the warm-up.
      b1, b2, eps: Adam's.
      max_grad_norm: clip gradients to this norm over all tensors; 0 leaves them alone.
      warmup_steps: steps over which the rate rises linearly from `learning_rate / warmup_steps`.
    """
    schedule = learning_rate
    if warmup_steps:
        schedule = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    clip = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    return optax.chain(*clip, optax.adam(schedule, b1=b1, b2=b2, eps=eps))
