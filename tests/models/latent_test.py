"""Latent attention: both ways of attending, what the cache holds, and the choice of experts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import experts, latent, lora, rope
from espl_jax.models.attention import Source
from espl_jax.models.config import Experts, Latent, Rope
from espl_jax.models.params import abstract, stacks
from espl_jax.sampling import decode, sizes
from tests.support import tiny

CONFIG = tiny.CONFIG.replace(
    num_kv_heads=4,
    latent=Latent(kv_rank=7, rope_dim=2, value_dim=5, query_rank=3),
    rope=Rope(theta=500.0, interleaved=True),
)


def test_interleaved_rotation_by_hand():
    """By 90 and 0 degrees; the pairs (1, 2) and (3, 4) become (-2, 1) and (3, 4)."""
    cos, sin = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])
    x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
    np.testing.assert_array_equal(rope.rotate(x, cos, sin, interleaved=True), [[[-2.0, 3.0, 1.0, 4.0]]])
    halves = rope.rotate(x[..., jnp.array([0, 2, 1, 3])], cos, sin)
    np.testing.assert_array_equal(halves, [[[-2.0, 3.0, 1.0, 4.0]]])


@pytest.mark.parametrize(
    ("widths", "precision", "adapted", "stored"),
    [
        (CONFIG.latent, "default", True, "float32"),
        (CONFIG.latent, "default", True, "int8"),
        *(
            pytest.param(Latent(30, 4, 3), "bfloat16", adapted, stored, marks=pytest.mark.slow)
            for adapted, stored in ((False, "float32"), (True, "float32"), (True, "int8"))
        ),
    ],
)
def test_absorbed_is_expanded(widths, precision, adapted, stored, monkeypatch):
    """Hidden states of a tree and their gradients, whichever way all levels attend."""
    config = CONFIG.replace(latent=widths, matmul_precision=precision, remat="none", param_dtype=stored)
    base, adapters = tiny.params(config), tiny.adapters(config) if adapted else {}
    trained = lora.attach(base, adapters) if stored == "float32" else adapters
    rng = np.random.default_rng(0)
    levels = [rng.integers(0, 61, shape).astype(np.int32) for shape in ((1, 5), (2, 4), (4, 6))]
    lengths = [np.array([5]), np.array([4, 2]), np.array([6, 3, 5, 6])]

    def run(absorbs):
        monkeypatch.setattr(latent, "absorbs", lambda *_: absorbs)

        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        @functools.partial(jax.grad, has_aux=True)
        def out(trained):
            params = trained if stored == "float32" else lora.attach(base, trained)
            hidden, _ = tiny.forward_tree(params, config, levels, lengths)
            return jnp.sin(hidden[2][:, :3]).sum(), hidden[2][:, :3]

        return out(trained)

    (grads, hidden), (wanted_grads, wanted) = run(True), run(False)
    exact = precision == "default"
    np.testing.assert_allclose(hidden, wanted, atol=1e-5 if exact else 0.1)
    tiny.assert_trees_close(grads, wanted_grads, 1e-5 if exact else 0.1)


def test_the_cheaper_way():
    """DeepSeek-V3's widths: an expanded column costs 512 * 256, and saves 768 for each query."""
    config = tiny.CONFIG.replace(head_dim=192, num_kv_heads=4, latent=Latent(512, 64, 128, 1536))

    def held(nodes, columns):
        filled = jnp.ones((nodes, columns), bool)
        return Source(jnp.zeros(0), jnp.zeros(0), filled, jnp.zeros(filled.shape, jnp.int32))

    def absorbs(rows, steps, *ancestors):
        return latent.absorbs(rows, steps, ancestors, config)

    assert absorbs(1000, 1, held(1, 100)), "a decode step"
    assert not absorbs(1, 1000), "prefill: nothing to expand but its own tokens"
    assert absorbs(1, 150, held(1, 10_000)) and not absorbs(1, 170, held(1, 10_000))
    assert absorbs(8, 150, held(8, 10_000)), "each row has its own cache"
    assert not absorbs(8, 150, held(1, 10_000)), "eight rows over a shared one"


