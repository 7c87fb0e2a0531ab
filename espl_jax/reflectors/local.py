"""Reflection on device, by the reference or the current policy, through the same sampler as rollouts."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from espl_jax.parallel import processes
from espl_jax.rollouts.encode import Model, stop_ids_of
from espl_jax.rollouts.keys import stable_hash
from espl_jax.sampling.answers import Place
from espl_jax.sampling.buckets import bucket
from espl_jax.sampling.draw import row_keys
from espl_jax.sampling.generate import sample_tree
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.text.chat import cut_middle, encode, encode_conversation, render
from espl_jax.text.constrained import GrammarRows
from espl_jax.text.replies import NO_THOUGHTS, after_thinking, closes_thinking, decode_reply, replies_at_once
from espl_jax.text.thinking import CLOSE, OPEN, prompt_opens_thinking, strip_tags, strip_thinking
from espl_jax.text.tools import between_turns
from espl_jax.types import Conversation, Question, Reply

CUT_MARK = "\n[... cut ...]\n"

TURN_MARKS = 64
"""Most tokens that a chat template puts around what is appended after reasoning."""


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class LocalReflector:
    """A `Reflect` that asks the model itself; conversations with one system turn share its cache.

    A conversation longer than `max_input_tokens` loses the middle of what follows its system turn, where the
    templates put the trajectories, and a mark stands for what is gone.

    Attributes:
      model: `.params` of the policy that reflects, `.config`, `.tokenizer`.
      key: one typed key, folded by the caller from seed, stream and iteration; a reply's own key is folded
        from it, a hash of its conversation and, among equal conversations of all calls, its number.
      sampling: how replies are drawn; `max_new_tokens` of each, without its opening. After reasoning, a reply
        may also use what the reasoning left of `reasoning_tokens`. Without `stop_ids` the model's own end a
        reply.
      max_input_tokens: of each conversation; what the model's context leaves beside the reply by default.
      reasoning_tokens: most tokens of reasoning before a reply.
      template_arguments: arguments of the chat template.
      capacity: what of the devices replies may take; `longest_problem` and `coarse` are its own.
      counts: `requests`, `prompt_tokens` (a shared system turn once for each group) and `completion_tokens`,
        reasoning included.
    """

    model: Model
    key: jax.Array
    sampling: Sampling
    max_input_tokens: int | None = None
    reasoning_tokens: int = 512
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    capacity: Capacity = Capacity()

    def __post_init__(self) -> None:
        self._arguments = dict(self.template_arguments)
        given = self.sampling.stop_ids
        self._stop_ids = stop_ids_of(self.model) if given is None else given
        self._mark = encode(self.model.tokenizer, CUT_MARK)
        closing = encode(self.model.tokenizer, closes_thinking(self.model.tokenizer))
        self._close = closing[0] if len(closing) == 1 else None
        self._asked: collections.Counter[int] = collections.Counter()
        self.counts: dict[str, float] = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        """One reply each, in order: the opening, if there was one, and what followed it, without thinking."""
        return [reply.text for reply in self.ask([Question(conversation=each) for each in conversations])]

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """One reply each, in order.

        With brief reasoning the model first ends a turn of free text within `reasoning_tokens`; `request` is
        appended, and the reply is drawn in the same sequence, under the grammar from there on. With
        `reasoning="model"` it thinks in its own thinking block first, which is opened for it where the chat
        template does not open one. Without reasoning a constrained reply is nothing but the reply: a thinking
        block that the chat template opens is closed at once.

        Args:
          questions: of one kind of reasoning, all with a grammar or all without.

        Raises:
          ValueError: a constrained conversation has an opening, llguidance refuses the tokenizer or a
            grammar, or no single token closes a thinking block, which `reasoning="model"` needs.
        """
        replies: list[Reply | None] = [None] * len(questions)
        for members, drawn in self._draw(questions):
            for i, reply in zip(members, drawn, strict=True):
                replies[i] = reply
        return [reply for reply in replies if reply is not None]

    def _render(self, messages: Conversation) -> str:
        return render(self.model.tokenizer, messages, **self._arguments)

    def _prepared(self, question: Question) -> Conversation:
        """The conversation with its thinking block opened, or closed, where that is needed."""
        messages = question.conversation
        opening = messages[-1]["role"] == "assistant"
        if opening and question.grammar is not None:
            raise ValueError("a conversation ends with an opening: a constrained reply begins by itself")
        if opening or (question.grammar is None and question.reasoning == "none"):
            return messages
        prompt = self._render(messages)
        if question.reasoning == "model":
            if self._close is None:
                raise ValueError(
                    f"reflection.reasoning='model': the tokenizer has no single token {CLOSE}, so the model "
                    "has no thinking block of its own; give brief"
                )
            if prompt_opens_thinking(prompt):
                return messages
            return [*messages, {"role": "assistant", "content": f"{OPEN}\n"}]
        if not replies_at_once(self.model.tokenizer, prompt):
            return messages
        return [*messages, {"role": "assistant", "content": NO_THOUGHTS}]

    def _draw(self, questions: Sequence[Question]) -> Iterator[tuple[list[int], list[Reply]]]:
        """The replies of each group of questions that share a system turn, with their places."""
        by_system: dict[tuple[int, ...], list[int]] = {}
        rests, words = [], []
        for i, question in enumerate(questions):
            messages = self._prepared(question)
            prompt = self._render(messages)
            system, rest = encode_conversation(self.model.tokenizer, messages, **self._arguments)
            by_system.setdefault(tuple(system), []).append(i)
            rests.append(self._fit(system, rest, question))
            word = stable_hash(prompt)
            words.append((word, self._asked[word]))
            self._asked[word] += 1
        for system, members in by_system.items():
            asked = [questions[i] for i in members]
            keys = np.array([words[i] for i in members], np.uint32)
            yield members, self._sampled(system, [rests[i] for i in members], keys, asked)

    def _fit(self, system: list[int], rest: list[int], question: Question) -> list[int]:
        positions = self.model.config.max_positions
        most = int(self.sampling.max_new_tokens) + self._reasoning_room(question)
        limit = min(self.max_input_tokens or positions, positions - most)
        if len(system) + len(self._mark) >= limit:
            raise ValueError(
                f"reflection.max_input_tokens={limit} is filled by the {len(system)} tokens of the "
                "instructions alone; raise it, or lower reflection.max_new_tokens or .reasoning_tokens"
            )
        return cut_middle(rest, limit - len(system), self._mark)

    def _reasoning_room(self, question: Question) -> int:
        """Most tokens that reasoning and what is appended after it take."""
        if question.reasoning == "none":
            return 0
        asked = encode(self.model.tokenizer, question.request) if question.reasoning == "brief" else []
        return self.reasoning_tokens + len(asked) + TURN_MARKS

    def _sampled(
        self, system: tuple[int, ...], rests: list[list[int]], words: np.ndarray, asked: list[Question]
    ) -> list[Reply]:
        # Shapes stay few: the batch is filled up with rows that may draw nothing. One conversation alone, as
        # every revision is, takes the time of one.
        model, reasoning = self.model, asked[0].reasoning
        spare = bucket(len(rests), smallest=4) - len(rests) if len(rests) > 1 else 0
        words = np.pad(words, ((0, spare), (0, 0)))
        most = [self.sampling.max_new_tokens + self._reasoning_room(question) for question in asked]
        grammars = [question.grammar for question in asked if question.grammar is not None]
        if len({question.reasoning for question in asked}) > 1 or len(grammars) not in (0, len(asked)):
            raise ValueError("ask questions of one kind at a time: one reasoning, all constrained or none")
        stop_ids = (*self._stop_ids, self._close) if reasoning == "model" else tuple(self._stop_ids)
        constraint = None
        if grammars:
            constraint = GrammarRows(
                model.tokenizer,
                grammars,
                stop_ids=self._stop_ids,
                vocab_size=model.config.vocab_size,
                after_answer=reasoning != "none",
            )
        begun: dict[Place, tuple[int, int]] = {}

        def respond(place: Place, tokens: np.ndarray) -> list[int] | None:
            """Asks for the reply once the reasoning has ended by itself."""
            if place in begun:
                return None
            appended = self._asking(asked[place[1]], int(tokens[-1]))
            if appended:
                begun[place] = (len(tokens), len(tokens) + len(appended))
            return appended

        samples = sample_tree(
            model.params,
            model.config,
            [system],
            [rests + [rests[0]] * spare],
            row_keys(self.key, *words.T[:, None, :, None]),
            dataclasses.replace(
                self.sampling,
                max_new_tokens=np.array(most + [0] * spare)[None, :, None],
                stop_ids=stop_ids,
                max_first_turn=self.reasoning_tokens if reasoning != "none" else None,
            ),
            # Conversations have all lengths, programs shall have few.
            dataclasses.replace(
                self.capacity, longest_problem=1 << (max(map(len, rests)) - 1).bit_length(), coarse=True
            ),
            respond=respond if reasoning != "none" else None,
            constraint=constraint,
        )
        if reasoning != "none":
            begun = processes.decide(lambda: begun)  # only the first process responds
        self.counts["requests"] += len(rests)
        drawn, appended = int(samples.drawn.sum()), int(samples.lengths.sum() - samples.drawn.sum())
        self.counts["prompt_tokens"] += len(system) + sum(map(len, rests)) + appended
        self.counts["completion_tokens"] += drawn
        replies = []
        for i, question in enumerate(asked):
            place = (0, i, 0)
            tokens = samples.tokens[place][: samples.lengths[place]].tolist()
            ended = not samples.truncated[place]
            if reasoning == "none":
                replies.append(Reply(text=self._as_text(question, tokens), ended=ended))
                continue
            end, start = begun.get(place, (len(tokens), len(tokens)))
            thought = strip_tags(decode_reply(model.tokenizer, tokens[:end], opened=reasoning == "model"))
            reply = strip_thinking(self._decode(tokens[start:]))
            replies.append(Reply(text=reply, reasoning=thought, ended=ended and place in begun))
        return replies

    def _asking(self, question: Question, last: int) -> list[int] | None:
        """What is appended after reasoning that ended with the token `last`; None if it did not close."""
        tokenizer = self.model.tokenizer
        if question.reasoning == "model":
            return encode(tokenizer, after_thinking(tokenizer)) if last == self._close else None
        turn = [{"role": "user", "content": question.request}]
        text = between_turns(tokenizer, turn, (), tokenizer.decode([last]), **self._arguments)
        return encode(tokenizer, text + replies_at_once(tokenizer, text))

    def _decode(self, tokens: list[int]) -> str:
        return self.model.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _as_text(self, question: Question, tokens: list[int]) -> str:
        """A reply: a constrained one as it is, a free one with its opening and without thinking."""
        if question.grammar is not None:
            return self._decode(tokens)
        messages = question.conversation
        opening = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        opened = not opening and prompt_opens_thinking(self._render(messages))
        return strip_thinking(opening + decode_reply(self.model.tokenizer, tokens, opened), opened)


def local_reflector(model: Model, **settings: Any) -> LocalReflector:
    """A reflector that asks this model; the settings are `LocalReflector`'s."""
    return LocalReflector(model=model, **settings)
