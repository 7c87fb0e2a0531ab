"""Questions that the model answers after searching for passages, in several turns.

The task is that of Search-R1 (Jin et al. 2025, arXiv 2503.09516) and of the paper's fourth data pair: one
tool, `search(query_list)`, and a last line `Answer: ...`, compared by exact match.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import re
import string
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from espl_jax.environments.retrievers.load import RetrievalError, Retriever
from espl_jax.types import Conversation, Grade, Message, Passage, Problem

Tell = Callable[..., None]
"""Called with what was found for each query, or with nothing and the reason."""

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches for passages, and gives the best ones for each query.",
        "parameters": {
            "type": "object",
            "properties": {
                "query_list": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "What to search for, one short query each.",
                }
            },
            "required": ["query_list"],
        },
    },
}
"""The tool's schema."""

INSTRUCTION = "End with a line that says `Answer:` and then the answer alone, in as few words as possible."
"""Said after each question."""

REWARDS = ("exact_match", "f1", "answered", "searched", "malformed_calls", "failed_searches")
"""What a reward is a weighted sum of; see `Search.grade`."""

MOST_QUERIES = 5
"""In one call; more are left out."""

_ANSWER = re.compile(r"^[ \t>*_]*answer[ \t*_]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LAST = "This was the last search. Answer in your next turn."


@dataclasses.dataclass(frozen=True)
class Search:
    """An agent with a search tool.

    A turn with calls is answered by what they find; one without ends the conversation. Searching takes
    threads of its own, and whatever goes wrong there is told to the model: nothing that a retriever does can
    cost more than the reward of the rollouts that asked it, and `timeout` seconds.

    Attributes:
      retriever: where to search. Of several processes those that never search have None.
      passages: found for each query.
      max_turns: of the model's, the answer included.
      max_passage_words: longer passages are cut.
      timeout: seconds for one call, after which the model is told that it failed.
      concurrency: calls at once.
      rewards: weights of `REWARDS`.
      instruction: said after the question, in a paragraph of its own; None for `INSTRUCTION`.

    Raises:
      ValueError: for a value out of range, or an unknown part of the reward.
    """

    retriever: Retriever | None
    passages: int = 3
    max_turns: int = 4
    max_passage_words: int = 150
    timeout: float = 30.0
    concurrency: int = 16
    rewards: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"exact_match": 1.0})
    instruction: str | None = None
    _free: threading.Semaphore = dataclasses.field(init=False, repr=False, compare=False)

    tools = (SEARCH,)

    def __post_init__(self):
        for name in ("passages", "max_turns", "max_passage_words", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: give at least 1")
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout!r}: give seconds, more than 0")
        if unknown := set(self.rewards) - set(REWARDS):
            raise ValueError(f"rewards={sorted(unknown)} are unknown; choose from {', '.join(REWARDS)}")
        object.__setattr__(self, "_free", threading.Semaphore(self.concurrency))

    def user_message(self, problem: Problem) -> str:
        """The question, and the instruction after a blank line."""
        instruction = INSTRUCTION if self.instruction is None else self.instruction
        return f"{problem.text}\n\n{instruction}".rstrip()

    def respond(
        self, problem: Problem, transcript: Conversation
    ) -> Sequence[Message] | concurrent.futures.Future | None:
        """What the calls of the last turn gave, one message each; nothing after a turn without any.

        Where a call cannot be read, a search fails or finds nothing, the message says so, and has a field
        `error`: `malformed`, `failed` or `nothing`.
        """
        calls = transcript[-1].get("tool_calls", ())
        turns = sum(message["role"] == "assistant" for message in transcript)
        if not calls or turns >= self.max_turns:
            return None
        asked = [_queries(call) for call in calls]
        wanted = list(dict.fromkeys(query for queries, _ in asked for query in queries))
        last = turns == self.max_turns - 1
        if not wanted:
            return _messages(asked, {}, "", last)
        answer: concurrent.futures.Future = concurrent.futures.Future()

        def tell(found: Mapping[str, str], failure: str = "") -> None:
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # too late: it was told already
                answer.set_result(_messages(asked, found, failure, last))

        threading.Thread(target=self._search, args=(wanted, answer, tell), daemon=True).start()
        too_late = f"it took longer than {self.timeout:g} seconds"
        timer = threading.Timer(self.timeout, tell, ({}, too_late))
        timer.daemon = True
        timer.start()
        answer.add_done_callback(lambda _: timer.cancel())
        return answer

    def _search(self, queries: Sequence[str], answer: concurrent.futures.Future, tell: Tell) -> None:
        """In a thread of its own: searches when others have done so, and tells what came of it."""
        if not self._free.acquire(timeout=self.timeout):
            return
        # Others go on, too, when nobody waits any longer for a search that hangs.
        answer.add_done_callback(lambda _: self._free.release())
        try:
            assert self.retriever is not None
            found = self.retriever.search(queries, self.passages)
            shown = [self._shown(passages) for passages in found]
            tell(dict(zip(queries, shown, strict=True)))
        except RetrievalError as error:
            tell({}, str(error))
        except Exception as error:  # what a retriever of the user's raises, or gives in the place of passages
            tell({}, type(error).__name__)

    def _shown(self, passages: Sequence[Passage]) -> str:
        lines = []
        for number, passage in enumerate(passages, start=1):
            words = passage.text.split()
            text = " ".join(words[: self.max_passage_words]) + " ..." * (len(words) > self.max_passage_words)
            lines.append(f"[{number}] {passage.title}: {text}" if passage.title else f"[{number}] {text}")
        return "\n".join(lines)

    def grade(self, problems: Sequence[Problem], transcripts: Sequence[Conversation]) -> list[Grade]:
        """Grades of a batch, in order.

        The answer is that of the last line `Answer: ...` of the last turn. It is a success if it equals the
        gold answer, or one of its aliases, once case, punctuation, articles and white space are gone. The
        reward is the sum of these, each times its weight in `rewards`: `exact_match`; `f1`, of the words of
        the answer; `answered` and `searched`, 1 if there is an answer, and a search that found something;
        `malformed_calls` and `failed_searches`, how many there were.
        """
        return [self._grade(*each) for each in zip(problems, transcripts, strict=True)]

    def _grade(self, problem: Problem, transcript: Conversation) -> Grade:
        answer = final_answer(transcript[-1]["content"])
        golds = (problem.answer, *problem.aliases)
        results = [message for message in transcript if message["role"] == "tool"]
        errors = collections.Counter(message.get("error") for message in results)
        parts = {
            "exact_match": float(answer is not None and normalized(answer) in map(normalized, golds)),
            "f1": max(f1(answer, gold) for gold in golds) if answer else 0.0,
            "answered": float(answer is not None),
            "searched": float(errors[None] > 0),
            "malformed_calls": float(errors["malformed"]),
            "failed_searches": float(errors["failed"]),
        }
        turns = sum(message["role"] == "assistant" for message in transcript)
        success = bool(parts["exact_match"])
        return Grade(
            reward=sum(weight * parts[name] for name, weight in self.rewards.items()),
            success=success,
            answer=answer,
            metrics={**parts, "searches": float(len(results)), "turns": float(turns)},
            feedback=" ".join(self._feedback(answer, success, transcript, turns)),
        )

    def _feedback(
        self, answer: str | None, success: bool, transcript: Conversation, turns: int
    ) -> Iterator[str]:
        """Yields what was wrong with a conversation, sentence by sentence."""
        results = [message for message in transcript if message["role"] == "tool"]
        malformed = [message["content"] for message in results if message.get("error") == "malformed"]
        if malformed:
            first = malformed[0].removeprefix("Error: ").partition("\n")[0].rstrip(".")
            yield f"{len(malformed)} of {len(results)} calls could not be read: {first}."
        for error, what in (("failed", "failed"), ("nothing", "found nothing")):
            if count := sum(message.get("error") == error for message in results):
                yield f"{count} of {len(results)} searches {what}."
        if success:
            return
        if not results:
            yield "Nothing was searched."
        if answer is not None:
            yield f"The answer that was read, {answer!r}, is wrong."
        elif transcript[-1].get("tool_calls"):
            yield f"The last of {turns} turns called a tool and gave no answer."
        else:
            yield "The last turn has no line that begins with `Answer:`."