def test_the_cache_holds_latents_and_rotated_keys():
    """Per token and layer kv_rank + rope_dim numbers, in sampling's slots and in what a level returns."""
    config = CONFIG.replace(dtype="bfloat16")
    numbers = config.num_layers * (7 + 2)
    slots = decode.abstract_slots(config, 3, 10, None)
    assert sum(x.size * x.dtype.itemsize for x in slots) == 3 * 10 * numbers * 2
    cache = tiny.forward(tiny.params(config), config, np.zeros((3, 10), np.int32)).cache
    assert cache.key.shape == (2, 1, 3, 2, 10) and cache.value.shape == (2, 1, 3, 10, 7)
    assert cache.key.nbytes + cache.value.nbytes == 3 * 10 * numbers * 2
    memory = int((100 + 0.1) * (10 + 4) * numbers * 2 / sizes.SHARE + 100 * 12 * 61 / sizes.SHARE)
    assert sizes.slots_that_fit(config, 10, 4, False, 0, memory, None) == 100


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"num_kv_heads=2: with latent attention .* num_heads=4"):
        CONFIG.replace(num_kv_heads=2)
    with pytest.raises(ValueError, match="latent rope_dim=2: is a part of a head; give less than head_dim=2"):
        CONFIG.replace(head_dim=2)
    with pytest.raises(ValueError, match="supports neither qk_norm, nor windows, nor attention_sinks"):
        CONFIG.replace(qk_norm=True)
    with pytest.raises(ValueError, match=r"first_dense=1: .* or 0 without experts"):
        CONFIG.replace(first_dense=1)
    with pytest.raises(ValueError, match="experts scores='tanh' is unknown; choose one of"):
        Experts(4, 2, 8, scores="tanh")
    with pytest.raises(ValueError, match="latent kv_rank=0: give at least 1"):
        Latent(0, 2, 5)


class TestAdapters:
    def test_targets_of_other_families_stand_for_latents(self):
        def of(*targets, config=CONFIG):
            return set(lora.abstract_adapters(config, 2, targets)["layers"]["attention"])

        assert of("query") == {"query_down", "query_up"}
        assert of("key") == of("value") == {"kv_down", "kv_up"}
        assert of("kv_up") == {"kv_up"}
        direct = CONFIG.replace(latent=Latent(7, 2, 5))
        assert of("query", "value", config=direct) == {"query", "kv_down", "kv_up"}

    def test_models_without_latents_have_no_such_targets(self):
        with pytest.raises(ValueError, match="targets='kv_up': this model has no such latents; name query"):
            lora.abstract_adapters(tiny.CONFIG, 2, ("kv_up",))


def test_two_stacks():
    config = CONFIG.replace(num_layers=5, first_dense=2, experts=Experts(4, 2, 8, shared_dim=6))
    assert stacks(config) == {"first_layers": range(2), "layers": range(2, 5)}
    declared = abstract(config)
    assert set(declared["first_layers"]["mlp"]) == {"gate", "up", "down"}
    assert set(declared["layers"]["mlp"]) == {"gate", "up", "down", "router", "shared"}
    assert declared["first_layers"]["mlp"]["up"]["weight"].shape == (2, 16, 20)
    up = declared["layers"]["mlp"]["up"]["weight"]
    assert up.shape == (3, 4, 16, 8) and up.members[:5] == [(2, 0), (2, 1), (2, 2), (2, 3), (3, 0)]
    assert up.adapter(2)["lora_a"].members == up.members


class TestRouting:
    """Six experts in three groups; the sigmoids of ln(p / (1 - p)) are p."""

    PROBABILITIES = np.array([0.9, 0.1, 0.6, 0.5, 0.7, 0.2])

    def route(self, correction=(0.0,) * 6, **changes):
        settings = {"scores": "sigmoid", "corrected": True, "groups": 3, "active_groups": 2} | changes
        config = tiny.CONFIG.replace(embed_dim=1, experts=Experts(6, 2, 4, **settings))
        logits = np.log(self.PROBABILITIES / (1 - self.PROBABILITIES))
        router = {"weight": jnp.asarray(logits)[None], "correction": jnp.asarray(correction)}
        return experts.route(jnp.ones((1, 1)), router, config)

    def test_groups(self):
        """Their sums of two are 1.0, 1.1 and 0.9: the best expert of the last one is not available."""
        routing = self.route(scale=2.5)
        assert routing.choices.tolist() == [[0, 2]]
        np.testing.assert_allclose(routing.weights, [[2.5 * 0.9 / 1.5, 2.5 * 0.6 / 1.5]], rtol=1e-5)
        assert self.route(groups=1, active_groups=1).choices.tolist() == [[0, 4]]
        assert self.route(active_groups=1).choices.tolist() == [[2, 3]]

    def test_the_correction_changes_the_choice_and_not_the_weights(self):
        routing = self.route((0.0, 0.0, 0.0, 0.0, 0.0, 5.0), normalize=False)
        assert routing.choices.tolist() == [[5, 2]] or routing.choices.tolist() == [[5, 4]]
        assert routing.choices[0, 0] == 5
        np.testing.assert_allclose(routing.weights[0, 0], 0.2, rtol=1e-5)

    def test_no_gradient_reaches_the_correction(self):
        grad = jax.grad(lambda correction: self.route(correction).weights.sum())(jnp.full(6, 0.1))
        np.testing.assert_array_equal(grad, np.zeros(6))

    def test_sigmoids_that_are_all_zero_have_finite_weights(self):
        config = tiny.CONFIG.replace(embed_dim=1, experts=Experts(4, 2, 4, scores="sigmoid"))
        routing = experts.route(jnp.ones((1, 1)), {"weight": jnp.full((1, 4), -200.0)}, config)
        np.testing.assert_array_equal(routing.weights, [[0, 0]])
