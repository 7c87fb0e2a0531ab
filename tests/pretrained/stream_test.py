import collections
import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.models import int8
from espl_jax.models.params import Weight
from espl_jax.parallel.sharding import make_mesh
from espl_jax.pretrained import stream
from espl_jax.pretrained.layout import file_shape, from_file
from tests.support.devices import xla_flags

LAYERS = 3
WEIGHTS = {
    "query": Weight(("layers", "embed", "heads", "head"), ("embed",), (LAYERS, 16, 4, 6), "float32"),
    "out": Weight(("layers", "heads", "head", "embed"), ("heads", "head"), (LAYERS, 4, 6, 16), "bfloat16"),
    "scale": Weight(("layers", "embed"), (), (LAYERS, 16), "float32"),
    "embedding": Weight(("vocab", "embed"), ("embed",), (37, 16), "bfloat16"),
}


@dataclasses.dataclass
class Counted:
    """In place of a StoredTensor: an array that counts how often it is looked at."""

    array: np.ndarray
    views: int = 0
    path: Path = Path("a/model.safetensors")

    def view(self):
        self.views += 1
        return self.array


def stored_for(weight, seed=0):
    rng = np.random.default_rng(seed)
    count = weight.shape[0] if weight.axes[0] == "layers" else 1
    return [Counted(rng.normal(size=file_shape(weight)).astype(np.float32)) for _ in range(count)]


def expected(weight, stored):
    layers = np.stack([from_file(weight, each.array) for each in stored])
    return (layers if weight.axes[0] == "layers" else layers[0]).astype(jnp.dtype(weight.dtype))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "sizes", [None, {"fsdp": 8}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "fsdp": 2}]
)
def test_values_placement_and_reads(name, sizes):
    weight, mesh = WEIGHTS[name], sizes and make_mesh(sizes)
    stored = stored_for(weight)
    array = stream.load_weight(weight, stored, mesh)
    assert (array.shape, array.dtype) == (weight.shape, weight.dtype)
    np.testing.assert_array_equal(array, expected(weight, stored))
    if mesh is not None:
        assert array.sharding == stream.sharding.named(mesh, weight.axes, weight.shape, "sampling")
        assert len(array.addressable_shards) == 8
    # Each part once, however many devices hold it.
    parts = collections.Counter(str(shard.index) for shard in array.addressable_shards)
    assert {each.views for each in stored} == {len(parts)}


@pytest.mark.parametrize("name", ["query", "out", "embedding"])
@pytest.mark.parametrize("block", [40, stream.BLOCK])
@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "fsdp": 2}])
def test_int8(name, sizes, block, monkeypatch):
    """Rounded in blocks and by shards, of which the first reads all inputs: the same as all at once."""
    monkeypatch.setattr(stream, "BLOCK", block)
    weight, mesh = dataclasses.replace(WEIGHTS[name], dtype="int8"), sizes and make_mesh(sizes)
    stored = stored_for(weight)
    values, scale = stream.load_int8(weight, stored, mesh)
    whole = expected(dataclasses.replace(weight, dtype="float32"), stored)
    for ours, wanted in zip((values, scale), int8.quantize(whole, weight.input_axes), strict=True):
        assert ours.dtype == wanted.dtype
        np.testing.assert_array_equal(ours, wanted)
    parts = {str(shard.index) for shard in values.addressable_shards}
    assert {each.views for each in stored} == {len(parts)}
    if mesh is not None:
        for array, declared in ((values, weight), (scale, weight.scale)):
            placement = stream.sharding.named(mesh, declared.axes, declared.shape, "sampling")
            assert array.sharding == placement


def test_scales_alone():
    """As where a process has shards of the scales but not of the weights."""
    weight = dataclasses.replace(WEIGHTS["out"], dtype="int8")
    stored = stored_for(weight)
    scale = stream._Int8(weight, stored).scales((slice(1, 3), slice(4, 8)))
    whole = expected(dataclasses.replace(weight, dtype="float32"), stored)
    np.testing.assert_array_equal(scale, int8.scales(whole, weight.input_axes)[1:3, 4:8])
    assert [each.views for each in stored] == [0, 1, 1]


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_int8_of_numbers_that_are_not_finite(odd):
    weight = Weight(("vocab", "embed"), ("embed",), (3, 2), "int8")
    values = np.array([[1, 2], [3, odd], [5, 6]], np.float32)
    with pytest.raises(ValueError, match=r"a/model.safetensors: holds a number that is not finite"):
        stream.load_int8(weight, [Counted(values)], None)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=3).filter(lambda shape: np.prod(shape) < 1e6))
def test_tiles_cover_every_shape(shape):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    out = np.full(shape[::-1], np.nan, np.float32)
    stream._copy(out, values.T)
    np.testing.assert_array_equal(out, values.T)


def test_the_host_holds_one_shard_at_a_time(monkeypatch):
    weight, stored = WEIGHTS["out"], stored_for(WEIGHTS["out"])
    mesh = make_mesh({"data": 2, "fsdp": 4})
    sizes = []
    empty = np.empty
    monkeypatch.setattr(
        stream.np, "empty", lambda shape, dtype: sizes.append(np.prod(shape)) or empty(shape, dtype)
    )
    stream.load_weight(weight, stored, mesh)
    # jax makes small arrays of its own meanwhile.
    part = np.prod(weight.shape) // 4
    assert sizes.count(part) == 4 and max(sizes) == part


def test_rounding_is_to_nearest_even():
    weight = Weight(("embed",), (), (4,), "bfloat16")
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-9], np.float32)
    array = stream.load_weight(weight, [Counted(values)], None)
    np.testing.assert_array_equal(array.astype(jnp.float32), [1, 1 + 2**-6, 1 + 2**-7, -1])
    assert isinstance(array, jax.Array)


IN_TWO_PROCESSES = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import dataclasses
import numpy as np
from espl_jax.models import int8
from espl_jax.pretrained import stream
from espl_jax.parallel.sharding import make_mesh
from tests.pretrained.stream_test import WEIGHTS, expected, stored_for
mesh = make_mesh({"data": 2, "fsdp": 4}) if sys.argv[3] == "data" else make_mesh({"fsdp": 8})
for weight in WEIGHTS.values():
    stored = stored_for(weight)
    array = stream.load_weight(weight, stored, mesh)
    whole = expected(weight, stored)
    assert len(array.addressable_shards) == 4 and len(array.global_shards) == 8
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    assert {each.views for each in stored} == {len({str(s.index) for s in array.addressable_shards})}
    if weight.inputs:
        weight = dataclasses.replace(weight, dtype="int8")
        whole = expected(dataclasses.replace(weight, dtype="float32"), stored)
        wanted = int8.quantize(whole, weight.input_axes)
        for array, each in zip(stream.load_int8(weight, stored, mesh), wanted, strict=True):
            assert array.shape == each.shape
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, each[shard.index])
"""


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_each_process_reads_the_shards_of_its_own_devices(axis):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": xla_flags(4)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IN_TWO_PROCESSES, address, str(number), axis],
            cwd=Path(__file__).parents[2],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
