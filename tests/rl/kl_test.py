import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.choices import KL_ESTIMATORS
from espl_jax.rl.kl import kl_estimate

# d = log 2 at the first token, -log 2 at the second, 0 at the third.
LOGPROBS, REFERENCE = (jnp.log(jnp.array(p)) for p in ([0.25, 0.5, 0.1], [0.5, 0.25, 0.1]))
LOG2 = np.log(2)

BY_HAND = {  # values, and gradients with respect to the logprobs
    "k1": ([-LOG2, LOG2, 0], [1, 1, 1]),
    "k2": ([LOG2**2 / 2, LOG2**2 / 2, 0], [-LOG2, LOG2, 0]),
    "k3": ([2 - 1 - LOG2, 0.5 - 1 + LOG2, 0], [1 - 2, 1 - 0.5, 0]),
}


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_by_hand(estimator):
    values, grads = BY_HAND[estimator]
    np.testing.assert_allclose(kl_estimate(LOGPROBS, REFERENCE, estimator), values, atol=1e-6)
    ours = jax.grad(lambda x, y: kl_estimate(x, y, estimator).sum(), argnums=(0, 1))(LOGPROBS, REFERENCE)
    np.testing.assert_allclose(ours[0], grads, atol=1e-6)
    assert not np.asarray(ours[1]).any()


def test_a_small_difference_is_not_rounded_away():
    # exp(d) - 1 in float32 would be off by half of it.
    assert kl_estimate(jnp.zeros(()), jnp.float32(1e-3), "k3") == pytest.approx(1e-6 / 2, rel=1e-3)


def expectations(estimator, scores, reference_scores, sampler_scores=None):
    """Mean of the estimate and of its gradient to the scores, over tokens drawn from policy or sampler."""
    reference = jax.nn.log_softmax(reference_scores)
    sampler = None if sampler_scores is None else jax.nn.log_softmax(sampler_scores)
    drawn = jax.nn.softmax(scores if sampler_scores is None else sampler_scores)

    def mean(x):
        return (drawn * kl_estimate(jax.nn.log_softmax(x), reference, estimator, sampler)).sum()

    return jax.value_and_grad(mean)(scores)


def kl(scores, reference_scores):
    p, q = jax.nn.log_softmax(scores), jax.nn.log_softmax(reference_scores)
    return (jnp.exp(p) * (p - q)).sum()


@pytest.mark.parametrize("seed", range(3))
def test_means_over_what_the_policy_draws(seed):
    """Checks the docstring's claims about each estimator against the exact gradients of both divergences."""
    scores, reference = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 11)), jnp.float32)
    wanted, reverse = jax.grad(kl)(scores, reference), jax.grad(kl, argnums=1)(reference, scores)
    assert np.abs(wanted - reverse).max() > 0.02
    close = {"atol": 1e-6}
    for estimator in ("k1", "k3"):
        assert expectations(estimator, scores, reference)[0] == pytest.approx(
            float(kl(scores, reference)), rel=1e-5
        )
    np.testing.assert_allclose(expectations("k1", scores, reference)[1], np.zeros(11), **close)
    np.testing.assert_allclose(expectations("k2", scores, reference)[1], wanted, **close)
    np.testing.assert_allclose(expectations("k3", scores, reference)[1], reverse, **close)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_means_over_what_another_policy_draws_are_the_same(estimator):
    scores, reference, sampler = jnp.asarray(np.random.default_rng(3).normal(size=(3, 11)), jnp.float32)
    expected = expectations(estimator, scores, reference)
    value, grads = expectations(estimator, scores, reference, sampler)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    np.testing.assert_allclose(grads, expected[1], atol=1e-6)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="estimator='exact' is unknown; choose one of"):
        kl_estimate(LOGPROBS, REFERENCE, "exact")
