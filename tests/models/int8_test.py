"""Int8 weights: rounding by hand, and models against those with the float weights that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import int8, lora, transformer
from espl_jax.models.attention import KVCache
from espl_jax.models.config import Experts, Latent
from espl_jax.models.params import SCALE, abstract, init
from espl_jax.parallel import sharding
from espl_jax.rl.logprobs import target_logprobs, token_kl
from espl_jax.sampling.layout import for_sampling
from tests.support import ragged_tree, tiny

QUICKLY = {"xla_backend_optimization_level": 0}
DENSE = tiny.CONFIG.replace(vocab_size=64, param_dtype="int8", lora_scale=0.5)
CONFIGS = {
    "tied": DENSE,
    "untied": DENSE.replace(tied_head=False, qkv_bias=True, qk_norm=True, embed_scale=3.0),
    "experts": DENSE.replace(experts=Experts(count=8, active=2, mlp_dim=12, bias=True)),
    "latent": DENSE.replace(
        num_layers=3,
        num_kv_heads=4,
        latent=Latent(kv_rank=8, rope_dim=2, value_dim=5, query_rank=3),
        first_dense=1,
        experts=Experts(8, 2, 12, scores="sigmoid", corrected=True, groups=4, active_groups=2, shared_dim=10),
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 64, (16, 6)).astype(np.int32)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_rounding_by_hand(array):
    """Scales 1, 2 and 0; 2.5 and -3.5 are halfway, and go to even numbers."""
    weight = array(np.array([[127, 2.5, -3.5], [-254, 3, 5.1], [0, 0, 0]], np.float32).T)
    values, scale = int8.quantize(weight, (-2,))
    assert (values.dtype, scale.dtype, type(values)) == (np.int8, np.float32, type(weight))
    assert scale.tolist() == [1, 2, 0]
    assert values.T.tolist() == [[127, 2, -4], [-127, 2, 3], [0, 0, 0]]
    back = int8.dequantize(values, scale, (-2,))
    assert back.dtype == np.float32 and back.T.tolist() == [[127, 2, -4], [-254, 4, 6], [0, 0, 0]]
    again = int8.quantize(back, (-2,))
    assert all(np.array_equal(x, y) for x, y in zip(again, (values, scale), strict=True))


def test_scales_of_stacks_with_several_inputs():
    """Each layer and each output has its own scale; the error is at most half of it."""
    weight = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(jnp.bfloat16)
    values, scale = int8.quantize(weight, (-3, -2))
    wide = weight.astype(np.float32)
    np.testing.assert_allclose(scale, np.abs(wide).max((1, 2)) / 127, rtol=1e-6)
    assert np.abs(values).max((1, 2)).tolist() == [[127] * 5] * 2
    error = np.abs(int8.dequantize(values, scale, (-3, -2)) - wide)
    assert (error <= 0.5001 * scale[:, None, None]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_declarations(dtype):
    """Matmul weights have scales next to them; norms, biases and routers keep the compute dtype."""
    config = CONFIGS["latent"].replace(dtype=dtype, qkv_bias=True)
    declared = abstract(config)
    layer = declared["layers"]
    up = layer["attention"]["kv_up"]
    assert (up["weight"].dtype, up[SCALE].dtype) == ("int8", "float32")
    assert up[SCALE].axes == ("layers", "heads", "key_and_value") and up[SCALE].shape == (2, 4, 9)
    gate = layer["mlp"]["gate"]
    assert gate[SCALE].axes == ("layers", "experts", "expert_mlp") and not gate[SCALE].inputs
    assert declared["embedding"][SCALE].axes == ("vocab",)
    assert SCALE not in layer["mlp"]["router"] and layer["mlp"]["router"]["weight"].dtype == dtype
    assert layer["mlp"]["router"]["correction"].dtype == "float32"
    assert layer["attention"]["kv_down"]["bias"].dtype == layer["mlp_norm"]["scale"].dtype == dtype
    params = init(jax.random.key(0), config)
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), params)
    assert shapes == jax.tree.map(lambda w: (w.shape, w.dtype), declared)
    # Adapters are declared as without rounding.
    plain = lora.abstract_adapters(config.replace(param_dtype="float32"), 3)
    assert lora.abstract_adapters(config, 3) == plain


def both(name, adapted=True, **changes):
    """The configuration and params in int8, and those in float32 that compute the same."""
    config = CONFIGS[name].replace(**changes)
    params = tiny.params(config)
    pairs = [(config, params), (config.replace(param_dtype="float32"), tiny.in_float(params, config))]
    if not adapted:
        return pairs
    return [(each, lora.attach(of_each, tiny.adapters(config))) for each, of_each in pairs]


@pytest.mark.parametrize("name", CONFIGS)
def test_flat_tree_and_cached_logits(name):
    batch = ragged_tree.random_tree(3, 64, (2, 2, 2), (5, 4, 6))
    levels = [x.reshape(-1, x.shape[-1]) for x in (batch.system_tokens, batch.problem_tokens, batch.inputs)]
    lengths = [x.reshape(-1) for x in (batch.system_lengths, batch.problem_lengths, batch.mask.sum(-1))]

    @functools.partial(jax.jit, static_argnames="config", compiler_options=QUICKLY)
    def run(params, config):
        hidden, caches = tiny.forward_tree(params, config, levels, lengths)
        # A decode step, after the first two levels and a row's own cache of no tokens yet.
        rows, (heads, *widths) = len(levels[2]), config.cache_shape
        own = [jnp.zeros((config.num_layers, heads, rows, 4, width)) for width in widths]
        own = KVCache(own[0].swapaxes(3, 4), own[1], caches[2].start, jnp.zeros(rows, jnp.int32))
        one = levels[2][:, :1]
        step = transformer.forward(params, config, one, ancestors=(*caches[:2], own)).hidden
        logits = transformer.logits(params, config, TOKENS)
        return [transformer.unembed(params, config, x) for x in (hidden[2], step)], logits

    (config, params), (plain, floats) = both(name)
    ours, wanted = run(params, config), run(floats, plain)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


@functools.partial(jax.jit, static_argnames="config", compiler_options=QUICKLY)
def value_and_grads(adapters, base, config, tokens):
    """Of a policy loss with the exact KL to the reference policy, in the adapters; also the hidden states."""

    def loss(adapters):
        params = lora.attach(base, adapters)
        hidden, reference = (transformer.forward(x, config, tokens[:, :-1]).hidden for x in (params, base))
        logprobs = target_logprobs(params, config, hidden, tokens[:, 1:], 0.7).logprobs
        kl = token_kl(params, hidden, base, reference, config)
        return (logprobs * jnp.cos(jnp.arange(5)) + kl).sum(), hidden

    return jax.value_and_grad(loss, has_aux=True)(adapters)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tied", {"remat": "rounded"}),
        ("untied", {"matmul_precision": "highest", "remat": "products"}),
        ("experts", {}),
        ("latent", {}),
    ],
)
def test_gradients_of_adapters(name, changes):
    (config, params), (plain, floats) = both(name, adapted=False, **changes)
    adapters = tiny.adapters(config)
    (value, hidden), grads = value_and_grads(adapters, params, config, TOKENS)
    (wanted, wanted_hidden), wanted_grads = value_and_grads(adapters, floats, plain, TOKENS)
    np.testing.assert_allclose(value, wanted, rtol=1e-4)
    np.testing.assert_allclose(hidden, wanted_hidden, atol=2e-5)
    tiny.assert_trees_close(grads, wanted_grads, 2e-5)


@pytest.mark.parametrize("name", ["untied", "latent"])
@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
def test_a_decode_step_in_the_layout_of_sampling(name, layout):
    (config, params), (plain, floats) = both(name, sampling_layout=layout)

    @functools.partial(jax.jit, static_argnames="config", compiler_options=QUICKLY)
    def run(params, config):
        return transformer.logits(params, config, TOKENS[:, :1])

    laid_out = for_sampling(params, config)
    if layout == "unstacked":
        query = laid_out[0]["layers"]["attention"]["out"]
        assert query["outputs_first"][0].dtype == np.int8 and query[SCALE].shape == (2, 16)
    wanted = run(*for_sampling(floats, plain))
    np.testing.assert_allclose(run(*laid_out), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("precision", ["default", "bfloat16"])
def test_in_bfloat16(precision):
    """Rounded operands of either kind differ by little; the result is not a product of rounded scales."""
    (config, params), (plain, floats) = both("untied", dtype="bfloat16", matmul_precision=precision)
    ours, wanted = tiny.logits(params, config, TOKENS), tiny.logits(floats, plain, TOKENS)
    exact = tiny.logits(floats, plain.replace(dtype="float32", matmul_precision="default"), TOKENS)
    assert ours.dtype == jnp.float32
    assert tiny.relative_error(ours, exact) < 1.5 * tiny.relative_error(wanted, exact) < 0.1


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("untied", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("experts", {"expert": 2, "fsdp": 2, "tensor": 2}),
        pytest.param("latent", {"expert": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_are_one(name, sizes):
    """The update, and logits in the phase of sampling, with weights and scales sharded by their axes."""
    config = CONFIGS[name]
    params, adapters = tiny.params(config), tiny.adapters(config)
    mesh = sharding.make_mesh(sizes)
    base = sharding.place(params, abstract(config), mesh, "sampling")
    up = base["layers"]["mlp"]["up"]
    *stack, _, outputs = up["weight"].sharding.spec
    assert tuple(up[SCALE].sharding.spec) == (*stack, outputs) and outputs == ("tensor", "fsdp")
    spread = sharding.place(adapters, lora.abstract_adapters(config, 3), mesh)
    tokens = sharding.place_rows(jnp.asarray(TOKENS), mesh)
    (value, _), grads = value_and_grads(spread, base, config, tokens)
    (wanted, _), wanted_grads = value_and_grads(adapters, params, config, TOKENS)
    np.testing.assert_allclose(value, wanted, rtol=1e-4)
    tiny.assert_trees_close(grads, wanted_grads, 1e-4)
    sampling = config.replace(phase="sampling")
    ours, alone = tiny.logits(base, sampling, tokens), tiny.logits(params, sampling, TOKENS)
    np.testing.assert_allclose(ours, alone, atol=1e-5 * np.abs(alone).max())
