import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_jax.models import transformer
from espl_jax.models.attention import KVCache
from tests.support import ragged_tree, tiny

LEVELS = ("system", "problem", "rollout")


@pytest.fixture(scope="module")
def params():
    return tiny.params()


def levels_of(batch):
    """Tokens and lengths of the three levels, nodes on one axis."""
    rollouts = batch.inputs.reshape(-1, batch.inputs.shape[-1])
    tokens = batch.system_tokens, batch.problem_tokens.reshape(-1, batch.problem_tokens.shape[-1]), rollouts
    lengths = batch.system_lengths, batch.problem_lengths.reshape(-1), batch.mask.sum(-1).reshape(-1)
    return tuple(map(jnp.asarray, tokens)), tuple(jnp.asarray(x, jnp.int32) for x in lengths)


def at_real_tokens(values, batch):
    return np.asarray(values).reshape(*batch.mask.shape, -1)[batch.mask]


def flat_logits(params, config, batch):
    """Logits of plain sequences where the tree's rollouts are."""
    logits = tiny.logits(params, config, ragged_tree.flatten(batch).tokens)
    return at_real_tokens(ragged_tree.pick(logits, batch), batch)


def flat_levels(params, config, batch):
    """Logits of plain sequences at every real token of all three levels."""
    flat = ragged_tree.flatten(batch)
    logits = np.asarray(tiny.logits(params, config, flat.tokens)).reshape(
        *batch.advantages.shape, flat.tokens.shape[1], -1
    )
    system = [logits[m, 0, 0, :n] for m, n in enumerate(batch.system_lengths)]
    problem = []
    for (m, p), n in np.ndenumerate(batch.problem_lengths):
        first = batch.system_lengths[m]
        problem.append(logits[m, p, 0, first : first + n])
    return np.concatenate(system), np.concatenate(problem), flat_logits(params, config, batch)


