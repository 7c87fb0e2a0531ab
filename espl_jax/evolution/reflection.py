"""What mutation and crossover share: asking in stages, showing a rollout, and handing back a child."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from espl_jax.evolution.edit_limits import drop_copies, drop_repeats, shorten_edits
from espl_jax.evolution.edits import Drop, Edit
from espl_jax.types import Conversation, Reflect, Rollouts, SystemPrompt


@dataclasses.dataclass(frozen=True)
class Offspring:
    """What a mutation or a crossover came to.

    Attributes:
      child: the new prompt with its birth rating, without an id; None if there is none.
      transcripts: one `{"stage", "conversation", "reply"}` for every call of the reflector, in order.
      drops: how often each reason of `edits.REASONS` dropped an edit; besides, `shortened` (principles cut to
        the word limit), `no_room` (new principles left out because the list was full) and
        `revision_unusable` (the critiques' own edits were applied because the revision held none).
      reason: why there is no child, or empty.
    """

    child: SystemPrompt | None
    transcripts: tuple[dict[str, Any], ...] = ()
    drops: dict[str, int] = dataclasses.field(default_factory=dict)
    reason: str = ""


class Record:
    """Collects the transcripts and drops of one mutation or crossover."""

    def __init__(self, reflect: Reflect):
        self._reflect = reflect
        self._transcripts: list[dict[str, Any]] = []
        self._drops: collections.Counter[str] = collections.Counter()

    def ask(self, stage: str, conversations: Sequence[Conversation]) -> list[str]:
        """The replies to all conversations of a stage, in one batch. Raises ValueError for a wrong number."""
        replies = self._reflect(conversations)
        if len(replies) != len(conversations):
            raise ValueError(
                f"reflect gave {len(replies)} replies to the {len(conversations)} conversations of the stage "
                f"{stage!r}: it must give one for each, in order"
            )
        for conversation, reply in zip(conversations, replies, strict=True):
            self._transcripts.append({"stage": stage, "conversation": conversation, "reply": reply})
        return replies

    def kept(self, checked: tuple[Sequence[Any], Iterable[Drop]]) -> tuple[Any, ...]:
        """The edits that a check kept; those it dropped are counted."""
        edits, drops = checked
        self._drops.update(reason for reason, _ in drops)
        return tuple(edits)

    def count(self, reason: str, times: int = 1) -> None:
        """Counts what was changed rather than dropped."""
        if times:
            self._drops[reason] += times

    def offspring(self, child: SystemPrompt | None, reason: str = "") -> Offspring:
        """The result with all that was collected."""
        return Offspring(child, tuple(self._transcripts), dict(self._drops), reason)


def show_principles(entries: Mapping[str, str]) -> str:
    """One line for each principle with its id; `(none)` for an empty list."""
    return "\n".join(f"{name}. {principle}" for name, principle in entries.items()) or "(none)"


def verdict(rollouts: Rollouts, i: int, b: int, j: int) -> str:
    """`right` or `wrong`, with the reward where it says more than that."""
    success, reward = bool(rollouts.success[i, b, j]), float(rollouts.rewards[i, b, j])
    word = "right" if success else "wrong"
    return word if reward == success else f"{word} (reward {reward:.3g})"


def presentable(
    edits: Sequence[Edit],
    entries: Mapping[str, str],
    problems: Sequence[str],
    max_words: int,
    record: Record,
) -> tuple[Edit, ...]:
    """Edits whose principles are short, say something new and quote no problem; the rest is counted."""
    edits, shortened = shorten_edits(edits, max_words)
    record.count("shortened", shortened)
    return record.kept(drop_repeats(record.kept(drop_copies(edits, problems)), entries))


def fit(
    parent: SystemPrompt, principles: tuple[str, ...], max_principles: int | None, record: Record
) -> tuple[tuple[str, ...], tuple[dict[str, Any], ...]]:
    """Leaves out the newest principles beyond `max_principles`, never fewer than the parent has.

    Returns:
      (principles, edits): what is kept, and `{"op": "keep", "first": ...}` if anything was left out.
    """
    if max_principles is None:
        return principles, ()
    room = max(max_principles, len(parent.principles))
    if len(principles) <= room:
        return principles, ()
    record.count("no_room", len(principles) - room)
    return principles[:room], ({"op": "keep", "first": room},)
