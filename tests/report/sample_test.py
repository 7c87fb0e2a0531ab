"""Which rollouts and conversations the page shows."""

import base64
import gzip
import json

import numpy as np

from espl_jax.report.sample import (
    ROLLOUT_LADDER,
    chosen,
    cut_text,
    cut_tokens,
    fit_rollouts,
    fit_transcripts,
    packed,
)


def rollouts(count, tokens=50):
    rng = np.random.default_rng(0)
    return [
        {"reward": float(i), "tokens": rng.integers(9999, size=tokens).tolist(), "reply": "word " * tokens}
        for i in range(count)
    ]


def fitted_of(items, room, share=0.0):
    rewards = [each["reward"] for each in items]
    return fit_rollouts(items.__getitem__, rewards, room, seed=0, iteration=1, share=share)


def test_a_smaller_choice_is_part_of_a_larger_one():
    rewards = np.random.default_rng(3).integers(4, size=150).astype(float).tolist()
    whole = set(chosen(rewards, 40, seed=5, iteration=2))
    for count, _ in ROLLOUT_LADDER:
        assert set(chosen(rewards, count, seed=5, iteration=2)) <= whole


def test_all_are_chosen_if_they_are_few():
    assert chosen([0.0, 1.0, 0.5], 3, seed=0, iteration=1) == [0, 1, 2]


def test_the_best_the_worst_and_others_are_chosen():
    rewards = [float(i % 100) for i in range(200)]
    kept = chosen(rewards, 40, seed=1, iteration=7)
    assert kept == sorted(set(kept)) and len(kept) == 40
    values = sorted(rewards[i] for i in kept)
    assert values[:10] == sorted([*range(5)] * 2) and values[-10:] == sorted([*range(95, 100)] * 2)
    assert any(20 < value < 80 for value in values)


def test_the_choice_depends_on_seed_and_iteration_alone():
    rewards = [0.0] * 100
    first = chosen(rewards, 10, seed=1, iteration=7)
    assert first == chosen(rewards, 10, seed=1, iteration=7)
    assert first != chosen(rewards, 10, seed=2, iteration=7)
    assert first != chosen(rewards, 10, seed=1, iteration=8)


def test_what_fits_is_shown_whole():
    fitted = fitted_of(rollouts(60), 1_000_000)
    assert len(fitted.items) == 40 and not any("left_out" in each for each in fitted.items)


def test_what_does_not_fit_is_fewer_and_shorter():
    fitted = fitted_of(rollouts(60, tokens=900), 20_000)
    assert 0 < len(fitted.items) < 40 and len(packed(fitted.items)) <= 20_000
    assert all(len(each["tokens"]) == fitted.cut for each in fitted.items)


def test_the_share_of_the_iteration_before_finds_the_same_step():
    items = rollouts(60, tokens=900)
    first = fitted_of(items, 20_000)
    assert first == fitted_of(items, 20_000, first.share)


def test_tokens_are_cut_in_the_middle():
    record = {"tokens": [*range(100)], "logprobs": [*range(100)], "reply": "x"}
    cut = cut_tokens(record, 8)
    assert cut["tokens"] == cut["logprobs"] == [0, 1, 2, 3, 4, 5, 98, 99]
    assert cut["left_out"] == [6, 92] and len(record["tokens"]) == 100
    assert cut_text("abcdefgh", 4) == "abc\n[... 4 characters left out ...]\nh"


def test_edits_come_before_summaries():
    talk = [
        {"stage": stage, "conversation": [{"role": "user", "content": str(i) * 3000}], "reply": None}
        for i, stage in enumerate(["summary"] * 300 + ["critique"])
    ]
    fitted = fit_transcripts(talk, room=1500)
    assert fitted.items[-1]["stage"] == "critique" and len(fitted.items) < 301


def test_packing_is_the_same_every_time():
    value = {"b": [1.5, None], "a": "</script>é"}
    text = packed(value)
    assert text == packed(value) and "<" not in text
    assert json.loads(gzip.decompress(base64.b64decode(text))) == value
