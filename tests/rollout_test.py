"""Prompts and problems in, rollouts out, and the tree of a policy-gradient step out of them."""

import concurrent.futures
import dataclasses
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from espl_jax.rl.advantages import advantages
from espl_jax.rollout import (
    collect_rollouts,
    conversation,
    prompt_numbers,
    records,
    stable_hash,
    stop_ids_of,
    train_batch,
)
from espl_jax.sampling.truncation import Truncation
from espl_jax.text.chat import encode, render
from espl_jax.train_step import gradients
from espl_jax.types import Grade, Rollouts
from tests.fakes import CONFIG, PROBLEMS, PROMPTS, Letters, model, tokenizer

ENVIRONMENT = Letters()
SETTINGS = {"key": jax.random.key(7), "group_size": 3, "max_new_tokens": 10}


def collect(prompts=PROMPTS, problems=PROBLEMS, environment=ENVIRONMENT, **settings):
    return collect_rollouts(model(), prompts, problems, environment, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def rollouts():
    return collect()


def test_shapes_and_dtypes(rollouts):
    shape = (3, 4, 3)
    assert (rollouts.prompts, rollouts.problems) == (PROMPTS, PROBLEMS)
    for name in ("lengths", "truncated", "rewards", "success"):
        assert getattr(rollouts, name).shape == shape, name
    for name in ("tokens", "logprobs", "untruncated_logprobs"):
        assert getattr(rollouts, name).shape == (*shape, 10), name
    assert rollouts.rewards.dtype == np.float32 and rollouts.success.dtype == bool
    for nested in (rollouts.replies, rollouts.answers):
        assert np.shape(nested) == shape
    assert rollouts.lengths.min() >= 1 and rollouts.lengths.max() <= 10
    past = np.arange(10) >= rollouts.lengths[..., None]
    assert not rollouts.tokens[past].any() and not rollouts.logprobs[past].any()
    # The stop token is the last where a rollout ended by itself, and nowhere where the limit ended it.
    stops = (rollouts.tokens == tokenizer().eos_token_id).any(axis=-1)
    assert np.array_equal(stops, ~rollouts.truncated)


def test_every_stop_id_of_the_model_ends_a_reply(rollouts):
    often = int(rollouts.tokens[0, 0, 0, 1])
    stopping = dataclasses.replace(model(), generation={"eos_token_id": [often]})
    assert stop_ids_of(stopping) == tuple(sorted([often, tokenizer().eos_token_id]))
    only_what_is_needed = SimpleNamespace(params=None, config=CONFIG, tokenizer=tokenizer())
    assert stop_ids_of(only_what_is_needed) == (tokenizer().eos_token_id,)
    shorter = collect_rollouts(stopping, PROMPTS, PROBLEMS, ENVIRONMENT, **SETTINGS)
    assert shorter.lengths[0, 0, 0] <= 2 and not shorter.truncated[0, 0, 0]
    for row, length in zip(shorter.tokens.reshape(-1, 10), shorter.lengths.flat, strict=True):
        assert not np.isin(row[: length - 1], stop_ids_of(stopping)).any()


def test_levels_together_are_the_tokens_of_the_whole_conversation(rollouts):
    for m, prompt in enumerate(PROMPTS):
        for b, problem in enumerate(PROBLEMS):
            whole = render(tokenizer(), conversation(prompt, problem, ENVIRONMENT))
            joined = list(rollouts.system_tokens[m]) + list(rollouts.problem_tokens[m][b])
            assert joined == encode(tokenizer(), whole)
            assert tokenizer().decode(joined) == whole
    assert all(len(tokens) >= 1 for slot in rollouts.problem_tokens for tokens in slot)


def test_an_empty_prompt_has_no_system_turn():
    (turn,) = conversation(PROMPTS[0], PROBLEMS[0], ENVIRONMENT)
    assert turn == {"role": "user", "content": PROBLEMS[0].text}
    system, user = conversation(PROMPTS[2], PROBLEMS[0], ENVIRONMENT)
    assert system == {"role": "system", "content": "Add.\n\nG0. Count twice.\nG1. Say only the number."}
    assert user == turn


def test_grades_go_to_the_rollout_they_belong_to(rollouts):
    for m, b, n in np.ndindex(3, 4, 3):
        tokens = rollouts.tokens[m, b, n, : rollouts.lengths[m, b, n]]
        reply = tokenizer().decode(tokens, skip_special_tokens=True)
        (grade,) = ENVIRONMENT.grade([PROBLEMS[b]], [reply])
        assert rollouts.replies[m][b][n] == reply
        assert rollouts.answers[m][b][n] == grade.answer
        assert (rollouts.rewards[m, b, n], rollouts.success[m, b, n]) == (grade.reward, grade.success)
    assert 0 < rollouts.rewards.mean() < 1


def test_copies_of_a_prompt_number_their_samples_on():
    copies = collect([PROMPTS[1]] * 3, PROBLEMS[:2])
    alone = collect([PROMPTS[1]], PROBLEMS[:2], group_size=9)
    # Copy c, sample j is number 3 c + j.
    assert np.array_equal(copies.tokens.transpose(1, 0, 2, 3).reshape(2, 9, 10), alone.tokens[0])
    assert len({tuple(row) for row in alone.tokens[0, 0]}) == 9
    assert copies.slots() == {"p1": [0, 1, 2]} and [p.id for p in copies.distinct()] == ["p1"]
    assert np.array_equal(copies.score_matrix(), alone.score_matrix())
    assert prompt_numbers(copies).tolist() == [0, 0, 0]


def test_copies_are_pooled_by_id_wherever_they_stand():
    mixed = collect([PROMPTS[1], PROMPTS[0], PROMPTS[1]], PROBLEMS[:2])
    assert mixed.slots() == {"p1": [0, 2], "p0": [1]}
    assert prompt_numbers(mixed).tolist() == [0, 1, 0]
    expected = [mixed.rewards[[0, 2]].mean(axis=(0, 2)), mixed.rewards[1].mean(axis=1)]
    assert mixed.score_matrix() == pytest.approx(np.array(expected))
    gains = np.asarray(advantages(mixed.rewards, "per_prompt", prompt_numbers(mixed)))
    assert gains[[0, 2]].sum(axis=(0, 2)) == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("prompts", "problems"),
    [([1], [2]), ([2, 1, 0], [3, 1]), ([1, 1, 0], [2, 0])],
    ids=["alone", "moved", "copy"],
)
def test_a_rollout_does_not_depend_on_its_company(rollouts, prompts, problems):
    other = collect([PROMPTS[m] for m in prompts], [PROBLEMS[b] for b in problems])
    seen = set()
    for i, m in enumerate(prompts):
        if m in seen:
            continue
        seen.add(m)
        for j, b in enumerate(problems):
            assert np.array_equal(other.tokens[i, j], rollouts.tokens[m, b])
            np.testing.assert_allclose(other.logprobs[i, j], rollouts.logprobs[m, b], atol=1e-5)


