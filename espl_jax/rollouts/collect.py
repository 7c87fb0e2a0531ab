"""Where the worlds meet: prompts and problems in, `Rollouts` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from espl_jax.environments.base import (
    Dialogue,
    Environment,
    checked_grades,
)
from espl_jax.parallel import processes
from espl_jax.rollouts.encode import Model, encode_tree, stop_ids_of
from espl_jax.rollouts.keys import rollout_keys
from espl_jax.rollouts.turns import Turns, as_text
from espl_jax.sampling.generate import sample_tree
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation
from espl_jax.text.stop_strings import stop_finder, trim
from espl_jax.text.thinking import prompt_opens_thinking, strip_thinking
from espl_jax.text.tool_calls import tool_format_of
from espl_jax.types import Conversation, Grade, Problem, Rollouts, SystemPrompt


def collect_rollouts(
    model: Model,
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    environment: Environment | Dialogue,
    *,
    key: jax.Array,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    truncation: Truncation = UNTRUNCATED,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    context_limit: int | None = None,
    longest_problem: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    show_thinking: bool = False,
    tool_format: str = "auto",
    max_rows: int | None = None,
    held_bytes: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Rollouts:
    """Runs every prompt on every problem, `group_size` times, and grades the replies.

    A `Dialogue` makes conversations of several turns. Of several processes the first one alone calls the
    methods of the environment that answer and grade.

    Args:
      model: `.params` (adapters attached or not), `.config`, `.tokenizer`.
      prompts: M system prompts; one that appears several times draws different rollouts each time.
      problems: B problems.
      environment: words the user turn and grades.
      key: one typed threefry key, folded by the caller from seed, stream and iteration. Each rollout's own
        key is folded from it, the ids of prompt and problem and the number of the sample.
      group_size: N.
      max_new_tokens: T, of all turns together, what was said to the model between them included.
      temperature: 0 for greedy.
      truncation: top-k, top-p and min-p.
      stop_ids: tokens that end a turn; by default the model's own, see `stop_ids_of`.
      stop_strings: texts that end a turn, too.
      context_limit: most tokens of a conversation; by default what the model was made for.
      longest_problem: tokens of the longest problem that this and later calls bring, see `longest_problem`.
      chat_template_kwargs: passed to the chat template.
      show_thinking: let grader and reflection see thinking blocks too.
      tool_format: how the model calls tools, one of `text.tool_calls.FORMATS`, or `auto` for what its chat
        template shows.
      max_rows: M times as many rollouts are in flight at once; as many as fit into memory by default.
      held_bytes: memory of each device that stays taken; that of the params by default.
      mesh: shard rows over its data axes.

    Returns:
      Rollouts, shapes [M, B, N, ...].
    """
    tokenizer, kwargs = model.tokenizer, chat_template_kwargs or {}
    system_tokens, problem_tokens = encode_tree(tokenizer, prompts, problems, environment, kwargs)
    _check_room(prompts, problems, system_tokens, problem_tokens, context_limit or model.config.max_positions)
    stop_ids = stop_ids_of(model) if stop_ids is None else stop_ids
    opened = prompt_opens_thinking(tokenizer.decode(problem_tokens[0][0][-8:]))
    turns = None
    if hasattr(environment, "respond"):
        turns = Turns(
            environment,
            problems,
            tokenizer,
            tool_format=tool_format_of(tokenizer) if tool_format == "auto" else tool_format,
            stop_ids=stop_ids,
            opened=opened,
            show_thinking=show_thinking,
            chat_template_kwargs=kwargs,
        )

    def reply(place: tuple[int, int, int], tokens: np.ndarray) -> str | Conversation:
        """What the environment grades."""
        if turns:
            return turns.transcript(place, tokens)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if stop_strings:
            text = trim(text, stop_strings)
        return text if show_thinking else strip_thinking(text, opened)

    begun = {}

    def begin(place: tuple[int, int, int], tokens: np.ndarray) -> None:
        if processes.is_first():
            begun[place] = reply(place, tokens)
            environment.begin(problems[place[1]], begun[place])

    samples = sample_tree(
        model.params,
        model.config,
        system_tokens,
        problem_tokens,
        rollout_keys(key, prompts, problems, group_size),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        truncation=truncation,
        stop_ids=stop_ids,
        find_end=stop_finder(tokenizer, stop_strings) if stop_strings else None,
        respond=turns and turns.respond,
        finished=begin if hasattr(environment, "begin") else None,
        context_limit=context_limit,
        longest_problem=longest_problem,
        max_rows=max_rows,
        held_bytes=held_bytes,
        mesh=mesh,
    )
    shape = samples.lengths.shape

    def graded() -> tuple[list[str], list[Grade]]:
        places = list(np.ndindex(*shape))
        replies = [
            begun[place] if place in begun else reply(place, samples.tokens[place][: samples.lengths[place]])
            for place in places
        ]
        grades = checked_grades(environment, [problems[b] for _, b, _ in places], replies)
        return [as_text(each) if turns else each for each in replies], grades

    texts, grades = processes.decide(graded)
    return Rollouts(
        prompts=tuple(prompts),
        problems=tuple(problems),
        system_tokens=system_tokens,
        problem_tokens=problem_tokens,
        tokens=samples.tokens,
        lengths=samples.lengths,
        logprobs=samples.logprobs,
        untruncated_logprobs=samples.untruncated_logprobs,
        truncated=samples.truncated,
        cutoffs=samples.cutoffs,
        drawn=samples.drawn,
        temperature=temperature,
        replies=_nested(texts, shape),
        answers=_nested([grade.answer for grade in grades], shape),
        rewards=np.array([grade.reward for grade in grades], np.float32).reshape(shape),
        success=np.array([grade.success for grade in grades], bool).reshape(shape),
        metrics={
            name: np.array([grade.metrics.get(name, 0.0) for grade in grades], np.float32).reshape(shape)
            for name in dict.fromkeys(name for grade in grades for name in grade.metrics)
        },
    )


def _nested(values: Sequence[Any], shape: tuple[int, int, int]) -> tuple[tuple[tuple[Any, ...], ...], ...]:
    m, b, n = shape
    rows = iter(values)
    return tuple(tuple(tuple(next(rows) for _ in range(n)) for _ in range(b)) for _ in range(m))


def _check_room(
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    system_tokens: Sequence[Sequence[int]],
    problem_tokens: Sequence[Sequence[Sequence[int]]],
    context: int,
) -> None:
    """Raises ValueError, naming the first problem that leaves no room for an answer."""
    for prompt, system, lane in zip(prompts, system_tokens, problem_tokens, strict=True):
        for problem, tokens in zip(problems, lane, strict=True):
            if (count := len(system) + len(tokens)) >= context:
                raise ValueError(
                    f"problem {problem.id} with prompt {prompt.id}: a prompt of {count} tokens leaves no "
                    f"room in a context of {context}; leave the problem out, shorten one of the two, or "
                    "raise context_limit up to what the model was made for"
                )
