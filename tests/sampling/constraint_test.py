"""Constrained sampling: tokens are always allowed, and follow the renormalized distribution."""

import jax
import numpy as np
import pytest
from scipy import stats

from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.sampling import draw
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation
from tests.sampling.boundaries import distribution
from tests.support import tiny
from tests.support.flat import sample_tree

SYSTEMS = [[5, 6, 7, 8], []]
PROBLEMS = [[[9, 10], [11]], [[12, 13, 14], [15, 16]]]
SHAPE = (2, 2, 3)
NEW = 20
STOPS = (3, 33)
V = tiny.CONFIG.vocab_size


class RandomThirds:
    """Allows a third of the vocabulary or so at each place of a row, and keeps what was asked and drawn.

    `names` are the rows by their number, so that a row alone can be the one that it was in company.
    """

    def __init__(self, names, always=()):
        self.names, self.always = names, list(always)
        self.drawn = {name: [] for name in names}
        self.asked = []

    def at(self, name, place):
        """What row `name` may draw after `place` tokens: bool [V]."""
        allowed = np.random.default_rng([name, place]).random(V) < 0.3
        allowed[[*self.always, 40]] = True
        return allowed

    def active(self, rows):
        return np.ones(len(rows), bool)

    def allowed(self, rows):
        names = [self.names[row] for row in rows]
        self.asked.append(names)
        bits = np.zeros((len(rows), 64), bool)
        bits[:, :V] = [self.at(name, len(self.drawn[name])) for name in names]
        bits[:, V:] = True  # tokens that the model does not have
        return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)

    def accept(self, rows, tokens):
        for row, token in zip(rows, tokens, strict=True):
            name = self.names[row]
            assert self.at(name, len(self.drawn[name]))[token]
            self.drawn[name].append(int(token))


def keys_of(shape=SHAPE, seed=0):
    return draw.row_keys(jax.random.key(seed, impl="threefry2x32"), *np.ogrid[tuple(slice(n) for n in shape)])


def sample(constraint, params=None, **changes):
    settings = {"max_new_tokens": NEW, "temperature": 1.0, "stop_ids": STOPS} | changes
    return sample_tree(
        params or tiny.params(), tiny.CONFIG, SYSTEMS, PROBLEMS, keys_of(), constraint=constraint, **settings
    )


def in_order(**options):
    return RandomThirds(list(range(np.prod(SHAPE))), **options)


@pytest.fixture(scope="module")
def company():
    constraint = in_order(always=STOPS)
    return constraint, sample(constraint)


def scores(place, tokens):
    """Returns the logits [T, V] from which each new token of a row was sampled, computed without cache."""
    prompt = SYSTEMS[place[0]] + PROBLEMS[place[0]][place[1]]
    whole = np.array([*prompt, *tokens, *[0] * (48 - len(prompt) - len(tokens))])
    return np.asarray(tiny.logits(tiny.params(), tiny.CONFIG, whole[None])[0])[len(prompt) - 1 :][
        : len(tokens)
    ]


