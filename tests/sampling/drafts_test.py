"""Drafts change how many decode steps it takes to draw the tokens, and not the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from espl_jax.models.config import Experts, Latent, Rope
from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.sampling import decode, draw
from espl_jax.sampling.draft_lengths import Acceptance
from espl_jax.sampling.draft_texts import DraftTexts
from espl_jax.sampling.drafts import NGRAM, NOTHING, propose
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation
from tests.sampling.boundaries import distribution, same_row
from tests.support import tiny
from tests.support.flat import sample_tree

SYSTEMS = [[5, 6, 7, 8], []]
PROBLEMS = [[[9, 10], [11]], [[12, 13, 14], [15, 16]]]
GROUP, NEW, STOPS = 4, 40, (3, 33)
FAMILIES = {
    "windows": tiny.CONFIG.replace(windows=(7, 0), local_rope=Rope(theta=50.0), qk_norm=True),
    "latent": tiny.CONFIG.replace(num_kv_heads=4, latent=Latent(7, 2, 5, 3)),
    "experts": tiny.CONFIG.replace(experts=Experts(count=8, active=2, mlp_dim=12)),
}


def keys_of(seed=0):
    return draw.row_keys(jax.random.key(seed, impl="threefry2x32"), *np.ogrid[:2, :2, :GROUP])


def sample(params, config=tiny.CONFIG, **changes):
    settings = {"max_new_tokens": NEW, "temperature": 1.0, "stop_ids": STOPS, "coarse": True} | changes
    return sample_tree(params, config, SYSTEMS, PROBLEMS, keys_of(), **settings)


def texts_of(samples):
    """The rows of each problem as earlier texts."""
    texts = [[] for _ in PROBLEMS[0]]
    for m, b, n in np.ndindex(samples.lengths.shape):
        texts[b].append(samples.tokens[m, b, n, : samples.lengths[m, b, n]])
    return texts


@pytest.fixture(scope="module")
def params():
    return tiny.params()


@pytest.fixture(scope="module")
def plain(params):
    """Samples without drafts, by settings."""
    kept = {}

    def draw_once(**settings):
        name = repr(sorted(settings.items()))
        if name not in kept:
            kept[name] = sample(params, **settings)
        return kept[name]

    return draw_once


@pytest.fixture
def always(monkeypatch):
    """Makes every chunk draft as much as it may."""
    monkeypatch.setattr(Acceptance, "choose", lambda self, rows, width, read, lengths: lengths[-1])


def assert_same(first, other, params, config=tiny.CONFIG, temperature=1.0, truncation=UNTRUNCATED):
    """All rows are the same, except for a few at a near tie."""
    keys, places = keys_of(), list(np.ndindex(first.lengths.shape))
    differing = sum(
        not same_row(
            *(first, other, params, config, SYSTEMS[place[0]] + PROBLEMS[place[0]][place[1]], keys[place]),
            place,
            temperature,
            truncation,
        )
        for place in places
    )
    assert differing <= 1


class TestPropose:
    @pytest.mark.parametrize(
        ("others", "own", "expected"),
        [
            pytest.param([5, 6, 7, 8, -1], [1, 5, 6], [7, 8, -1], id="up to the end of a text"),
            pytest.param([5, 6, 7, -1, 5, 6, 8], [1, 5, 6], [8, -1, -1], id="the latest"),
            pytest.param([5, 6, 7, 7, 7], [6, 9, 9, 9, 5, 6], [7, 7, 7], id="the longest"),
            pytest.param([5, 6, 7, 7, 7], [5, 6, 2, 3, 5, 6], [2, 3, 5], id="its own among equals"),
            pytest.param([5, 6, -1, -1, -1], [1, 5, 6], [-1, -1, -1], id="nothing follows"),
            pytest.param([4, 4, 4, 4, 4], [1, 2, 3], [-1, -1, -1], id="nothing matches"),
            pytest.param([1, 2, 3, 4, -1], [1], [2, 3, 4], id="a single token"),
            pytest.param([9, 5, -1, 6, 7], [5, 6], [7, -1, -1], id="not across a border"),
        ],
    )
    def test_by_hand(self, others, own, expected):
        padded = own + [NOTHING] * 3
        draft = propose(jnp.array([others]), jnp.array([padded]), jnp.array([len(own)]), 3)
        assert draft[0].tolist() == expected

    def test_against_a_search_in_strings(self):
        """Texts over three letters, in which matches are many and long."""
        rng = np.random.default_rng(0)

        def following(text, end):
            """(tokens matched, place of what follows), the best of them."""
            found = (0, 0)
            for place in range(1, len(text)):
                if text[place] == NOTHING:
                    continue
                matched = 0
                while (
                    matched < min(NGRAM, place, len(end)) and text[place - 1 - matched] == end[-1 - matched]
                ):
                    matched += 1
                found = max(found, (matched, place))
            return found

        others, own = rng.integers(-1, 3, (200, 30)), rng.integers(0, 3, (200, 12))
        length = rng.integers(1, 10, 200)
        own[np.arange(12) >= length[:, None]] = NOTHING
        drafts = propose(*map(jnp.asarray, (others, own, length)), 4)
        for draft, text, mine, count in zip(np.asarray(drafts), others, own, length, strict=True):
            end = mine[:count].tolist()
            (far, there), (near, here) = following(text, end), following(mine, end)
            source, place = (mine, here) if near >= far else (text, there)
            expected = [*source[place : place + 4].tolist(), *[NOTHING] * 4][:4]
            assert draft.tolist() == (expected if max(near, far) else [NOTHING] * 4)


class TestSameTokens:
    @pytest.mark.parametrize(
        ("drafted", "settings"),
        [
            pytest.param(
                drafted, settings, marks=() if kept == drafted else pytest.mark.slow, id=f"{name}-{drafted}"
            )
            for name, kept, settings in (
                ("all", 4, {}),
                ("greedy", 8, {"temperature": 0.0}),
                ("truncated", 2, {"temperature": 0.7, "truncation": Truncation(20, 0.8, 0.02)}),
            )
            for drafted in (2, 4, 8)
        ],
    )
    def test_with_what_texts_provide(self, params, plain, always, drafted, settings):
        first = plain(**settings)
        other = sample(params, draft_tokens=drafted, **settings)
        cut = {name: settings[name] for name in ("temperature", "truncation") if name in settings}
        assert_same(first, other, params, **cut)
        if settings:
            assert other.row_steps < first.row_steps
        np.testing.assert_allclose(other.cutoffs, first.cutoffs, atol=1e-4)

    @pytest.mark.parametrize(
        "drafted", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
    )
    def test_drafts_that_are_always_right(self, params, plain, always, drafted):
        """Each problem's only text is that of its only row."""
        rows = [[row[:1] for row in lane] for lane in np.asarray(keys_of())][:1]
        given = params, tiny.CONFIG, SYSTEMS[:1], PROBLEMS[:1], jnp.asarray(rows)
        settings = {"max_new_tokens": NEW, "temperature": 1.0, "coarse": True}
        first = sample_tree(*given, **settings)
        past = [[first.tokens[0, b, 0]] for b in range(2)]
        other = sample_tree(*given, **settings, draft_tokens=drafted, past=past)
        np.testing.assert_array_equal(other.tokens, first.tokens)
        np.testing.assert_allclose(other.logprobs, first.logprobs, atol=1e-5)
        # A text may have the same n-gram twice, so that a draft goes wrong once.
        assert -(-NEW // (drafted + 1)) * 2 <= other.row_steps <= (-(-NEW // (drafted + 1)) + 2) * 2
        assert first.row_steps == 2 * NEW

    @pytest.mark.parametrize("drafted", [3, pytest.param(7, marks=pytest.mark.slow)])
    def test_drafts_that_are_always_wrong(self, params, plain, always, monkeypatch, drafted):
        """A drafted stop token ends the row if it is drawn, so no draft saves a step."""
        monkeypatch.setattr(decode, "propose", lambda *texts: jnp.full((len(texts[0]), texts[-1]), STOPS[0]))
        first = plain()
        other = sample(params, draft_tokens=drafted)
        assert_same(first, other, params)
        assert other.row_steps >= first.row_steps * 0.9

    @pytest.mark.parametrize("family", FAMILIES)
    def test_families(self, always, family):
        config = FAMILIES[family]
        params = tiny.params(config)
        settings = {"stop_ids": (), "record_routing": config.experts is not None}
        first = sample(params, config, **settings)
        other = sample(params, config, **settings, draft_tokens=4, past=texts_of(first))
        assert_same(first, other, params, config)
        assert other.row_steps < first.row_steps
        if config.experts:
            np.testing.assert_array_equal(other.routing, first.routing)

    def test_on_eight_devices(self, always):
        """Rows and their texts are sharded over four devices."""
        config = FAMILIES["windows"]
        mesh, params = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), tiny.params(config)
        first = sample(params, config)
        spread = sharding.place(params, abstract(config), mesh)
        other = sample(spread, config, mesh=mesh, draft_tokens=4, past=texts_of(first))
        assert_same(first, other, params, config)
        assert other.row_steps < first.row_steps

    def test_limits_of_rows(self, params, plain, always):
        """A draft that goes beyond the limit of a row."""
        limits = np.array([[[0, 1, 7, NEW]], [[3, 0, 0, 32]]])
        first = plain(max_new_tokens=limits)
        other = sample(params, max_new_tokens=limits, draft_tokens=8, past=texts_of(plain()))
        np.testing.assert_array_equal(other.lengths, first.lengths)
        assert_same(first, other, params)

    def test_few_slots(self, params, plain, always):
        """Rows leave slots at different times, and others take them; those that are done are texts."""
        other = sample(params, max_rows=2, draft_tokens=4, stop_ids=())
        assert_same(plain(stop_ids=()), other, params)

    def test_what_the_host_cuts_and_appends(self, params, always):
        """Turns end at the second even token; then five tokens are appended."""

        def find_end(tokens, checked):
            even = np.flatnonzero(np.asarray(tokens) % 2 == 0)
            return int(even[1]) + 1 if len(even) > 1 and even[1] >= checked else None

        def respond(place, tokens):
            return [40, 41, 42, 43, 44] if (tokens == 44).sum() < 2 else None

        settings = {"find_end": find_end, "respond": respond, "max_new_tokens": 60}
        first, other = (sample(params, **settings, draft_tokens=drafted) for drafted in (0, 4))
        assert_same(first, other, params)
        np.testing.assert_array_equal(other.drawn, first.drawn)


