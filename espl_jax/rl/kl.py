"""Sample-based estimators of KL(policy || reference); `logprobs.token_kl` sums over the whole vocabulary."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from espl_jax.choices import KL_ESTIMATORS


def kl_estimate(
    logprobs: jax.Array,
    reference_logprobs: jax.Array,
    estimator: str,
    sampler_logprobs: jax.Array | None = None,
) -> jax.Array:
    """Estimates KL(policy || reference) per token (Schulman 2020, "Approximating KL divergence").

    With d = reference_logprob - logprob of a token sampled from the policy:

    - `k1`: -d. Unbiased; high variance, and either sign.
    - `k2`: d^2 / 2. Never negative; in expectation equal to the KL up to terms of third order in d.
    - `k3`: exp(d) - 1 - d. Never negative, and unbiased.

    As losses, their gradients differ from that of the KL, because sampling is not differentiated (Tang and
    Munos 2025, arXiv 2506.09477). On policy, the expected gradient is

    - for `k1`: zero, whatever the reference. Use it as a metric, not as a loss.
    - for `k2`: the gradient of KL(policy || reference). Use this one for training.
    - for `k3`: the gradient of the reverse direction, KL(reference || policy). The two agree only while the
      policies are close; a token that is far more likely under the reference has a gradient of about exp(d).

    Both estimates and gradients are per token, given its context: as in `token_kl`, the effect of a token on
    the contexts of later tokens is not differentiated.

    These expectations hold for tokens sampled from the current policy. For tokens from another policy, such
    as the one before the updates of a batch, pass `sampler_logprobs`: each estimate is then multiplied by the
    importance ratio exp(logprob - sampler_logprob), without gradient, which restores the expectations above.

    Args:
      logprobs: float32 [...], of the sampled tokens under the policy.
      reference_logprobs: float32 [...], of the same tokens under the reference policy, treated as constant.
        Replace logprobs at masked positions by finite numbers before the call.
      estimator: one of `KL_ESTIMATORS`.
      sampler_logprobs: float32 [...], of the same tokens under the policy that sampled them; None if that is
        the current policy.

    Returns:
      float32 [...], in nats.

    Raises:
      ValueError: if the estimator is unknown.
      AssertionError: if shapes differ.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is unknown; choose one of {KL_ESTIMATORS}")
    chex.assert_equal_shape([logprobs, reference_logprobs])
    if sampler_logprobs is not None:
        chex.assert_equal_shape([logprobs, sampler_logprobs])
    difference = jax.lax.stop_gradient(reference_logprobs) - logprobs
    if estimator == "k1":
        estimate = -difference
    elif estimator == "k2":
        estimate = jnp.square(difference) / 2
    else:
        estimate = jnp.expm1(difference) - difference
    if sampler_logprobs is None:
        return estimate
    return jax.lax.stop_gradient(jnp.exp(logprobs - sampler_logprobs)) * estimate