class TestDraws:
    @pytest.mark.parametrize(
        "truncation",
        [
            pytest.param(UNTRUNCATED, marks=pytest.mark.slow),
            Truncation(top_p=0.8),
            pytest.param(Truncation(top_k=5), marks=pytest.mark.slow),
        ],
        ids=["all", "top-p", "top-k"],
    )
    def test_five_thousand_under_one_mask(self, truncation):
        """Tokens follow the distribution renormalized over the allowed tokens."""
        count, context, temperature = 5_000, [5, 6, 7, 9, 10], 0.8

        class Same(RandomThirds):
            def at(self, name, place):
                return np.arange(V) % 3 == 1

        drawn = sample_tree(
            tiny.params(),
            tiny.CONFIG,
            [context[:3]],
            [[context[3:]]],
            keys_of((1, 1, count), seed=11),
            max_new_tokens=1,
            temperature=temperature,
            truncation=truncation,
            constraint=Same(range(count)),
            max_rows=5_000,
        )
        allowed = np.arange(V) % 3 == 1
        logits = np.asarray(tiny.logits(tiny.params(), tiny.CONFIG, np.array([context])))[0, -1:]
        exact = np.zeros(V)
        exact[allowed] = distribution(logits[:, allowed], temperature, truncation)[0]
        tokens = drawn.tokens[0, 0, :, 0]
        assert (exact[tokens] > 0).all() and len(np.unique(tokens)) > 3
        np.testing.assert_allclose(drawn.logprobs[0, 0, :, 0], np.log(exact[tokens]), atol=1e-4)
        observed, expected = np.bincount(tokens, minlength=V), exact * count
        likely = expected >= 5
        observed = np.append(observed[likely], observed[~likely].sum())
        expected = np.append(expected[likely], expected[~likely].sum())
        observed, expected = observed[expected > 0], expected[expected > 0]
        assert stats.chisquare(observed, expected * count / expected.sum()).pvalue > 1e-3

    def test_logprobs_along_a_row_are_those_among_the_allowed(self, company):
        constraint, samples = company
        for row, place in enumerate(np.ndindex(SHAPE)):
            tokens = samples.tokens[place][: samples.lengths[place]]
            assert constraint.drawn[row] == tokens.tolist()
            masks = np.array([constraint.at(row, t) for t in range(len(tokens))])
            expected = jax.nn.log_softmax(np.where(masks, scores(place, tokens), -np.inf), axis=-1)
            expected = np.asarray(expected)[np.arange(len(tokens)), tokens]
            np.testing.assert_allclose(samples.logprobs[place][: len(tokens)], expected, atol=1e-4)
        np.testing.assert_array_equal(samples.logprobs, samples.untruncated_logprobs)

    def test_greedy_takes_the_most_likely_of_the_allowed(self):
        constraint = in_order()
        samples = sample(constraint, temperature=0.0, stop_ids=())
        unmasked = 0
        for row, place in enumerate(np.ndindex(SHAPE)):
            tokens = samples.tokens[place]
            logits = scores(place, tokens)
            masks = np.array([constraint.at(row, t) for t in range(NEW)])
            np.testing.assert_array_equal(tokens, np.where(masks, logits, -np.inf).argmax(axis=-1))
            unmasked += (tokens == logits.argmax(axis=-1)).sum()
        assert unmasked < samples.tokens.size / 2

    def test_a_mask_of_all_tokens_changes_nothing(self):
        class All(RandomThirds):
            def at(self, name, place):
                return np.ones(V, bool)

        free, under = sample(None), sample(All(range(np.prod(SHAPE))))
        np.testing.assert_array_equal(free.tokens, under.tokens)
        np.testing.assert_allclose(free.logprobs, under.logprobs, atol=1e-5)


