"""Policy-gradient losses over tokens, returned as sums and counts so that microbatches add up exactly.

A loss has a kind, which defines the terms of the sum (`policy_gradient_loss`), and an aggregation, which
defines its divisor (`denominator`). Both are fields of `Loss`.

Every kind weights its terms by an importance ratio; kinds that clip keep the ratio in [1 - clip_low,
1 + clip_high]. For `importance_sampling` the ratio is policy over sampler. For the other kinds it is policy
over old policy, which is the trainer's policy before the batch's first update, so the ratio is 1 in that
update. The numerical difference between sampler and trainer therefore causes no clipping in these kinds;
`sampler_weight_cap` corrects for it separately.

- `importance_sampling` (Zhang et al. 2026, arXiv 2602.14697, equation 3): ratio * advantage per token.
- `sequence_importance_sampling` (Precup et al. 2000, "Eligibility traces for off-policy policy evaluation"):
  ratio * advantage per rollout, where the ratio is the product of the token ratios.
- `ppo` (Schulman et al. 2017, arXiv 1707.06347): min(ratio * advantage, clipped ratio * advantage) per token.
  With clip_high > clip_low, this is the clip-higher of DAPO (Yu et al. 2025, arXiv 2503.14476).
- `cispo` (MiniMax 2025, arXiv 2506.13585): clipped ratio, without gradient, * advantage * logprob per token.
  Tokens outside the range keep a gradient.
- `gspo` (Zheng et al. 2025, arXiv 2507.18071): as `ppo`, but per rollout, where the ratio is the geometric
  mean of the token ratios.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from espl_jax.choices import AGGREGATIONS, CLIP_RANGES, LOSSES, SEQUENCE_LOSSES


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of an update. Hashable, so that it can be a static argument under jit.

    Attributes:
      kind: one of `LOSSES`.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; None for the kind's default.
      aggregation: one of `AGGREGATIONS`; see `denominator`. Sequence kinds require `seq_mean_token_sum`.
      sampler_weight_cap: cap of the importance weight of trainer over sampler; 0 for no weights.
      constant_length: tokens per rollout that the aggregation `constant_length` divides by.

    Raises:
      ValueError: if a name is unknown, fields are incompatible, or a bound is out of range.
    """

    kind: str = "importance_sampling"
    clip_low: float | None = None
    clip_high: float | None = None
    aggregation: str = "seq_mean_token_sum"
    sampler_weight_cap: float = 0.0
    constant_length: int = 0

    def __post_init__(self) -> None:
        ratio_bounds(self.kind, self.clip_low, self.clip_high)
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation={self.aggregation!r} is unknown; choose one of {AGGREGATIONS}")
        if self.kind in SEQUENCE_LOSSES and self.aggregation != "seq_mean_token_sum":
            raise ValueError(
                f"aggregation={self.aggregation!r}: kind={self.kind!r} has one term per rollout, not per "
                "token; use seq_mean_token_sum"
            )
        if self.aggregation == "constant_length" and self.constant_length < 1:
            raise ValueError(
                f"constant_length={self.constant_length}: aggregation='constant_length' divides by it; set "
                "it to the most tokens that a rollout can have"
            )
        if self.sampler_weight_cap < 0:
            raise ValueError(
                f"sampler_weight_cap={self.sampler_weight_cap}: give a positive cap, or 0 for no weights"
            )

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether ratios or weights use the old policy: true except for unweighted `importance_sampling`."""
        return self.kind != "importance_sampling" or self.sampler_weight_cap > 0


def ratio_bounds(kind: str, clip_low: float | None, clip_high: float | None) -> tuple[float, float] | None:
    """Returns the bounds that a kind clips ratios to, or None if it does not clip.

    Args:
      kind: one of `LOSSES`.
      clip_low, clip_high: distances of the bounds below and above 1; None for the kind's default in
        `CLIP_RANGES`.

    Raises:
      ValueError: if the kind is unknown, a bound is given for a kind that does not clip, `clip_low` is not in
        [0, 1], or `clip_high` is negative.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss kind={kind!r} is unknown; choose one of {LOSSES}")
    if kind not in CLIP_RANGES:
        for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
            if value is not None:
                raise ValueError(f"{name}={value}: kind={kind!r} does not clip; set it to None")
        return None
    low, high = (
        own if x is None else x for own, x in zip(CLIP_RANGES[kind], (clip_low, clip_high), strict=True)
    )
    if not 0 <= low <= 1:
        raise ValueError(f"clip_low={low}: ratios are kept above 1 - clip_low; give a number from 0 to 1")
    if not high >= 0:
        raise ValueError(f"clip_high={high}: ratios are kept below 1 + clip_high; give 0 or more")
    return 1.0 - low, 1.0 + high


