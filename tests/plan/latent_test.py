"""What a plan counts of a DeepSeek-V3: both stacks of layers, active experts, and compressed caches once."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from espl_jax.models.attention import KVCache
from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.plan import tpu_compiler
from espl_jax.plan.hlo.traffic import traffic
from espl_jax.pretrained.hf_config import from_hf_config
from espl_jax.sampling import decode
from espl_jax.sampling.layout import for_sampling
from espl_jax.sampling.truncation import HALVINGS
from tests.pretrained.deepseek_v3_test import PUBLISHED

ROWS, COLUMNS, STEPS = 256, 4096, 32
CONFIG = from_hf_config(
    PUBLISHED | {"num_hidden_layers": 5, "first_k_dense_replace": 2}, dtype="bfloat16", param_dtype="bfloat16"
)


def sampled():
    """The mesh, the params and the slots of a run on 16 chips."""
    mesh = sharding.make_mesh({"expert": 16}, tpu_compiler.devices("v5p:2x2x4"))
    declared = abstract(CONFIG)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(w.dtype)), declared)
    params, decoder = for_sampling(sharding.place(shapes, declared, mesh, "sampling"), CONFIG, mesh)
    return mesh, params, decoder, decode.abstract_slots(decoder, ROWS, COLUMNS, mesh)


def lower(number):
    mesh, params, decoder, slots = sampled()
    numbers = sharding.replicate(jax.ShapeDtypeStruct((2,), jnp.int32), mesh)
    system = KVCache(*decode.abstract_slots(decoder, 2, 128, mesh, everywhere=True), numbers, numbers)
    temperature = jax.ShapeDtypeStruct((), jnp.float32)
    rows = decode.abstract_rows(ROWS, mesh)
    return decode.decode_chunk.lower(
        *(params, decoder, system, slots, rows, numbers, temperature),
        columns=COLUMNS - 128,  # a chunk writes behind them
        steps=STEPS,
        mesh=mesh,
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_decode_step():
    (compiled,) = tpu_compiler.compile_each(lower, 1, preload=[__name__])
    assert not compiled.error
    counted = traffic(compiled.text, {"jit(decode_chunk)/while": STEPS, "/while": HALVINGS})
    _, params, _, slots = sampled()
    least = bytes_per_device(params) + bytes_per_device(list(slots))
    assert least < counted.total / STEPS < 1.3 * least
    active = sum(
        math.prod(weight.shape) * (8 / 256 if "experts" in weight.stack else 1)
        for path, weight in jax.tree_util.tree_leaves_with_path(abstract(CONFIG))
        if path[0].key != "embedding"
    )
    pairs = CONFIG.num_layers * CONFIG.num_heads * (64 + 2 * 512) * COLUMNS
    assert counted.flops / STEPS == pytest.approx(2 * ROWS / 16 * (active + pairs), rel=0.05)
