"""Reflection on device, by the reference or the current policy, through the same sampler as rollouts."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from espl_jax.rollouts.encode import Model, stop_ids_of
from espl_jax.rollouts.keys import stable_hash
from espl_jax.sampling.buckets import bucket
from espl_jax.sampling.draw import row_keys
from espl_jax.sampling.generate import sample_tree
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.text.chat import cut_middle, encode, encode_conversation, render
from espl_jax.text.constrained import SchemaRows
from espl_jax.text.thinking import CLOSE, prompt_opens_thinking, strip_thinking
from espl_jax.types import Conversation, Schema

CUT_MARK = "\n[... cut ...]\n"

NO_THOUGHTS = f"\n{CLOSE}\n\n"
"""What follows an opening tag where nothing is to be thought."""


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class LocalReflector:
    """A `Reflect` that asks the model itself; conversations with one system turn share its cache.

    A conversation longer than `max_input_tokens` loses the middle of what follows its system turn, where the
    templates put the trajectories, and a mark stands for what is gone.

    Attributes:
      model: `.params` of the policy that reflects, `.config`, `.tokenizer`.
      key: one typed key, folded by the caller from seed, stream and iteration; a reply's own key is folded
        from it, a hash of its conversation and, among equal conversations of all calls, its number.
      sampling: how replies are drawn; `max_new_tokens` of each, the opening not counted. Without `stop_ids`
        the model's own end a reply.
      max_input_tokens: of each conversation; what the model's context leaves beside the reply by default.
      template_arguments: arguments of the chat template.
      capacity: what of the devices replies may take; `longest_problem` and `coarse` are its own.
    """

    model: Model
    key: jax.Array
    sampling: Sampling
    max_input_tokens: int | None = None
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    capacity: Capacity = Capacity()

    def __post_init__(self) -> None:
        self._arguments = dict(self.template_arguments)
        given = self.sampling.stop_ids
        self._stop_ids = stop_ids_of(self.model) if given is None else given
        self._mark = encode(self.model.tokenizer, CUT_MARK)
        self._asked: collections.Counter[int] = collections.Counter()

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        """One reply each, in order: the opening, if there was one, and what followed it, without thinking."""
        prompts = [self._render(messages) for messages in conversations]
        drawn = self._draw(conversations, prompts, None)
        texts = self.model.tokenizer.batch_decode(drawn, skip_special_tokens=True)
        replies = []
        for messages, prompt, text in zip(conversations, prompts, texts, strict=True):
            opening = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
            opened = not opening and prompt_opens_thinking(prompt)
            replies.append(strip_thinking(opening + text, opened))
        return replies

    def constrained(self, conversations: Sequence[Conversation], schemas: Sequence[Schema]) -> list[str]:
        """One reply each, in order: JSON under its conversation's schema, and nothing else.

        Nothing is thought either: where the chat template opens a thinking block, it is closed at once, and
        other models do not get to write the opening tag. Models that were trained for both answer better when
        `template_arguments` turn thinking off.

        Args:
          conversations: without openings.
          schemas: one each. Whatever they allow should fit into `max_new_tokens` tokens of one byte (see
            `evolution.schemas.most_bytes`), else a reply may be cut.

        Raises:
          ValueError: a conversation has an opening, or llguidance refuses the tokenizer or a schema.
        """
        if any(messages[-1]["role"] == "assistant" for messages in conversations):
            raise ValueError(
                "a conversation ends with an opening: under a schema the reply is JSON from its start"
            )
        closed = [self._without_thoughts(messages) for messages in conversations]
        drawn = self._draw(closed, [self._render(messages) for messages in closed], schemas)
        return self.model.tokenizer.batch_decode(
            drawn, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _render(self, messages: Conversation) -> str:
        return render(self.model.tokenizer, messages, **self._arguments)

    def _without_thoughts(self, messages: Conversation) -> Conversation:
        if prompt_opens_thinking(self._render(messages)):
            return [*messages, {"role": "assistant", "content": NO_THOUGHTS}]
        return messages

    def _draw(
        self,
        conversations: Sequence[Conversation],
        prompts: Sequence[str],
        schemas: Sequence[Schema] | None,
    ) -> list[list[int]]:
        """The tokens of each reply. `prompts` are the conversations as text."""
        by_system: dict[tuple[int, ...], list[int]] = {}
        rests, words = [], []
        for i, (messages, prompt) in enumerate(zip(conversations, prompts, strict=True)):
            system, rest = encode_conversation(self.model.tokenizer, messages, **self._arguments)
            by_system.setdefault(tuple(system), []).append(i)
            rests.append(self._fit(system, rest))
            word = stable_hash(prompt)
            words.append((word, self._asked[word]))
            self._asked[word] += 1
        drawn: list[list[int]] = [[] for _ in conversations]
        for system, members in by_system.items():
            replies = self._ask(
                system,
                [rests[i] for i in members],
                np.array([words[i] for i in members], np.uint32),
                None if schemas is None else [schemas[i] for i in members],
            )
            for i, reply in zip(members, replies, strict=True):
                drawn[i] = reply
        return drawn

    def _fit(self, system: list[int], rest: list[int]) -> list[int]:
        positions = self.model.config.max_positions
        limit = min(self.max_input_tokens or positions, positions - int(self.sampling.max_new_tokens))
        if len(system) + len(self._mark) >= limit:
            raise ValueError(
                f"reflection.max_input_tokens={limit} is filled by the {len(system)} tokens of the "
                "instructions alone; raise it, or lower reflection.max_new_tokens"
            )
        return cut_middle(rest, limit - len(system), self._mark)

    def _ask(
        self,
        system: tuple[int, ...],
        rests: list[list[int]],
        words: np.ndarray,
        schemas: list[Schema] | None,
    ) -> list[list[int]]:
        # Shapes stay few: the batch is filled up with rows that may draw nothing. One conversation alone, as
        # every revision is, takes the time of one.
        spare = bucket(len(rests), smallest=4) - len(rests) if len(rests) > 1 else 0
        words = np.pad(words, ((0, spare), (0, 0)))
        limits = np.array([self.sampling.max_new_tokens] * len(rests) + [0] * spare)
        model, constraint = self.model, None
        if schemas is not None:
            constraint = SchemaRows(
                model.tokenizer, schemas, stop_ids=self._stop_ids, vocab_size=model.config.vocab_size
            )
        samples = sample_tree(
            model.params,
            model.config,
            [system],
            [rests + [rests[0]] * spare],
            row_keys(self.key, *words.T[:, None, :, None]),
            dataclasses.replace(
                self.sampling, max_new_tokens=limits[None, :, None], stop_ids=tuple(self._stop_ids)
            ),
            # Conversations have all lengths, programs shall have few.
            dataclasses.replace(
                self.capacity, longest_problem=1 << (max(map(len, rests)) - 1).bit_length(), coarse=True
            ),
            constraint=constraint,
        )
        return [samples.tokens[0, i, 0, : samples.lengths[0, i, 0]].tolist() for i in range(len(rests))]


def local_reflector(model: Model, **settings: Any) -> LocalReflector:
    """A reflector that asks this model; the settings are `LocalReflector`'s."""
    return LocalReflector(model=model, **settings)
