"""Layers whose windows follow a pattern: the same results as unrolled, and no copy of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import transformer
from espl_jax.models.params import abstract
from tests.support import tiny


@pytest.mark.parametrize("windows", [(3, 0, 3, 0, 3), (2, 2, 4, 2, 2)])
def test_patterns_of_windows_while_sampling(windows):
    """Whole and incomplete last periods, through a cache, against layers that are not scanned."""
    config = tiny.CONFIG.replace(num_layers=5, windows=windows, phase="sampling")
    params = tiny.params(config)
    tokens = jnp.arange(1, 13).reshape(2, 6)
    for level in (tokens, tokens[:, :1]):
        _, cache, _ = tiny.forward(params, config, tokens)
        ours, wanted = (
            tiny.forward(params, config.replace(scan_layers=scan), level, ancestors=[cache])
            for scan in (True, False)
        )
        np.testing.assert_allclose(ours.hidden, wanted.hidden, atol=1e-5)
        tiny.assert_trees_close(ours.cache, wanted.cache, 1e-5)


def test_patterns_of_windows_keep_no_weights_for_the_backward_pass():
    config = tiny.CONFIG.replace(num_layers=16, mlp_dim=1024, windows=(8, 0) * 8)
    shapes = jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape, weight.dtype), abstract(config))
    tokens = jnp.ones((1, 4), jnp.int32)
    gradient = jax.jit(jax.grad(lambda params: transformer.logits(params, config, tokens).sum()))
    temporary = gradient.lower(shapes).compile().memory_analysis().temp_size_in_bytes
    layers = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes["layers"]))
    assert temporary < layers / 2
