"""Training batches from rollouts: worked examples, invariants of every split, and gradients."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_jax.rl.advantages import advantages
from espl_jax.rl.tree import sum_over_microbatches
from espl_jax.sampling.truncation import Truncation
from espl_jax.training.batches import (
    abstract_batch,
    problems_of_a_shard,
    prompt_numbers,
    rows_of_a_shard,
    train_batches,
)
from espl_jax.types import Problem, Rollouts, SystemPrompt
from tests.support import tiny
from tests.support.fakes import CONFIG, PROBLEMS, PROMPTS, Letters, Talker, model
from tests.support.flat import collect_rollouts, compiled_gradients

# Two slots, three problems, two rollouts of at most three tokens.
TOKENS = np.arange(1, 37, dtype=np.int32).reshape(2, 3, 2, 3)
LENGTHS = np.array([[[3, 1], [2, 2], [1, 1]], [[1, 2], [3, 3], [2, 1]]], np.int32)
MIXED = [[[1, 0], [0, 0], [1, 0]], [[0, 0], [1, 0], [1, 1]]]


def made(tokens, lengths, system_tokens, problem_tokens, rewards):
    """Rollouts of these tokens, all drawn by the policy; logprobs name the tokens that they belong to."""
    prompts, problems, group = lengths.shape
    mask = np.arange(tokens.shape[-1]) < lengths[..., None]
    logprobs = np.where(mask, -tokens / 10, 0).astype(np.float32)
    rewards = np.array(rewards, np.float32)
    return Rollouts(
        prompts=tuple(SystemPrompt(id=f"p{m}") for m in range(prompts)),
        problems=tuple(Problem(f"q{b}", "", "") for b in range(problems)),
        system_tokens=system_tokens,
        problem_tokens=problem_tokens,
        tokens=np.where(mask, tokens, 0),
        lengths=lengths,
        drawn=mask,
        logprobs=logprobs,
        untruncated_logprobs=logprobs - 1,
        cutoffs=np.full(tokens.shape, -np.inf, np.float32),
        temperature=0.7,
        truncated=np.zeros(lengths.shape, bool),
        replies=((("",) * group,) * problems,) * prompts,
        answers=((("",) * group,) * problems,) * prompts,
        rewards=rewards,
        success=rewards > 0,
    )


def by_hand(rewards=MIXED):
    problems = np.shape(rewards)[1]
    prompts = ((10,), (20, 21), (30, 31, 32)), ((40, 41), (50,), (60, 61))
    return made(
        TOKENS[:, :problems],
        LENGTHS[:, :problems],
        ((1, 2), (3,)),
        tuple(lane[:problems] for lane in prompts),
        rewards,
    )


def advantages_of(rollouts):
    return np.asarray(advantages(rollouts.rewards))


def one_batch(rollouts, **settings):
    (batch,) = train_batches(rollouts, advantages_of(rollouts), **settings)
    return batch


class TestByHand:
    def test_groups_without_a_gradient_are_left_out(self):
        """One group per prompt has mixed rewards: the last of prompt 0, the middle one of prompt 1."""
        hand = by_hand([[[1, 1], [0, 0], [1, 0]], [[0, 0], [1, 0], [1, 1]]])
        batch = one_batch(hand)
        # Of twelve rollouts four are left, and half of twelve is the least that holds them.
        assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (1, 6, 16)
        assert batch.advantages.tolist() == [[0.5, -0.5, 0.5, -0.5, 0, 0]]
        assert batch.num_rollouts == 12 and batch.num_tokens == LENGTHS.sum()
        assert batch.system_lengths.tolist() == [2, 1]
        assert batch.system_tokens[:, :3].tolist() == [[1, 2, 0], [3, 0, 0]]
        # The last token of a prompt is the first input of its rollouts.
        assert batch.problem_lengths[0, :2].tolist() == [2, 0]
        assert batch.problem_tokens[0, 0, :3].tolist() == [30, 31, 0]
        assert batch.problem_system[0, :2].tolist() == [0, 1]
        assert batch.rollout_problem[0, :4].tolist() == [0, 0, 1, 1]
        assert batch.inputs[0, :2, :3].tolist() == [[32, 13, 0], [32, 16, 0]]
        assert batch.targets[0, :2, :3].tolist() == [[13, 0, 0], [16, 0, 0]]
        assert batch.inputs[0, 2:4, :4].tolist() == [[50, 25, 26, 27], [50, 28, 29, 30]]
        assert batch.targets[0, 2:4, :4].tolist() == [[25, 26, 27, 0], [28, 29, 30, 0]]
        assert batch.mask[0].sum(axis=-1).tolist() == [1, 1, 3, 3, 0, 0]
        assert batch.mask[0, 0, 0] and batch.mask[0, 2, :3].all()
        assert np.array_equal(batch.sampler_logprobs[0, 2:4, :3], hand.logprobs[1, 1])
        assert batch.cutoffs is None and batch.old_logprobs is None

    def test_a_group_may_lie_in_two_parts(self):
        hand = by_hand([[[1, 0], [0, 1]], [[1, 0], [0, 1]]])
        batch = one_batch(hand, shards=3)
        # Groups 0 0 1 | 1 2 2 | 3 3 and one row too many.
        assert batch.rollout_problem.tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 1]]
        assert batch.problem_lengths.tolist() == [[0, 1], [1, 1], [0, 0]]
        assert batch.problem_tokens[..., 0].tolist() == [[0, 20], [20, 40], [0, 0]]
        assert batch.problem_system.tolist() == [[0, 0], [0, 1], [1, 1]]
        assert batch.inputs[..., 0].tolist() == [[10, 10, 21], [21, 41, 41], [50, 50, 50]]
        assert batch.targets[..., 0].tolist()[:2] == [[1, 4, 7], [10, 19, 22]]
        assert batch.mask.sum(axis=-1).tolist() == [[3, 1, 2], [2, 1, 2], [3, 3, 0]]
        assert batch.advantages.tolist() == [[0.5, -0.5, -0.5], [0.5, 0.5, -0.5], [-0.5, 0.5, 0]]

    def test_without_a_mixed_group_there_is_no_update(self):
        assert train_batches(by_hand(np.ones((2, 3, 2))), np.zeros((2, 3, 2), np.float32)) == []

    def test_every_group_may_be_asked_for(self):
        hand = by_hand(np.ones((2, 3, 2)))
        batch = one_batch(hand, every_group=True)
        assert batch.mask.any(axis=-1).all() and batch.inputs.shape[1] == 12

    def test_cutoffs_are_taken_along_where_something_was_cut(self):
        hand = by_hand()
        cutoffs = np.where(hand.drawn, -TOKENS, -np.inf).astype(np.float32)
        batch = one_batch(dataclasses.replace(hand, cutoffs=cutoffs))
        assert batch.cutoffs.dtype == np.float32
        assert np.array_equal(batch.cutoffs[0, 2:4, :3], cutoffs[0, 2])
        # Padding does not say that something was cut.
        padded = np.where(hand.drawn, -np.inf, 0).astype(np.float32)
        assert one_batch(dataclasses.replace(hand, cutoffs=padded)).cutoffs is None

    def test_what_the_model_did_not_draw_is_masked(self):
        hand = by_hand()
        appended = hand.drawn.copy()
        appended[0, 0, 0] = [True, False, True]
        batch = one_batch(dataclasses.replace(hand, drawn=appended))
        assert batch.mask[0, 0, :4].tolist() == [True, False, True, False]
        # The model saw the appended token all the same.
        assert batch.inputs[0, 0, :3].tolist() == [10, 1, 2] and batch.targets[0, 0, 1] == 2
        assert batch.num_tokens == LENGTHS.sum() - 1

    def test_truncated_rollouts_can_be_left_without_a_gradient(self):
        truncated = np.zeros((2, 3, 2), bool)
        truncated[0, 0, 1] = True  # one of a group
        truncated[0, 2] = True  # a whole group
        hand = dataclasses.replace(by_hand(), truncated=truncated)
        plain, masked = one_batch(hand), one_batch(hand, mask_truncated=True)
        assert plain.mask.any(axis=-1).sum() == 6
        assert masked.mask.any(axis=-1).tolist() == [[True, False, True, True, False, False]]
        assert masked.advantages[0, :4].tolist() == [0.5, -0.5, 0.5, -0.5]
        # They are among those that the update stands for.
        assert masked.num_rollouts == plain.num_rollouts == 12
        assert masked.num_tokens == plain.num_tokens == LENGTHS.sum()
        everything = dataclasses.replace(hand, truncated=np.ones((2, 3, 2), bool))
        assert train_batches(everything, advantages_of(hand), mask_truncated=True) == []

    def test_greedy_rollouts_cannot_be_trained_on(self):
        hand = dataclasses.replace(by_hand(), temperature=0.0)
        with pytest.raises(ValueError, match="temperature=0: greedy rollouts cannot be trained on"):
            train_batches(hand, advantages_of(hand))

    def test_copies_of_a_prompt_have_one_number(self):
        copies = [SystemPrompt(id=name) for name in ("p4", "p0", "p4")]
        numbers = prompt_numbers(dataclasses.replace(by_hand(), prompts=tuple(copies)))
        assert numbers.dtype == np.int32 and numbers.tolist() == [0, 1, 0]


class TestSizes:
    @pytest.mark.parametrize(
        ("groups", "most", "group_size", "shards", "microbatch_rows", "rows"),
        [
            (6, 6, 2, 1, 0, 12),
            (4, 6, 2, 1, 0, 12),  # a half would hold three
            (3, 6, 2, 1, 0, 6),
            (1, 6, 2, 1, 0, 2),  # 12, 6, 3, 2
            (1, 1, 1, 1, 0, 1),
            (6, 6, 2, 3, 0, 4),
            (3, 6, 2, 3, 0, 2),
            (6, 6, 2, 5, 0, 3),  # 15 places for 12
            (5, 6, 2, 5, 0, 2),
            (1, 6, 2, 8, 0, 1),
            (3, 6, 2, 1, 4, 12),  # with microbatches one number for all
            (1, 6, 2, 1, 4, 12),
            (6, 6, 2, 3, 4, 4),
            (1, 1, 2, 1, 4, 2),  # no microbatch is larger than all rows
            (6, 6, 2, 5, 2, 4),
        ],
    )
    def test_rows_of_a_shard(self, groups, most, group_size, shards, microbatch_rows, rows):
        assert rows_of_a_shard(groups, most, group_size, shards, microbatch_rows) == rows

    @pytest.mark.parametrize(
        ("rows", "group_size", "shards", "microbatch_rows", "problems"),
        [
            (6, 2, 1, 0, 3),
            (5, 2, 1, 0, 3),
            (3, 2, 3, 0, 2),  # 001 122 334
            (5, 2, 2, 0, 3),  # 00112 23344
            (3, 4, 2, 0, 2),  # 000 011
            (2, 4, 4, 0, 1),  # 00 00 11 11
            (1, 4, 8, 0, 1),
            (5, 3, 2, 0, 3),  # 00011 12223
            (4, 4, 2, 1, 2),  # 0000 1111, but if three rows of each are in use 000 011
            (4, 2, 2, 2, 2),  # 0011 2233 or 00 11
        ],
    )
    def test_problems_of_a_shard(self, rows, group_size, shards, microbatch_rows, problems):
        assert problems_of_a_shard(rows, group_size, shards, microbatch_rows) == problems

    @pytest.mark.parametrize("settings", [{}, {"shards": 5, "microbatch_rows": 2}], ids=str)
    @pytest.mark.parametrize("cut", [False, True])
    def test_shapes_are_known_before(self, settings, cut):
        """Those of an update in which every group has a gradient and a rollout is as long as it may be."""
        hand = by_hand(np.ones((2, 3, 2)))
        if cut:
            hand = dataclasses.replace(hand, cutoffs=hand.logprobs)
        batch = one_batch(hand, every_group=True, **settings)
        announced = abstract_batch(
            prompts=2,
            groups=6,
            group_size=2,
            system_tokens=2,
            problem_tokens=3,
            new_tokens=3,
            cutoffs=cut,
            **settings,
        )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
            lambda x: (x.shape, x.dtype), announced
        )

    def test_few_shapes(self):
        """Whichever groups are mixed, rows are all, a half or a quarter ... of all."""
        rng, seen = np.random.default_rng(0), set()
        for _ in range(50):
            hand = by_hand(rng.integers(0, 2, (2, 3, 2)))
            seen |= {batch.inputs.shape for batch in train_batches(hand, advantages_of(hand))}
        assert seen == {(1, rows, 16) for rows in (2, 3, 6, 12)} - {(1, 3, 16)}


def random_rollouts(seed, shape):
    """Every token is another one, so that it tells whose it is; a third of the groups are not mixed."""
    rng = np.random.default_rng(seed)
    prompts, problems, _ = shape
    names = iter(range(1, 100_000))

    def some(most):
        return tuple(next(names) for _ in range(rng.integers(1, most + 1)))

    rewards = rng.random(shape) * (rng.random((prompts, problems, 1)) > 1 / 3)
    return made(
        np.arange(100_000, 100_000 + 4 * np.prod(shape), dtype=np.int32).reshape(*shape, 4),
        rng.integers(1, 5, shape).astype(np.int32),
        tuple(some(3) for _ in range(prompts)),
        tuple(tuple(some(3) for _ in range(problems)) for _ in range(prompts)),
        rewards,
    )


def places_of(batch, rollouts, weights):
    """(m, b, n) of every rollout in a batch, after a look at all that belongs to it."""
    found = []
    owner = {int(rollouts.tokens[place][0]): place for place in np.ndindex(rollouts.lengths.shape)}
    for shard, row in np.ndindex(batch.inputs.shape[:2]):
        mask = batch.mask[shard, row]
        if not mask.any():
            assert batch.advantages[shard, row] == 0
            continue
        m, b, n = owner[int(batch.targets[shard, row, 0])]
        problem = batch.rollout_problem[shard, row]
        system = batch.problem_system[shard, problem]
        prompt = [
            *batch.system_tokens[system, : batch.system_lengths[system]],
            *batch.problem_tokens[shard, problem, : batch.problem_lengths[shard, problem]],
            batch.inputs[shard, row, 0],
        ]
        assert prompt == [*rollouts.system_tokens[m], *rollouts.problem_tokens[m][b]]
        length = rollouts.lengths[m, b, n]
        assert np.array_equal(batch.targets[shard, row, mask], rollouts.tokens[m, b, n, :length])
        assert np.array_equal(batch.inputs[shard, row, 1:], batch.targets[shard, row, :-1])
        assert np.array_equal(batch.sampler_logprobs[shard, row, mask], rollouts.logprobs[m, b, n, :length])
        assert batch.advantages[shard, row] == weights[m, b, n]
        found.append((m, b, n))
    return found


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 5)),
    shards=st.integers(1, 8),
    microbatch_rows=st.integers(0, 6),
    minibatches=st.integers(1, 4),
)
def test_every_rollout_of_a_useful_group_is_in_one_place(seed, shape, shards, microbatch_rows, minibatches):
    rollouts = random_rollouts(seed, shape)
    weights = advantages_of(rollouts)
    batches = train_batches(
        rollouts,
        weights,
        shards=shards,
        microbatch_rows=microbatch_rows,
        minibatches=minibatches,
        rng=np.random.default_rng(seed),
    )
    found = [places_of(batch, rollouts, weights) for batch in batches]
    useful = [place for place in np.ndindex(shape) if weights[place[:2]].any()]
    assert sorted(itertools.chain(*found)) == useful
    for batch, places in zip(batches, found, strict=True):
        assert len(places) and len(places) % shape[2] == 0  # groups are whole
        assert batch.inputs.shape[0] == batch.problem_tokens.shape[0] == shards
        rows = batch.inputs.shape[1]
        assert rows % (min(microbatch_rows, rows) or rows) == 0
        assert set(batch.rollout_problem.flat) <= set(range(batch.problem_system.shape[1]))


class TestMinibatches:
    SHAPE = (2, 4, 3)

    def split(self, minibatches=3, seed=0, rollouts=None):
        rollouts = rollouts or self.rollouts()
        rng = np.random.default_rng(seed)
        return train_batches(rollouts, advantages_of(rollouts), minibatches=minibatches, rng=rng)

    def rollouts(self):
        """All groups are mixed."""
        rollouts = random_rollouts(0, self.SHAPE)
        return dataclasses.replace(
            rollouts, rewards=np.broadcast_to(np.float32([0, 1, 5]), self.SHAPE).astype(np.float32)
        )

    def test_denominators_add_up(self):
        rollouts = self.rollouts()
        whole, shares = one_batch(rollouts), self.split()
        # Eight groups among three.
        assert sorted(int(batch.num_rollouts) for batch in shares) == [6, 9, 9]
        assert sum(batch.num_rollouts for batch in shares) == whole.num_rollouts == 24
        assert sum(batch.num_tokens for batch in shares) == whole.num_tokens == rollouts.drawn.sum()
        for batch in shares:
            assert batch.num_tokens == batch.mask.sum()

    def test_groups_are_dealt_out_by_the_generator_alone(self):
        first, again, other = self.split(), self.split(), self.split(seed=1)
        jax.tree.map(np.testing.assert_array_equal, first, again)
        assert any(
            not np.array_equal(a.targets[0, 0], b.targets[0, 0]) for a, b in zip(first, other, strict=True)
        )

    def test_one_batch_draws_no_numbers(self):
        rng = np.random.default_rng(0)
        train_batches(self.rollouts(), advantages_of(self.rollouts()), rng=rng)
        assert rng.random() == np.random.default_rng(0).random()

    def test_a_share_without_a_gradient_is_left_out(self):
        rewards = np.zeros(self.SHAPE, np.float32)
        rewards[1, 2, 0] = 1
        rollouts = dataclasses.replace(self.rollouts(), rewards=rewards)
        (batch,) = self.split(minibatches=8, rollouts=rollouts)
        # The group stands for itself alone; the others' updates are not made.
        assert batch.num_rollouts == 3 and batch.num_tokens == rollouts.drawn[1, 2].sum()
        assert places_of(batch, rollouts, advantages_of(rollouts)) == [(1, 2, 0), (1, 2, 1), (1, 2, 2)]

    def test_more_minibatches_than_groups(self):
        shares = self.split(minibatches=20)
        assert len(shares) == 8 and all(batch.num_rollouts == 3 for batch in shares)


SETTINGS = {"key": jax.random.key(7), "group_size": 3, "max_new_tokens": 10}
EQUAL = np.ones((3, 4, 3), np.float32)  # every group counts

score = compiled_gradients


def collect(environment=None, **settings):
    environment = environment or Letters()
    return collect_rollouts(model(), PROMPTS, PROBLEMS, environment, **{**SETTINGS, **settings})


def scored(batch, temperature=1.0, microbatch_rows=0):
    return score(
        model().params, None, None, batch, CONFIG, temperature=temperature, microbatch_rows=microbatch_rows
    )


@pytest.fixture(scope="module")
def rollouts():
    return collect()


class TestGradient:
    """What the trainer makes of what the sampler drew."""

    def test_scores_as_the_sampler_did(self, rollouts):
        (batch,) = train_batches(rollouts, EQUAL)
        _, metrics = scored(batch)
        assert float(metrics["log_ratio_abs"]) < 1e-5
        assert float(metrics["ratio"]) == pytest.approx(1, abs=1e-5)
        # At another temperature the trainer has to know it, or the ratio would not be one.
        (batch,) = train_batches(collect(temperature=0.7), EQUAL)
        right, wrong = (scored(batch, temperature)[1] for temperature in (0.7, 1.0))
        assert float(right["log_ratio_abs"]) < 1e-5 < 1e-2 < float(wrong["log_ratio_abs"])

    @pytest.mark.parametrize(
        "truncation",
        [
            pytest.param(Truncation(top_p=0.9), marks=pytest.mark.slow),
            pytest.param(Truncation(top_k=20, top_p=0.9, min_p=0.02), marks=pytest.mark.slow),
        ],
        ids=str,
    )
    def test_is_cut_where_the_sampler_cut(self, truncation):
        """Drawn in turns with ends taken back, so that every column moves about before it is trained on."""
        settings = {"max_new_tokens": 112, "temperature": 0.8, "stop_strings": ("e", "1"), "max_rows": 2}
        rollouts = collect(Talker(), truncation=truncation, **settings)
        assert (rollouts.cutoffs[rollouts.drawn] > -20).all()
        assert np.isneginf(rollouts.cutoffs[~rollouts.drawn]).all()
        (batch,) = train_batches(rollouts, EQUAL)
        # Only what the model drew, and not what it was told.
        np.testing.assert_array_equal(batch.mask[0, :, :112], rollouts.drawn.reshape(36, 112))
        assert rollouts.drawn.sum() < rollouts.lengths.sum()
        _, metrics = scored(batch, 0.8)
        assert float(metrics["log_ratio_abs"]) < 1e-5 and float(metrics["cut_disagreements"]) == 0
        _, wrong = scored(batch._replace(cutoffs=np.roll(batch.cutoffs, 1, axis=-1)), 0.8)
        assert float(wrong["log_ratio_abs"]) > 1e-2

    def test_groups_left_out_do_not_change_it(self, rollouts):
        weights = advantages_of(rollouts) * np.array([1, 0, 0, 1], np.float32)[:, None]
        (dropped,) = train_batches(rollouts, weights)
        # An advantage too small to matter keeps every group in the batch.
        (whole,) = train_batches(rollouts, np.where(weights == 0, np.float32(1e-30), weights))
        assert (dropped.inputs.shape[1], whole.inputs.shape[1]) == (18, 36)
        assert np.abs(scored(whole)[0]["embedding"]["weight"]).max() > 1e-3
        tiny.assert_trees_close(scored(dropped)[0], scored(whole)[0], 1e-5)

    @pytest.mark.parametrize("shards", [1, 5])
    def test_microbatches_make_one_shape_for_any_number_of_groups(self, rollouts, shards):
        weights = advantages_of(rollouts) * np.array([1, 0, 0, 1], np.float32)[:, None]
        settings = {"shards": shards, "microbatch_rows": 4}
        (whole,) = train_batches(rollouts, EQUAL, **settings)
        (few,) = train_batches(rollouts, weights, **settings)
        assert jax.tree.map(np.shape, few) == jax.tree.map(np.shape, whole)
        # Every shard has a share, in its first microbatches; 18 rollouts fill 5 of 9, or one of two for each.
        used = few.mask.reshape(shards, -1, 4, few.mask.shape[-1]).any(axis=(2, 3))
        assert used.tolist() == ([[True] * 5 + [False] * 4] if shards == 1 else [[True, False]] * shards)
        expected = scored(*train_batches(rollouts, weights))[0]
        tiny.assert_trees_close(scored(few, microbatch_rows=4)[0], expected, 1e-5)

    def test_empty_microbatches_are_skipped(self, rollouts):
        (batch,) = train_batches(rollouts, advantages_of(rollouts), microbatch_rows=4)
        batch = batch._replace(mask=batch.mask & (np.arange(36) // 4 == 2)[:, None])
        seen = []

        def targets(micro):
            jax.debug.callback(seen.append, micro["targets"])
            return micro["targets"].sum()

        total = jax.jit(lambda batch: sum_over_microbatches(targets, batch, 4))(batch)
        jax.effects_barrier()
        np.testing.assert_array_equal(seen, batch.targets[:, 8:12])
        assert total == batch.targets[:, 8:12].sum()

    @pytest.mark.slow
    def test_parts_and_minibatches_add_up_to_it(self, rollouts):
        """The loss is a sum over rollouts divided by their number, however they are split."""
        weights = advantages_of(rollouts)
        expected = scored(*train_batches(rollouts, weights))[0]
        (cut,) = train_batches(rollouts, weights, shards=5, microbatch_rows=2)
        assert cut.inputs.shape[:2] == (5, 8)  # 36 rollouts in groups of three
        tiny.assert_trees_close(scored(cut, microbatch_rows=2)[0], expected, 1e-5)
        shares = train_batches(rollouts, weights, minibatches=2, rng=np.random.default_rng(0))
        weights = [batch.num_rollouts / 36 for batch in shares]
        total = jax.tree.map(
            lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)),
            *(scored(batch)[0] for batch in shares),
        )
        tiny.assert_trees_close(total, expected, 1e-5)
