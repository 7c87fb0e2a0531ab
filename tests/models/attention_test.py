import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import attention
from espl_jax.models.attention import Source, attend
from tests import tiny

ROWS, STEPS, HEADS, KV, HEAD = 6, 9, tiny.CONFIG.num_heads, tiny.CONFIG.num_kv_heads, tiny.CONFIG.head_dim


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs():
    """A level of six nodes under ancestors of two and three, the shared caches only partly filled."""
    level = (
        normal(0, ROWS, STEPS, HEADS, HEAD),
        normal(1, ROWS, STEPS, KV, HEAD),
        normal(2, ROWS, STEPS, KV, HEAD),
    )
    ancestors = []
    for i, (nodes, capacity, lengths) in enumerate([(2, 5, [5, 2]), (6, 4, [0, 1, 4, 2, 3, 0])]):
        filled = np.arange(capacity) < np.array(lengths)[:, None]
        # What is not filled holds numbers that would show.
        key, value = (
            jnp.where(filled[None, :, :, None], normal(seed, KV, nodes, capacity, HEAD), 50.0)
            for seed in (3 + 2 * i, 4 + 2 * i)
        )
        ancestors.append(Source(key, value, jnp.asarray(filled)))
    return level, ancestors


def one_by_one(level, ancestors):
    """Softmax attention written out for one query and one head at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in level)
    out = np.zeros_like(query)
    for row, step, head in np.ndindex(ROWS, STEPS, HEADS):
        shared = head // (HEADS // KV)
        keys, values = [key[row, : step + 1, shared]], [value[row, : step + 1, shared]]
        for source in ancestors:
            node = row // (ROWS // source.filled.shape[0])
            keys.append(np.asarray(source.key)[shared, node][np.asarray(source.filled)[node]])
            values.append(np.asarray(source.value)[shared, node][np.asarray(source.filled)[node]])
        scores = np.concatenate(keys) @ query[row, step, head] / np.sqrt(HEAD)
        weights = np.exp(scores - scores.max())
        out[row, step, head] = weights @ np.concatenate(values) / weights.sum()
    return out


@pytest.mark.parametrize("block", [512, 9, 4])
def test_against_one_query_at_a_time(monkeypatch, block):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    level, ancestors = inputs()
    np.testing.assert_allclose(
        attend(*level, ancestors, tiny.CONFIG), one_by_one(level, ancestors), atol=1e-5
    )
    np.testing.assert_allclose(attend(*level, [], tiny.CONFIG), one_by_one(level, []), atol=1e-5)


def test_gradients_of_blocks(monkeypatch):
    level, ancestors = inputs()

    def loss(level, arrays):
        sources = [Source(k, v, a.filled) for (k, v), a in zip(arrays, ancestors, strict=True)]
        return jnp.sin(attend(*level, sources, tiny.CONFIG)).sum()

    arrays = [(a.key, a.value) for a in ancestors]
    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(level, arrays)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    blocked = jax.jit(jax.grad(lambda *x: loss(*x), argnums=(0, 1)))(level, arrays)
    tiny.assert_trees_close(blocked, expected, 1e-5)
    # Nothing flows into columns that are not filled.
    for (key_bar, value_bar), source in zip(expected[1], ancestors, strict=True):
        unfilled = np.broadcast_to(~np.asarray(source.filled)[None, :, :, None], key_bar.shape)
        assert not np.asarray(key_bar)[unfilled].any()
        assert not np.asarray(value_bar)[unfilled].any()


def test_scores_beyond_the_range_of_exp():
    level, ancestors = inputs()
    query, key, value = level
    large = query * 1000, key, value
    np.testing.assert_allclose(
        attend(*large, ancestors, tiny.CONFIG), one_by_one(large, ancestors), atol=1e-4
    )
