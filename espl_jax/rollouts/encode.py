"""Encodes conversations as tokens: the prefix tree of a batch, and the longest lengths of a run."""

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
    """A model to sample from. `espl_jax.load_pretrained` returns one that has `stop_ids` as well."""

    @property
    def params(self) -> Any: ...

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def tokenizer(self) -> Any: ...


def stop_ids_of(model: Model) -> tuple[int, ...]:
    """Returns the tokens that end a reply: the model's `stop_ids`, else its tokenizer's EOS token."""
    return getattr(model, "stop_ids", (model.tokenizer.eos_token_id,))


def conversation(
    tokenizer: Any,
    prompt: SystemPrompt,
    problem: Problem,
    environment: Environment | Dialogue,
    chat_template_kwargs: Mapping[str, Any],
) -> tuple[Conversation, dict[str, Any]]:
    """Returns the messages that a rollout starts with, and the arguments of the chat template.

    An empty prompt adds no system turn, so the template's default system prompt applies.
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
    """Returns the tokens of the two shared levels: M common prefixes, and M tuples of B remainders."""

    def encoded_conversation(prompt: SystemPrompt, problem: Problem) -> tuple[list[int], list[int]]:
        messages, kwargs = conversation(tokenizer, prompt, problem, environment, chat_template_kwargs)
        return encode_conversation(tokenizer, messages, **kwargs)

    encoded = [[encoded_conversation(prompt, problem) for problem in problems] for prompt in prompts]
    # If the template has no special token right before the problem, prefixes may tokenize differently for
    # different problems: share only the common tokens.
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
    """Returns the tokens of the longest problem, so that all batches of a run share compiled programs.

    Only the 32 problems with the longest text are encoded. If another one has more tokens, its batch compiles
    additional programs.
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
    """Returns the tokens of the longest conversation that a rollout starts with, without the system prompt.

    Only the candidates of `longest_problem` are encoded. Arguments as for `conversation_lengths`.
    """
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
    """Counts the tokens of the conversations that rollouts start with, without the system prompt.

    Args:
      tokenizer: the model's, with a chat template.
      problems: at least one.
      environment: formats the user turn.
      chat_template_kwargs: arguments of the chat template.
      least: skips problems whose text has too few bytes to reach this many tokens, since encoding thousands
        of problems takes seconds.
      prompt: every non-empty prompt gives the same lengths. With an empty one, the system turn is the chat
        template's default, which counts.

    Returns:
      Tokens by problem id.
    """
    prompt_tokens = len(encode(tokenizer, prompt.render()))

    def length(problem: Problem) -> int:
        messages, kwargs = conversation(tokenizer, prompt, problem, environment, chat_template_kwargs)
        return len(encode(tokenizer, render(tokenizer, messages, **kwargs))) - prompt_tokens

    # The first problem bounds the template's overhead, and a token covers at least one byte.
    frame = length(problems[0])
    return {
        problem.id: length(problem)
        for problem in problems
        if frame + len(checked_user_message(environment, problem).encode()) >= least
    }
