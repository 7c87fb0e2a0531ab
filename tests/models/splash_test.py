"""The TPU kernel, interpreted on CPU against plain attention, and compiled for a TPU that is not there."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from espl_jax.models import splash
from espl_jax.models.attention import Source, attend
from espl_jax.parallel import sharding
from tests.conftest import ROOT
from tests.support import tiny

ROWS, STEPS, HEADS, KV, HEAD = 4, 130, 4, 2, 16
CONFIG = tiny.CONFIG.replace(num_heads=HEADS, num_kv_heads=KV, head_dim=HEAD, query_scale=0.3)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The least that the kernel takes, so that a few hundred tokens are several blocks."""
    monkeypatch.setattr(splash, "BLOCK", 128)


def level():
    rng = np.random.default_rng(0)
    shapes = [(ROWS, STEPS, heads, HEAD) for heads in (HEADS, KV, KV)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def ancestors(owners=(None, None)):
    """Two levels, of two nodes and of four, their caches partly filled, and where the next level starts."""
    rng = np.random.default_rng(1)
    sources, end = [], np.zeros(2, np.int32)
    levels = [(2, 70, [70, 33]), (4, 9, [0, 1, 9, 5])]
    for (nodes, capacity, lengths), owner in zip(levels, owners, strict=True):
        filled = np.arange(capacity) < np.array(lengths)[:, None]
        start = np.repeat(end, nodes // len(end))
        end = start + lengths
        key, value = (rng.normal(size=(KV, nodes, capacity, HEAD)) for _ in range(2))
        # What is not filled holds numbers that would show.
        key, value = (jnp.asarray(np.where(filled[..., None], x, 50.0), jnp.float32) for x in (key, value))
        owner = None if owner is None else jnp.array(owner)
        positions = jnp.asarray(start[:, None] + np.arange(capacity))
        sources.append(Source(key.swapaxes(2, 3), value, jnp.asarray(filled), positions, owner))
    return sources, jnp.asarray(end)


@pytest.mark.parametrize("owners", [(None, None), ([1, 0, 0, 1], None), ([0, 1, 1, 1], [3, 0, 2, 2])])
def test_over_ragged_ancestors(owners):
    sources, start = ancestors(owners)
    expected = attend(*level(), sources, CONFIG, start)
    np.testing.assert_allclose(
        splash.splash_attend(*level(), sources, CONFIG, interpret=True), expected, atol=2e-6
    )


@pytest.mark.parametrize("window", [0, 1, 40])
def test_over_itself(window):
    expected = attend(*level(), [], CONFIG, jnp.zeros(ROWS, jnp.int32), window)
    ours = splash.splash_attend(*level(), [], CONFIG, window, interpret=True)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


SINKS = jnp.array([-1.0, 0.0, 2.0, 4.0])


@pytest.mark.parametrize("window", [0, 40])
def test_sinks(window):
    start = jnp.zeros(ROWS, jnp.int32)
    expected = attend(*level(), [], CONFIG, start, window, SINKS)
    ours = splash.splash_attend(*level(), [], CONFIG, window, SINKS, interpret=True)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    sources, start = ancestors()
    expected = attend(*level(), sources, CONFIG, start, sinks=SINKS)
    ours = splash.splash_attend(*level(), sources, CONFIG, sinks=SINKS, interpret=True)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def gradients(attention, mesh=None):
    """Of a level, of the keys and values of its ancestors, and of sinks; with a mesh, of copies on every
    device."""
    sources, start = ancestors()
    arrays = sharding.replicate((level(), [(s.key, s.value) for s in sources], SINKS), mesh)

    def loss(level, above, sinks):
        given = [s._replace(key=key, value=value) for s, (key, value) in zip(sources, above, strict=True)]
        return jnp.sin(attention(*level, given, CONFIG, start, sinks=sinks)).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)


def interpreted(query, key, value, sources, config, start, sinks):
    return splash.splash_attend(query, key, value, sources, config, sinks=sinks, interpret=True)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"tensor": 8}, marks=pytest.mark.slow)],
    ids=["divided", "a copy on each device"],
)
def test_gradients(sizes):
    mesh = sharding.make_mesh(sizes)
    tiny.assert_trees_close(gradients(interpreted, mesh), gradients(attend), 1e-5)