def test_few_rows_in_flight_draw_the_same(rollouts):
    assert np.array_equal(collect(max_rows=5).tokens, rollouts.tokens)


def test_another_key_draws_others(rollouts):
    assert not np.array_equal(collect(key=jax.random.key(8)).tokens, rollouts.tokens)


def test_stable_hash_is_the_same_for_ever():
    assert stable_hash("p0") == 0x374D8F86
    assert stable_hash("p1") != stable_hash("p0") and 0 <= stable_hash("") < 2**32


def test_the_grader_sees_no_thinking():
    seen = []

    class Listening(Letters):
        def grade(self, problems, replies):
            seen.extend(replies)
            return [Grade(0.0, False)] * len(replies)

    fake = model()
    texts = ["<think>It is 3.</think>\n4", "5</think> 6", "<think>never done"]

    class Thinking:
        def __getattr__(self, name):
            return getattr(fake.tokenizer, name)

        def batch_decode(self, rows, **_):
            return texts[: len(rows)]

    thinking = dataclasses.replace(fake, tokenizer=Thinking())
    result = collect_rollouts(thinking, PROMPTS[:1], PROBLEMS[:1], Listening(), **SETTINGS)
    assert seen == ["4", "6", ""]
    assert result.replies == ((("4", "6", ""),),)
    seen.clear()
    collect_rollouts(thinking, PROMPTS[:1], PROBLEMS[:1], Listening(), **SETTINGS, show_thinking=True)
    assert seen == texts


def test_records_hold_every_rollout_once(rollouts):
    rows = records(rollouts)
    assert [(row["slot"], row["problem"], row["sample"]) for row in rows] == [
        (m, f"q{b}", n) for m, b, n in np.ndindex(3, 4, 3)
    ]
    row = rows[5]
    assert row["prompt"] == "p0" and row["reply"] == rollouts.replies[0][1][2]
    assert len(row["tokens"]) == rollouts.lengths[0, 1, 2]
    assert row["logprob"] == pytest.approx(float(rollouts.logprobs[0, 1, 2].sum()), abs=1e-5)


