import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from espl_jax.sampling import draw
from espl_jax.sampling.truncation import Truncation
from tests.sampling.boundaries import boundary_distance, distribution

VOCAB = 300  # five blocks, the last of them not full
LOGITS = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2
COUNT = 20_000

draw_many = jax.jit(draw.draw, static_argnames="truncation")


@pytest.fixture(scope="module")
def uniform():
    """By rows and positions, as the sampler makes them."""
    keys = draw.row_keys(jax.random.key(0, impl="threefry2x32"), np.arange(100)[:, None], np.arange(50))
    keys = jnp.repeat(keys.reshape(-1, 2), 4, axis=0)
    return draw.uniforms(keys, jnp.tile(jnp.arange(4), 5000))


def test_uniforms_are_uniform(uniform):
    assert uniform.shape == (COUNT,)
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert stats.kstest(np.asarray(uniform), "uniform").pvalue > 1e-3
    by_position = np.asarray(uniform).reshape(-1, 4)
    assert np.abs(np.corrcoef(by_position.T) - np.eye(4)).max() < 0.05


TRUNCATIONS = [
    Truncation(),
    Truncation(top_p=0.95),
    Truncation(top_p=0.8),
    Truncation(top_k=20),
    Truncation(min_p=0.1),
    Truncation(top_k=40, top_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize(
    ("temperature", "truncation"),
    [
        pytest.param(t, cut, marks=() if i % 3 == j else pytest.mark.slow)
        for i, cut in enumerate(TRUNCATIONS)
        for j, t in enumerate((0.5, 1.0, 1.7))
    ],
    ids=str,
)
def test_frequencies(uniform, temperature, truncation):
    drawn = draw_many(jnp.tile(LOGITS, (COUNT, 1)), uniform, temperature, truncation)
    tokens = np.asarray(drawn.token)
    whole = distribution(LOGITS[None], temperature)[0]
    exact = distribution(LOGITS[None], temperature, truncation)[0]
    assert (exact > 0).sum() < VOCAB or not truncation
    assert (exact[tokens] > 0).all()
    np.testing.assert_allclose(drawn.logprob, np.log(exact[tokens]), atol=1e-5)
    np.testing.assert_allclose(drawn.untruncated_logprob, np.log(whole[tokens]), atol=1e-5)
    middle = np.log([whole[exact > 0].min(), whole[exact == 0].max()]).mean() if truncation else -np.inf
    np.testing.assert_allclose(drawn.cutoff, middle, atol=1e-5)
    observed, expected = np.bincount(tokens, minlength=VOCAB), exact * COUNT
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert stats.chisquare(observed, expected * COUNT / expected.sum()).pvalue > 1e-3


def test_a_single_token_kept_is_certain(uniform):
    drawn = draw_many(jnp.tile(LOGITS, (COUNT, 1)), uniform, 0.7, Truncation(top_k=1))
    assert (drawn.token == LOGITS.argmax()).all()
    np.testing.assert_allclose(drawn.logprob, 0, atol=1e-6)
    first, second = np.sort(LOGITS)[:-3:-1] / 0.7
    np.testing.assert_allclose(drawn.untruncated_logprob - drawn.cutoff, (first - second) / 2, atol=1e-5)


@pytest.mark.parametrize("truncation", TRUNCATIONS[:2], ids=str)
def test_only_draws_near_a_boundary_depend_on_rounding(uniform, truncation):
    """Slightly perturbed logits give another token only if the uniform is next to a boundary."""
    tiled = jnp.tile(LOGITS, (COUNT, 1))
    same = draw_many(tiled, uniform, 1.0, truncation).token
    shaken = tiled + 1e-4 * jax.random.normal(jax.random.key(1), tiled.shape)
    differ = np.asarray(draw_many(shaken, uniform, 1.0, truncation).token != same)
    distance = boundary_distance(LOGITS, uniform, 1.0, truncation)
    assert distance.shape == (COUNT,) and 0 < differ.sum() < COUNT / 20
    assert distance[differ].max() < 1e-3 < np.median(distance)


def test_boundary_distance_by_hand():
    logits = np.log([0.5, 0.25, 0.25])
    uniform = np.array([0.0, 0.45, 0.6, 0.99])
    np.testing.assert_allclose(boundary_distance(logits, uniform, 1.0), [0.5, 0.05, 0.1, 0.24], atol=1e-6)
    cut = boundary_distance(logits, uniform, 1.0, Truncation(top_k=1))
    assert np.isinf(cut).all()


def test_inverse_of_the_distribution_function():
    uniform = np.linspace(0, 1, 4001, dtype=np.float32)[:-1]
    tokens = draw_many(jnp.tile(LOGITS, (4000, 1)), jnp.asarray(uniform), 1.0).token
    cumulative = np.cumsum(np.exp(np.asarray(jax.nn.log_softmax(jnp.asarray(LOGITS))), dtype=np.float64))
    below = np.append(0, cumulative)[np.asarray(tokens)]
    assert (below - 1e-6 <= uniform).all()
    assert (uniform <= cumulative[np.asarray(tokens)] + 1e-6).all()


LARGEST = np.nextafter(np.float32(1), np.float32(0))


@settings(max_examples=100)
@given(
    likely=st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
)
def test_impossible_tokens_are_never_drawn(likely, seed, temperature):
    """Even for uniforms at, or right next to, a boundary of the cumulative distribution."""
    logits = np.full(VOCAB, -np.inf, np.float32)
    order = sorted(likely)
    logits[order] = np.random.default_rng(seed).normal(size=len(order))
    exact = np.exp(np.asarray(jax.nn.log_softmax(jnp.asarray(logits) / temperature)))
    edges = np.cumsum(exact[order])[:-1].astype(np.float32)
    edges = np.clip(np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, 1)]), 0, LARGEST)
    uniform = np.concatenate([[0, LARGEST], edges, np.full(16 - len(edges), 0.5)]).astype(np.float32)
    tokens, logprobs, *_ = draw_many(jnp.tile(logits, (18, 1)), jnp.asarray(uniform), temperature)
    assert set(np.asarray(tokens).tolist()) <= likely
    assert tokens[0] == order[0]
    assert tokens[1] == order[-1]
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("truncation", [Truncation(), Truncation(top_k=200)], ids=str)
@pytest.mark.parametrize("likely", [[1, 65], [1, 63], [70, 299], [5, 129]], ids=str)
def test_tokens_of_almost_no_probability_are_drawn_at_no_edge(likely, truncation):
    """Two tokens are likely; every token before, between and behind them has a probability of e^-25 or e^-80.

    Edges are 0, what is next to 1, and the bound between the two, at the start of a block or inside of one.
    """
    uniform = np.array([0, 2.0**-24, 0.5, np.nextafter(np.float32(0.5), 0), LARGEST], np.float32)
    for unlikely in (-25.0, -80.0):
        logits = np.full(VOCAB, unlikely, np.float32)
        logits[likely] = np.log(0.5)
        drawn = draw_many(jnp.tile(logits, (len(uniform), 1)), jnp.asarray(uniform), 1.0, truncation)
        first, second = likely
        assert drawn.token.tolist() == [first, first, second, first, second]
        np.testing.assert_allclose(drawn.logprob, np.log(0.5), atol=1e-6)