@pytest.mark.parametrize(
    "truncation", [Truncation(top_p=0.8), pytest.param(Truncation(top_k=5), marks=pytest.mark.slow)], ids=str
)
def test_twenty_thousand_draws(params, always, truncation):
    """The first token, and the second where the first was drafted: drawn in one step, from the exact
    distribution after it."""
    shape, context = (1, 100, 200), [5, 6, 7, 9, 10]

    def exact_after(tokens):
        return distribution(tiny.logits(params, tiny.CONFIG, np.array([tokens]))[0, -1:], 1.0, truncation)[0]

    likely = int(exact_after(context).argmax())
    samples = sample_tree(
        params,
        tiny.CONFIG,
        [context[:3]],
        [[context[3:]] * shape[1]],
        draw.row_keys(jax.random.key(11, impl="threefry2x32"), *np.ogrid[tuple(map(slice, shape))]),
        max_new_tokens=2,
        temperature=1.0,
        truncation=truncation,
        max_rows=5_000,
        coarse=True,
        draft_tokens=1,
        past=[[[likely, 1]]] * shape[1],
    )
    tokens, logprobs = (x.reshape(-1, 2) for x in (samples.tokens, samples.logprobs))
    drafted = tokens[:, 0] == likely
    for drawn, scores, exact in (
        (tokens[:, 0], logprobs[:, 0], exact_after(context)),
        (tokens[drafted, 1], logprobs[drafted, 1], exact_after([*context, likely])),
    ):
        assert (exact[drawn] > 0).all() and len(drawn) > 2000
        np.testing.assert_allclose(scores, np.log(exact[drawn]), atol=1e-4)
        observed, expected = np.bincount(drawn, minlength=len(exact)), exact * len(drawn)
        often = expected >= 5
        observed = np.append(observed[often], observed[~often].sum())
        expected = np.append(expected[often], expected[~often].sum())
        observed, expected = observed[expected > 0], expected[expected > 0]
        assert stats.chisquare(observed, expected * len(drawn) / expected.sum()).pvalue > 1e-3


