"""Estimates of KL(policy || reference) from the tokens drawn alone; the whole sum is `logprobs.token_kl`."""

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
    """Per token, an estimate of KL(policy || reference) (Schulman 2020, "Approximating KL divergence").

    With d = reference_logprob - logprob of a token drawn from the policy:

    - `k1`: -d. Its mean is the KL, its variance large, its sign either.
    - `k2`: d^2 / 2. Never negative; its mean is the KL only up to third order in d.
    - `k3`: exp(d) - 1 - d. Never negative, and its mean is the KL.

    Differentiated as a loss they do something else (Tang and Munos 2025, arXiv 2506.09477), since nothing
    differentiates the drawing. On policy the mean of the gradient is

    - of `k1`: zero, whatever the reference. It is no loss, only a number to look at.
    - of `k2`: that of KL(policy || reference). It is the one to train with.
    - of `k3`: that of the other direction, KL(reference || policy), which agrees with the wanted one only
      while the two are close; a token that the reference likes far better has a gradient of about exp(d).

    All of this is per token, its context given: that an earlier token changes the contexts of later ones
    enters no gradient, as it enters none of `token_kl`.

    Tokens that another policy drew, such as the one before the updates of a batch, have other means. With
    `sampler_logprobs` each estimate is multiplied by its importance ratio exp(logprob - sampler_logprob),
    without gradient, and the means are those above again.

    Args:
      logprobs: float32 [...], of the tokens drawn, under the policy.
      reference_logprobs: float32 [...], of the same tokens under the reference; no gradient flows through
        them. Outside of a mask replace all logprobs by finite numbers beforehand.
      estimator: one of `KL_ESTIMATORS`.
      sampler_logprobs: float32 [...], of the same tokens under what drew them; None if the policy did.

    Returns:
      float32 [...], in nats.

    Raises:
      ValueError: for an unknown estimator.
      AssertionError: for shapes that differ.
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
