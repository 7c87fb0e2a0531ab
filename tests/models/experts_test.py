"""Routing and grouped products by hand, and mixtures on eight devices against one."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import experts, grouped, grouped_int8, lora, transformer
from espl_jax.models.config import Experts, Latent, config_from_dict
from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.sampling import draw
from tests.support import tiny
from tests.support.flat import sample_tree

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tiny.CONFIG.replace(vocab_size=64, experts=Experts(count=8, active=2, mlp_dim=12))
DEEPSEEK = CONFIG.replace(  # latent attention, dense layers first, sigmoids, groups and a shared expert
    num_layers=3,
    first_dense=1,
    num_kv_heads=4,
    latent=Latent(kv_rank=8, rope_dim=2, value_dim=5, query_rank=3),
    experts=Experts(
        *(8, 2, 12), scores="sigmoid", scale=2.5, corrected=True, groups=4, active_groups=2, shared_dim=10
    ),
)
TOKENS = np.random.default_rng(0).integers(0, 64, (16, 6)).astype(np.int32)


@pytest.mark.parametrize("normalize", [True, False])
def test_routing_by_hand(normalize):
    """Scores ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8."""
    config = CONFIG.replace(embed_dim=1, experts=Experts(3, 2, 4, normalize))
    router = {"weight": jnp.log(jnp.array([[1.0, 2.0, 5.0]]))}
    routing = experts.route(jnp.array([[1.0], [-1.0]]), router, config)
    np.testing.assert_array_equal(routing.choices, [[2, 1], [0, 1]])
    # The negated scores have probabilities 10/17, 5/17, 2/17.
    chosen = np.array([[5 / 8, 2 / 8], [10 / 17, 5 / 17]])
    wanted = chosen / chosen.sum(1, keepdims=True) if normalize else chosen
    np.testing.assert_allclose(routing.weights, wanted, rtol=1e-6)
    entropy = -sum(p * np.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    np.testing.assert_allclose(routing.entropy[0], entropy, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(3, 0, 4), (0, 0, 0), (0, 9, 0), (2, 3, 4)])
@pytest.mark.parametrize("precision", ["default", "bfloat16"])
def test_grouped_products(sizes, precision):
    """Values and gradients, with empty groups and with rows in no group."""
    rng = np.random.default_rng(1)
    config = CONFIG.replace(matmul_precision=precision)
    # Small integers: exact in bfloat16 too.
    x, weight = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((9, 5), (3, 5, 2)))
    of = np.repeat(np.arange(4), [*sizes, 9 - sum(sizes)])
    each = np.concatenate([weight, np.zeros((1, 5, 2), np.float32)])[of]

    def ours(x, weight):
        return grouped.product(x, weight, jnp.array(sizes, jnp.int32), config)

    wanted = np.einsum("ri,rio->ro", x, each)
    np.testing.assert_array_equal(ours(x, weight), wanted)
    stack = grouped.InStack(jnp.stack([0 * weight, weight]), jnp.int32(1))
    np.testing.assert_array_equal(ours(x, stack), wanted)
    x_bar, weight_bar = jax.grad(lambda *a: (ours(*a) ** 2).sum(), (0, 1))(x, weight)
    np.testing.assert_array_equal(x_bar, np.einsum("ro,rio->ri", 2 * wanted, each))
    outer = np.einsum("ri,ro->rio", x, 2 * wanted)
    np.testing.assert_array_equal(weight_bar, np.stack([outer[of == e].sum(0) for e in range(3)]))


@pytest.mark.parametrize("sizes", [(3, 0, 4), (0, 0, 0), (0, 9, 0), (2, 3, 4)])
@pytest.mark.parametrize("precision", ["default", "bfloat16"])
def test_grouped_products_of_int8(sizes, precision):
    """With scales of powers of two, exact; the same by the TPU kernel, which is interpreted here."""
    rng = np.random.default_rng(1)
    config = CONFIG.replace(matmul_precision=precision)
    x = rng.integers(-4, 5, (9, 5)).astype(np.float32)
    weight, scale = rng.integers(-127, 128, (3, 5, 2), np.int8), 2.0 ** rng.integers(-3, 4, (3, 2))
    scale, g = scale.astype(np.float32), rng.integers(-4, 5, (9, 2)).astype(np.float32)
    of = np.repeat(np.arange(4), [*sizes, 9 - sum(sizes)])
    each = np.concatenate([weight * scale[:, None], np.zeros((1, 5, 2), np.float32)])[of]
    arguments, given = jnp.array(sizes, jnp.int32), (jnp.asarray(weight), jnp.asarray(scale))

    def ours(x):
        return grouped.product(x, given[0], arguments, config, given[1])

    out, pull_back = jax.vjp(ours, jnp.asarray(x))
    wanted, x_bar = np.einsum("ri,rio->ro", x, each), np.einsum("ro,rio->ri", g, each)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(pull_back(jnp.asarray(g))[0], x_bar)
    stacks = [grouped.InStack(jnp.stack([0 * each, each]), jnp.int32(1)) for each in given]
    out = jax.jit(lambda x, *stacks: grouped.product(x, stacks[0], arguments, config, stacks[1]))(x, *stacks)
    np.testing.assert_array_equal(out, wanted)

    # Of the second of two layers; tiles that divide neither rows, inputs nor outputs.
    every = jnp.concatenate([0 * arguments, arguments])
    both = jnp.concatenate([given[0], given[0]])
    for rows, transposed, expected in ((x, False, wanted), (g, True, x_bar)):
        padded = jnp.pad(rows, ((0, 7), (0, 0)))
        kernel = functools.partial(grouped_int8.product, transposed=transposed, interpret=True)
        out = kernel(padded, both, given[1], every, "float32", (8, 3, 1 if transposed else 2))[:9]
        np.testing.assert_array_equal(np.where((of < 3)[:, None], out, 0), expected)


TPU_PROGRAM = """
from espl_jax.plan import tpu_compiler
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from espl_jax.models import grouped
from tests.support import tiny

