"""Checks that system prompt, problem and at least one new token fit into the context."""

from __future__ import annotations

import dataclasses
import functools
import json

from espl_jax.data.problems import ProblemSet
from espl_jax.environments.base import Dialogue, Environment
from espl_jax.evolution.population import Population
from espl_jax.models.config import DecoderConfig
from espl_jax.pretrained.load import Pretrained
from espl_jax.rollouts.encode import conversation_lengths, longest_conversation
from espl_jax.run.config import Config
from espl_jax.run.tasks import check_batch
from espl_jax.text.chat import encode
from espl_jax.types import SystemPrompt


def context_of(config: Config, decoder: DecoderConfig) -> int:
    """Returns the context length of the run: the largest number of tokens of a conversation.

    Raises:
      ValueError: if sampling.context_limit exceeds the context length of the model.
    """
    limit, most = config.sampling.context_limit, decoder.max_positions
    if limit > most:
        raise ValueError(
            f"sampling.context_limit={limit}: the model supports {most} tokens; give at most that, or 0"
        )
    return limit or most


def fitting(
    config: Config, splits: dict[str, ProblemSet], model: Pretrained, environment: Environment | Dialogue
) -> tuple[dict[str, ProblemSet], dict[str, tuple[str, ...]]]:
    """Returns the problems that leave room for an answer under any system prompt that evolution allows.

    Returns:
      (splits, ids of the dropped problems by split).

    Raises:
      ValueError: if some are too long and `data.too_long` is "refuse", or if no problem would be left.
    """
    context = context_of(config, model.config)
    root = SystemPrompt(config.population.text, tuple(config.population.principles))
    allowance = len(encode(model.tokenizer, root.render()))
    if config.mode != "rl":
        allowance = max(allowance, least_budget(config, context))
    kwargs, room = json.loads(config.model.chat_template_kwargs), context - allowance
    kept, left_out = dict(splits), {}
    for name, split in splits.items():
        measured = functools.partial(
            conversation_lengths, model.tokenizer, split.problems, environment, kwargs
        )
        lengths = {id: length + allowance for id, length in measured(least=room).items()}
        if not root.render():  # the template may add a default system turn
            blank = measured(least=context, prompt=root)
            lengths |= {id: max(length, lengths.get(id, 0)) for id, length in blank.items()}
        long = {
            problem.id: lengths[problem.id]
            for problem in split.problems
            if lengths.get(problem.id, 0) >= context
        }
        if not long:
            continue
        named = ", ".join(list(long)[:10]) + (f" and {len(long) - 10} more" if len(long) > 10 else "")
        said = (
            f"data.{name}={config.data[name]!r}: {len(long)} of {len(split)} problems are too long ({named})"
        )
        if config.data.too_long == "refuse" or len(long) == len(split):
            raise ValueError(
                f"{said}: with a system prompt of up to {allowance} tokens, the longest prompt has "
                f"{max(long.values())} tokens, which leaves no room in a context of {context}; raise "
                f"sampling.context_limit (the model supports {model.config.max_positions}), lower "
                "evolution.max_prompt_tokens, or drop these problems with --config.data.too_long=drop"
            )
        rest = tuple(problem for problem in split.problems if problem.id not in long)
        kept[name], left_out[name] = dataclasses.replace(split, problems=rest), tuple(long)
    check_batch(config, kept["train"])
    return kept, left_out


def check_first_prompts(
    population: Population,
    config: Config,
    splits: dict[str, ProblemSet],
    model: Pretrained,
    environment: Environment | Dialogue,
) -> None:
    """Raises ValueError if the longest problem does not fit into the context with an initial prompt."""
    kwargs = json.loads(config.model.chat_template_kwargs)
    problems = [problem for split in splits.values() for problem in split.problems]
    measured = functools.partial(longest_conversation, model.tokenizer, problems, environment, kwargs)
    longest = measured()
    context = context_of(config, model.config)
    for member in population.members:
        text = member.render()
        count = len(encode(model.tokenizer, text)) + longest if text else measured(prompt=member)
        if count >= context:
            raise ValueError(
                f"population.start_from={config.population.start_from!r}: system prompt {member.id} and "
                f"the longest problem have {count} tokens, but the context is {context}; shorten the prompt, "
                "or raise sampling.context_limit"
            )


def least_budget(config: Config, context: int) -> int:
    """Returns the tokens that a system prompt may always use, however long problems and rollouts are."""
    return min(config.evolution.max_prompt_tokens, context // 4)
