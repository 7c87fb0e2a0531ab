"""What mutation and crossover share: asking in stages, showing a rollout, and handing back a child."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.edits import Drop, Edit
from espl_jax.evolution.guards import Guards, drop_copies, drop_not_allowed, drop_repeats, shorten_edits
from espl_jax.evolution.templates import load_template
from espl_jax.types import Conversation, Problem, Reflect, Rollouts, Schema, SystemPrompt, keeps_schemas

_Edit = TypeVar("_Edit", bound=Edit)


@dataclasses.dataclass(frozen=True)
class Offspring:
    """What a mutation or a crossover came to.

    Attributes:
      child: the new prompt with its birth rating, without an id; None if there is none.
      transcripts: one `{"stage", "conversation", "reply"}` for every call of the reflector, in order; without
        an answer the reply is None.
      drops: how often each reason of `edits.REASONS` dropped an edit; besides, `no_reply` (replies that were
        not to be had), `retried` (replies asked for again because a principle was too long), `shortened`
        (principles cut to the word limit) and `revision_unusable` (the critiques' own edits were applied
        because the revision held none).
      reason: why there is no child, or empty.
    """

    child: SystemPrompt | None
    transcripts: tuple[dict[str, Any], ...] = ()
    drops: dict[str, int] = dataclasses.field(default_factory=dict)
    reason: str = ""


class Unanswered(Exception):
    """No conversation of a stage was answered: the reflector is out of order, and the operator is skipped."""


class Record:
    """Asks the reflector for one mutation or crossover, and collects its transcripts and drops.

    Attributes:
      guards: what is accepted.
      constrained: whether the reflector keeps replies to a schema.
    """

    def __init__(self, reflect: Reflect, guards: Guards, opening: bool, constrained: bool = True):
        self.guards = guards
        self._reflect = reflect
        self._keeper = reflect if constrained and keeps_schemas(reflect) else None
        self.constrained = self._keeper is not None
        self._opening = opening
        self._transcripts: list[dict[str, Any]] = []
        self._drops: collections.Counter[str] = collections.Counter()

    def summaries(self, values: Sequence[dict[str, Any]]) -> list[str | None]:
        """Free text for each set of values of the template `summary`. Raises `Unanswered`."""
        template = load_template("summary")
        return self._ask("summary", [template.conversation(opening=self._opening, **each) for each in values])

    def edits(
        self,
        stage: str,
        template: str,
        values: Sequence[Mapping[str, Any]],
        schema: Schema | None,
        allowed: tuple[type[_Edit], ...],
    ) -> list[tuple[tuple[_Edit, ...], bool]]:
        """The edits of each reply: of operations that the stage allows, dropped ones counted.

        A reply with a principle of too many words is asked for again. Raises `Unanswered`.

        Args:
          stage: its name in the transcripts.
          template: name of the template.
          values: its placeholders, for each conversation.
          schema: of every reply, for reflectors that keep to one; others get an opening if they are to.
          allowed: types of edits.

        Returns:
          For each conversation its edits, and whether it asked for none by an empty list.
        """
        opening = self._opening and not self.constrained
        loaded = load_template(template)
        conversations = [loaded.conversation(opening=opening, **each) for each in values]
        read = [_read(reply) for reply in self._ask(stage, conversations, schema)]
        for _ in range(self.guards.word_retries):
            long = [i for i, found in enumerate(read) if found and any(map(self.guards.too_long, found[0]))]
            if not long:
                break
            self.count("retried", len(long))
            try:
                replies = self._ask(stage, [conversations[i] for i in long], schema)
            except Unanswered:
                break
            for i, reply in zip(long, replies, strict=True):
                again = _read(reply)
                if again and again[0] and not any(map(self.guards.too_long, again[0])):
                    read[i] = again
        return [
            (self.kept(drop_not_allowed(self.kept(found or ((), ())), allowed)), found == ((), ()))
            for found in read
        ]

    def presentable(
        self, edits: Sequence[_Edit], problems: Sequence[Problem], entries: Mapping[str, str]
    ) -> tuple[_Edit, ...]:
        """Edits whose principles are short, say something new and give no problem away; the rest counted."""
        short, shortened = shorten_edits(edits, self.guards)
        self.count("shortened", shortened)
        return self.kept(drop_repeats(self.kept(drop_copies(short, problems, self.guards)), entries))

    def _ask(
        self, stage: str, conversations: Sequence[Conversation], schema: Schema | None = None
    ) -> list[str | None]:
        """The replies to all conversations of a stage, in one batch. Raises ValueError for a wrong number."""
        if schema is not None and self._keeper is not None:
            replies = self._keeper.constrained(conversations, [schema] * len(conversations))
        else:
            replies = self._reflect(conversations)
        if len(replies) != len(conversations):
            raise ValueError(
                f"reflect gave {len(replies)} replies to the {len(conversations)} conversations of the stage "
                f"{stage!r}: it must give one for each, in order"
            )
        for conversation, reply in zip(conversations, replies, strict=True):
            self._transcripts.append({"stage": stage, "conversation": conversation, "reply": reply})
        missing = sum(reply is None for reply in replies)
        self.count("no_reply", missing)
        if missing == len(replies):
            raise Unanswered(stage)
        return list(replies)

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


def _read(reply: str | None) -> tuple[tuple[Edit, ...], tuple[Drop, ...]] | None:
    return None if reply is None else parse_edits(reply)


def verdict(rollouts: Rollouts, i: int, b: int, j: int) -> str:
    """`right` or `wrong`, with the reward where it says more than that."""
    success, reward = bool(rollouts.success[i, b, j]), float(rollouts.rewards[i, b, j])
    word = "right" if success else "wrong"
    return word if reward == success else f"{word} (reward {reward:.3g})"
