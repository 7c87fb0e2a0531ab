import jax
import numpy as np
import pytest
from scipy import stats

from espl_jax.models import lora
from espl_jax.models.config import Rope
from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.sampling import draw
from espl_jax.sampling.generate import generate
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation
from tests.sampling.boundaries import distribution, same_row
from tests.support import tiny
from tests.support.flat import sample_tree

WINDOWED = tiny.CONFIG.replace(windows=(7, 0), local_rope=Rope(theta=50.0), qk_norm=True, post_norms=True)
KEY = jax.random.key(0, impl="threefry2x32")
# Ragged at both shared levels; one lane without a system prompt, one problem of a single token.
SYSTEMS = [[5, 6, 7, 8], []]
PROBLEMS = [[[9, 10], [11]], [[12, 13, 14], [15, 16]]]
GROUP = 4
NEW = 40
STOPS = (3, 33)


@pytest.fixture(scope="module")
def params():
    return tiny.params()


def keys_of(seed=0, group=GROUP):
    m, b, n = np.ogrid[:2, :2, :group]
    return draw.row_keys(jax.random.key(seed, impl="threefry2x32"), m, b, n)


def sample(params, config=tiny.CONFIG, **changes):
    settings = {"max_new_tokens": NEW, "temperature": 1.0, "stop_ids": STOPS} | changes
    return sample_tree(params, config, SYSTEMS, PROBLEMS, keys_of(), **settings)


@pytest.fixture(scope="module")
def samples(params):
    return sample(params)


def sequences(samples):
    """Yields the index, the prompt and the new tokens of every row."""
    for m, b, n in np.ndindex(samples.lengths.shape):
        yield (m, b, n), SYSTEMS[m] + PROBLEMS[m][b], samples.tokens[m, b, n, : samples.lengths[m, b, n]]


def rescored(params, config, samples, temperature):
    """Returns logprobs [M, B, N, T] of the sampled tokens, from separate sequences without caches."""
    width = max(len(s) + max(map(len, p)) for s, p in zip(SYSTEMS, PROBLEMS, strict=True)) + NEW
    rows = [np.append(prompt, tokens) for _, prompt, tokens in sequences(samples)]
    tokens = np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)
    scores = np.asarray(tiny.token_logprobs(params, config, tokens, temperature))
    out = np.zeros(samples.logprobs.shape, np.float32)
    for row, (index, prompt, tokens) in zip(scores, sequences(samples), strict=True):
        out[index][: len(tokens)] = row[len(prompt) - 1 :][: len(tokens)]
    return out


class TestEnds:
    def test_stops_and_limits(self, samples):
        assert samples.tokens.shape == (2, 2, GROUP, NEW)
        ended = ~samples.truncated
        assert ended.any()
        assert samples.truncated.any()
        for index, _, tokens in sequences(samples):
            assert not set(tokens[:-1].tolist()) & set(STOPS)
            assert (tokens[-1] in STOPS) == ended[index]
            assert ended[index] or len(tokens) == NEW
            past = slice(len(tokens), None)
            for x in (samples.tokens, samples.logprobs, samples.untruncated_logprobs):
                assert not x[index][past].any()
            assert (samples.logprobs[index][: len(tokens)] < 0).all()
        np.testing.assert_array_equal(samples.logprobs, samples.untruncated_logprobs)

    def test_limits_of_rows(self, params, samples):
        limits = np.array([[[0, 1, 7, NEW]], [[3, 0, 0, 32]]])
        cut = sample(params, max_new_tokens=limits)
        limits = np.broadcast_to(limits, samples.lengths.shape)
        lengths = np.minimum(samples.lengths, limits)
        np.testing.assert_array_equal(cut.lengths, lengths)
        kept = np.arange(NEW) < lengths[..., None]
        np.testing.assert_array_equal(cut.tokens, np.where(kept, samples.tokens, 0))
        np.testing.assert_allclose(cut.logprobs, np.where(kept, samples.logprobs, 0), atol=1e-5)
        stopped = np.isin(
            np.take_along_axis(cut.tokens, np.maximum(lengths - 1, 0)[..., None], -1)[..., 0], STOPS
        )
        np.testing.assert_array_equal(cut.truncated, (lengths > 0) & ~stopped)

    def test_without_stop_ids_every_row_runs_to_its_limit(self, params):
        long = sample(params, stop_ids=(), max_new_tokens=5)
        assert (long.lengths == 5).all()
        assert long.truncated.all()


