"""Conversations as tokens: the prefix tree of a batch, and the lengths it can have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from espl_jax.environments.base import (
    Dialogue,
    Environment,
    checked_tools,
    checked_user_message,
)
from espl_jax.models.config import DecoderConfig
from espl_jax.text.chat import common_length, encode, encode_conversation, render
from espl_jax.text.tools import with_tools
from espl_jax.types import Conversation, Problem, SystemPrompt

_SOME_PROMPT = SystemPrompt("-")


class Model(Protocol):
    """What sampling needs of a model; `espl_jax.load_pretrained` returns one, which has `stop_ids` too."""

    @property
    def params(self) -> Any: ...

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def tokenizer(self) -> Any: ...


def stop_ids_of(model: Model) -> tuple[int, ...]:
    """Tokens that end a model's replies: its `stop_ids`, else its tokenizer's end of sequence."""
    return getattr(model, "stop_ids", (model.tokenizer.eos_token_id,))


def conversation(
    tokenizer: Any,
    prompt: SystemPrompt,
    problem: Problem,
    environment: Environment | Dialogue,
    chat_template_kwargs: Mapping[str, Any],
) -> tuple[Conversation, dict[str, Any]]:
    """The messages that a rollout begins with, and the chat template's arguments.

    An empty prompt has no system turn: the template's own default stands.
    """
    system = prompt.render()
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": checked_user_message(environment, problem)})
    return with_tools(tokenizer, messages, checked_tools(environment), **chat_template_kwargs)


def encode_tree(
    tokenizer: Any,
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    environment: Environment | Dialogue,
    chat_template_kwargs: Mapping[str, Any],
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[tuple[int, ...], ...], ...]]:
    """Tokens of the two shared levels: (M starts of conversations, M tuples of B rests)."""

    def encoded_conversation(prompt: SystemPrompt, problem: Problem) -> tuple[list[int], list[int]]:
        messages, kwargs = conversation(tokenizer, prompt, problem, environment, chat_template_kwargs)
        return encode_conversation(tokenizer, messages, **kwargs)

    encoded = [[encoded_conversation(prompt, problem) for problem in problems] for prompt in prompts]
    # Without an added token right before the problem, starts may differ within a slot: only what is common
    # is shared.
    shared = [min(common_length(slot[0][0], system) for system, _ in slot) for slot in encoded]
    systems = tuple(tuple(slot[0][0][:size]) for slot, size in zip(encoded, shared, strict=True))
    return systems, tuple(
        tuple((*system[size:], *rest) for system, rest in slot)
        for slot, size in zip(encoded, shared, strict=True)
    )


def longest_problem(
    tokenizer: Any,
    problems: Sequence[Problem],
    environment: Environment | Dialogue,
    chat_template_kwargs: Mapping[str, Any],
) -> int:
    """Tokens of the longest problem, so that all batches of a run share their programs.

    Only the 32 with the longest statements are looked at. A longer one among the others would do no harm: its
    batch compiles programs of its own.
    """
    prompts, candidates = [_SOME_PROMPT], _longest_statements(problems)
    _, (tokens,) = encode_tree(tokenizer, prompts, candidates, environment, chat_template_kwargs)
    return max(map(len, tokens))


def _longest_statements(problems: Sequence[Problem], count: int = 32) -> list[Problem]:
    return sorted(problems, key=lambda problem: len(problem.text))[-count:]


def longest_conversation(
    tokenizer: Any,
    problems: Sequence[Problem],
    environment: Environment | Dialogue,
    chat_template_kwargs: Mapping[str, Any],
    prompt: SystemPrompt = _SOME_PROMPT,
) -> int:
    """Tokens of the longest of the conversations that rollouts begin with, the system prompt's not counted;
    out of the candidates of `longest_problem`. Arguments as for `conversation_lengths`."""
    candidates = _longest_statements(problems)
    lengths = conversation_lengths(tokenizer, candidates, environment, chat_template_kwargs, prompt=prompt)
    return max(lengths.values())


def conversation_lengths(
    tokenizer: Any,
    problems: Sequence[Problem],
    environment: Environment | Dialogue,
    chat_template_kwargs: Mapping[str, Any],
    least: int = 0,
    prompt: SystemPrompt = _SOME_PROMPT,
) -> dict[str, int]:
    """Tokens of the conversations that rollouts begin with, the system prompt's not counted.

    Args:
      least: problems whose texts have too few bytes for as many tokens are left out: encoding thousands of
        problems takes seconds.
      prompt: any that is not empty gives the same lengths. An empty one leaves the system turn to the chat
        template, whose default counts.

    Returns:
      Tokens by the id of the problem.
    """
    prompt_tokens = len(encode(tokenizer, prompt.render()))

    def length(problem: Problem) -> int:
        messages, kwargs = conversation(tokenizer, prompt, problem, environment, chat_template_kwargs)
        return len(encode(tokenizer, render(tokenizer, messages, **kwargs))) - prompt_tokens

    # Its frame is that of all others, and a token stands for one byte at least.
    frame = length(problems[0])
    return {
        problem.id: length(problem)
        for problem in problems
        if frame + len(checked_user_message(environment, problem).encode()) >= least
    }
