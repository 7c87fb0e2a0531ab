import itertools

import jax
import jax.numpy as jnp
import pytest

from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.sampling import decode, sizes
from espl_jax.sampling.drafts import Texts
from espl_jax.sampling.sizes import choose_sizes, describe, rungs
from tests.support import tiny

TREE = {"lanes": 3, "rows": 60, "longest_problem": 40, "max_new_tokens": 64}


def test_rungs():
    assert rungs(150) == [1, 2, 3, 4, 5, 8, 10, 15, 19, 29, 38, 57, 75, 113, 150]
    assert rungs(1) == [1] and rungs(2) == [1, 2] and rungs(4) == [1, 2, 3, 4]
    assert rungs(10) == [1, 2, 3, 4, 5, 8, 10]
    for most in range(1, 200):
        steps = rungs(most)
        assert steps[0] == 1 and steps[-1] == most
        assert all(b <= 1.5 * a + 1 for a, b in itertools.pairwise(steps))


def only(**changes):
    """Returns the sizes of a tree that runs in one stage."""
    (stage,) = choose_sizes(tiny.CONFIG, **TREE | changes)
    return stage


def test_sizes_of_a_tree():
    chosen = only()
    # A problem's bucket, 64 new tokens, and room to write a whole chunk: 64 + 64 + 32 columns, rounded up.
    assert (chosen.slots, chosen.capacity, chosen.steps, chosen.problem) == (60, 256, 32, 64)
    # A chunk reads the columns of TPU's tiles as they lie.
    assert chosen.columns == [128]
    short = only(max_new_tokens=16)
    assert (short.capacity, short.steps, short.columns) == (96, 16, [32, 64, 96])
    assert chosen.problem_widths == [32, 64]
    assert "60 slots of 256 columns" in describe([chosen])


def test_problems_of_about_the_same_length_share_their_sizes():
    assert len({only(longest_problem=n) for n in range(33, 65)}) == 1


@pytest.mark.parametrize("filled", [0, 1, 31, 32, 33, 100, 159])
def test_columns_hold_what_is_filled_and_little_more(filled):
    short, longer = only(max_new_tokens=16), only(max_new_tokens=1000)
    assert filled <= longer.columns_for(filled) <= max(128, 1.5 * filled + 64)
    assert filled <= short.columns_for(filled) <= max(64, 1.5 * filled) or filled > short.capacity


def test_longer_slots_are_read_in_whole_tiles():
    """The TPU compiler copies slots of any other width; see tests/plan/plan_test.py."""
    config = tiny.CONFIG.replace(max_positions=10_000)
    (longer,) = choose_sizes(config, **TREE | {"max_new_tokens": 2000})
    assert longer.columns == [128, 256, 384, 512, 768, 1024, 1536, 2048, 2176]


def test_the_context_bounds_the_columns():
    assert only(max_new_tokens=10**6, chunk=32).capacity == 256 + 128
    assert only(max_new_tokens=10**6, context_limit=100).capacity == 256
    assert only(turns=True).capacity == 64 + 64 + 256


