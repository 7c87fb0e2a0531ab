"""Optimizers of the policy-gradient step, as optax chains."""

from __future__ import annotations

import functools

import jax
import optax

from espl_jax.choices import OPTIMIZERS, SCHEDULES

DECAYED = ("weight", "lora_a", "lora_b")
"""Names of the leaves with weight decay: matmul weights, but not norm scales and biases."""
MIN_FACTORED = 128
"""Adafactor factors an array over its two longest axes if both have at least this size. It exceeds the number
of layers of the supported models, so the layer axis is never factored."""


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
    """Returns an optimizer that first clips gradients by their global norm. Defaults follow the paper.

    Adafactor keeps no first moment. It stores the second moment as row and column sums for arrays whose two
    longest axes both have at least 128 entries, and in full for other arrays. A stacked weight [layers, in,
    out...] is factored over the two longest of in and out..., separately for each index of the other axes:
    the query weight [layers, embed, heads, head] over embed and head, for every layer and head. Norm scales,
    biases, adapters with a rank below 128 and heads of less than 128 are not factored. The update of an
    array, over all its layers, is scaled down to a root mean square of at most 1 before it is multiplied by
    the learning rate. The learning rate is thus a step size as in Adam, not relative to the weights' scale.

    Args:
      learning_rate: peak learning rate, after the warm-up.
      kind: `adam` (Kingma and Ba 2015, arXiv 1412.6980), `adamw` (Loshchilov and Hutter 2019, arXiv
        1711.05101), or `adafactor` (Shazeer and Stern 2018, arXiv 1804.04235), which has less state.
      b1, b2, eps: decay rates of the first and second moments, and the term added to the denominator, for
        Adam and AdamW. Adafactor uses its own constants.
      weight_decay: for `adamw`, decoupled decay of the leaves named in `DECAYED`.
      max_grad_norm: clips gradients to this global norm; 0 disables clipping.
      schedule: of the learning rate after the warm-up: `constant`, `linear` or `cosine` decay.
      warmup_steps: updates over which the rate rises linearly, starting at `learning_rate / warmup_steps`.
      decay_steps: updates of the whole run, warm-up included. The rate reaches final_rate * learning_rate
        right after the last of them, and stays there. Ignored by the constant schedule.
      final_rate: final learning rate as a fraction of `learning_rate`.

    Raises:
      ValueError: if the kind or schedule is unknown, `weight_decay` is set for a kind other than `adamw`, or
        a schedule has no updates between warm-up and end.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer kind={kind!r} is unknown; choose one of {OPTIMIZERS}")
    if weight_decay and kind != "adamw":
        raise ValueError(f"weight_decay={weight_decay}: {kind} has no weight decay; use kind='adamw', or 0")
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
    """Returns the learning rate as a function of the update, counted from 0; a number if it is constant."""
    if schedule not in SCHEDULES:
        raise ValueError(f"optimizer schedule={schedule!r} is unknown; choose one of {SCHEDULES}")
    falling = decay_steps - warmup_steps
    if schedule != "constant" and falling < 1:
        raise ValueError(
            f"decay_steps={decay_steps}: schedule={schedule!r} decays after warmup_steps={warmup_steps}; "
            "set it to the updates of the whole run, which must be more"
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
    """Returns a tree of bools: whether weight decay applies to the leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
