import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.sampling.slots import SlotTable


def test_a_row_gets_the_slot_of_its_number_if_it_can():
    table = SlotTable(1, 4)
    assert [table.put(row) for row in (2, 9, 0, 7)] == [(0, 2), (0, 0), (0, 1), (0, 3)]
    assert table.free == 0
    table.remove(9)
    assert table.free == 1 and table.put(5) == (0, 0) and table.place(5) == (0, 0)


def test_the_emptiest_part_gets_the_next_row():
    table = SlotTable(2, 2)
    assert [table.put(row) for row in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    table.remove(1)
    assert table.put(8) == (1, 0)


@given(st.data())
def test_chunks_get_narrower_and_no_row_leaves_its_part(data):
    shards, per_shard = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    count = data.draw(st.integers(1, shards * per_shard))
    table = SlotTable(shards, per_shard)
    part_of = {row: table.put(row)[0] for row in range(count)}
    for row in data.draw(st.lists(st.sampled_from(range(count)), unique=True, max_size=count - 1)):
        table.remove(row)
    there = sorted(table.row[table.row >= 0].tolist())
    running = np.zeros(count, bool)
    running[data.draw(st.lists(st.sampled_from(there), min_size=1, unique=True))] = True

    before = table.row.copy()
    width, moves, counts = table.narrow(running)
    moved = before.copy()
    for shard in range(shards):
        for source, target in moves[shard, : counts[shard]]:
            assert moved[shard, target] == -1
            moved[shard, target], moved[shard, source] = moved[shard, source], -1
    np.testing.assert_array_equal(moved, table.row)
    assert sorted(table.row[table.row >= 0].tolist()) == there
    first = table.first(width)
    assert set(np.flatnonzero(running)) <= set(first.tolist())
    assert first.shape == (shards * width,)
    for row in there:
        assert table.place(row)[0] == part_of[row]
    most = max(sum(running[row] and part_of[row] == shard for row in there) for shard in range(shards))
    waiting = max(sum(not running[row] and part_of[row] == shard for row in there) for shard in range(shards))
    assert most <= width <= max(1, -(-3 * (most + waiting) // 2))
