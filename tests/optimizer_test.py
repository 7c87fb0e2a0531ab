import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espl_jax.optimizer import make_optimizer

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
GRADS = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([12.0])}  # norm 13


def first_momentum(optimizer):
    """Adam's mean after one step, over one minus its decay: the gradient that it was given."""
    _, state = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    return optax.tree.get(state, "mu")


@pytest.mark.parametrize(("limit", "factor"), [(1.0, 1 / 13), (13.5, 1.0), (0.0, 1.0)])
def test_clipping_by_the_norm_over_all_tensors(limit, factor):
    momentum = first_momentum(make_optimizer(1e-3, b1=0.5, max_grad_norm=limit))
    np.testing.assert_allclose(momentum["a"], 0.5 * factor * GRADS["a"], rtol=1e-6)
    np.testing.assert_allclose(momentum["b"], 0.5 * factor * GRADS["b"], rtol=1e-6)


def rates(optimizer, steps):
    """The largest change of each step; with a constant gradient Adam's is the learning rate."""
    state, found = optimizer.init(PARAMS), []
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state, PARAMS)
        found.append(float(jnp.abs(updates["b"]).max()))
    return found


def test_learning_rate_and_warm_up():
    np.testing.assert_allclose(rates(make_optimizer(1e-3), 3), [1e-3] * 3, rtol=1e-4)
    np.testing.assert_allclose(
        rates(make_optimizer(8e-4, warmup_steps=4), 6), [2e-4, 4e-4, 6e-4, 8e-4, 8e-4, 8e-4], rtol=1e-4
    )
    np.testing.assert_allclose(rates(make_optimizer(8e-4, warmup_steps=1), 2), [8e-4] * 2, rtol=1e-4)