def test_rows_and_heads_are_spread_over_the_mesh():
    """Where the kernel runs, each device holds a part of the rows and of the kv heads."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = sharding.replicate(level(), mesh)
    run = jax.jit(functools.partial(splash.splash_attend, ancestors=[], decoder=CONFIG, interpret=True))
    assert run(*placed).sharding.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"), None, "tensor")), 4
    )


def test_inside_of_a_shard_map():
    """There every device calls the kernel on what it has."""
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    spec = PartitionSpec("data", None, "tensor")
    run = jax.shard_map(
        lambda *level: splash.splash_attend(*level, [], CONFIG, interpret=True),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    expected = attend(*level(), [], CONFIG, jnp.zeros(ROWS, jnp.int32))
    np.testing.assert_allclose(jax.jit(run)(*level()), expected, atol=2e-6)


def test_what_fits():
    above, _ = ancestors()
    long = splash.SHORTEST
    assert splash.fits(long, [], CONFIG)
    assert splash.fits(long, above, CONFIG)
    assert splash.fits(long, [], CONFIG, window=40)
    assert not splash.fits(long - 1, [], CONFIG)
    assert not splash.fits(long, above, CONFIG, window=40)
    assert not splash.fits(long, [], CONFIG, window=jnp.int32(40))
    assert not splash.fits(long, [], CONFIG.replace(matmul_precision="highest"))


def test_windows_into_ancestors_are_refused():
    with pytest.raises(ValueError, match="window=40: may reach into ancestors"):
        splash.splash_attend(*level(), ancestors()[0], CONFIG, 40)


def test_nothing_here_runs_on_a_tpu():
    assert not splash.on_tpu(jnp.zeros(3))
    assert not splash.on_tpu(sharding.replicate(jnp.zeros(3), sharding.make_mesh()))


TPU_PROGRAM = """
from espl_jax.plan import tpu_compiler
import jax
from jax.sharding import NamedSharding, PartitionSpec
from espl_jax.parallel import sharding
from espl_jax.models import splash
from tests.support import tiny

mesh = sharding.make_mesh({{"data": 2, "tensor": 4}}, tpu_compiler.devices("v5e:2x4"))
config = tiny.CONFIG.replace(num_heads=16, num_kv_heads=8, head_dim={head}, dtype="bfloat16")

def loss(query, key, value, sinks):
    assert splash.on_tpu(query)
    out = splash.splash_attend(query, key, value, [], config, sinks=sinks if {sinks} else None)
    return out.astype("float32").sum()

given = [
    jax.ShapeDtypeStruct((2, 600, heads, {head}), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec()))
    for heads in (16, 8, 8)
]
given.append(jax.ShapeDtypeStruct((16,), "float32", sharding=NamedSharding(mesh, PartitionSpec())))
compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*given).compile()
for line in compiled.as_text().splitlines():
    if 'custom_call_target="tpu_custom_call"' in line:
        print(line.strip())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install libtpu"
)
@pytest.mark.parametrize(("head", "sinks"), [(64, False), (64, True), (128, False)])
def test_compiles_for_a_tpu(head, sinks):
    """With its gradient, on the part of rows and heads that a device has: one row and four query heads."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    run = subprocess.run(
        [sys.executable, "-c", TPU_PROGRAM.format(head=head, sinks=sinks)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = run.stdout.splitlines()
    assert [any(name in line for line in kernels) for name in ("fwd", "dq", "dkv")] == [True] * 3, run.stdout
    assert any(f"bf16[4,1024,{head}]" in line for line in kernels), run.stdout
