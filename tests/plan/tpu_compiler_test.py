"""Compiling for TPUs up to code: what is known then is what is known in the end."""

import importlib.util
import math
import os

import pytest

from espl_jax.parallel.sharding import make_mesh
from espl_jax.plan.chips import CHIPS
from espl_jax.plan.tpu_compiler import assigned_bytes, compile_each, devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install libtpu"
)

ASSIGNED = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <1 sum @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, page 0, parameter 4, shape |bf16[8,128]| at ShapeIndex {}:
 value: <2 param @0> (size=4096,offset=0): bf16[8,128]{1,0:T(8,128)(2,1)}
allocation 2: size 8192, page 0, parameter 0, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 100, page 0, constant:
allocation 4: size 2048, color 5, page 0, parameter 1, shape |f32[512]| at ShapeIndex {}:
allocation 5: size 1024, page 0, maybe-live-out:
allocation 6: size 64, page 0, output shape is |(f32[8,128], f32[2,128])|, maybe-live-out:
allocation 7: size 30000, page 0, preallocated-temp:
allocation 8: size 70000, color 1, page 0, preallocated-temp:
"""


def test_bytes_by_what_they_are():
    """Donated arguments count once, and memory of another color is not HBM."""
    assert assigned_bytes(ASSIGNED) == (4096 + 8192, 30000, 1024 + 64)


def lower(number):
    """Products in a loop; with donation; too large for the chip; a process that dies."""
    import jax

    device = jax.sharding.SingleDeviceSharding(devices("v5e:1x1")[0])

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, "bfloat16", sharding=device)

    def products(x, weights):
        return jax.lax.scan(lambda x, w: (jax.numpy.tanh(x @ w), None), x, weights)[0]

    if number == 0:
        return jax.jit(products).lower(array(64, 1024), array(4, 1024, 1024))
    if number == 1:
        add = jax.jit(lambda x, y: (x + y.T, (x @ y).sum()), donate_argnums=0)
        return add.lower(array(4096, 4096), array(4096, 4096))
    if number == 2:
        return jax.jit(products).lower(array(64, 65536), array(2, 65536, 65536))
    os._exit(3)


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_meshes_of_the_slices_that_can_be_had(chip):
    """With two devices along `tensor` too, which no axis of a v6e:4x4 has."""
    for slice_ in CHIPS[chip].slices:
        found = devices(f"{chip}:{slice_}")
        per_chip = 2 if chip == "tpu7x" else 1
        assert len(found) == per_chip * math.prod(map(int, slice_.split("x")))
        for tensor in (1, 2, 4):
            if len(found) % tensor == 0:
                mesh = make_mesh({"fsdp": -1, "tensor": tensor}, found)
                assert mesh.shape["fsdp"] * tensor == len(found)


@pytest.mark.slow
@needs_libtpu
def test_what_is_assigned_is_what_the_finished_program_has():
    early, whole = list(compile_each(lower, 3)), list(compile_each(lower, 3, codegen=True))
    for a, b in zip(early, whole, strict=True):
        assert (a.arguments, a.outputs, a.error) == (b.arguments, b.outputs, b.error)
        assert a.temporaries == pytest.approx(b.temporaries, abs=2**16)
    loop, donated, large = early
    assert loop.arguments == 2 * (64 * 1024 + 4 * 1024 * 1024) and "while(" in loop.text
    assert donated.arguments == 2 * 2 * 4096 * 4096 and donated.outputs < 2**16
    assert "hbm" in large.error.lower() and not large.text


@needs_libtpu
def test_a_process_that_dies_is_no_result():
    with pytest.raises(RuntimeError, match="the process that compiled program 0 ended with exit code 3"):
        list(compile_each(lower_and_die, 1))


def lower_and_die(_):
    """The program that ends its process."""
    return lower(3)