# Two slots, three problems, two rollouts of at most three tokens.
TOKENS = np.arange(1, 37, dtype=np.int32).reshape(2, 3, 2, 3)
LENGTHS = np.array([[[3, 1], [2, 2], [1, 1]], [[1, 2], [3, 3], [2, 1]]], np.int32)


def by_hand(rewards):
    mask = np.arange(3) < LENGTHS[..., None]
    logprobs = np.where(mask, -TOKENS / 10, 0).astype(np.float32)
    rewards = np.array(rewards, np.float32)
    return Rollouts(
        prompts=PROMPTS[:2],
        problems=PROBLEMS[:3],
        system_tokens=((1, 2), (3,)),
        problem_tokens=(((10,), (20, 21), (30, 31, 32)), ((40, 41), (50,), (60, 61))),
        tokens=np.where(mask, TOKENS, 0),
        lengths=LENGTHS,
        drawn=mask,
        logprobs=logprobs,
        untruncated_logprobs=logprobs - 1,
        cutoffs=np.full(TOKENS.shape, -np.inf, np.float32),
        temperature=0.7,
        truncated=np.zeros((2, 3, 2), bool),
        replies=((("",) * 2,) * 3,) * 2,
        answers=((("",) * 2,) * 3,) * 2,
        rewards=rewards,
        success=rewards > 0,
    )


def test_train_batch_leaves_out_groups_without_a_gradient():
    hand = by_hand([[[1, 1], [0, 0], [1, 0]], [[0, 0], [1, 0], [1, 1]]])
    gains = np.asarray(advantages(hand.rewards))
    batch = train_batch(hand, gains)
    # One group of each slot is mixed: the last problem of the first, the middle one of the second.
    assert batch.inputs.shape == (2, 1, 2, 16) and batch.advantages.tolist() == [[[0.5, -0.5]], [[0.5, -0.5]]]
    assert batch.num_rollouts == 12
    assert batch.system_lengths.tolist() == [2, 1]
    assert batch.system_tokens[:, :3].tolist() == [[1, 2, 0], [3, 0, 0]]
    # The last token of a prompt is the first input of its rollouts.
    assert batch.problem_lengths.tolist() == [[2], [0]]
    assert batch.problem_tokens[0, 0, :3].tolist() == [30, 31, 0]
    assert batch.inputs[0, 0, :, :3].tolist() == [[32, 13, 0], [32, 16, 0]]
    assert batch.targets[0, 0, :, :3].tolist() == [[13, 0, 0], [16, 0, 0]]
    assert batch.inputs[1, 0, :, :4].tolist() == [[50, 25, 26, 27], [50, 28, 29, 30]]
    assert batch.targets[1, 0, :, :4].tolist() == [[25, 26, 27, 0], [28, 29, 30, 0]]
    assert batch.mask[0, 0, :, :3].tolist() == [[True, False, False]] * 2
    assert batch.mask[1, 0].sum(axis=-1).tolist() == [3, 3]
    assert np.array_equal(batch.sampler_logprobs[1, 0, :, :3], hand.logprobs[1, 1])
    assert batch.cutoffs is None


def test_train_batch_fills_uneven_slots_with_places_that_do_not_count():
    hand = by_hand([[[1, 0], [0, 0], [1, 0]], [[0, 0], [0, 0], [0, 0]]])
    batch = train_batch(hand, np.asarray(advantages(hand.rewards)))
    assert batch.inputs.shape[:3] == (2, 2, 2)
    assert batch.mask.any(axis=-1).tolist() == [
        [[True, True], [True, True]],
        [[False, False], [False, False]],
    ]
    assert batch.advantages[1].tolist() == [[0, 0], [0, 0]]
    assert batch.advantages[0].tolist() == [[0.5, -0.5], [0.5, -0.5]]


def test_train_batch_without_a_mixed_group_is_none():
    hand = by_hand(np.ones((2, 3, 2)))
    assert train_batch(hand, np.zeros((2, 3, 2), np.float32)) is None