class TestTree:
    @pytest.mark.parametrize(
        ("scan", "tied"),
        [
            (True, False),
            (False, True),
            *(pytest.param(same, same, marks=pytest.mark.slow) for same in (True, False)),
        ],
    )
    def test_all_levels_at_once_against_plain_sequences(self, scan, tied):
        config = tiny.CONFIG.replace(scan_layers=scan, tied_head=tied, remat="full" if scan else "none")
        params = tiny.params(config)
        batch = ragged_tree.random_tree(0, config.vocab_size, (2, 3, 2))
        hidden, caches = tiny.jitted_forward_tree(params, config, *levels_of(batch))
        for ours, length, expected in zip(
            hidden, levels_of(batch)[1], flat_levels(params, config, batch), strict=True
        ):
            logits = np.asarray(tiny.unembed(params, config, ours))
            real = np.arange(logits.shape[1]) < np.asarray(length)[:, None]
            np.testing.assert_allclose(logits[real], expected, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_array_equal(caches[1].start, np.repeat(batch.system_lengths, 3))
        np.testing.assert_array_equal(caches[2].start, np.repeat(caches[1].end, 2))

    def test_level_by_level_is_the_same(self, params):
        tokens, lengths = levels_of(ragged_tree.random_tree(0, tiny.CONFIG.vocab_size, (2, 3, 2)))
        expected, caches = tiny.jitted_forward_tree(params, tiny.CONFIG, tokens, lengths)
        ancestors = []
        for i in range(3):
            hidden, cache, _ = tiny.forward(
                params, tiny.CONFIG, tokens[i], lengths[i], ancestors=tuple(ancestors)
            )
            np.testing.assert_allclose(hidden, expected[i], atol=1e-5)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cache, caches[i])
            ancestors.append(cache)

    @settings(max_examples=15)
    @given(seed=st.integers(0, 10_000))
    def test_random_trees(self, seed):
        params = tiny.params()
        batch = ragged_tree.random_tree(seed, tiny.CONFIG.vocab_size, (2, 3, 2))
        hidden, _ = tiny.jitted_forward_tree(params, tiny.CONFIG, *levels_of(batch))
        ours = at_real_tokens(tiny.unembed(params, tiny.CONFIG, hidden[2]), batch)
        # One width for all examples, so that the plain forward compiles once.
        flat = ragged_tree.flatten(batch)
        tokens = np.pad(flat.tokens, ((0, 0), (0, 19 - flat.tokens.shape[1])))
        expected = at_real_tokens(ragged_tree.pick(tiny.logits(params, tiny.CONFIG, tokens), batch), batch)
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())

    def test_what_the_padding_holds_does_not_matter(self, params):
        batches = [ragged_tree.random_tree(3, tiny.CONFIG.vocab_size, (2, 3, 2), filler=f) for f in (0, 60)]
        one, other = (
            tiny.jitted_forward_tree(params, tiny.CONFIG, *levels_of(batch))[0][2] for batch in batches
        )
        np.testing.assert_array_equal(at_real_tokens(one, batches[0]), at_real_tokens(other, batches[1]))
        assert np.isfinite(one).all()

    @pytest.mark.parametrize("parts", [1, 2])
    def test_nodes_in_any_order_name_their_ancestors(self, params, parts):
        """Within each part rollouts are shuffled and problems too, and one problem is nobody's."""
        tokens, lengths = levels_of(ragged_tree.random_tree(0, tiny.CONFIG.vocab_size, (2, 3, 2)))
        expected, caches = tiny.jitted_forward_tree(params, tiny.CONFIG, tokens, lengths)
        # Rollouts 2p and 2p + 1 are of problem p, problems 0, 1, 2 of the first system prompt.
        problems = np.array([[2, 0, 4, 1], [3, 2, 0, 5]])
        rollouts = np.array([[5, 0, 2, 4, 1, 3], [10, 7, 11, 6, 4, 5]])
        if parts == 1:
            problems, rollouts = problems[:1], rollouts[:1]
        owner = [list(p).index(r // 2) for p, rows in zip(problems, rollouts, strict=True) for r in rows]
        problems, rollouts = problems.reshape(-1), rollouts.reshape(-1)

        def above(cache, owner, parts=1):
            return cache.replace(owner=jnp.asarray(owner, jnp.int32), parts=parts)

        system = caches[0]
        hidden, problem, _ = tiny.forward(
            params, tiny.CONFIG, tokens[1][problems], lengths[1][problems], (above(system, problems // 3),)
        )
        np.testing.assert_allclose(hidden, expected[1][problems], atol=1e-5)
        ancestors = above(system, rollouts // 6), above(problem, owner, parts)
        hidden, cache, _ = tiny.forward(
            params, tiny.CONFIG, tokens[2][rollouts], lengths[2][rollouts], ancestors
        )
        np.testing.assert_allclose(hidden, expected[2][rollouts], atol=1e-5)
        np.testing.assert_array_equal(cache.start, caches[2].start[rollouts])

    def test_ancestors_that_cannot_be_shared_are_refused(self, params):
        _, cache, _ = tiny.forward(params, tiny.CONFIG, jnp.zeros((2, 3), jnp.int32))
        with pytest.raises(ValueError, match="3 nodes cannot share 2 ancestors evenly"):
            transformer.forward(params, tiny.CONFIG, jnp.zeros((3, 1), jnp.int32), ancestors=[cache])


def test_remat_says_what_is_stored(params):
    """Beside its input a layer stores everything, the products, the result of attention, or nothing."""
    tokens = jnp.zeros((1, 8), jnp.int32)

    def stored(remat):
        config = tiny.CONFIG.replace(remat=remat)
        _, pull_back = jax.vjp(lambda p: transformer.forward(p, config, tokens)[0], params)
        return sum(x.size for x in jax.tree.leaves(pull_back))

    # For each token of each layer.
    full, tokens_of_layers = stored("full"), 8 * tiny.CONFIG.num_layers
    assert stored("attention") == full + tokens_of_layers * 24
    # Query, key, value, out, gate and up. Nothing of the layer depends on what down returns.
    assert stored("products") == full + tokens_of_layers * (24 + 12 + 12 + 16 + 20 + 20)
    assert stored("none") > stored("products")


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_rounded_inputs_change_gradients_alone_and_little(scan):
    """In float32 nothing; in bfloat16 the gradient, by about as much as its products were rounded."""
    tokens = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, (2, 9)).astype(np.int32)
    params = tiny.params(tiny.CONFIG)

    def run(remat, dtype):
        config = tiny.CONFIG.replace(remat=remat, dtype=dtype, scan_layers=scan)

        def loss(params):
            hidden, cache, _ = transformer.forward(params, config, tokens)
            # The level below, whose gradient comes through the cache.
            below, _, _ = transformer.forward(params, config, tokens[:, :3], ancestors=[cache])
            return jnp.square(hidden).sum() + jnp.sin(below).sum()

        stored = sum(x.nbytes for x in jax.tree.leaves(jax.vjp(loss, params)[1]))
        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        return value, np.concatenate([x.reshape(-1) for x in jax.tree.leaves(gradient)]), stored

    value, gradient, _ = run("full", "float32")
    same, exact, _ = run("rounded", "float32")
    assert same == value
    np.testing.assert_allclose(exact, gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())
    (value, full, stored), (same, rounded, fewer) = run("full", "bfloat16"), run("rounded", "bfloat16")
    assert same == value and fewer < stored
    off, rounding = (np.linalg.norm(x - y) for x, y in ((rounded, full), (full, gradient)))
    assert 0 < off < rounding


class TestCachedDecoding:
    @pytest.mark.parametrize("scan", [True, False])
    def test_token_by_token_over_growing_caches(self, scan):
        """Ragged prefixes, then single tokens, each over the caches of all that came before."""
        config = tiny.CONFIG.replace(scan_layers=scan, remat="none")
        params = tiny.params(config)
        rng = np.random.default_rng(0)
        lengths, new = np.array([3, 5], np.int32), 6
        tokens = rng.integers(0, config.vocab_size, (2, 5 + new)).astype(np.int32)
        _, prefix, _ = tiny.forward(params, config, tokens[:, :5], lengths)
        drawn = rng.integers(0, config.vocab_size, (2, new)).astype(np.int32)
        shape = (config.num_layers, config.num_kv_heads, 2, new, config.head_dim)
        key, value = np.zeros(shape, np.float32).swapaxes(3, 4), np.zeros(shape, np.float32)
        steps = []
        for t in range(new):
            written = KVCache(key, value, prefix.end, np.full(2, t, np.int32))
            hidden, fresh, _ = tiny.forward(params, config, drawn[:, t : t + 1], ancestors=(prefix, written))
            steps.append(tiny.unembed(params, config, hidden[:, 0]))
            key[..., t], value[:, :, :, t] = fresh.key[..., 0], fresh.value[:, :, :, 0]
            np.testing.assert_array_equal(fresh.start, lengths + t)
        for row, length in enumerate(lengths):
            whole = np.concatenate([tokens[row, :length], drawn[row], np.zeros(5 - length, np.int32)])
            expected = tiny.logits(params, config, whole[None])[0, length : length + new]
            np.testing.assert_allclose(np.stack(steps)[:, row], expected, atol=1e-5)


class TestLogits:
    def test_causal(self, params):
        tokens = np.random.default_rng(0).integers(0, 61, (1, 12)).astype(np.int32)
        before = tiny.logits(params, tiny.CONFIG, tokens)
        for t in (0, 5, 11):
            changed = tokens.copy()
            changed[0, t] = (changed[0, t] + 1) % 61
            after = tiny.logits(params, tiny.CONFIG, changed)
            np.testing.assert_array_equal(before[0, :t], after[0, :t])
            assert np.abs(before[0, t:] - after[0, t:]).max(axis=-1).min() > 1e-4

    @pytest.mark.parametrize("token", [61, -1])
    @pytest.mark.parametrize("array", [np.array, jnp.array])
    def test_tokens_outside_the_vocabulary_are_refused(self, params, token, array):
        """Where they are known, and not in padding."""
        tokens = array([[1, 2], [3, token]])
        with pytest.raises(
            ValueError, match=f"tokens: token id {token} is outside .*, vocab_size=61; give ids"
        ):
            transformer.logits(params, tiny.CONFIG, tokens)
        with pytest.raises(ValueError, match=f"tokens: token id {token} is outside"):
            transformer.forward(params, tiny.CONFIG, tokens, jnp.array([1, 2]))
        lengths = np.array([2, 1])
        hidden, *_ = jax.eval_shape(lambda: transformer.forward(params, tiny.CONFIG, tokens, lengths))
        assert hidden.shape == (2, 2, 16)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("precision", ["default", "highest", "bfloat16"])
    def test_numerics(self, params, dtype, precision):
        config = tiny.CONFIG.replace(dtype=dtype, matmul_precision=precision)
        tokens = np.random.default_rng(0).integers(0, 61, (2, 12)).astype(np.int32)
        hidden, cache, _ = tiny.forward(params, config, tokens)
        assert cache.key.dtype == cache.value.dtype == hidden.dtype == dtype
        logits = tiny.logits(params, config, tokens)
        assert logits.dtype == jnp.float32
        expected = tiny.logits(params, tiny.CONFIG, tokens)
        exact = dtype == "float32" and precision != "bfloat16"
        assert tiny.relative_error(logits, expected) < (1e-5 if exact else 0.05)
        assert exact or tiny.relative_error(logits, expected) > 1e-5
