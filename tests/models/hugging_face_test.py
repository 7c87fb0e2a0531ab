"""Parity with tiny random models of transformers, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from espl_jax.models.transformer import logits
from tests import tiny, torch_llama

VARIANTS = {
    "tied, groups of two": {},
    "a head of its own, unrolled": {"tied_head": False, "scan_layers": False, "remat": False},
    "one kv head": {"num_kv_heads": 1, "rope_theta": 10_000.0},
    "as many kv heads as heads": {"num_kv_heads": 4, "head_dim": 4, "tied_head": False, "norm_eps": 1e-3},
    "three layers, odd group": {
        "embed_dim": 18,
        "num_heads": 3,
        "num_kv_heads": 1,
        "num_layers": 3,
        "scan_layers": False,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits(changes):
    config = tiny.CONFIG.replace(**changes)
    params = tiny.params(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40)).astype(np.int32)
    with torch.no_grad():
        expected = torch_llama.logits(torch_llama.from_params(params, config), tokens).numpy()
    np.testing.assert_allclose(tiny.logits(params, config, tokens), expected, atol=2e-5)


@pytest.mark.parametrize("changes", list(VARIANTS.values())[:2], ids=list(VARIANTS)[:2])
def test_gradients_of_the_likelihood(changes):
    config = tiny.CONFIG.replace(**changes)
    params = tiny.params(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 12)).astype(np.int32)

    def negative_log_likelihood(params):
        scores = jax.nn.log_softmax(logits(params, config, tokens[:, :-1]))
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

    grads = torch_llama.to_names(jax.jit(jax.grad(negative_log_likelihood))(params), config)
    model = torch_llama.from_params(params, config)
    scores = torch.log_softmax(torch_llama.logits(model, tokens[:, :-1]), -1)
    (-scores.gather(-1, torch.tensor(tokens[:, 1:, None], dtype=torch.long)).mean()).backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert set(grads) == set(expected)
    for name in expected:
        assert tiny.relative_error(grads[name], expected[name]) < 1e-4, name
