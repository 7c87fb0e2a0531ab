import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import attention
from espl_jax.models.attention import RowsView, Source, attend
from tests.support import tiny

ROWS, STEPS, HEADS, KV, HEAD = 6, 9, tiny.CONFIG.num_heads, tiny.CONFIG.num_kv_heads, tiny.CONFIG.head_dim


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs():
    """A level of six nodes under ancestors of two and six, the caches only partly filled, and its starts."""
    level = (
        normal(0, ROWS, STEPS, HEADS, HEAD),
        normal(1, ROWS, STEPS, KV, HEAD),
        normal(2, ROWS, STEPS, KV, HEAD),
    )
    ancestors = []
    end = np.array([3, 0])
    for i, (nodes, capacity, lengths) in enumerate([(2, 5, [5, 2]), (6, 4, [0, 1, 4, 2, 3, 0])]):
        filled = np.arange(capacity) < np.array(lengths)[:, None]
        start = np.repeat(end, nodes // len(end))
        end = start + lengths
        # What is not filled holds numbers that would show.
        key, value = (
            jnp.where(filled[None, :, :, None], normal(seed, KV, nodes, capacity, HEAD), 50.0)
            for seed in (3 + 2 * i, 4 + 2 * i)
        )
        positions = jnp.asarray(start[:, None] + np.arange(capacity))
        ancestors.append(Source(key.swapaxes(2, 3), value, jnp.asarray(filled), positions))
    return level, ancestors, jnp.asarray(end)


def one_by_one(level, ancestors, start, window=0, sinks=None):
    """Softmax attention written out for one query and one head at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in level)
    out = np.zeros_like(query)
    for row, step, head in np.ndindex(ROWS, STEPS, HEADS):
        shared = head // (HEADS // KV)
        position = int(start[row]) + step
        first = position - window + 1 if window else 0
        own = max(0, first - int(start[row]))
        keys, values = [key[row, own : step + 1, shared]], [value[row, own : step + 1, shared]]
        for source in ancestors:
            node = row // (ROWS // source.filled.shape[0])
            seen = np.asarray(source.filled)[node] & (np.asarray(source.positions)[node] >= first)
            keys.append(np.asarray(source.key)[shared, node].T[seen])
            values.append(np.asarray(source.value)[shared, node][seen])
        scores = np.concatenate(keys) @ query[row, step, head] / np.sqrt(HEAD)
        sink = -np.inf if sinks is None else sinks[head]
        largest = max(scores.max(), sink)
        weights = np.exp(scores - largest)
        out[row, step, head] = weights @ np.concatenate(values) / (weights.sum() + np.exp(sink - largest))
    return out


@pytest.mark.parametrize(
    ("window", "block"),
    [
        *((0, 512), (0, 4), (1, 9), (3, 512), (3, 4), (7, 9), (100, 9)),
        *(
            pytest.param(window, block, marks=pytest.mark.slow)
            for window, block in ((0, 9), (1, 512), (1, 4), (3, 9), (7, 512), (7, 4), (100, 512), (100, 4))
        ),
    ],
)
def test_against_one_query_at_a_time(monkeypatch, block, window):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    level, ancestors, start = inputs()
    for above in (ancestors, []):
        expected = one_by_one(level, above, start, window)
        for given in (window, jnp.int32(window or 1000)):  # known to the compiler, or traced
            ours = attend(*level, above, tiny.CONFIG, start, given)
            np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
def test_rows_in_any_order_name_their_ancestor(window):
    """Shuffled rows with owners get the same results as adjacent rows."""
    level, ancestors, start = inputs()
    expected = attend(*level, ancestors, tiny.CONFIG, start, window)
    order = np.array([4, 0, 5, 2, 1, 3])
    shuffled = tuple(x[order] for x in level)
    named = [a._replace(owner=jnp.asarray(order // (ROWS // a.filled.shape[0]))) for a in ancestors]
    np.testing.assert_allclose(
        attend(*shuffled, named, tiny.CONFIG, start[order], window), expected[order], atol=1e-6
    )


def test_a_sink_takes_its_share():
    """Scores ln 1 and ln 3, and a sink of ln 4: weights 1/8, 3/8 and 4/8, of which the last has no value."""
    config = tiny.CONFIG.replace(num_heads=1, num_kv_heads=1, head_dim=1)
    query, value = jnp.full((1, 2, 1, 1), 1.0), jnp.array([16.0, 8.0]).reshape(1, 2, 1, 1)
    key, sink = jnp.log(jnp.array([1.0, 3.0])).reshape(1, 2, 1, 1), jnp.log(jnp.array([4.0]))
    out = attend(query, key, value, [], config, jnp.array([0]), sinks=sink)
    np.testing.assert_allclose(out.reshape(-1), [16 / 5, (16 + 3 * 8) / 8], rtol=1e-6)

    # The first token in an ancestor: still one softmax, and one sink in it.
    above = Source(
        *(x[:, :1].reshape(1, 1, 1, 1) for x in (key, value)), jnp.array([[True]]), jnp.array([[0]])
    )
    last = query[:, 1:], key[:, 1:], value[:, 1:]
    out = attend(*last, [above], config, jnp.array([1]), sinks=sink)
    np.testing.assert_allclose(out.reshape(-1), [5.0], rtol=1e-6)
    # d out / d sink = -out * (share of the sink).
    slope = jax.grad(lambda s: attend(*last, [above], config, jnp.array([1]), sinks=s).sum())(sink)
    np.testing.assert_allclose(slope, [-5.0 * 4 / 8], rtol=1e-6)


@pytest.mark.parametrize("window", [0, 3])
def test_sinks_in_blocks_of_queries(monkeypatch, window):
    """Values one query at a time, and gradients in blocks as in one; large sinks do not overflow."""
    level, ancestors, start = inputs()
    sinks = jnp.array([-200.0, 0.5, 2.0, 200.0])

    def out(sinks, level):
        return attend(*level, ancestors, tiny.CONFIG, start, window, sinks)

    def gradients(sinks, level):
        return jax.jit(jax.grad(lambda *x: jnp.sin(out(*x)).sum(), (0, 1)))(sinks, level)

    expected = one_by_one(level, ancestors, start, window, np.asarray(sinks))
    whole = gradients(sinks, level)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    np.testing.assert_allclose(out(sinks, level), expected, atol=1e-5)
    tiny.assert_trees_close(gradients(sinks, level), whole, 1e-5)


def test_what_each_owner_has():
    x = jnp.array([[10, 11, 12, 13], [20, 21, 22, 23]])
    owner = jnp.array([1, 0, 1, 0, 0, 1])
    assert attention.of_owners(x, owner).tolist() == [[20, 21, 22, 23], [10, 11, 12, 13]] * 2 + [
        [10, 11, 12, 13],
        [20, 21, 22, 23],
    ]
    # Two parts of two columns each; three rows count within the first, three within the second.
    taken = attention.of_owners(x, owner, parts=2, axis=1)
    assert taken.tolist() == [[11, 10, 11, 12, 12, 13], [21, 20, 21, 22, 22, 23]]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_nodes_gradient_is_the_sum_of_its_rows_rounded_once(parts):
    """A thousand rows over six nodes in bfloat16, as in a microbatch of many rollouts of one problem."""
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 6 // parts, 1000).astype(np.int32)
    rows = (1 + rng.normal(size=(2, 1000, HEAD))).astype(jnp.bfloat16)
    nodes = jnp.zeros((2, 6, HEAD), jnp.bfloat16)
    _, pull_back = jax.vjp(lambda x: attention.of_owners(x, jnp.asarray(owner), parts, axis=1), nodes)
    (ours,) = pull_back(jnp.asarray(rows))
    expected = np.zeros(nodes.shape)
    part = np.arange(1000) // (1000 // parts)
    np.add.at(expected, (slice(None), part * (6 // parts) + owner), rows.astype(np.float64))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=2.0**-8)


def test_gradients_are_summed_over_blocks_of_queries_in_float32(monkeypatch):
    """Those of the keys and values that 64 blocks in bfloat16 see, the level's own and an ancestor's."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    config = tiny.CONFIG.replace(num_heads=KV)
    rng = np.random.default_rng(0)
    level = [rng.normal(size=(1, 256, KV, HEAD)).astype(jnp.bfloat16) for _ in range(3)]
    above = [rng.normal(size=shape).astype(jnp.bfloat16) for shape in ((KV, 1, HEAD, 5), (KV, 1, 5, HEAD))]
    start = jnp.array([5])

    @jax.jit
    def gradients(query, keys_and_values):
        def out(key, value, *above):
            source = Source(*above, jnp.ones((1, 5), bool), jnp.arange(5)[None])
            return attend(query, key, value, [source], config, start)

        return jax.vjp(out, *keys_and_values)[1](jnp.abs(query))

    query, *rest = map(jnp.asarray, (*level, *above))
    ours = gradients(query, rest)
    exact = gradients(query.astype(jnp.float32), [x.astype(jnp.float32) for x in rest])
    for narrow, wide in zip(ours, exact, strict=True):
        assert tiny.relative_error(narrow.astype(jnp.float32), wide) < 3e-3


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("steps", [STEPS, 1])
def test_owners_within_parts_are_copies_of_their_nodes(steps, window):
    """Compares shuffled rows over nodes split into parts with a node per row; gradients included."""
    level, ancestors, start = inputs()
    level = tuple(x[:, :steps] for x in level)
    nodes = np.array([[1, 1, 0], [0, 1, 1]]), np.array([[2, 0, 2], [1, 1, 0]])  # in the two parts
    owners = [jnp.asarray(nodes[0].reshape(-1)), jnp.asarray(nodes[1].reshape(-1))]
    # The first ancestor's two nodes are in one part, the second's six in two.
    parts, rows = (1, 2), [nodes[0].reshape(-1), (nodes[1] + [[0], [3]]).reshape(-1)]

    def run(level, arrays, copied):
        given = []
        for i, ((key, value), source) in enumerate(zip(arrays, ancestors, strict=True)):
            row = rows[i]
            if copied:
                given.append(Source(key[:, row], value[:, row], source.filled[row], source.positions[row]))
            else:
                given.append(Source(key, value, source.filled, source.positions, owners[i], parts[i]))
        return attend(*level, given, tiny.CONFIG, start, window)

    @functools.partial(jax.jit, static_argnums=2)
    def results(level, arrays, copied):
        out, pull_back = jax.vjp(lambda *x: run(*x, copied), level, arrays)
        return out, pull_back(jnp.cos(out))

    arrays = [(a.key, a.value) for a in ancestors]
    named, copied = results(level, arrays, False), results(level, arrays, True)
    np.testing.assert_allclose(named[0], copied[0], atol=1e-6)
    tiny.assert_trees_close(named[1], copied[1], 1e-5)
    source = ancestors[1]._replace(owner=owners[1], parts=2).by_row()
    assert source.owner is None and source.parts == 1
    np.testing.assert_array_equal(source.filled, ancestors[1].filled[rows[1]])


@pytest.mark.parametrize("parts", [1, 2])
def test_a_view_reads_the_first_slots_of_each_part(parts):
    key, value = normal(0, 3, KV, 8, HEAD, 16), normal(1, 3, KV, 8, 16, HEAD)
    length = jnp.array([1, 5, 0, 3], jnp.int32)
    view = RowsView(key, value, jnp.zeros(4, jnp.int32), length, columns=6, shards=parts)
    slots = [0, 1, 2, 3] if parts == 1 else [0, 1, 4, 5]
    for index in (0, jnp.int32(2)):
        read = view.layer(index)
        np.testing.assert_array_equal(read[0], key[index][:, slots][:, :, :, :6])
        np.testing.assert_array_equal(read[1], value[index][:, slots][:, :, :6])
    assert view.filled.shape == (4, 6)
    np.testing.assert_array_equal(view.filled.sum(axis=1), length)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_view_reads_the_window_alone(parts):
    """The last filled columns of every row; shorter rows are read from their start."""
    key, value = normal(0, 3, KV, 8, HEAD, 16), normal(1, 3, KV, 8, 16, HEAD)
    length, start = jnp.array([9, 5, 0, 3], jnp.int32), jnp.array([7, 0, 1, 2], jnp.int32)
    view = RowsView(key, value, start, length, columns=13, shards=parts)
    slots = [0, 1, 2, 3] if parts == 1 else [0, 1, 4, 5]
    for index in (0, jnp.int32(2)):
        source = view.source(index, 4)
        for row, (slot, first) in enumerate(zip(slots, (5, 1, 0, 0), strict=True)):
            columns = slice(first, first + 4)
            np.testing.assert_array_equal(source.key[:, row], key[index][:, slot, :, columns])
            np.testing.assert_array_equal(source.value[:, row], value[index][:, slot, columns])
        np.testing.assert_array_equal(source.positions, np.array([[12], [1], [1], [2]]) + np.arange(4))
        np.testing.assert_array_equal(source.filled.sum(1), [4, 4, 0, 3])
    for window in (0, 5, 13, jnp.int32(4)):
        assert view.source(0, window).key.shape == (KV, 4, HEAD, 13)


def test_scores_can_have_another_factor():
    level, ancestors, start = inputs()
    query, *rest = level
    scaled = attend(*level, ancestors, tiny.CONFIG.replace(query_scale=0.3), start)
    expected = one_by_one((query * 0.3 * np.sqrt(HEAD), *rest), ancestors, start)
    np.testing.assert_allclose(scaled, expected, atol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
def test_gradients_of_blocks(monkeypatch, window):
    level, ancestors, start = inputs()

    def loss(level, arrays):
        sources = [Source(k, v, *a[2:]) for (k, v), a in zip(arrays, ancestors, strict=True)]
        return jnp.sin(attend(*level, sources, tiny.CONFIG, start, window)).sum()

    arrays = [(a.key, a.value) for a in ancestors]
    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(level, arrays)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    blocked = jax.jit(jax.grad(lambda *x: loss(*x), argnums=(0, 1)))(level, arrays)
    tiny.assert_trees_close(blocked, expected, 1e-5)
    # Nothing flows into columns that are not filled.
    for (key_bar, value_bar), source in zip(expected[1], ancestors, strict=True):
        unfilled = np.broadcast_to(~np.asarray(source.filled)[None, :, :, None], value_bar.shape)
        assert not np.asarray(key_bar).swapaxes(2, 3)[unfilled].any()
        assert not np.asarray(value_bar)[unfilled].any()


def test_scores_beyond_the_range_of_exp():
    level, ancestors, start = inputs()
    query, key, value = level
    large = query * 1000, key, value
    np.testing.assert_allclose(
        attend(*large, ancestors, tiny.CONFIG, start), one_by_one(large, ancestors, start), atol=1e-4
    )
