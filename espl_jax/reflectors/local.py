"""Reflection on device, by the reference or the current policy, through the same sampler as rollouts."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from espl_jax.rollout import Model, stable_hash, stop_ids_of
from espl_jax.sampling.buckets import bucket
from espl_jax.sampling.draw import row_keys
from espl_jax.sampling.generate import sample_tree
from espl_jax.text.chat import cut_middle, encode, encode_conversation, render
from espl_jax.text.thinking import prompt_opens_thinking, strip_thinking
from espl_jax.types import Conversation, Reflect

CUT_MARK = "\n[... cut ...]\n"


def local_reflector(
    model: Model,
    *,
    key: jax.Array,
    max_new_tokens: int,
    temperature: float,
    max_input_tokens: int | None = None,
    stop_ids: Sequence[int] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    held_bytes: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Reflect:
    """A `reflect` that asks the model itself; conversations with one system turn share its cache.

    A conversation longer than `max_input_tokens` loses the middle of what follows its system turn, where the
    templates put the trajectories, and a mark stands for what is gone.

    Args:
      model: `.params` of the policy that reflects, `.config`, `.tokenizer`.
      key: one typed key, folded by the caller from seed, stream and iteration; a reply's own key is folded
        from it, a hash of its conversation and, among equal conversations, its number.
      max_new_tokens: of each reply, the opening not counted.
      temperature: 0 for greedy.
      max_input_tokens: of each conversation; what the model's context leaves beside the reply by default.
      stop_ids: tokens that end a reply; the model's own by default.
      chat_template_kwargs: passed to the chat template.
      max_rows: most replies in flight at once; as many as fit into memory by default.
      held_bytes: memory of each device that stays taken; that of the params by default.
      mesh: shard rows over its data axes.

    Returns:
      Conversations in, one reply each out, in order: the opening, if there was one, and what followed it,
      without thinking blocks.
    """
    tokenizer = model.tokenizer
    kwargs = dict(chat_template_kwargs or {})
    limit = min(max_input_tokens or model.config.max_positions, model.config.max_positions - max_new_tokens)
    mark = encode(tokenizer, CUT_MARK)

    def fit(system: list[int], rest: list[int]) -> list[int]:
        if len(system) + len(mark) >= limit:
            raise ValueError(
                f"reflection.max_input_tokens={limit} is filled by the {len(system)} tokens of the "
                "instructions alone; raise it, or lower reflection.max_new_tokens"
            )
        return cut_middle(rest, limit - len(system), mark)

    def ask(system: tuple[int, ...], rests: list[list[int]], words: np.ndarray) -> list[list[int]]:
        # Shapes stay few: the batch is filled up with rows that may draw nothing.
        spare = bucket(len(rests), smallest=4) - len(rests)
        words = np.pad(words, ((0, spare), (0, 0)))
        limits = np.array([max_new_tokens] * len(rests) + [0] * spare)
        samples = sample_tree(
            model.params,
            model.config,
            [system],
            [rests + [rests[0]] * spare],
            row_keys(key, *words.T[:, None, :, None]),
            max_new_tokens=limits[None, :, None],
            temperature=temperature,
            stop_ids=stop_ids_of(model) if stop_ids is None else stop_ids,
            max_rows=max_rows,
            # Conversations have all lengths, programs shall have few.
            longest_problem=1 << (max(map(len, rests)) - 1).bit_length(),
            held_bytes=held_bytes,
            mesh=mesh,
        )
        return [samples.tokens[0, i, 0, : samples.lengths[0, i, 0]].tolist() for i in range(len(rests))]

    def reflect(conversations: Sequence[Conversation]) -> list[str]:
        seen: collections.Counter[int] = collections.Counter()
        by_system: dict[tuple[int, ...], list[int]] = {}
        rests, words = [], []
        for i, messages in enumerate(conversations):
            system, rest = encode_conversation(tokenizer, messages, **kwargs)
            by_system.setdefault(tuple(system), []).append(i)
            rests.append(fit(system, rest))
            word = stable_hash(render(tokenizer, messages, **kwargs))
            words.append((word, seen[word]))
            seen[word] += 1
        replies = [""] * len(conversations)
        for system, members in by_system.items():
            drawn = ask(system, [rests[i] for i in members], np.array([words[i] for i in members], np.uint32))
            for i, text in zip(members, tokenizer.batch_decode(drawn, skip_special_tokens=True), strict=True):
                last = conversations[i][-1]
                opening = last["content"] if last["role"] == "assistant" else ""
                opened = not opening and prompt_opens_thinking(tokenizer.decode(rests[i][-8:]))
                replies[i] = strip_thinking(opening + text, opened)
        return replies

    return reflect