class TestRows:
    def test_a_row_is_asked_about_once_a_token_and_no_longer(self, company):
        constraint, samples = company
        times = np.bincount(np.concatenate(constraint.asked), minlength=np.prod(SHAPE))
        np.testing.assert_array_equal(times, samples.lengths.reshape(-1))
        ended = ~samples.truncated
        assert ended.any() and (samples.lengths[ended] < NEW).all()
        for place in np.argwhere(ended):
            place = tuple(place)
            assert samples.tokens[place][samples.lengths[place] - 1] in STOPS

    def test_rows_that_may_draw_nothing_are_never_asked_about(self, company):
        limits = np.array([[[0, 1, 7], [0, 0, 0]], [[3, 0, 0], [0, 0, NEW]]])
        constraint = in_order(always=STOPS)
        samples = sample(constraint, max_new_tokens=limits)
        assert set(np.concatenate(constraint.asked)) == set(np.flatnonzero(limits.reshape(-1)))
        kept = np.arange(NEW) < samples.lengths[..., None]
        np.testing.assert_array_equal(samples.lengths, np.minimum(company[1].lengths, limits))
        np.testing.assert_array_equal(samples.tokens, np.where(kept, company[1].tokens, 0))

    @pytest.mark.parametrize(
        ("max_rows", "sizes"),
        [
            pytest.param(1, None, marks=pytest.mark.slow),
            (4, None),
            pytest.param(4, {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        ],
    )
    def test_the_layout_does_not_matter(self, company, max_rows, sizes):
        mesh = sizes and sharding.make_mesh(sizes)
        params = sharding.place(tiny.params(), abstract(tiny.CONFIG), mesh)
        constraint = in_order(always=STOPS)
        samples = sample(constraint, params, max_rows=max_rows, mesh=mesh)
        assert max(map(len, constraint.asked)) == 2 * max_rows
        np.testing.assert_array_equal(samples.tokens, company[1].tokens)
        np.testing.assert_array_equal(samples.lengths, company[1].lengths)

    def test_a_row_alone_draws_what_it_draws_in_company(self, company):
        alone = sample_tree(
            tiny.params(),
            tiny.CONFIG,
            SYSTEMS[1:],
            [PROBLEMS[1][:1]],
            keys_of()[1:, :1, 2:],
            max_new_tokens=NEW,
            temperature=1.0,
            stop_ids=STOPS,
            constraint=RandomThirds([8], always=STOPS),
        )
        np.testing.assert_array_equal(alone.tokens[0, 0, 0], company[1].tokens[1, 0, 2])

    def test_ends_by_text_are_refused(self):
        with pytest.raises(ValueError, match="constraint: constrained rows end only at stop tokens"):
            sample(in_order(), find_end=lambda *_: None)


class AfterAnAnswer(RandomThirds):
    """Constrains a row once tokens have been appended to it."""

    def __init__(self, names, **options):
        super().__init__(names, **options)
        self.begun = np.zeros(len(names), bool)

    def active(self, rows):
        return self.begun[rows]

    def answered(self, rows):
        assert not self.begun[rows].any()
        self.begun[rows] = True


class TestAFreeTurnBeforeAConstrainedOne:
    """Rows reason freely, are told something, and then draw under the constraint, in one sequence."""

    TOLD, FIRST = [7, 8, 9], 12

    @pytest.fixture(scope="class")
    @staticmethod
    def drawn():
        cls = TestAFreeTurnBeforeAConstrainedOne
        ended = {}

        def respond(place, tokens):
            if place in ended:
                return None
            ended[place] = len(tokens)
            return cls.TOLD

        constraint = AfterAnAnswer(list(range(np.prod(SHAPE))), always=STOPS)
        samples = sample(
            constraint,
            respond=respond,
            max_first_turn=cls.FIRST,
            max_new_tokens=40,
            stop_ids=(*STOPS, *range(40, 50)),
        )
        return constraint, samples, ended

    def test_the_first_turn_is_the_one_without_a_constraint(self, drawn):
        _, samples, ended = drawn
        free = sample(None, max_new_tokens=self.FIRST, stop_ids=(*STOPS, *range(40, 50)))
        assert 0 < len(ended) < np.prod(SHAPE)  # some rows end by themselves, others at the limit
        for place in np.ndindex(*SHAPE):
            length = free.lengths[place]
            np.testing.assert_array_equal(samples.tokens[place][:length], free.tokens[place][:length])
            np.testing.assert_allclose(
                samples.logprobs[place][:length], free.logprobs[place][:length], atol=1e-5
            )
            assert (place in ended) == (not free.truncated[place])
            if place not in ended:
                assert samples.truncated[place] and samples.lengths[place] == self.FIRST

    def test_the_second_turn_follows_in_the_same_sequence(self, drawn):
        constraint, samples, ended = drawn
        for place, end in ended.items():
            row, length = int(np.ravel_multi_index(place, SHAPE)), samples.lengths[place]
            begin = end + len(self.TOLD)
            assert samples.tokens[place][end:begin].tolist() == self.TOLD
            assert not samples.drawn[place][end:begin].any() and not samples.logprobs[place][end:begin].any()
            tokens = samples.tokens[place][:length]
            assert constraint.drawn[row] == tokens[begin:].tolist() and length > begin
            whole = scores(place, tokens)
            free = np.asarray(jax.nn.log_softmax(whole[:end], -1))[np.arange(end), tokens[:end]]
            np.testing.assert_allclose(samples.logprobs[place][:end], free, atol=1e-4)
            masks = np.array([constraint.at(row, t) for t in range(length - begin)])
            kept = np.asarray(jax.nn.log_softmax(np.where(masks, whole[begin:], -np.inf), -1))
            expected = kept[np.arange(length - begin), tokens[begin:]]
            np.testing.assert_allclose(samples.logprobs[place][begin:length], expected, atol=1e-4)
