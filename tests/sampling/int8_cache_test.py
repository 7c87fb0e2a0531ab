"""Cached keys and values in int8: what is stored, what attention reads, and how far logprobs move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import int8
from espl_jax.models.attention import RowsView, Source, attend
from espl_jax.models.config import Latent, Rope
from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.sampling import decode, draw
from espl_jax.sampling import sizes as sizing
from tests.support import tiny
from tests.support.flat import sample_tree

FAMILIES = {
    "plain": tiny.CONFIG,
    "windows": tiny.CONFIG.replace(windows=(7, 0), local_rope=Rope(theta=50.0)),
    "latent": tiny.CONFIG.replace(num_kv_heads=4, latent=Latent(7, 2, 5, 3)),
}
SYSTEMS, PROBLEMS, STOP = [[5, 6, 7, 8], [9, 4]], [[[9, 10], [11, 12, 13]], [[12, 13, 14], [15]]], 3


def sample(config, **changes):
    """Conversations of two turns; the second begins with tokens that are prefilled at the end of a slot."""
    settings = {"max_new_tokens": 40, "temperature": 1.0, "stop_ids": (STOP,), "coarse": True} | changes
    keys = draw.row_keys(jax.random.key(0, impl="threefry2x32"), *np.ogrid[:2, :2, :3])

    def respond(place, tokens):
        return [40, 41, 42] if (tokens == STOP).sum() < 2 else None

    mesh, params = settings.get("mesh"), tiny.params(config)
    params = sharding.place(params, abstract(config), mesh)
    return sample_tree(params, config, SYSTEMS, PROBLEMS, keys, respond=respond, **settings)


def rescored(config, samples):
    """Logprobs of the tokens that were drawn, from float sequences without a cache."""
    scores = []
    for m, b, n in np.ndindex(samples.lengths.shape):
        prompt, length = SYSTEMS[m] + PROBLEMS[m][b], samples.lengths[m, b, n]
        row = np.zeros(64, np.int32)
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + length] = samples.tokens[m, b, n, :length]
        logprobs = np.asarray(tiny.token_logprobs(tiny.params(config), config, row[None], 1.0))[0]
        scores.append(logprobs[len(prompt) - 1 :][:40])
    return np.stack(scores).reshape(samples.logprobs.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_near_those_of_the_trainer(family):
    config = FAMILIES[family]
    samples = sample(config.replace(cache_dtype="int8"), draft_tokens=2)
    assert (~samples.drawn & (np.arange(40) < samples.lengths[..., None])).any()
    gap = np.abs(samples.logprobs - rescored(config, samples))[samples.drawn]
    assert 0 < gap.mean() < 0.01 and gap.max() < 0.1


def test_on_eight_devices():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    config = tiny.CONFIG.replace(cache_dtype="int8")
    alone, spread = (sample(config, mesh=where) for where in (None, mesh))
    np.testing.assert_array_equal(spread.tokens, alone.tokens)
    np.testing.assert_allclose(spread.logprobs, alone.logprobs, atol=2e-3)


@pytest.mark.parametrize("window", [0, 3])
def test_attention_reads_int8_with_their_scales(window):
    """The same as over what int8 and scales stand for, with the other half of the slots left alone."""
    rng = np.random.default_rng(0)
    key, value = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 2, 8, 6, 16), (3, 2, 8, 16, 6))
    )
    (key, of_key), (value, of_value) = int8.quantize(key, (-2,)), int8.quantize(value, (-1,))
    start, length = jnp.arange(4), jnp.array([12, 9, 0, 3])
    view = RowsView(key, value, start, length, 13, 2, (of_key, of_value))
    whole = RowsView(
        int8.dequantize(key, of_key, (-2,)), int8.dequantize(value, of_value, (-1,)), start, length, 13, 2
    )
    query = jnp.asarray(rng.normal(size=(4, 2, 4, 6)), jnp.float32)
    own = jnp.asarray(rng.normal(size=(4, 2, 2, 6)), jnp.float32)

    def out(view):
        source = view.source(1, window)
        assert isinstance(source, Source)
        return attend(query, own, own, [source], tiny.CONFIG.replace(phase="sampling"), view.end, window)

    np.testing.assert_allclose(out(view), out(whole), atol=1e-5)


def test_a_slot_takes_half_the_memory():
    config = tiny.CONFIG.replace(cache_dtype="int8", num_layers=3, head_dim=64)
    slots = decode.abstract_slots(config, 5, 32, None)
    assert [x.dtype.name for x in slots] == ["int8", "int8", "float32", "float32"]
    held = sum(x.size * x.dtype.itemsize for x in slots)
    assert held == 5 * 32 * sizing.column_bytes(config)
    assert sizing.column_bytes(config) == 3 * 2 * (2 * 64 + 8)
    shared = decode.abstract_slots(config, 5, 32, None, everywhere=True)
    assert [x.dtype.name for x in shared] == ["float32", "float32"]