class TestLogprobs:
    """Tokens are sampled with caches and scored without."""

    @pytest.mark.parametrize(
        ("changes", "temperature", "tolerance"),
        [
            ({}, 1.0, 1e-5),
            ({"tied_head": False, "scan_layers": False}, 0.7, 1e-5),
            ({"dtype": "bfloat16"}, 0.7, 0.02),
            ({"matmul_precision": "bfloat16"}, 1.0, 0.02),
        ],
    )
    def test_sampler_and_trainer_agree(self, changes, temperature, tolerance):
        config = tiny.CONFIG.replace(**changes)
        params = tiny.params(config)
        drawn = sample(params, config, temperature=temperature, stop_ids=(), max_new_tokens=20, chunk=10)
        gap = np.abs(rescored(params, config, drawn, temperature) - drawn.logprobs)
        assert gap.mean() < tolerance

    def test_adapters_are_applied(self, params):
        attached = lora.attach(params, tiny.adapters())
        drawn = sample(attached, stop_ids=(), max_new_tokens=20, chunk=10)
        gap = np.abs(rescored(attached, tiny.CONFIG, drawn, 1.0) - drawn.logprobs)
        assert gap.max() < 1e-4

    @pytest.mark.parametrize(
        "config", [pytest.param(tiny.CONFIG, marks=pytest.mark.slow), WINDOWED], ids=["plain", "windowed"]
    )
    def test_greedy_is_the_argmax_of_the_uncached_forward(self, config):
        prompt, params = [1, 2, 3], tiny.params(config)
        drawn = generate(params, config, [prompt], key=KEY, group_size=1, max_new_tokens=200, temperature=0.0)
        tokens = drawn.tokens[0, 0]
        scores = tiny.logits(params, config, np.append(prompt, tokens)[None])[0, len(prompt) - 1 : -1]
        np.testing.assert_array_equal(tokens, scores.argmax(axis=-1))
        expected = jax.nn.log_softmax(scores)[np.arange(200), tokens]
        np.testing.assert_allclose(drawn.untruncated_logprobs[0, 0], expected, atol=1e-4)
        assert not drawn.logprobs.any()


class TestLayout:
    """Samples depend on their keys, not on rows, chunks, capacities or devices."""

    def test_windows_on_eight_devices(self):
        """Each device reads the windows of its rows."""
        mesh = sharding.make_mesh({"data": 4, "tensor": 2})
        params = tiny.params(WINDOWED)
        spread = sharding.place(params, abstract(WINDOWED), mesh)
        alone, ours = (
            sample(weights, WINDOWED, max_new_tokens=16, chunk=8, mesh=where)
            for weights, where in ((params, None), (spread, mesh))
        )
        np.testing.assert_array_equal(ours.tokens, alone.tokens)
        np.testing.assert_allclose(ours.untruncated_logprobs, alone.untruncated_logprobs, atol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "truncation",
        [
            pytest.param(UNTRUNCATED, id="all"),
            pytest.param(Truncation(top_p=0.9), id="top-p"),
        ],
    )
    def test_rows_that_differ_do_so_at_a_boundary(self, truncation, record_property):
        """Slots for two and seven rows a lane, chunks of four and of 32, one device and eight."""
        shape, new = (3, 4, 10), 40
        systems = [[5, 6, 7, 8], [], [9] * 20]
        problems = [[[10 + m, *range(20, 20 + 2 * b + m)] for b in range(4)] for m in range(3)]
        config = tiny.CONFIG.replace(vocab_size=64)
        params, key = tiny.params(config), jax.random.key(3, impl="threefry2x32")
        keys = draw.row_keys(key, *np.ogrid[tuple(slice(n) for n in shape)])
        mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        spread = sharding.place(params, abstract(config), mesh)

        def run(max_rows, chunk, mesh):
            settings = {"max_new_tokens": new, "temperature": 1.0, "stop_ids": STOPS, "chunk": chunk}
            settings["truncation"] = truncation
            weights = params if mesh is None else spread
            return sample_tree(
                weights, config, systems, problems, keys, **settings, max_rows=max_rows, mesh=mesh
            )

        first = run(2, 4, None)
        differing = compared = 0
        one_device = [(2, 32, None), (7, 4, None), (7, 32, None), (None, 32, None)]
        for layout in [*one_device, (2, 4, mesh), (7, 32, mesh)]:
            other = run(*layout)
            for place in np.ndindex(shape):
                compared += 1
                prompt = systems[place[0]] + problems[place[0]][place[1]]
                given = params, config, prompt, keys[place], place
                differing += not same_row(first, other, *given, truncation=truncation)
        print(f"{differing} of {compared} rows differ, each first at a boundary")
        record_property(f"rows that differ under another layout, {truncation}", f"{differing} of {compared}")
        # A near tie at the cut of one row in the first layout counts in each of the others.
        assert differing < compared / (50 if truncation else 200)

    def test_a_row_alone_draws_what_it_draws_in_company(self, params, samples):
        alone = sample_tree(
            params,
            tiny.CONFIG,
            SYSTEMS[1:],
            [PROBLEMS[1][:1]],
            keys_of()[1:, :1, 2:3],
            max_new_tokens=NEW,
            temperature=1.0,
            stop_ids=STOPS,
        )
        np.testing.assert_array_equal(alone.tokens[0, 0, 0], samples.tokens[1, 0, 2])

    def test_rows_draw_differently(self, samples):
        assert len({tuple(row) for row in samples.tokens.reshape(-1, NEW)}) == samples.lengths.size

    @pytest.mark.parametrize("scan", [pytest.param(True, marks=pytest.mark.slow), False])
    def test_weights_of_each_layer_alone(self, params, samples, scan):
        config = tiny.CONFIG.replace(sampling_layout="unstacked", scan_layers=scan)
        unstacked = sample(params, config, max_new_tokens=NEW)
        np.testing.assert_array_equal(unstacked.tokens, samples.tokens)
        np.testing.assert_allclose(unstacked.logprobs, samples.logprobs, atol=1e-5)