def test_train_batch_rounds_groups_up():
    hand = by_hand([[[1, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]])
    gains = np.asarray(advantages(hand.rewards))
    assert train_batch(hand, gains).inputs.shape[1] == 1
    padded = train_batch(hand, gains, groups_multiple=2)
    assert padded.inputs.shape[1] == 2 and padded.mask.any(axis=(2, 3)).tolist() == [
        [True, False],
        [False, False],
    ]


MIXED = [[[1, 0], [0, 0], [1, 0]], [[0, 0], [1, 0], [1, 1]]]


def test_train_batch_takes_cutoffs_along_where_something_was_cut():
    hand = by_hand(MIXED)
    cutoffs = np.where(hand.drawn, -TOKENS, -np.inf).astype(np.float32)
    batch = train_batch(dataclasses.replace(hand, cutoffs=cutoffs), np.asarray(advantages(hand.rewards)))
    assert batch.cutoffs.dtype == np.float32
    assert np.array_equal(batch.cutoffs[0, 1, :, :3], cutoffs[0, 2])
    # Padding does not say that something was cut.
    padded = np.where(hand.drawn, -np.inf, 0).astype(np.float32)
    batch = train_batch(dataclasses.replace(hand, cutoffs=padded), np.asarray(advantages(hand.rewards)))
    assert batch.cutoffs is None


def test_train_batch_masks_what_the_model_did_not_draw():
    hand = by_hand(MIXED)
    appended = hand.drawn.copy()
    appended[0, 0, 0] = [True, False, True]
    batch = train_batch(dataclasses.replace(hand, drawn=appended), np.asarray(advantages(hand.rewards)))
    assert batch.mask[0, 0, 0, :4].tolist() == [True, False, True, False]
    # The model saw the appended token all the same.
    assert batch.inputs[0, 0, 0, :3].tolist() == [10, 1, 2] and batch.targets[0, 0, 0, 1] == 2


def test_train_batch_can_leave_truncated_rollouts_without_a_gradient():
    hand = by_hand(MIXED)
    truncated = np.zeros((2, 3, 2), bool)
    truncated[0, 0, 1] = True  # one of a group
    truncated[0, 2] = True  # a whole group
    hand = dataclasses.replace(hand, truncated=truncated)
    gains = np.asarray(advantages(hand.rewards))
    plain, masked = train_batch(hand, gains), train_batch(hand, gains, mask_truncated=True)
    assert plain.inputs.shape[1] == 2 and plain.mask.any(axis=-1)[0].all()
    assert masked.inputs.shape[1] == 1 and masked.mask.any(axis=-1).tolist() == [
        [[True, False]],
        [[True, True]],
    ]
    assert masked.advantages[0].tolist() == [[0.5, -0.5]] and masked.num_rollouts == plain.num_rollouts == 12
    everything = dataclasses.replace(hand, truncated=np.ones((2, 3, 2), bool))
    assert train_batch(everything, gains, mask_truncated=True) is None


def test_greedy_rollouts_cannot_be_trained_on():
    hand = dataclasses.replace(by_hand(MIXED), temperature=0.0)
    with pytest.raises(ValueError, match="temperature=0: greedy rollouts cannot be trained on"):
        train_batch(hand, np.asarray(advantages(hand.rewards)))


score = jax.jit(gradients, static_argnames="config")


def test_train_batch_scores_as_the_sampler_did(rollouts):
    gains = np.full((3, 4, 3), 1, np.float32)  # every group counts
    _, metrics = score(model().params, None, None, train_batch(rollouts, gains), CONFIG, temperature=1.0)
    assert float(metrics["log_ratio_abs"]) < 1e-5
    assert float(metrics["ratio"]) == pytest.approx(1, abs=1e-5)
    # At another temperature the trainer has to know it, or the ratio would not be one.
    batch = train_batch(collect(temperature=0.7), gains)
    right, wrong = (score(model().params, None, None, batch, CONFIG, temperature=t)[1] for t in (0.7, 1.0))
    assert float(right["log_ratio_abs"]) < 1e-5 < 1e-2 < float(wrong["log_ratio_abs"])


@pytest.mark.parametrize(
    "truncation", [Truncation(top_p=0.9), Truncation(top_k=20, top_p=0.9, min_p=0.02)], ids=str
)
def test_train_batch_is_cut_where_the_sampler_cut(truncation):
    """Drawn in turns with ends taken back, so that every column moves about before it is trained on."""
    gains = np.full((3, 4, 3), 1, np.float32)
    settings = {"max_new_tokens": 40, "temperature": 0.8, "stop_strings": ("e", "1"), "max_rows": 2}
    rollouts = collect(truncation=truncation, environment=Talker(), **settings)
    assert (rollouts.cutoffs[rollouts.drawn] > -20).all() and np.isneginf(
        rollouts.cutoffs[~rollouts.drawn]
    ).all()
    batch = train_batch(rollouts, gains)
    _, metrics = score(model().params, None, None, batch, CONFIG, temperature=0.8)
    assert float(metrics["log_ratio_abs"]) < 1e-5 and float(metrics["cut_disagreements"]) == 0
    shifted = batch._replace(cutoffs=np.roll(batch.cutoffs, 1, axis=-1))
    _, wrong = score(model().params, None, None, shifted, CONFIG, temperature=0.8)
    assert float(wrong["log_ratio_abs"]) > 1e-2


class Talker(Letters):
    """Says something after each of the first two turns, every other time as a future."""

    def respond(self, problem, text):
        said = text.count("<said>")
        if said == 2:
            return None
        answer = f"<said> {problem.answer} e {len(text)}\n"
        if len(text) % 2:
            return answer
        future = concurrent.futures.Future()
        threading.Timer(0.05, lambda: future.set_result(answer)).start()
        return future


class TestTurns:
    """Text in, text out: what an environment says is appended as it says it, and ends no turn."""

    STOPS = tuple("etaoinshrdlucm01")

    @pytest.fixture(scope="class")
    def talked(self):
        return collect(environment=Talker(), max_new_tokens=96, stop_strings=self.STOPS)

    def test_every_turn_ends_with_a_stop_and_is_answered(self, talked):
        for m, b, n in np.ndindex(talked.lengths.shape):
            length, drawn = talked.lengths[m, b, n], talked.drawn[m, b, n]
            tokens = talked.tokens[m, b, n, :length]
            edges = np.flatnonzero(np.diff(drawn[:length].astype(int))) + 1
            said = [piece for piece, own in self.pieces(tokens, drawn, edges) if not own]
            so_far = ""
            for text, own in self.pieces(tokens, drawn, edges):
                if own:
                    # A stop string is the end of what the model says, and nowhere before.
                    ended = [text.find(stop) for stop in self.STOPS if stop in text]
                    assert not ended or min(ended) == len(text) - 1
                else:
                    assert text == f"<said> {talked.problems[b].answer} e {len(so_far)}\n"
                so_far += text
            assert talked.replies[m][b][n] == so_far
            assert len(said) == 2 or talked.truncated[m, b, n]
        assert (~talked.truncated).any()

    @staticmethod
    def pieces(tokens, drawn, edges):
        for piece in np.split(np.arange(len(tokens)), edges):
            text = tokenizer().decode(tokens[piece], skip_special_tokens=True)
            yield text, bool(drawn[piece[0]])

    def test_only_the_models_own_tokens_are_trained_on(self, talked):
        batch = train_batch(talked, np.ones((3, 4, 3), np.float32))
        np.testing.assert_array_equal(batch.mask, talked.drawn)
        assert (~talked.drawn & (np.arange(96) < talked.lengths[..., None])).any()

    def test_a_tool_that_fails_later_is_an_error(self):
        class Broken(Letters):
            def respond(self, problem, text):
                future = concurrent.futures.Future()
                future.set_exception(RuntimeError("the tool is down"))
                return future

        with pytest.raises(RuntimeError, match="the tool is down"):
            collect(environment=Broken(), stop_strings=self.STOPS)

    def test_without_turns_a_reply_ends_before_its_stop(self):
        stopped = collect(max_new_tokens=40, stop_strings=self.STOPS)
        flat = [text for slot in stopped.replies for group in slot for text in group]
        assert not any(stop in text for text in flat for stop in self.STOPS)
        assert (~stopped.truncated).any()


def test_groups_left_out_do_not_change_the_gradient(rollouts):
    gains = np.asarray(advantages(rollouts.rewards)) * np.array([1, 0, 0, 1], np.float32)[:, None]
    dropped = train_batch(rollouts, gains)
    # An advantage too small to matter keeps every group in the batch.
    whole = train_batch(rollouts, np.where(gains == 0, np.float32(1e-30), gains))
    assert (dropped.inputs.shape[1], whole.inputs.shape[1]) == (2, 4)
    grads = [
        score(model().params, None, None, batch, CONFIG, temperature=1.0)[0] for batch in (dropped, whole)
    ]
    assert max(float(abs(x).max()) for x in jax.tree.leaves(grads[0])) > 1e-3
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
