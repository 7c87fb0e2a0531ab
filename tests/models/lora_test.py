import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.choices import LORA_TARGETS
from espl_jax.models import lora
from espl_jax.models.config import Experts
from tests.support import tiny

CONFIG = tiny.CONFIG.replace(tied_head=False, lora_scale=0.5)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 10)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return tiny.params(CONFIG)


def names(tree):
    """Adapted weights by name."""
    return {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_fresh_adapters_change_nothing(params):
    adapters = lora.init(jax.random.key(0), CONFIG, 3)
    assert names(adapters) == set(LORA_TARGETS[:7])
    np.testing.assert_array_equal(
        tiny.logits(lora.attach(params, adapters), CONFIG, TOKENS), tiny.logits(params, CONFIG, TOKENS)
    )
    for path, x in jax.tree_util.tree_leaves_with_path(adapters):
        assert x.dtype == jnp.float32
        assert bool(x.any()) == (path[-1].key == "lora_a")
    assert np.abs(adapters["layers"]["mlp"]["down"]["lora_a"]).max() <= CONFIG.mlp_dim**-0.5


@pytest.mark.parametrize("targets", [("query",), ("down", "head"), LORA_TARGETS[:8]])
def test_merged_equals_attached(params, targets):
    adapters = tiny.adapters(CONFIG, targets=targets)
    assert names(adapters) == set(targets)
    attached = lora.attach(params, adapters)
    merged = lora.merge(attached, CONFIG)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    plain, expected = tiny.logits(params, CONFIG, TOKENS), tiny.logits(attached, CONFIG, TOKENS)
    np.testing.assert_allclose(tiny.logits(merged, CONFIG, TOKENS), expected, atol=1e-5)
    assert np.abs(plain - expected).max() > 0.01
    untouched = "key" if "key" not in targets else "final"
    if untouched == "key":
        weight = "layers", "attention", "key", "weight"
        kept, original = merged, params
        for name in weight:
            kept, original = kept[name], original[name]
        assert kept is original


def test_shapes():
    declared = lora.abstract_adapters(CONFIG, 3, LORA_TARGETS[:8])
    attention, mlp = declared["layers"]["attention"], declared["layers"]["mlp"]
    shapes = {
        ("query", "lora_a"): (2, 16, 3),
        ("query", "lora_b"): (2, 3, 4, 6),
        ("key", "lora_b"): (2, 3, 2, 6),
        ("out", "lora_a"): (2, 4, 6, 3),
        ("out", "lora_b"): (2, 3, 16),
        ("down", "lora_a"): (2, 20, 3),
        ("down", "lora_b"): (2, 3, 16),
    }
    for (name, leaf), shape in shapes.items():
        assert (attention | mlp)[name][leaf].shape == shape
    assert attention["query"]["lora_b"].axes == ("layers", "lora", "heads", "head")
    assert declared["head"]["lora_a"].shape == (16, 3)
    assert declared["head"]["lora_b"].shape == (3, 61)


def test_detach_is_the_inverse_of_attach(params):
    adapters = tiny.adapters(CONFIG, targets=LORA_TARGETS[:8])
    base, back = lora.detach(lora.attach(params, adapters))
    for ours, original in ((base, params), (back, adapters)):
        assert jax.tree.structure(ours) == jax.tree.structure(original)
        # The same buffers: the reference policy costs no memory.
        assert all(a is b for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(original), strict=True))
    assert lora.detach(params) == (params, {})
    assert "lora_a" not in params["head"]


def test_the_gradient_is_of_the_adapters_alone(params):
    adapters = tiny.adapters(CONFIG)
    loss = jax.jit(lambda a, p: jnp.square(tiny.logits(lora.attach(p, a), CONFIG, TOKENS)).mean())
    grads = jax.grad(loss)(adapters, params)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("config", "rank", "targets", "message"),
    [
        (tiny.CONFIG, 2, ("query", "head"), "ties its head to the embedding"),
        (CONFIG, 2, ("query", "gates"), r"targets=\('query', 'gates'\)"),
        (CONFIG, 2, (), r"targets=\(\): choose some of"),
        (CONFIG, 0, ("query",), "rank=0"),
    ],
)
def test_what_cannot_be_adapted_is_refused(config, rank, targets, message):
    with pytest.raises(ValueError, match=message):
        lora.init(jax.random.key(0), config, rank, targets)


def test_biases_stay_beside_adapters():
    config = tiny.CONFIG.replace(qkv_bias=True, mlp_bias=True, lora_scale=0.5)
    params = tiny.params(config)
    attached = lora.attach(params, tiny.adapters(config))
    base, _ = lora.detach(attached)
    assert jax.tree.structure(base) == jax.tree.structure(params)
    merged = lora.merge(attached, config)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    expected = tiny.logits(attached, config, TOKENS)
    np.testing.assert_allclose(tiny.logits(merged, config, TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("experts", [None, Experts(count=3, active=2, mlp_dim=5)])
def test_merged_int8_weights_are_rounded_again(experts):
    """Their error is at most half a scale of the sum; weights without an adapter are the same arrays."""
    config = CONFIG.replace(param_dtype="int8", experts=experts)
    params = tiny.params(config)
    attached = lora.attach(params, tiny.adapters(config, targets=("down", "query", "head")))
    merged = lora.merge(attached, config)
    assert jax.tree.map(jnp.dtype, merged) == jax.tree.map(jnp.dtype, params)
    float_config = config.replace(param_dtype="float32")
    exact = lora.merge(lora.attach(tiny.in_float(params, config), lora.detach(attached)[1]), float_config)
    for path, inputs in ((("layers", "mlp", "down"), -2), (("head",), -1)):
        ours, wanted = (functools.reduce(dict.get, path, x) for x in (tiny.in_float(merged, config), exact))
        node = functools.reduce(dict.get, path, merged)
        scale = np.expand_dims(np.abs(wanted["weight"]).max(inputs) / 127, inputs)
        np.testing.assert_allclose(np.expand_dims(node["weight_scale"], inputs), scale, rtol=1e-5)
        assert (np.abs(ours["weight"] - wanted["weight"]) <= 0.501 * scale).all()
    up = "layers", "mlp", "up", "weight_scale"
    assert functools.reduce(dict.get, up, merged) is functools.reduce(dict.get, up, params)