@pytest.mark.slow
def test_tokens_of_almost_no_probability_are_not_drawn_where_sums_are_rounded():
    """A thousand likely tokens among others of e^-40: tries every bound and the steps on either side."""
    vocab = 40_000
    logits = np.full(vocab, -40.0, np.float32)
    likely = np.sort(np.random.default_rng(2).choice(vocab, 1000, replace=False))
    logits[likely] = np.random.default_rng(3).normal(size=1000)
    edges = np.cumsum(np.exp(logits[likely], dtype=np.float64))
    edges = (edges / edges[-1])[:-1].astype(np.float32)
    edges = np.unique(np.clip(edges[:, None] * (1 + np.arange(-2, 3) * 2.0**-24), 0, LARGEST))
    rows = 400
    edges = np.append(edges, np.zeros(-len(edges) % rows)).astype(np.float32)
    tiled = jnp.tile(logits, (rows, 1))
    tokens = np.concatenate([draw_many(tiled, jnp.asarray(u), 1.0)[0] for u in edges.reshape(-1, rows)])
    assert np.isin(tokens, likely).all()


def test_impossible_tokens_in_a_large_vocabulary():
    """With rounded sums of many numbers; tests every boundary between two possible tokens."""
    vocab, rng = 40_000, np.random.default_rng(1)
    logits = np.where(rng.random(vocab) < 0.02, rng.normal(size=vocab) * 3, -np.inf).astype(np.float32)
    possible = np.isfinite(logits)
    cumulative = np.cumsum(np.exp(np.asarray(jax.nn.log_softmax(jnp.asarray(logits))), dtype=np.float64))
    edges = cumulative[possible][:-1].astype(np.float32)
    edges = np.unique(np.clip(edges[:, None] * (1 + np.arange(-2, 3) * 2.0**-24), 0, LARGEST))
    rows = 400
    edges = np.append(edges, np.full(-len(edges) % rows, 0.5)).astype(np.float32)
    tiled = jnp.tile(logits, (rows, 1))
    tokens = np.concatenate([draw_many(tiled, jnp.asarray(u), 1.0)[0] for u in edges.reshape(-1, rows)])
    assert possible[tokens].all()


def test_greedy():
    logits = jnp.asarray(np.stack([LOGITS, LOGITS[::-1]]))
    tokens, logprobs = draw.greedy(logits)
    best = LOGITS.argmax()
    assert tokens.tolist() == [best, VOCAB - 1 - best]
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits).max(axis=-1), atol=1e-6)


class TestRowKeys:
    KEY = jax.random.key(3, impl="threefry2x32")

    def test_words_are_folded_in_one_after_the_other(self):
        keys = draw.row_keys(self.KEY, np.uint32(5), np.array([[7], [8]]), np.arange(3))
        assert keys.shape == (2, 3, 2)
        expected = self.KEY
        for word in (5, 8, 2):
            expected = jax.random.fold_in(expected, word)
        np.testing.assert_array_equal(keys[1, 2], jax.random.key_data(expected))

    def test_neither_company_nor_order_matters(self):
        whole = np.asarray(draw.row_keys(self.KEY, np.arange(4)[:, None], np.arange(5)))
        part = np.asarray(draw.row_keys(self.KEY, np.array([[3], [1]]), np.array([4, 0])))
        np.testing.assert_array_equal(part, whole[[3, 1]][:, [4, 0]])
        assert len({tuple(k) for k in whole.reshape(-1, 2)}) == 20

    def test_hashes_of_32_bits(self):
        keys = draw.row_keys(self.KEY, np.array([0, 2**31, 2**32 - 1], np.uint32))
        assert len({tuple(k) for k in np.asarray(keys)}) == 3
