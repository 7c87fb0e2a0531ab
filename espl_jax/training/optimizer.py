"""The optax chain of the policy-gradient step."""

from __future__ import annotations

import functools

import jax
import optax

from espl_jax.choices import OPTIMIZERS, SCHEDULES

DECAYED = ("weight", "lora_a", "lora_b")
"""Names of the leaves that weight decay shrinks: what products use, not norm scales and biases."""
MIN_FACTORED = 128
"""Adafactor factors an array by its two longest axes if both have this size: more than models have layers."""


@functools.cache  # jit compares optimizers by identity: equal settings share the compiled step
def make_optimizer(
    learning_rate: float,
    *,
    kind: str = "adam",
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    schedule: str = "constant",
    warmup_steps: int = 0,
    decay_steps: int = 0,
    final_rate: float = 0.0,
) -> optax.GradientTransformation:
    """Gradients clipped by their global norm, then an optimizer; the defaults are the paper's settings.

    Adafactor keeps no mean of the gradients. Of their squares it keeps sums over rows and over columns where
    an array's two longest axes have 128 or more, and all of them elsewhere. A stacked weight [layers, in,
    out...] is factored over the two longest of in and out..., each layer, and each index of another axis, by
    itself: the query [layers, embed, heads, head] over embed and head, once for every head. Norm scales,
    biases, adapters of a rank below 128 and heads of less than 128 are not factored. Updates of an array, all
    layers together, are scaled down to a root mean square of one before the learning rate multiplies them,
    which is a step size as for Adam and not relative to the size of the weights.

    Args:
      learning_rate: after the warm-up.
      kind: `adam` (Kingma and Ba 2015, arXiv 1412.6980), `adamw` (Loshchilov and Hutter 2019, arXiv
        1711.05101), or `adafactor` (Shazeer and Stern 2018, arXiv 1804.04235), with less state.
      b1, b2, eps: decays of the gradients' mean and of their squares' mean, and what is added to the root of
        the latter; of Adam and AdamW. Adafactor has constants of its own.
      weight_decay: of `adamw`: each step takes rate * weight_decay times the weight from leaves named as in
        `DECAYED`.
      max_grad_norm: clip gradients to this norm over all tensors; 0 leaves them alone.
      schedule: of the rate after the warm-up: `constant`, or falling by a line (`linear`) or half a cosine
        (`cosine`).
      warmup_steps: updates over which the rate rises linearly from `learning_rate / warmup_steps`.
      decay_steps: updates of the whole run, warm-up included. The rate would reach final_rate * learning_rate
        in the first update after them, and stays there. A constant schedule does not look at it.
      final_rate: where a schedule ends, as a part of the learning rate.

    Raises:
      ValueError: for an unknown kind or schedule, a weight decay of another kind than `adamw`, or a schedule
        with no updates between warm-up and end.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer kind={kind!r} is unknown; choose one of {OPTIMIZERS}")
    if weight_decay and kind != "adamw":
        raise ValueError(f"weight_decay={weight_decay}: {kind} has none; give kind='adamw', or 0")
    rate = _rate(learning_rate, schedule, warmup_steps, decay_steps, final_rate)
    if kind == "adafactor":
        optimizer = optax.adafactor(
            rate, min_dim_size_to_factor=MIN_FACTORED, multiply_by_parameter_scale=False
        )
    elif kind == "adamw":
        optimizer = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_is_decayed)
    else:
        optimizer = optax.adam(rate, b1=b1, b2=b2, eps=eps)
    clip = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    return optax.chain(*clip, optimizer)


def _rate(
    learning_rate: float, schedule: str, warmup_steps: int, decay_steps: int, final_rate: float
) -> optax.ScalarOrSchedule:
    """The rate of each update, counted from 0; a number where it never changes."""
    if schedule not in SCHEDULES:
        raise ValueError(f"optimizer schedule={schedule!r} is unknown; choose one of {SCHEDULES}")
    falling = decay_steps - warmup_steps
    if schedule != "constant" and falling < 1:
        raise ValueError(
            f"decay_steps={decay_steps}: schedule={schedule!r} falls after warmup_steps={warmup_steps}; "
            "give the updates of the whole run, which are more"
        )
    if schedule == "linear":
        after = optax.linear_schedule(learning_rate, final_rate * learning_rate, falling)
    elif schedule == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, falling, final_rate)
    elif warmup_steps:
        after = optax.constant_schedule(learning_rate)
    else:
        return learning_rate
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    return optax.join_schedules([rise, after], [warmup_steps])


def _is_decayed(params: optax.Params) -> optax.Params:
    """A bool for every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
