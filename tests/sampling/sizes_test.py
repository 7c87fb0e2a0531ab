import itertools

import jax
import numpy as np
import pytest

from espl_jax import sharding
from espl_jax.sampling import sizes
from espl_jax.sampling.sizes import choose_sizes, rung, rungs
from tests import tiny

TREE = {"lanes": 3, "rows": 60, "longest_problem": 40, "max_new_tokens": 64}


def test_rungs():
    assert rungs(150) == [1, 2, 3, 4, 5, 8, 10, 15, 19, 29, 38, 57, 75, 113, 150]
    assert rungs(1) == [1] and rungs(2) == [1, 2] and rungs(4) == [1, 2, 3, 4]
    assert [rung(n, 10) for n in range(1, 11)] == [1, 2, 3, 4, 5, 8, 8, 8, 10, 10]
    for most in range(1, 200):
        steps = rungs(most)
        assert steps[0] == 1 and steps[-1] == most
        assert all(b <= 1.5 * a + 1 for a, b in itertools.pairwise(steps))


def test_sizes_of_a_tree():
    chosen = choose_sizes(tiny.CONFIG, **TREE)
    # A problem's bucket, 64 new tokens, and room to write a whole chunk: 64 + 64 + 32 columns.
    assert (chosen.slots, chosen.capacity, chosen.steps, chosen.problem) == (60, 160, 32, 64)
    assert chosen.columns == [32, 64, 96, 128]
    short = choose_sizes(tiny.CONFIG, **TREE | {"max_new_tokens": 16})
    assert (short.capacity, short.steps, short.columns) == (96, 16, [32, 64, 96])
    assert chosen.programs == (len(chosen.widths) + 1) * 4
    assert "60 slots of 160 columns" in str(chosen)


def test_problems_of_about_the_same_length_share_their_sizes():
    assert len({choose_sizes(tiny.CONFIG, **TREE | {"longest_problem": n}) for n in range(33, 65)}) == 1


@pytest.mark.parametrize("filled", [0, 1, 31, 32, 33, 100, 159])
def test_columns_hold_what_is_filled_and_little_more(filled):
    columns = choose_sizes(tiny.CONFIG, **TREE).columns_for(filled)
    assert filled <= columns <= max(64, 1.5 * filled)


def test_the_context_bounds_the_columns():
    assert choose_sizes(tiny.CONFIG, **TREE | {"max_new_tokens": 10**6}, chunk=32).capacity == 256 + 32
    assert choose_sizes(tiny.CONFIG, **TREE | {"max_new_tokens": 10**6}, context_limit=100).capacity == 160
    assert choose_sizes(tiny.CONFIG, **TREE, extension=256).capacity == 64 + 64 + 256


class TestMemory:
    def test_rows_that_fit(self, monkeypatch):
        # Two layers, two heads of six numbers, keys and values of four bytes: 192 a column, 160 columns.
        slot = 2 * 2 * 6 * 2 * 4 * 160
        assert (tiny.CONFIG.num_layers, tiny.CONFIG.num_kv_heads, tiny.CONFIG.head_dim) == (2, 2, 6)
        monkeypatch.setattr(sizes, "device_memory", lambda: 10 * slot / sizes.SHARE + 1)
        assert choose_sizes(tiny.CONFIG, **TREE).slots == 10
        assert choose_sizes(tiny.CONFIG, **TREE, held=3 * slot).slots == 7
        assert choose_sizes(tiny.CONFIG, **TREE, held=100 * slot).slots == 1
        assert choose_sizes(tiny.CONFIG, **TREE, max_rows=5).slots == 15
        assert choose_sizes(tiny.CONFIG, **TREE, max_rows=1000).slots == 60

    def test_devices_hold_parts_of_the_slots(self, monkeypatch):
        mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        # Each device has one of the two heads.
        monkeypatch.setattr(sizes, "device_memory", lambda: 3 * 2 * 6 * 2 * 4 * 160 / sizes.SHARE + 1)
        chosen = choose_sizes(tiny.CONFIG, **TREE, mesh=mesh)
        assert (chosen.parts, chosen.per_part, chosen.slots) == (4, 3, 12)
        assert chosen.widths == [4, 8, 12]

    def test_bytes_of_a_device(self):
        mesh = sharding.make_mesh({"data": 8})
        rows = sharding.place_rows(np.zeros((16, 3), np.float32), mesh)
        assert sizes.bytes_per_device(rows) == 24
        assert sizes.bytes_per_device([np.zeros(5, np.int32), jax.ShapeDtypeStruct((2, 2), "bfloat16")]) == 28

    def test_this_machine_has_memory(self):
        assert sizes.device_memory() > 2**20