def policy_gradient_loss(
    logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    kind: str = "importance_sampling",
    *,
    old_logprobs: jax.Array | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    sampler_weight_cap: float = 0.0,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Returns the loss as a sum over terms, which the caller divides by `denominator`.

    Ratios compare `logprobs` with `old_logprobs` if given, else with `sampler_logprobs`. Pass `old_logprobs`
    for a loss that `needs_old_logprobs`; otherwise it clips tokens on which sampler and trainer differ
    numerically. With a `sampler_weight_cap`, every term is multiplied by the importance weight of the old
    policy over the sampler, truncated and without gradient: min(exp(old - sampler), cap) (Yao et al. 2025,
    "Your efficient RL framework secretly brings you off-policy RL training"). In sequence kinds this weight
    also belongs to the whole rollout: the product (for `gspo`, the geometric mean) over its tokens.

    On policy, where ratios are 1, every kind has the gradient of -advantage * log pi(rollout); for `gspo` it
    is divided by the number of tokens of the rollout.

    Args:
      logprobs: float32 [R, T], under the params being trained, truncated as in sampling. The only argument
        with a gradient.
      sampler_logprobs: float32 [R, T], under the sampling distribution.
      advantages: float32 [R].
      mask: bool [R, T], True for tokens that the policy sampled. Other positions of the inputs are ignored
        and may hold NaN.
      kind: one of `LOSSES`.
      old_logprobs: float32 [R, T], like `logprobs`, under the params before the batch's first update; in the
        first update, pass `logprobs` itself.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; None for the kind's default.
      sampler_weight_cap: the largest weight; 0 for no weights. Weights require `old_logprobs`.

    Returns:
      (loss_sum float32 [], count float32 [], metrics): the negated objective summed over rollouts; the number
      of rollouts with at least one unmasked token; and sums over tokens, float32 [], of
        `tokens`: 1;
        `ratio`: the importance ratio before clipping, in sequence kinds that of the token's rollout;
        `log_ratio_abs`: |logprob - sampler_logprob|, the mismatch between trainer and sampler;
        `clip_fraction`: 1 where clipping removed or changed the gradient;
        `sampler_weight`: the truncated weight, only with a cap.

    Raises:
      ValueError: as `ratio_bounds`, or if a cap is given without `old_logprobs`.
      AssertionError: if shapes differ or the mask is not bool.
    """
    bounds = ratio_bounds(kind, clip_low, clip_high)
    given = [logprobs, sampler_logprobs, mask, *([] if old_logprobs is None else [old_logprobs])]
    chex.assert_rank(given, 2)
    chex.assert_equal_shape(given)
    chex.assert_shape(advantages, logprobs.shape[:1])
    chex.assert_type(mask, bool)
    if sampler_weight_cap and old_logprobs is None:
        raise ValueError(
            f"sampler_weight_cap={sampler_weight_cap}: weights compare the old policy with the sampler; pass "
            "old_logprobs (in the first update of a batch, logprobs itself)"
        )

    # Select before computing, so that masked values reach neither the loss nor the gradient.
    def safe(x: jax.Array) -> jax.Array:
        return jnp.where(mask, x, 0.0)

    logprobs, sampler = safe(logprobs), jax.lax.stop_gradient(safe(sampler_logprobs))
    old = sampler if old_logprobs is None else jax.lax.stop_gradient(safe(old_logprobs))
    drawn = mask.any(axis=1, keepdims=True)
    token_advantages = jnp.where(drawn, advantages[:, None], 0.0)  # [R, 1]
    has_term = drawn if kind in SEQUENCE_LOSSES else mask

    def log_ratio(new: jax.Array, before: jax.Array) -> jax.Array:
        """Returns the log ratio of each term: [R, T], or [R, 1] in sequence kinds."""
        difference = new - before
        if kind not in SEQUENCE_LOSSES:
            return difference
        total = difference.sum(axis=1, keepdims=True)
        return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1) if kind == "gspo" else total

    log_ratios = log_ratio(logprobs, old)
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratios))
    clipped = jnp.zeros_like(has_term)
    if kind == "cispo":
        assert bounds is not None
        low, high = bounds
        clipped = ((ratio < low) | (ratio > high)) & (token_advantages != 0)
        objective = jnp.clip(ratio, low, high) * token_advantages * logprobs
    elif bounds:
        low, high = bounds
        clipped = ((ratio < low) & (token_advantages < 0)) | ((ratio > high) & (token_advantages > 0))
        kept = jnp.exp(jnp.where(clipped, 0.0, log_ratios))
        objective = jnp.where(clipped, jnp.where(token_advantages > 0, high, low), kept) * token_advantages
    else:
        objective = jnp.exp(log_ratios) * token_advantages

    metrics = {
        "tokens": mask.sum().astype(jnp.float32),
        "ratio": safe(ratio).sum(),
        "log_ratio_abs": jnp.abs(logprobs - sampler).sum(),
        "clip_fraction": (mask & clipped).sum().astype(jnp.float32),
    }
    if sampler_weight_cap:
        weight = jnp.minimum(jnp.exp(log_ratio(old, sampler)), sampler_weight_cap)
        objective = weight * objective
        metrics["sampler_weight"] = safe(weight).sum()
    loss_sum = -jnp.where(has_term, objective, 0.0).sum()
    return loss_sum, drawn.sum().astype(jnp.float32), jax.lax.stop_gradient(metrics)


def denominator(loss: Loss, num_rollouts: jax.Array | float, num_tokens: jax.Array | float):
    """Returns the divisor of the `policy_gradient_loss` summed over an update, known before the first term.

    - `seq_mean_token_sum`: the rollouts, 1/(N M B) of Zhang et al. 2026 (arXiv 2602.14697, equation 3).
    - `token_mean`: the tokens (DAPO, Yu et al. 2025, arXiv 2503.14476). Every token of the update has the
      same weight, however long its rollout is.
    - `constant_length`: rollouts * `loss.constant_length` (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).

    Args:
      loss: its `aggregation` selects the divisor.
      num_rollouts: rollouts of the update, including those without a gradient.
      num_tokens: tokens that the policy sampled in them.

    Returns:
      float or float32 [], like the arguments; 1 instead of 0 tokens, for which the sum is 0 too.
    """
    if loss.aggregation == "token_mean":
        return num_tokens + (num_tokens == 0)
    if loss.aggregation == "constant_length":
        return num_rollouts * loss.constant_length
    return num_rollouts