class TestLengths:
    """How many tokens to draft."""

    LENGTHS = (0, 2, 4, 8)

    def choose(self, hits, misses, width, read=1.0):
        acceptance = Acceptance(4)
        rows = np.arange(4)
        for _ in range(10):
            acceptance.add(rows, np.full(4, hits), np.full(4, misses))
        return acceptance.choose(rows, width, read, self.LENGTHS)

    def test_more_where_drafts_are_right(self):
        lengths = [self.choose(hits, 10 - hits, 4) for hits in range(11)]
        assert lengths == sorted(lengths) and lengths[0] == 0 and lengths[-1] == 8

    def test_more_for_the_last_rows(self):
        lengths = [self.choose(7, 3, width) for width in (1, 4, 16, 64, 1024)]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1] == 0

    def test_more_where_much_is_read(self):
        assert self.choose(6, 4, 16, read=1.0) < self.choose(6, 4, 16, read=4.0)

    def test_an_accelerator_computes_while_it_reads(self, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert self.choose(6, 4, 60) > 0 and self.choose(6, 4, 2000) == 0

    def test_a_row_without_counts_is_like_the_others(self):
        acceptance = Acceptance(3)
        acceptance.add(np.array([0, 1]), np.array([90, 10]), np.array([10, 90]))
        good, bad, unknown = acceptance.rates(np.arange(3))
        assert good > 0.85 and bad < 0.15 and unknown == pytest.approx(0.5, abs=0.01)


class TestTexts:
    def texts(self, past, new=2):
        prompts = [[1, 2], [1, 2], [3], [3]]
        settings = {"own_columns": 6, "new_tokens": new, "mesh": None}
        return DraftTexts(prompts, np.array([0, 0, 1, 1]), past, **settings)

    def test_rows_in_the_order_of_a_chunk(self):
        texts = self.texts([[[7, 8]], []])
        texts.write(2, 0, [5, 6])
        texts.write(2, 1, [9])
        given = texts.of_rows(np.array([2, -1, 0]))
        assert given.own.tolist() == [[3, 5, 9, -1, -1, -1], [-1] * 6, [1, 2, -1, -1, -1, -1]]
        assert given.length.tolist() == [3, 1, 2] and given.problem.tolist() == [1, 0, 0]
        assert given.shared[0, :5].tolist() == [1, 2, 7, 8, -1] and (given.shared[1] == -1).all()
        texts.share(2, np.array([5, 9]))
        again = texts.of_rows(np.array([0]))
        assert again.shared[1, :5].tolist() == [3, 5, 9, -1, -1]
        assert (given.shared[1] == -1).all(), "what was handed out stays as it was"

    def test_shared_texts_are_transferred_once(self):
        texts = self.texts([[[7, 8]], []])
        first, again = (texts.of_rows(np.array([0])).shared for _ in range(2))
        assert isinstance(first, jax.Array) and again is first

    def test_the_oldest_texts_go_first(self):
        texts = self.texts([[], [[10 + i, 70 + i] for i in range(60)]])
        shared = np.asarray(texts.of_rows(np.array([0])).shared[1])
        assert shared[-4:].tolist() == [3, 69, 129, -1]
        kept = shared[(shared >= 10) & (shared < 70)].tolist()
        assert kept == list(range(kept[0], 70)) and kept[0] > 10


def test_drafts_need_texts(params):
    with pytest.raises(ValueError, match="drafted=2: drafts need texts"):
        decode.decode_chunk(params, tiny.CONFIG, *[None] * 4, jnp.float32(1), columns=1, steps=1, drafted=2)
    with pytest.raises(ValueError, match="draft_tokens=16: give 1 to 15, or 0"):
        sample(params, draft_tokens=16)
    with pytest.raises(ValueError, match="past: 1 lists for 2 problems; give one list for each problem"):
        sample(params, draft_tokens=2, past=[[[9, 10]]])