mesh = Mesh(np.array(tpu_compiler.devices("v5e:2x2")[:1]), ("data",))
config = tiny.CONFIG.replace(dtype="bfloat16")

def run(x, weight, scale, stack, scales, sizes, layer):
    out, pull_back = jax.vjp(lambda x: grouped.product(x, weight, sizes, config, scale), x)
    stacks = (grouped.InStack(each, layer) for each in (stack, scales))
    return pull_back(out), grouped.product(x, next(stacks), sizes, config, next(stacks))

shapes = [((64, 2880), "bfloat16"), ((4, 2880, 768), "int8"), ((4, 768), "float32")]
shapes += [((3, *shapes[1][0]), "int8"), ((3, 4, 768), "float32"), ((4,), "int32"), ((), "int32")]
given = [jax.ShapeDtypeStruct(*each, sharding=NamedSharding(mesh, PartitionSpec())) for each in shapes]
compiled = jax.jit(run).lower(*given).compile()
assert compiled.memory_analysis().temp_size_in_bytes < 2**20, "a copy of matrices"
print(compiled.as_text().count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install libtpu"
)
def test_the_kernel_for_int8_compiles_for_a_tpu():
    """Forward, backward and in a stack, without a copy of matrices in another dtype."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "-c", TPU_PROGRAM]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["3"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_biases_of_groups(dtype):
    """Rows of groups 1, 0, 1 and one in no group; the gradient of a bias is summed over its rows."""
    group, bias = jnp.array([1, 0, 1, 3]), jnp.array([[1.0, 2.0], [10.0, 20.0], [5.0, 5.0]])
    x, g = jnp.ones((4, 2), dtype), jnp.arange(8.0).reshape(4, 2).astype(dtype)
    out, pull_back = jax.vjp(lambda x, bias: grouped.add_bias(x, bias, group), x, bias)
    assert out.dtype == dtype and out.tolist() == [[11, 21], [2, 3], [11, 21], [1, 1]]
    stack = grouped.InStack(jnp.stack([0 * bias, bias]), jnp.int32(1))
    np.testing.assert_array_equal(grouped.add_bias(x, stack, group), out)
    x_bar, bias_bar = pull_back(g)
    np.testing.assert_array_equal(x_bar, g)
    assert bias_bar.tolist() == [[2, 3], [4, 6], [0, 0]]


@pytest.mark.parametrize("bias", [False, True])
def test_equal_experts_are_a_dense_layer(bias):
    """Whatever the router chooses, if all experts are one and their weights add up to 1."""
    dense = tiny.CONFIG.replace(vocab_size=64, mlp_dim=12, mlp_bias=bias)
    config = CONFIG.replace(experts=Experts(count=8, active=2, mlp_dim=12, bias=bias))
    params = tiny.params(dense)
    mlp = jax.tree.map(lambda x: jnp.repeat(x[:, None], 8, axis=1), params["layers"]["mlp"])
    router = tiny.params(config)["layers"]["mlp"]["router"]
    mixed = params | {"layers": params["layers"] | {"mlp": {**mlp, "router": router}}}
    ours, wanted = tiny.logits(mixed, config, TOKENS), tiny.logits(params, dense, TOKENS)
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, DEEPSEEK])
def test_through_json(config):
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert hash(config) == hash(config.replace())


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"experts active=9: give at least 1, and at most.*count=8"):
        Experts(count=8, active=9, mlp_dim=4)
    with pytest.raises(ValueError, match="mlp_bias=True is not supported with experts"):
        CONFIG.replace(mlp_bias=True)
    with pytest.raises(ValueError, match="targets='router': this model has no experts"):
        lora.abstract_adapters(tiny.CONFIG, 2, ("router",))


def test_adapters_of_experts():
    declared = lora.abstract_adapters(CONFIG, 3)["layers"]["mlp"]
    assert set(declared) == {"gate", "up", "down"}, "the router is not adapted unless it is named"
    assert declared["gate"]["lora_a"].axes == ("layers", "experts", "embed", "lora")
    assert declared["down"]["lora_b"].shape == (2, 8, 3, 16)
    adapters = tiny.adapters(CONFIG, targets=("gate", "down", "router"))
    attached = lora.attach(tiny.params(CONFIG), adapters)
    merged = tiny.logits(lora.merge(attached, CONFIG), CONFIG, TOKENS)
    np.testing.assert_allclose(tiny.logits(attached, CONFIG, TOKENS), merged, atol=2e-5)


@functools.partial(jax.jit, static_argnames="config")
def value_and_grads(params, config, tokens):
    def loss(params):
        logits = transformer.logits(params, config, tokens)
        return (logits * jnp.cos(jnp.arange(64))).sum(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def alone(config):
    params = lora.attach(tiny.params(config), tiny.adapters(config))
    (_, logits), grads = value_and_grads(params, config, TOKENS)
    return logits, grads


def placed(config, mesh, phase):
    base = sharding.place(tiny.params(config), abstract(config), mesh, phase)
    declared = lora.abstract_adapters(config, 3)
    return lora.attach(base, sharding.place(tiny.adapters(config), declared, mesh, phase))


BIASED = CONFIG.replace(  # as gpt-oss
    experts=Experts(count=8, active=2, mlp_dim=12, bias=True),
    activation="clamped_swiglu",
    swiglu_limit=0.7,
    attention_sinks=True,
    qkv_bias=True,
    out_bias=True,
    windows=(3, 0),
)

SLOW = pytest.mark.slow
MESHES = [
    pytest.param({"expert": 1, "fsdp": 8}, marks=SLOW),
    {"expert": 2, "fsdp": 2, "tensor": 2},
    pytest.param({"expert": 4, "data": 2}, marks=SLOW),
    pytest.param({"expert": 4, "tensor": 2}, marks=SLOW),
    pytest.param({"expert": 8}, marks=SLOW),
]
CONFIGS = [
    pytest.param(CONFIG, marks=SLOW, id="plain"),
    pytest.param(BIASED, id="biased"),
    pytest.param(DEEPSEEK, marks=SLOW, id="latent"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_eight_devices(sizes, config):
    """Logits in both phases, of rows that divide and rows that do not, and the gradient in all weights."""
    mesh = sharding.make_mesh(sizes)
    logits, grads = alone(config)
    trained = placed(config, mesh, "training")
    gate = trained["layers"]["mlp"]["gate"]["weight"]
    assert gate.addressable_shards[0].data.shape[1] == 8 // mesh.shape["expert"]
    (_, ours), our_grads = value_and_grads(trained, config, sharding.place_rows(TOKENS, mesh))
    np.testing.assert_allclose(ours, logits, atol=1e-5)
    tiny.assert_trees_close(our_grads, grads, 1e-5)

    sampling, params = config.replace(phase="sampling"), placed(config, mesh, "sampling")
    for rows in (16, 3):
        tokens = sharding.place_rows(TOKENS[:rows], mesh)
        np.testing.assert_allclose(tiny.logits(params, sampling, tokens), logits[:rows], atol=1e-5)


def test_no_choice_is_dropped_if_all_go_to_one_device():
    """Every token chooses the same two experts, which lie on one of four devices."""
    params = tiny.params(CONFIG)
    router = params["layers"]["mlp"]["router"]
    params["layers"]["mlp"]["router"] = {"weight": jnp.zeros_like(router["weight"])}  # ties: experts 0 and 1
    wanted = tiny.logits(params, CONFIG, TOKENS)
    mesh = sharding.make_mesh({"expert": 4, "data": 2})
    spread = sharding.place(params, abstract(CONFIG), mesh)
    ours = tiny.logits(spread, CONFIG, sharding.place_rows(TOKENS, mesh))
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [{}, pytest.param({"expert": 2, "fsdp": 2, "tensor": 2}, marks=SLOW)], ids=str
)
def test_chunks_of_tokens(sizes, monkeypatch):
    """As many chunks as there can be: the same logits and gradients, tokens in their order."""
    monkeypatch.setattr(experts, "ROW_BYTES", 1)
    config = BIASED.replace(max_positions=1999)  # compiled for this test alone
    mesh = sharding.make_mesh(sizes) if sizes else None
    params = placed(config, mesh, "training")
    jaxpr = str(jax.make_jaxpr(lambda: transformer.logits(params, config, TOKENS))())
    assert jaxpr.count("scan[") > 1
    (_, ours), our_grads = value_and_grads(params, config, sharding.place_rows(TOKENS, mesh))
    logits, grads = alone(BIASED)
    np.testing.assert_allclose(ours, logits, atol=1e-5)
    tiny.assert_trees_close(our_grads, grads, 1e-5)


def test_replayed_choices_on_eight_devices():
    """Experts that the routers did not choose, for half of the tokens."""
    replay = np.random.default_rng(1).permuted(np.tile(np.arange(8), (2, 16, 6, 1)), axis=-1)[..., :2]
    replay[:, ::2] = -1
    mesh = sharding.make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})
    spread = sharding.place(tiny.params(CONFIG), abstract(CONFIG), mesh)
    wanted = tiny.forward(tiny.params(CONFIG), CONFIG, TOKENS, replay=replay)
    ours = tiny.forward(spread, CONFIG, sharding.place_rows(TOKENS, mesh), replay=replay)
    np.testing.assert_allclose(ours.hidden, wanted.hidden, atol=1e-5)
    np.testing.assert_array_equal(ours.routing.choices, wanted.routing.choices)
    used = np.where(replay < 0, wanted.routing.choices, replay)
    np.testing.assert_array_equal(ours.routing.used, used)
    assert (used[:, 1::2] != wanted.routing.choices[:, 1::2]).any()


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_sampling_on_eight_devices(config):
    """The same rollouts, drawn through the caches of a tree."""
    m, b, n = np.ogrid[:2, :2, :4]
    keys = draw.row_keys(jax.random.key(0, impl="threefry2x32"), m, b, n)
    prompts = [[5, 6, 7, 8], [9]], [[[9, 10], [11]], [[12, 13, 14], [15, 16]]]

    def sample(params, mesh):
        settings = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": (3,), "chunk": 5, "mesh": mesh}
        return sample_tree(params, config.replace(phase="sampling"), *prompts, keys, **settings)

    mesh = sharding.make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})
    spread = sharding.place(tiny.params(config), abstract(config), mesh, "sampling")
    wanted, ours = sample(tiny.params(config), None), sample(spread, mesh)
    np.testing.assert_array_equal(ours.tokens, wanted.tokens)
    np.testing.assert_allclose(ours.logprobs, wanted.logprobs, atol=1e-5)
