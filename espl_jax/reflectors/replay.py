"""Reflection from a record: the replies that another run had, given again to equal conversations."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espl_jax.evolution.asking import after_reasoning
from espl_jax.reflectors.journal import digest
from espl_jax.storage import json_values
from espl_jax.types import Conversation, Question, Reply


class Transcripts:
    """Recorded conversations and their replies, read once a run.

    Args:
      path: a run's `reflections.jsonl`, or the journal `replies.jsonl` of one that asked a server.

    Raises:
      ValueError: no such file, nothing in it, or a line that is no transcript, named.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ValueError(
                f"reflection.replay={path}: there is no such file; name a run's reflections.jsonl or "
                "replies.jsonl"
            )
        # Conversation -> iteration -> number of the asking -> record.
        self._replies: dict[str, dict[int | None, dict[int, dict[str, Any]]]] = {}
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._add(_transcript(line, f"reflection.replay={path}, line {number}"))
        if not self._replies:
            raise ValueError(f"reflection.replay={path}: the file is empty; name one with transcripts")

    def records(self, conversation: Conversation, iteration: int) -> list[dict[str, Any]]:
        """All records of a conversation, in order: the iteration's own, then those of others."""
        by_iteration = self._replies.get(digest(conversation), {})
        others = [each for name, each in by_iteration.items() if name != iteration]
        return [
            replies[number]
            for replies in (by_iteration.get(iteration, {}), *others)
            for number in sorted(replies)
        ]

    def _add(self, record: dict[str, Any]) -> None:
        by_iteration = self._replies.setdefault(digest(record["conversation"]), {})
        replies = by_iteration.setdefault(record.get("iteration"), {})
        # A journal has replies in the order in which they arrived, and the number of each. Where it has a
        # number twice, the iteration was done again under other settings, and the last is what came of it.
        replies[record.get("number", len(replies))] = record


class ReplayReflector:
    """A `reflect` for one iteration that answers from transcripts and asks nobody.

    The n-th asking of a conversation gets the n-th of its recorded replies, those that the same iteration had
    before those of others. Numbers begin anew in every object, so an iteration that is done again after a
    kill sees the same replies. Where nothing was recorded, or fewer replies than are asked for, the reply is
    None and counted.

    Args:
      transcripts: of the run that is replayed.
      iteration: of this run.

    Attributes:
      counts: `requests`, all conversations; `failed`, those without a reply; `unrecorded`, those of them that
        were not recorded, the rest having failed in the recorded run too.
    """

    def __init__(self, transcripts: Transcripts, *, iteration: int):
        self._transcripts = transcripts
        self._iteration = iteration
        self._seen: collections.Counter[str] = collections.Counter()
        self.counts = {"requests": 0, "failed": 0, "unrecorded": 0}

    def __call__(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """One recorded reply for each conversation, or None."""
        records = [self._record(conversation) for conversation in conversations]
        return [None if record is None else record["reply"] for record in records]

    def ask(self, questions: Sequence[Question]) -> list[Reply | None]:
        """One recorded reply each, or None; a grammar does not change what was recorded.

        A run's `reflections.jsonl` holds brief reasoning and the reply in one record, a server's journal in
        two, as the server was asked.
        """
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Reply | None:
        record = self._record(question.conversation)
        reply = _reply(record)
        if record is None or reply is None or question.reasoning != "brief" or "reasoning" in record:
            return reply
        if not reply.ended:
            return Reply(text="", reasoning=reply.text, ended=False)
        second = _reply(self._record(after_reasoning(question, reply.text)))
        return second and dataclasses.replace(second, reasoning=reply.text)

    def _record(self, conversation: Conversation) -> dict[str, Any] | None:
        recorded = self._transcripts.records(conversation, self._iteration)
        name = digest(conversation)
        number = self._seen[name]
        self._seen[name] += 1
        record = recorded[number] if number < len(recorded) else None
        self.counts["requests"] += 1
        self.counts["failed"] += record is None or record["reply"] is None
        self.counts["unrecorded"] += record is None
        return record


def _reply(record: dict[str, Any] | None) -> Reply | None:
    if record is None or record["reply"] is None:
        return None
    ended = record.get("ended", True) and not record.get("cut_off", False)
    return Reply(text=record["reply"], reasoning=record.get("reasoning", ""), ended=ended)


def _transcript(line: bytes, where: str) -> dict[str, Any]:
    """One line as a record with a conversation and a reply."""
    try:
        record = json_values.parse(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): remove the line") from error
    if not isinstance(record, dict) or not isinstance(record.get("conversation"), list):
        raise ValueError(f"{where} has no conversation: name a reflections.jsonl or replies.jsonl")
    if "reply" not in record or not isinstance(record["reply"], str | None):
        raise ValueError(f"{where} has no reply: name a reflections.jsonl or replies.jsonl")
    return record
