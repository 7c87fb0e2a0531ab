"""Computes what the page shows about one run, reading its rollouts once."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from espl_jax.report import members, series
from espl_jax.report.read import Record, RunLogs
from espl_jax.report.sample import fit_rollouts, fit_transcripts, packed
from espl_jax.report.scores import Scores, advantages_of

ROOM = 8_000_000
"""Bytes of the page for the rollouts and conversations of all iterations of all runs."""

SHARE = 0.65
"""Share of rollouts in the room of an iteration; the rest is for conversations with the reflector."""

MOST_ROOM = 400_000
"""Bytes for one iteration at most."""

DECIMALS = 3
"""Decimals of the logprobs in the page."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of the page's data, loaded when it is first shown.

    Attributes:
      id: id of its element.
      data: base64 of gzipped JSON.
    """

    id: str
    data: str


@dataclasses.dataclass(frozen=True)
class RunPage:
    """What the page shows about a run.

    Attributes:
      overview: curves, family tree, scores, health and times; loaded at once.
      blocks: details of members, and rollouts and conversations of each iteration; loaded when shown.
      tokens: sampled tokens: `rollouts`, `evaluations`, `trained`.
    """

    overview: Mapping[str, Any]
    blocks: tuple[Block, ...]
    tokens: Mapping[str, int]


def build(run: RunLogs, number: int, room: int = ROOM) -> RunPage:
    """Reads the logs of a run and computes its part of the page.

    Args:
      run: the run.
      number: its number in the page, part of the ids of its blocks.
      room: bytes for its rollouts and conversations.
    """
    count = max(len(run.metrics), 1)
    each_room = min(room // count, MOST_ROOM)
    parts = _Parts(run, number, each_room)
    for iteration, rollouts in run.by_iteration("rollouts"):
        parts.add_rollouts(iteration, rollouts)
    for iteration, transcripts in run.by_iteration("reflections"):
        parts.add_transcripts(iteration, transcripts)
    evaluated = sum(_sampled(each) for each in run.evaluations())
    trained = sum(int(each.get("trained_tokens", 0)) for each in run.metrics)
    overview = {
        "members": members.tree(run),
        "curves": series.curves(run, parts.rates, parts.longest),
        "scores": parts.scores.to_json(),
        "health": series.reflection_health(run, parts.replies),
        "times": series.times(run),
        "shown": {str(iteration): shown for iteration, shown in sorted(parts.shown.items())},
        "statements": {
            name: [each["text"], each["answer"]]
            for name in parts.scores.problems
            if (each := run.problems.get(name))
        }
        if len(parts.scores.problems) <= 200
        else {},
    }
    return RunPage(
        overview,
        tuple(parts.blocks()),
        {"rollouts": parts.tokens, "evaluations": evaluated, "trained": trained},
    )


class _Parts:
    """Collects the parts of a run while its logs are read."""

    def __init__(self, run: RunLogs, number: int, room: int):
        self._run = run
        self._number = number
        self._room = room
        self._rollouts: dict[int, list[dict[str, Any]]] = {}
        self._transcripts: dict[int, list[dict[str, Any]]] = {}
        self._feedback: dict[tuple[int, str], collections.Counter[str]] = {}
        self._vocabulary: dict[int, str] = {}
        self._rollout_share = self._conversation_share = 0.0
        self.scores = Scores()
        self.rates: dict[int, dict[str, float]] = {}
        self.longest: dict[int, int] = {}
        self.replies: dict[int, dict[str, int]] = {}
        self.shown: dict[int, dict[str, int]] = collections.defaultdict(dict)
        self.tokens = 0

    def add_rollouts(self, iteration: int, rollouts: Sequence[Record]) -> None:
        """Adds the rollouts of an iteration, of which some are kept."""
        run = self._run
        self.scores.add(iteration, rollouts)
        self.rates[iteration] = series.group_rates(rollouts)
        self.longest[iteration] = max(len(each["tokens"]) for each in rollouts)
        self.tokens += sum(map(_sampled, rollouts))
        self._feedback |= members.count_feedback(rollouts)
        weights = advantages_of(rollouts, run.config.get("loss", {}))
        rewards = [each["reward"] for each in rollouts]
        fitted = fit_rollouts(
            lambda i: {**rollouts[i], "length": len(rollouts[i]["tokens"]), "advantage": weights[i]},
            rewards,
            int(SHARE * self._room),
            int(run.config.get("seed", 0)),
            iteration,
            compact=_compact,
            share=self._rollout_share,
        )
        self._rollout_share = fitted.share
        self._rollouts[iteration] = fitted.items
        self.shown[iteration] |= {
            "rollouts": len(fitted.items),
            "of": len(rollouts),
            "cut": fitted.cut if any("left_out" in each for each in fitted.items) else 0,
        }
        if run.decode is not None:
            for each in fitted.items:
                for token in each["tokens"]:
                    if token not in self._vocabulary:
                        self._vocabulary[token] = run.decode(token)

    def add_transcripts(self, iteration: int, transcripts: Sequence[Record]) -> None:
        """Adds the conversations of an iteration with the reflector, of which some are kept."""
        self.replies[iteration] = series.count_replies(transcripts)
        fitted = fit_transcripts(transcripts, int((1 - SHARE) * self._room), self._conversation_share)
        self._conversation_share = fitted.share
        self._transcripts[iteration] = fitted.items
        self.shown[iteration] |= {"conversations": len(fitted.items), "conversations_of": len(transcripts)}

    def blocks(self) -> list[Block]:
        """Returns the blocks of the run."""
        name = f"run{self._number}"
        found = [Block(f"{name}-members", packed(members.details(self._run, self._feedback)))]
        if self._vocabulary:
            found.append(Block(f"{name}-vocabulary", packed(self._vocabulary)))
        for iteration in sorted(self._rollouts.keys() | self._transcripts.keys()):
            rollouts = self._rollouts.get(iteration, [])
            problems = {
                each["problem"]: [stated["text"], stated["answer"]]
                for each in rollouts
                if (stated := self._run.problems.get(each["problem"]))
            }
            value = {
                "rollouts": rollouts,
                "problems": problems,
                "transcripts": self._transcripts.get(iteration, []),
            }
            found.append(Block(f"{name}-iteration-{iteration}", packed(value)))
        return found


def _compact(rollout: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a rollout as the page has it: without its iteration and empty fields, with rounded logprobs."""
    kept = {name: x for name, x in rollout.items() if name != "iteration" and x not in ("", None, {})}
    for name in ("logprobs", "trainer_logprobs"):
        if name in kept:
            kept[name] = [None if x is None else round(x, DECIMALS) for x in kept[name]]
    if "logprob" in kept:
        kept["logprob"] = round(kept["logprob"], DECIMALS)
    return kept


def _sampled(record: Record) -> int:
    """Returns the number of sampled tokens; all of them where the log does not tell them apart."""
    logprobs = record.get("logprobs") or []
    return len(record["tokens"]) - logprobs.count(None)
