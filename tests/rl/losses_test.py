import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.rl.losses import policy_gradient_loss

LOGPROBS = jnp.log(jnp.array([[0.5, 0.4, 0.9], [0.2, 0.3, 0.9], [0.9, 0.9, 0.9]]))
SAMPLER = jnp.log(jnp.array([[0.25, 0.4, 0.9], [0.4, 0.3, 0.9], [0.9, 0.9, 0.9]]))
ADVANTAGES = jnp.array([2.0, -1.0, 5.0])
MASK = jnp.array([[True, True, False], [True, False, False], [False, False, False]])


def test_by_hand():
    loss, count, metrics = policy_gradient_loss(LOGPROBS, SAMPLER, ADVANTAGES, MASK)
    # Ratios 2 and 1 with advantage 2, and 0.5 with advantage -1.
    assert loss == pytest.approx(-(2 * 2 + 2 * 1 - 0.5), rel=1e-6)
    assert count == 2
    assert metrics["tokens"] == 3
    assert metrics["ratio"] == pytest.approx(3.5, rel=1e-6)
    assert metrics["log_ratio_abs"] == pytest.approx(2 * np.log(2), rel=1e-6)


def gradient(logprobs, sampler, advantages):
    return jax.grad(lambda x: policy_gradient_loss(x, sampler, advantages, MASK)[0])(logprobs)


def test_gradient_by_hand():
    expected = [[-4, -2, 0], [0.5, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(gradient(LOGPROBS, SAMPLER, ADVANTAGES), expected, rtol=1e-6)
    # On policy it is that of advantage * log pi.
    expected = [[-2, -2, 0], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(gradient(LOGPROBS, LOGPROBS, ADVANTAGES), expected, rtol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nothing_outside_the_mask_is_seen(poison):
    clean = policy_gradient_loss(LOGPROBS, SAMPLER, ADVANTAGES, MASK)
    dirty = (
        jnp.where(MASK, LOGPROBS, poison),
        jnp.where(MASK, SAMPLER, poison),
        jnp.array([2.0, -1.0, poison]),
    )
    for ours, expected in zip(
        jax.tree.leaves(policy_gradient_loss(*dirty, MASK)), jax.tree.leaves(clean), strict=True
    ):
        assert ours == expected
    np.testing.assert_array_equal(gradient(*dirty), gradient(LOGPROBS, SAMPLER, ADVANTAGES))


def test_microbatches_add_up():
    whole = policy_gradient_loss(LOGPROBS, SAMPLER, ADVANTAGES, MASK)
    parts = [
        policy_gradient_loss(LOGPROBS[rows], SAMPLER[rows], ADVANTAGES[rows], MASK[rows])
        for rows in (slice(0, 1), slice(1, 3))
    ]
    added = jax.tree.map(lambda a, b: a + b, *parts)
    for ours, expected in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        assert ours == pytest.approx(float(expected), rel=1e-6)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind='reinforce' is unknown; choose one of"):
        policy_gradient_loss(LOGPROBS, SAMPLER, ADVANTAGES, MASK, kind="reinforce")
