"""Policy-gradient losses over tokens, as sums and counts, so that microbatches add up exactly.

A loss has a kind (what is summed: `policy_gradient_loss`) and an aggregation (what the sum is divided by:
`denominator`). Both are fields of `Loss`.

Every kind weighs its terms by an importance ratio, and those that clip keep it within [1 - clip_low,
1 + clip_high]. For `importance_sampling` the ratio is policy over sampler. For the other kinds it is policy
over old policy, the trainer's own before the batch's first update: 1 in that update. How far the sampler's
logprobs are from the trainer's does not enter it, and clips nothing; `sampler_weight_cap` corrects for that.

- `importance_sampling` (Zhang et al. 2026, arXiv 2602.14697, equation 3): ratio * advantage of each token.
- `sequence_importance_sampling` (Precup et al. 2000, "Eligibility traces for off-policy policy evaluation"):
  ratio * advantage of each rollout; its ratio is the product of its tokens' ratios.
- `ppo` (Schulman et al. 2017, arXiv 1707.06347): the lesser of ratio * advantage and clipped ratio *
  advantage of each token; with a range that is wider above, that of DAPO (Yu et al. 2025, arXiv 2503.14476).
- `cispo` (MiniMax 2025, arXiv 2506.13585): clipped ratio, without gradient, * advantage * logprob of each
  token. Tokens outside the range keep a gradient.
- `gspo` (Zheng et al. 2025, arXiv 2507.18071): as `ppo`, of each rollout; its ratio is the geometric mean of
  its tokens' ratios.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from espl_jax.choices import AGGREGATIONS, CLIP_RANGES, LOSSES, SEQUENCE_LOSSES


@dataclasses.dataclass(frozen=True)
class Loss:
    """Which loss an update takes. Hashable, to be a static argument under jit.

    Attributes:
      kind: one of `LOSSES`.
      clip_low, clip_high: the ratio is kept within [1 - clip_low, 1 + clip_high]; None for the kind's own.
      aggregation: one of `AGGREGATIONS`; see `denominator`. A sequence kind takes `seq_mean_token_sum`.
      sampler_weight_cap: largest weight for the disagreement of sampler and trainer; 0 for no weights.
      constant_length: tokens that the aggregation `constant_length` counts for every rollout.

    Raises:
      ValueError: for an unknown name, fields that exclude one another, or a bound out of its range.
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
                f"aggregation={self.aggregation!r}: kind={self.kind!r} has one term a rollout, none a token; "
                "give seq_mean_token_sum"
            )
        if self.aggregation == "constant_length" and self.constant_length < 1:
            raise ValueError(
                f"constant_length={self.constant_length}: aggregation='constant_length' divides by it; give "
                "the most tokens that a rollout can have"
            )
        if self.sampler_weight_cap < 0:
            raise ValueError(
                f"sampler_weight_cap={self.sampler_weight_cap}: give a positive one, or 0 for no weights"
            )

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether ratios or weights compare with the old policy: in all but plain `importance_sampling`."""
        return self.kind != "importance_sampling" or self.sampler_weight_cap > 0


def ratio_bounds(kind: str, clip_low: float | None, clip_high: float | None) -> tuple[float, float] | None:
    """The least and the largest ratio of a kind, or None if it does not clip.

    Args:
      kind: one of `LOSSES`.
      clip_low, clip_high: how far below and above one; None for the kind's own of `CLIP_RANGES`.

    Raises:
      ValueError: for an unknown kind, a bound of a kind that does not clip, a `clip_low` that is not within
        0 and 1, or a `clip_high` below 0.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss kind={kind!r} is unknown; choose one of {LOSSES}")
    if kind not in CLIP_RANGES:
        for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
            if value is not None:
                raise ValueError(f"{name}={value}: kind={kind!r} does not clip; give None")
        return None
    low, high = (
        own if x is None else x for own, x in zip(CLIP_RANGES[kind], (clip_low, clip_high), strict=True)
    )
    if not 0 <= low <= 1:
        raise ValueError(f"clip_low={low}: ratios are kept above 1 - clip_low; give one from 0 to 1")
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
    """The loss as a sum over the rollouts' terms, which the caller divides by `denominator`.

    Ratios are those of `logprobs` to `old_logprobs`, or without these to `sampler_logprobs`; a loss that
    `needs_old_logprobs` should be given them, or it clips where sampler and trainer disagree. With a
    `sampler_weight_cap`, every term is multiplied by the importance weight of the old policy over the
    sampler, truncated and without gradient: min(exp(old - sampler), cap) (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"). In a sequence kind that ratio too is the rollout's
    own: the product, or for `gspo` the geometric mean, of its tokens'.

    On policy, where ratios are one, the gradient of every kind is that of -advantage * log pi(rollout); for
    `gspo` it is divided by the number of the rollout's tokens.

    Args:
      logprobs: float32 [R, T], under the params being trained and truncated as when sampling. Gradients flow
        through them alone.
      sampler_logprobs: float32 [R, T], under the distribution drawn from.
      advantages: float32 [R].
      mask: bool [R, T], True for tokens that the policy drew. Elsewhere the inputs may hold anything, NaN
        included.
      kind: one of `LOSSES`.
      old_logprobs: float32 [R, T], as `logprobs`, under the params before the batch's first update; in the
        first update that is `logprobs` itself.
      clip_low, clip_high: the ratio is kept within [1 - clip_low, 1 + clip_high]; None for the kind's own.
      sampler_weight_cap: the largest weight; 0 for no weights. Weights need `old_logprobs`.

    Returns:
      (loss_sum float32 [], count float32 [], metrics): the negated objective summed over rollouts; how many
      rollouts have a token under the mask; and sums over tokens, float32 [], of
        `tokens`: one;
        `ratio`: the importance ratio before clipping, in a sequence kind that of the token's rollout;
        `log_ratio_abs`: |logprob - sampler_logprob|, the disagreement of trainer and sampler;
        `clip_fraction`: whether clipping removed or changed the gradient;
        `sampler_weight`: the truncated weight, only where there are weights.

    Raises:
      ValueError: as `ratio_bounds`, or for weights without `old_logprobs`.
      AssertionError: for other shapes or a mask that is not bool.
    """
    bounds = ratio_bounds(kind, clip_low, clip_high)
    given = [logprobs, sampler_logprobs, mask, *([] if old_logprobs is None else [old_logprobs])]
    chex.assert_rank(given, 2)
    chex.assert_equal_shape(given)
    chex.assert_shape(advantages, logprobs.shape[:1])
    chex.assert_type(mask, bool)
    if sampler_weight_cap and old_logprobs is None:
        raise ValueError(
            f"sampler_weight_cap={sampler_weight_cap}: weights compare the old policy with the sampler; give "
            "old_logprobs, in the first update of a batch the logprobs themselves"
        )

    # Select before computing: what lies outside the mask reaches neither the value nor the gradient.
    def safe(x: jax.Array) -> jax.Array:
        return jnp.where(mask, x, 0.0)

    logprobs, sampler = safe(logprobs), jax.lax.stop_gradient(safe(sampler_logprobs))
    old = sampler if old_logprobs is None else jax.lax.stop_gradient(safe(old_logprobs))
    drawn = mask.any(axis=1, keepdims=True)
    token_advantages = jnp.where(drawn, advantages[:, None], 0.0)  # [R, 1]
    has_term = drawn if kind in SEQUENCE_LOSSES else mask

    def log_ratio(new: jax.Array, before: jax.Array) -> jax.Array:
        """Of each term: [R, T], or [R, 1] in a sequence kind."""
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
    """What the sum of `policy_gradient_loss` over a whole update is divided by, known before its first term.

    - `seq_mean_token_sum`: the rollouts, 1/(N M B) of Zhang et al. 2026 (arXiv 2602.14697, equation 3).
    - `token_mean`: the tokens (DAPO, Yu et al. 2025, arXiv 2503.14476), so that each weighs the same however
      long its rollout is, in an update whose size does not depend on lengths.
    - `constant_length`: rollouts * `loss.constant_length` (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).

    Args:
      loss: its aggregation decides.
      num_rollouts: of the update, those without a gradient included.
      num_tokens: that the policy drew in them.

    Returns:
      float or float32 [], as its arguments are; one instead of zero tokens, whose sum is zero.
    """
    if loss.aggregation == "token_mean":
        return num_tokens + (num_tokens == 0)
    if loss.aggregation == "constant_length":
        return num_rollouts * loss.constant_length
    return num_rollouts
