"""Reflection by a server: replies in order, counted, and journalled as they arrive."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Sequence
from typing import Any

from absl import logging

from espl_jax.evolution.asking import in_two_steps
from espl_jax.reflectors.journal import Journal, digest
from espl_jax.reflectors.openai_server import FAILURES, FINAL, OpenAIServer
from espl_jax.types import Conversation, Grammar, Question, Reply, Schema

PATIENCE = 3
"""So many conversations, or `concurrency` of them, fail for good in a row before a server is left alone."""

NOT_ASKED = {
    "reply": None,
    "failure": "not_asked",
    "said": None,
    "retries": 0,
    "usage": {"prompt_tokens": 0, "completion_tokens": 0},
}


class OpenAIReflector:
    """A `reflect` for one iteration that asks a server for what is not yet in its journal.

    The n-th asking of a conversation within the object is a request of its own, so that asking again gets
    another reply, and an iteration that is done again after a kill finds what had arrived. Final failures are
    journalled as well, so that it takes the same course; errors that stop the run are not. A server that has
    failed a round of conversations, all their retries included, is not asked again in the iteration: what is
    left fails at once.

    May be called in any thread that runs no event loop.

    Args:
      server: of the run.
      iteration: of the run.
      journal: of the run; None keeps none.

    Attributes:
      replayed: conversations whose outcome was in the journal, no part of `counts`.
    """

    def __init__(self, server: OpenAIServer, *, iteration: int, journal: Journal | None = None):
        self.replayed = 0
        self._failed_in_a_row = 0
        self._server = server
        self._iteration = iteration
        self._journal = journal
        self._seen: collections.Counter[str] = collections.Counter()
        self._totals: collections.Counter[str] = collections.Counter()

    @property
    def counts(self) -> dict[str, float]:
        """What this object's conversations came to, the same whether they were asked or replayed.

        `requests`, conversations; `retries`, further attempts at them; `failed`, those without a reply, and
        `failed_<reason>` for each of `FAILURES`; `prompt_tokens` and `completion_tokens`, of all attempts, as
        far as the server told them; `cost`, by the prices of the server object.
        """
        names = ["requests", "retries", "failed", *(f"failed_{reason}" for reason in FAILURES)]
        counts = {name: self._totals[name] for name in (*names, "prompt_tokens", "completion_tokens")}
        paid = counts["prompt_tokens"] * self._server.price_input
        paid += counts["completion_tokens"] * self._server.price_output
        return {**counts, "cost": paid / 1e6}

    def __call__(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """One reply for each conversation, in order, without thinking blocks; None where there was none.

        Raises:
          ValueError: a conversation ends with an opening.
          RuntimeError: an answer that every request would get: wrong key, model or address, no funds.
          OSError: the journal cannot be written.
        """
        replies = self._reply_to(conversations, [None] * len(conversations))
        return [reply and reply.text for reply in replies]

    def ask(self, questions: Sequence[Question]) -> list[Reply | None]:
        """One reply each, in order, as `__call__`; kept to its JSON schema if the server can do so.

        Brief reasoning is a request of its own before that for the reply. With `reasoning="model"` the server
        is left to think as it does.
        """
        return in_two_steps(self._reply_to, questions)

    def _reply_to(
        self, conversations: Sequence[Conversation], grammars: Sequence[Grammar | None]
    ) -> list[Reply | None]:
        # Servers share no grammar but JSON schema; lines are read leniently.
        schemas = [grammar if isinstance(grammar, dict) else None for grammar in grammars]
        entries = self._entries(conversations, schemas)
        return [
            None
            if entry["reply"] is None
            else Reply(text=entry["reply"], ended=not entry.get("cut_off", False))
            for entry in entries
        ]

    def _entries(
        self, conversations: Sequence[Conversation], schemas: Sequence[Schema | None]
    ) -> list[dict[str, Any]]:
        """The journal's entries of all conversations, in order."""
        requests = [self._request(*each) for each in zip(conversations, schemas, strict=True)]
        entries = {}
        if self._journal is not None:
            found = ((i, self._journal.find(digest(request))) for i, request in enumerate(requests))
            entries = {i: entry for i, entry in found if entry is not None}
        self.replayed += len(entries)
        for entry in entries.values():
            self._note(entry)
        if missing := [i for i in range(len(requests)) if i not in entries]:
            answered = asyncio.run(self._ask_all([requests[i] for i in missing]))
            self._say_failures(answered)
            entries |= dict(zip(missing, answered, strict=True))
        for entry in entries.values():
            self._count(entry)
        return [entries[i] for i in range(len(requests))]

    def _request(self, conversation: Conversation, schema: Schema | None) -> dict[str, Any]:
        """All that decides a reply; its digest is the journal's key."""
        if conversation[-1]["role"] == "assistant":
            raise ValueError(
                "reflection.opening=True: a server cannot be given the beginning of its reply; give False"
            )
        name = digest(conversation)
        self._seen[name] += 1
        return {
            "iteration": self._iteration,
            "number": self._seen[name] - 1,
            "model": self._server.model,
            "temperature": self._server.temperature,
            "max_new_tokens": self._server.max_new_tokens,
            "schema": schema,
            "conversation": conversation,
        }

    async def _ask_all(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The journal's entries for requests that it does not have."""
        slots = asyncio.Semaphore(self._server.concurrency)

        async def ask(request: dict[str, Any]) -> dict[str, Any]:
            async with slots:
                if self._failed_in_a_row >= max(self._server.concurrency, PATIENCE):
                    outcome = NOT_ASKED
                else:
                    outcome = await self._server.ask(client, request["conversation"], request["schema"])
                self._note(outcome)
                if self._journal is not None:
                    self._journal.add(digest(request), {**request, **outcome})
                return outcome

        async with self._server.client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(ask(request)) for request in requests]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # each of them stops the run
        return [task.result() for task in tasks]

    def _note(self, outcome: dict[str, Any]) -> None:
        """Keeps count of failures since the server last answered anything."""
        answered = outcome["failure"] in (None, *FINAL)
        self._failed_in_a_row = 0 if answered else self._failed_in_a_row + 1

    def _count(self, entry: dict[str, Any]) -> None:
        self._totals.update(entry["usage"])
        self._totals.update(requests=1, retries=entry["retries"])
        if entry["reply"] is None:
            self._totals.update(["failed", f"failed_{entry['failure']}"])

    def _say_failures(self, entries: Sequence[dict[str, Any]]) -> None:
        failed = [entry for entry in entries if entry["reply"] is None]
        if failed:
            logging.warning(
                "%d of %d replies could not be had from %s; the last: %s, %s",
                *(len(failed), len(entries), self._server.base_url),
                *(failed[-1]["failure"], failed[-1]["said"]),
            )