def final_answer(text: str) -> str | None:
    """What follows the last `Answer:` that begins a line; None where nothing does."""
    lines = _ANSWER.findall(text)
    return (lines[-1].strip(" \t*_`") or None) if lines else None


def normalized(answer: str) -> str:
    """An answer as it is compared: lower case, without ASCII punctuation, articles and extra white space
    (SQuAD, Rajpurkar et al. 2016, and Search-R1 after it)."""
    without = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(_ARTICLES.sub(" ", without).split())


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words of an answer, normalized; in [0, 1]."""
    words, wanted = normalized(answer).split(), normalized(gold).split()
    same = sum((collections.Counter(words) & collections.Counter(wanted)).values())
    return 2 * same / (len(words) + len(wanted)) if same else 0.0


def _queries(call: Mapping[str, Any]) -> tuple[list[str], str]:
    """What a call asks for; or nothing, and what is wrong with it."""
    if error := call.get("error"):
        return [], error
    if call["name"] != "search":
        return [], f"there is no tool {call['name']!r}; the only one is search"
    queries = call["arguments"].get("query_list")
    queries = [queries] if isinstance(queries, str) else queries
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        return [], 'search needs "query_list", a list of strings'
    queries = [query.strip() for query in queries if query.strip()]
    return queries[:MOST_QUERIES], "" if queries else '"query_list" is empty'


def _messages(
    asked: Sequence[tuple[list[str], str]], found: Mapping[str, str], failure: str, last: bool
) -> list[Message]:
    """The answer to each call of a turn."""
    messages: list[Message] = []
    for queries, error in asked:
        if error:
            messages.append({"content": f"Error: {error}.", "error": "malformed"})
        elif failure:
            messages.append({"content": f"Error: the search failed, {failure}.", "error": "failed"})
        else:
            texts = [f"{query}\n{found[query] or 'Nothing was found.'}" for query in queries]
            error = {} if any(map(found.get, queries)) else {"error": "nothing"}
            messages.append({"content": "\n\n".join(texts)} | error)
    if last:
        messages[-1]["content"] += f"\n\n{_LAST}"
    return [{"role": "tool", **message} for message in messages]
