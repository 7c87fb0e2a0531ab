"""Which rollouts and transcripts the page shows, and how they are cut to fit."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

MOST_ROLLOUTS = 40
"""Rollouts of an iteration that the page shows at most."""

ROLLOUT_LADDER = (
    (40, 4000),
    (40, 1000),
    (40, 400),
    (32, 250),
    (24, 200),
    (16, 200),
    (12, 150),
    (8, 120),
    (4, 100),
    (2, 60),
)
"""(rollouts, tokens of each): the first one that fits into the bytes of an iteration is taken."""

TRANSCRIPT_LADDER = (
    (200, 20_000),
    (200, 4000),
    (64, 3000),
    (32, 2000),
    (16, 1500),
    (8, 1200),
    (4, 800),
    (2, 400),
)
"""(conversations, characters of each message): as for rollouts."""

RULE = (
    f"At most {MOST_ROLLOUTS} rollouts of an iteration are in this page: a quarter with the highest rewards, "
    "a quarter with the lowest, and the others drawn at random with the run's seed; ties are broken "
    "at random. "
    "Where they take too much room, there are fewer, and long replies are cut in the middle. The work "
    "directory has all of them."
)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What fits into the page.

    Attributes:
      items: the items as JSON values.
      cut: the number of tokens or characters that longer ones were cut to.
      share: bytes in the page per character of JSON before compression, as `_amount` estimates them.
    """

    items: list[dict[str, Any]]
    cut: int
    share: float


def chosen(rewards: Sequence[float], count: int, seed: int, iteration: int) -> list[int]:
    """Returns the indices of the rollouts to show, in order: see `RULE`.

    Args:
      rewards: of all rollouts of the iteration.
      count: number to show at most.
      seed: the run's.
      iteration: counted from 1.
    """
    if len(rewards) <= count:
        return list(range(len(rewards)))
    order = np.random.default_rng([seed, iteration]).permutation(len(rewards))
    ranked = sorted(order.tolist(), key=lambda index: -rewards[index])
    quarter = max(count // 4, 1)
    taken = dict.fromkeys([*ranked[:quarter], *ranked[-quarter:], *order.tolist()])
    return sorted(list(taken)[:count])


def cut_tokens(record: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Cuts the tokens of a rollout and their logprobs in the middle; `left_out` is [position, number]."""
    tokens = record.get("tokens") or []
    cut = dict(record)
    if len(tokens) > limit:
        head = limit - limit // 4
        tail = len(tokens) - limit // 4
        cut["left_out"] = [head, tail - head]
        for name in ("tokens", "logprobs", "trainer_logprobs"):
            if cut.get(name):
                cut[name] = [*cut[name][:head], *cut[name][tail:]]
    if "reply" in cut:
        cut["reply"] = cut_text(cut["reply"], 6 * limit)
    return cut


def cut_text(text: str, limit: int) -> str:
    """Cuts a text in the middle, and says how much was left out."""
    if len(text) <= limit:
        return text
    head, tail = limit - limit // 4, limit // 4
    return f"{text[:head]}\n[... {len(text) - limit} characters left out ...]\n{text[-tail:]}"


def fit_rollouts(
    rollout: Callable[[int], Mapping[str, Any]],
    rewards: Sequence[float],
    room: int,
    seed: int,
    iteration: int,
    *,
    compact: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    share: float = 0.0,
) -> Fitted:
    """Returns the rollouts of an iteration that fit into `room` bytes of the page, by `RULE`.

    Args:
      rollout: index -> the rollout as JSON values.
      rewards: of all rollouts.
      room: bytes of base64.
      seed, iteration: as for `chosen`.
      compact: a cut rollout -> what the page has of it.
      share: that of the iteration before; 0 if there is none.
    """

    def shown(count: int, limit: int) -> list[dict[str, Any]]:
        return [cut_tokens(rollout(i), limit) for i in chosen(rewards, count, seed, iteration)]

    return _first_that_fits(ROLLOUT_LADDER, shown, compact, room, share)


def fit_transcripts(transcripts: Sequence[Mapping[str, Any]], room: int, share: float = 0.0) -> Fitted:
    """Returns the conversations of an iteration that fit into `room` bytes: edits first, then summaries."""
    order = sorted(range(len(transcripts)), key=lambda i: transcripts[i]["stage"] == "summary")

    def shown(count: int, limit: int) -> list[dict[str, Any]]:
        return [_cut_transcript(transcripts[i], limit) for i in sorted(order[:count])]

    return _first_that_fits(TRANSCRIPT_LADDER, shown, dict, room, share)


def _first_that_fits(
    ladder: Sequence[tuple[int, int]],
    shown: Callable[[int, int], list[dict[str, Any]]],
    compact: Callable[[dict[str, Any]], dict[str, Any]],
    room: int,
    share: float,
) -> Fitted:
    """Returns the first step of a ladder whose items fit into the room, or the last step.

    Writing and compressing every step would take most of the time of a report. Steps are skipped that would
    not fit if they were compressed like the step before or the iteration before.
    """
    items: list[dict[str, Any]] = []
    limit = 0
    for place, (count, limit) in enumerate(ladder):
        cut = shown(count, limit)
        amount = _amount(cut)
        if amount * share > room * 1.1 and place + 1 < len(ladder):
            continue
        items = list(map(compact, cut))
        length = len(packed(items))
        share = length / amount
        if length <= room:
            break
    return Fitted(items, limit, share)


def _amount(value: Any) -> int:
    """Estimates the characters of a value as JSON; lists of numbers count by their lengths alone."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return 10 * len(value) + sum(map(_amount, value.values()))
    if isinstance(value, list) and value:
        return sum(map(_amount, value)) if isinstance(value[0], str | dict) else 6 * len(value)
    return 6


def _cut_transcript(transcript: Mapping[str, Any], limit: int) -> dict[str, Any]:
    cut = {name: value for name, value in transcript.items() if name != "iteration"}
    cut["conversation"] = [
        {"role": each["role"], "content": cut_text(str(each["content"]), limit)}
        for each in transcript["conversation"]
    ]
    for name in ("reply", "reasoning", "request"):
        if cut.get(name):
            cut[name] = cut_text(cut[name], limit)
    return cut


def packed(value: Any) -> str:
    """Returns a value as base64 of gzipped JSON, the same for the same value."""
    return packed_text(_json(value))


def packed_text(text: str) -> str:
    """Returns a text as base64 of its gzipped bytes, the same for the same text."""
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()


def _json(value: Any) -> str:
    """Returns a value as JSON, with null for numbers that are not finite, which JSON lacks."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
