"""Small programs as the TPU compiler really prints them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from espl_jax.plan.hlo.traffic import traffic

LAYERS, ROWS, WIDTH, STEPS = 12, 64, 2048, 7

SCRIPT = Path(__file__).with_name("compile_for_tpu.py")


@pytest.fixture(scope="module")
def programs():
    """Optimized HLO of `stack_of_products` and `fill`."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; pip install libtpu")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("----\n")


def test_a_scan_of_products_reads_every_weight_once(programs):
    counted = traffic(programs[0])
    product = LAYERS * WIDTH * WIDTH
    assert counted.flops == 2 * ROWS * product
    # Beside the weights, x comes and goes once, and scalars have tiles of 512 bytes.
    assert 2 * product <= counted.read <= 2 * product + 2 * ROWS * WIDTH + 50_000
    assert 2 * ROWS * WIDTH <= counted.written <= 2 * ROWS * WIDTH + 50_000
    assert counted.by_operation[0].executions == LAYERS


def test_a_loop_that_writes_rows_in_place_never_copies_the_cache(programs):
    with pytest.raises(ValueError, match="has no trip count"):
        traffic(programs[1])
    counted = traffic(programs[1], {"jit(fill)/while": STEPS})
    assert STEPS * 4 * WIDTH <= counted.written < STEPS * 4 * WIDTH + 100_000
    assert counted.total - traffic(programs[1], {"jit(fill)/while": 0}).total < STEPS * (8 * 4 * WIDTH)