class TestMemory:
    def test_rows_that_fit(self, monkeypatch):
        # Two layers, two heads of six numbers, keys and values of four bytes: 192 a column, 256 columns and
        # 32 of a chunk; and three float32 for each of the 61 tokens of the vocabulary.
        slot = 2 * 2 * 6 * 2 * 4 * (256 + 32) + 3 * 4 * 61
        assert (tiny.CONFIG.num_layers, tiny.CONFIG.num_kv_heads, tiny.CONFIG.head_dim) == (2, 2, 6)
        monkeypatch.setattr(sizes, "device_memory", lambda: 10 * slot / sizes.SHARE + 1)
        # Several times as much is copied while rows are extended.
        monkeypatch.setattr(sizes, "EXTENDED_COLUMNS", 0)
        monkeypatch.setattr(sizes, "EXTENDED_TOKENS", 32)
        assert only().slots == 10
        assert only(held=3 * slot).slots == 7
        # What is left beside the share to plan with is for one row at least.
        assert only(held=11 * slot).slots == 1
        assert only(max_rows=5).slots == 15
        assert only(max_rows=1000).slots == 60
        with pytest.raises(
            ValueError, match=r"no rollout fits: .* of a device's 0.00 GiB .* lower max_new_tokens"
        ):
            only(held=12 * slot)

    def test_rows_that_do_not_fit_run_in_stages(self, monkeypatch):
        """Slots of half the length, twice as many, until all fit or a stage would hold little but prompts."""
        config, tree = tiny.CONFIG.replace(max_positions=10**6), TREE | {"max_new_tokens": 8192 - 64}
        monkeypatch.setattr(sizes, "device_memory", lambda: 2 * 2 * 6 * 2 * 4 * 10 * 8192 / sizes.SHARE)
        monkeypatch.setattr(sizes, "EXTENDED_COLUMNS", 0)
        stages = choose_sizes(config, **tree)
        assert [stage.longest for stage in stages] == [1024, 2048, 4096, 8192]
        assert [stage.capacity for stage in stages] == [1024 + 256, 2048 + 256, 4096 + 256, 8192 + 256]
        assert [stage.slots for stage in stages] == [60, 35, 18, 9]
        assert "stage 1: 60 slots of 1280 columns" in describe(stages)
        assert len(choose_sizes(config, **tree | {"max_new_tokens": 600})) == 1
        assert len(choose_sizes(config, **tree, max_rows=60)) == 1
        assert choose_sizes(config, **tree | {"rows": 10**6})[0].longest == 512

    def test_drafts_stage_columns_twice(self, monkeypatch):
        """With gaps, and without them before they are written to the slots: 64 columns each."""
        slot = 2 * 2 * 6 * 2 * 4 * (256 + 2 * 64) + 16 * 3 * 4 * 61
        monkeypatch.setattr(sizes, "device_memory", lambda: 10 * slot / sizes.SHARE + 1)
        monkeypatch.setattr(sizes, "EXTENDED_COLUMNS", 0)
        monkeypatch.setattr(sizes, "EXTENDED_TOKENS", 32)
        assert only(draft_tokens=15).slots == 10

    @pytest.mark.slow
    @pytest.mark.parametrize("drafted", [0, 4])
    def test_what_a_chunk_allocates_is_counted(self, drafted):
        """In the memory that a chunk really takes, no more rows would fit."""
        config, rows, capacity = tiny.CONFIG.replace(num_layers=24, head_dim=64), 32, 256
        steps = sizes.steps_for(32, drafted)
        staged = steps * (drafted + 1)

        def integers(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(w.dtype)), abstract(config))
        shared = decode.abstract_slots(config, 1, 64, None, everywhere=True)
        lowered = decode.decode_chunk.lower(
            params,
            config,
            decode.KVCache(*shared, integers(1), integers(1)),
            decode.abstract_slots(config, rows, capacity, None),
            decode.abstract_rows(rows, None),
            integers(1),
            jax.ShapeDtypeStruct((), jnp.float32),
            texts=Texts(integers(1, 64), integers(rows), integers(rows, 64), integers(rows)),
            columns=capacity,
            steps=steps,
            drafted=drafted,
            aligned=True,
        )
        temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
        slots = rows * capacity * sizes.column_bytes(config)
        memory = int((slots + temporaries) / sizes.SHARE)
        fit = sizes.slots_that_fit(config, capacity, staged, False, 0, memory, None, drafted + 1)
        assert rows * 0.9 < fit <= rows * 1.05

    def test_devices_hold_parts_of_the_slots(self, monkeypatch):
        mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        # Each device has one of the two heads.
        slot = 2 * 6 * 2 * 4 * (256 + 32) + 3 * 4 * 61
        monkeypatch.setattr(sizes, "device_memory", lambda: 3 * slot / sizes.SHARE + 1)
        monkeypatch.setattr(sizes, "EXTENDED_COLUMNS", 0)
        monkeypatch.setattr(sizes, "EXTENDED_TOKENS", 32)
        chosen = only(mesh=mesh)
        assert (chosen.shards, chosen.per_shard, chosen.slots) == (4, 3, 12)
        assert chosen.widths == [4, 8, 12]


def test_coarse_sizes_are_few():
    assert rungs(150, coarse=True) == [10, 38, 150] and rungs(1, coarse=True) == [1]
    assert rungs(16, coarse=True) == [4, 16] and rungs(12, coarse=True) == [12]
    fine, coarse = only(chunk=1, max_new_tokens=300), only(chunk=1, max_new_tokens=300, coarse=True)
    assert coarse.widths == [4, 15, 60] and coarse.columns == [128, 256]
    assert len(coarse.widths) < len(fine.widths) / 2 and set(coarse.columns) <= set(fine.columns)
    assert all(filled <= coarse.columns_for(filled) <= max(128, 2 * filled) for filled in range(256))
