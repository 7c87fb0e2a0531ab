"""What mutation and crossover share: asking in stages, checking edits, and handing back a child."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from espl_jax.evolution import formats
from espl_jax.evolution.asking import ask_all
from espl_jax.evolution.edits import REASONS, Drop, Edit
from espl_jax.evolution.guards import (
    drop_copies,
    drop_echoes,
    drop_members,
    drop_not_allowed,
    drop_repeats,
    drop_too_long,
)
from espl_jax.evolution.settings import Evolution
from espl_jax.types import (
    Grammar,
    Problem,
    Question,
    Reflect,
    Reply,
    SystemPrompt,
    is_answerer,
)

CONTENT_REASONS = (
    "repeat",
    "too_long",
    "copies_problem",
    "copies_answer",
    "copies_template",
    "copies_member",
)
"""Reasons of `edits.REASONS` that are worth telling the reflector: what was wrong with the edit itself."""


class Rejected(NamedTuple):
    """An edit that was proposed and refused, or that made a prompt worse.

    Attributes:
      edit: the edit in a line.
      why: the reason in words.
    """

    edit: str
    why: str


@dataclasses.dataclass(frozen=True)
class Offspring:
    """The outcome of a mutation or a crossover.

    Attributes:
      child: the new prompt with its birth rating, without an id; None if there is none.
      transcripts: one `{"stage", "conversation", "reply"}` for every call of the reflector, in order; without
        an answer the reply is None. With reasoning there is `reasoning` too, after brief reasoning also
        `request`; a reply that was cut off has `"ended": False`.
      drops: how often each reason of `edits.REASONS` dropped an edit; besides, `no_reply` (replies that were
        not to be had), `cut_off` (replies that a limit ended), `retried` (replies asked for again because a
        principle was too long) and `revision_unusable` (the critiques' own edits were applied because the
        revision held none).
      reason: why there is no child, or empty.
      rejected: edits that were refused for what they say, in order.
    """

    child: SystemPrompt | None
    transcripts: tuple[dict[str, Any], ...] = ()
    drops: dict[str, int] = dataclasses.field(default_factory=dict)
    reason: str = ""
    rejected: tuple[Rejected, ...] = ()


class Unanswered(Exception):
    """No conversation of a stage was answered: the reflector is out of order, and the operator is skipped."""


class Record:
    """Asks the reflector for one mutation or crossover, and collects its transcripts and drops.

    Attributes:
      guards: what is accepted.
      settings: what the reflector is shown and asked.
      constrained: whether the reflector keeps replies to a grammar.
    """

    def __init__(
        self, reflect: Reflect, evolution: Evolution, others: Sequence[SystemPrompt] = (), rejected: str = ""
    ):
        """Nothing has been asked yet.

        Args:
          reflect: conversations in, replies out.
          evolution: settings.
          others: members whose principles a new one must not repeat.
          rejected: what the placeholder `$rejected` is filled with.
        """
        self.guards, self.settings = evolution.guards, evolution.reflection
        self._reflect = reflect
        self.constrained = self.settings.constrained and is_answerer(reflect)
        self._others = others
        self._rejected_shown = rejected
        self._told: dict[str, None] = {}
        self._transcripts: list[dict[str, Any]] = []
        self._drops: collections.Counter[str] = collections.Counter()
        self._rejected: list[Rejected] = []

    def summaries(self, values: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """Free text for each set of values of the template `summary`. Raises `Unanswered`."""
        return [reply and reply.text for reply in self._ask("summary", "summary", values, reasons=False)]

    def edits(
        self,
        stage: str,
        template: str,
        values: Sequence[Mapping[str, Any]],
        grammar: Grammar | None,
        allowed: tuple[type, ...],
        opening: str = "",
    ) -> list[tuple[tuple[Edit, ...], bool]]:
        """The edits of each reply, of operations that the stage allows; dropped ones are counted.

        A reply with a principle of too many words is asked for again. Raises `Unanswered`.

        Args:
          stage: its name in the transcripts.
          template: name of the template.
          values: its placeholders, for each conversation.
          grammar: of every reply, for reflectors that keep to one.
          allowed: types of edits.
          opening: how replies begin, if they are not constrained and the template names no other beginning.

        Returns:
          For each conversation its edits, and whether it asked for none on purpose.
        """

        def ask(some: Sequence[Mapping[str, Any]]) -> list[Any]:
            replies = self._ask(stage, template, some, grammar, opening=opening)
            return [self._read(reply) for reply in replies]

        read = ask(values)
        for _ in range(self.guards.word_retries):
            long = [i for i, found in enumerate(read) if found and any(map(self.guards.too_long, found[0]))]
            if not long:
                break
            self.count("retried", len(long))
            try:
                replies = ask([values[i] for i in long])
            except Unanswered:
                break
            for i, again in zip(long, replies, strict=True):
                if again and again[0] and not any(map(self.guards.too_long, again[0])):
                    read[i] = again
        return [
            (self.kept(drop_not_allowed(self.kept(found or ((), ())), allowed)), found == ((), ()))
            for found in read
        ]

    def text(
        self, stage: str, template: str, values: Mapping[str, Any], grammar: Grammar | None = None
    ) -> str:
        """One reply as text; empty if it was cut off. Raises `Unanswered`."""
        (reply,) = self._ask(stage, template, [values], grammar)
        return reply.text if reply is not None and reply.ended else ""

    def presentable(
        self, edits: Sequence[Edit], problems: Sequence[Problem], entries: Mapping[str, str]
    ) -> tuple[Edit, ...]:
        """Edits whose principles are short, say something new and give no problem away; the rest counted."""
        edits = self.kept(drop_too_long(edits, self.guards))
        edits = self.kept(drop_echoes(edits, list(self._told), self.guards))
        edits = self.kept(drop_copies(edits, problems, self.guards))
        edits = self.kept(drop_members(edits, self._others, self.guards))
        return self.kept(drop_repeats(edits, entries))

    def _read(self, reply: Reply | None) -> tuple[tuple[Edit, ...], tuple[Drop, ...]] | None:
        if reply is None:
            return None
        return formats.read(self.settings.format, reply.text) if reply.ended else formats.cut_off(reply.text)

    def _ask(
        self,
        stage: str,
        template: str,
        values: Sequence[Mapping[str, Any]],
        grammar: Grammar | None = None,
        *,
        reasons: bool = True,
        opening: str = "",
    ) -> list[Reply | None]:
        """The replies to all conversations of a stage, in one batch. Raises ValueError for a wrong number."""
        loaded = self.settings.templates.load(template)
        reasoning = self.settings.reasoning if reasons else "none"
        brief = reasoning == "brief"
        grammar = grammar if self.constrained else None
        beginning = loaded.opening or opening
        begun = self.settings.opening and grammar is None and reasoning == "none" and beginning
        questions = []
        for each in values:
            filled = {"rejected": self._rejected_shown, **each}
            conversation = loaded.conversation(reason=brief, **filled)
            if begun:
                conversation.append({"role": "assistant", "content": beginning})
            request = loaded.filled_request(**filled) if brief else ""
            questions.append(
                Question(conversation=conversation, grammar=grammar, reasoning=reasoning, request=request)
            )
            self._told.update(dict.fromkeys((loaded.words, str(each.get("format", "")))))
        replies = ask_all(self._reflect, questions)
        if len(replies) != len(questions):
            raise ValueError(
                f"reflect gave {len(replies)} replies to the {len(questions)} conversations of the stage "
                f"{stage!r}: it must give one for each, in order"
            )
        self._transcripts += [_transcript(stage, *each) for each in zip(questions, replies, strict=True)]
        missing = sum(reply is None for reply in replies)
        self.count("no_reply", missing)
        self.count("cut_off", sum(reply is not None and not reply.ended for reply in replies))
        if missing == len(replies):
            raise Unanswered(stage)
        return list(replies)

    def kept(self, checked: tuple[Sequence[Any], Iterable[Drop]]) -> tuple[Any, ...]:
        """The edits that a check kept; those it dropped are counted."""
        edits, drops = checked
        for reason, what in drops:
            self._drops[reason] += 1
            if reason in CONTENT_REASONS:
                self._rejected.append(Rejected(what, REASONS[reason]))
        return tuple(edits)

    def count(self, reason: str, times: int = 1) -> None:
        """Counts what happened to replies."""
        if times:
            self._drops[reason] += times

    def offspring(self, child: SystemPrompt | None, reason: str = "") -> Offspring:
        """The result with all that was collected."""
        return Offspring(child, tuple(self._transcripts), dict(self._drops), reason, tuple(self._rejected))


def shown_rejected(rejected: Sequence[Rejected], most: int) -> str:
    """What `$rejected` is filled with: the last edits that were refused, each once; empty for none."""
    listed = list(dict.fromkeys(f"- {edit} ({why})" for edit, why in rejected))[-most:] if most else []
    return "\n\nRejected before; do not propose these again:\n" + "\n".join(listed) if listed else ""


def _transcript(stage: str, question: Question, reply: Reply | None) -> dict[str, Any]:
    record = {"stage": stage, "conversation": question.conversation, "reply": reply and reply.text}
    if question.reasoning == "brief":
        record["request"] = question.request
    if reply is not None and question.reasoning != "none":
        record["reasoning"] = reply.reasoning
    if reply is not None and not reply.ended:
        record["ended"] = False
    return record