class TestDistribution:
    """Compares samples at a fixed context with the exact distribution."""

    @pytest.mark.parametrize(
        ("temperature", "truncation"),
        [
            pytest.param(t, cut, marks=() if i == j == 1 else pytest.mark.slow)
            for i, cut in enumerate((UNTRUNCATED, Truncation(top_p=0.8), Truncation(top_k=5)))
            for j, t in enumerate((0.6, 1.0, 1.5))
        ],
        ids=str,
    )
    def test_twenty_thousand_draws(self, params, temperature, truncation):
        count, context = 20_000, [5, 6, 7, 9, 10]
        drawn = sample_tree(
            params,
            tiny.CONFIG,
            [context[:3]],
            [[context[3:]]],
            draw.row_keys(jax.random.key(11, impl="threefry2x32"), *np.ogrid[:1, :1, :count]),
            max_new_tokens=1,
            temperature=temperature,
            truncation=truncation,
            max_rows=5_000,
        )
        exact = distribution(
            tiny.logits(params, tiny.CONFIG, np.array([context]))[0, -1:], temperature, truncation
        )[0]
        tokens = drawn.tokens[0, 0, :, 0]
        assert (exact[tokens] > 0).all() and len(np.unique(tokens)) > 3
        np.testing.assert_allclose(drawn.logprobs[0, 0, :, 0], np.log(exact[tokens]), atol=1e-4)
        observed, expected = np.bincount(tokens, minlength=len(exact)), exact * count
        likely = expected >= 5
        observed = np.append(observed[likely], observed[~likely].sum())
        expected = np.append(expected[likely], expected[~likely].sum())
        observed, expected = observed[expected > 0], expected[expected > 0]
        assert stats.chisquare(observed, expected * count / expected.sum()).pvalue > 1e-3


class TestGenerate:
    SETTINGS = {"key": KEY, "group_size": 2, "max_new_tokens": 8}  # noqa: RUF012

    def test_prompts_that_share_a_start(self, params):
        """Flat prompts form one lane; the length of their common prefix does not affect samples."""
        prompts = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]
        flat = generate(params, tiny.CONFIG, prompts, **self.SETTINGS)
        assert flat.tokens.shape == (3, 2, 8)
        nested = generate(params, tiny.CONFIG, [prompts], **self.SETTINGS)
        np.testing.assert_array_equal(nested.tokens[0], flat.tokens)
        apart = generate(params, tiny.CONFIG, [[1, 2, 3, 4], [9, 2, 5], [1, 2, 3]], **self.SETTINGS)
        np.testing.assert_array_equal(apart.tokens[[0, 2]], flat.tokens[[0, 2]])
        assert (apart.tokens[1] != flat.tokens[1]).any()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"top_p": 1.1}, "top_p=1.1: give a probability"),
            ({"top_k": -5}, "top_k=-5: give a whole number"),
            ({"min_p": 2.0}, "min_p=2.0: give a ratio"),
            ({"temperature": -0.1}, "temperature=-0.1"),
            ({"max_new_tokens": 0}, "max_new_tokens=0: give at least 1"),
            ({"prompts": [[1] * 256]}, "a prompt of 256 tokens leaves no room in a context of 256"),
            ({"prompts": []}, "prompts: lists are missing, empty or of unequal number"),
            ({"prompts": [[1], []]}, "prompts: lists are missing, empty or of unequal number"),
            ({"prompts": [[[1], [2]], [[3]]]}, "the same number of lists"),
            (
                {"prompts": [[1, 2], [1, 61]]},
                "prompts: token id 61 is outside the model's vocabulary, vocab_size=61",
            ),
            ({"prompts": [[[-1, 2]]]}, "prompts: token id -1 is outside .*; give ids from 0 to 60"),
            ({"stop_ids": (3, 61)}, "stop_ids: token id 61 is outside"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, params, changes, message):
        settings = self.SETTINGS | changes
        prompts = settings.pop("prompts", [[1, 2, 3]])
        with pytest.raises(ValueError, match=message):
            generate(params, tiny.CONFIG, prompts, **settings)

    @pytest.mark.parametrize("name", ["system_tokens", "problem_tokens"])
    def test_a_tree_of_unknown_tokens_is_refused(self, params, name):
        tree = {"system_tokens": [[1]], "problem_tokens": [[[2]]]}
        tree[name] = [[99]] if name == "system_tokens" else [[[2, 99]]]
        with pytest.raises(ValueError, match=f"{name}: token id 99 is outside"):
            sample_tree(
                params, tiny.CONFIG, *tree.values(), keys_of()[:1, :1], max_new_tokens=2, temperature=1.0
            )

    def test_a_problem_of_no_tokens_is_refused(self, params):
        with pytest.raises(ValueError, match="at least one token"):
            sample_tree(
                params, tiny.CONFIG, [[1]], [[[]]], keys_of()[:1, :1], max_new_tokens=2, temperature=1.0
            )
