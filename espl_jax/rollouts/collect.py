"""Collects rollouts: samples replies for every prompt and problem, and grades them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from espl_jax.environments.base import (
    Dialogue,
    Environment,
    checked_grades,
    grades_early,
    is_dialogue,
)
from espl_jax.parallel import processes
from espl_jax.rollouts.encode import Model, encode_tree, stop_ids_of
from espl_jax.rollouts.keys import rollout_keys
from espl_jax.rollouts.turns import Turns, as_text
from espl_jax.sampling.generate import sample_tree
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.text.chat_format import ChatFormat
from espl_jax.text.replies import decode_reply
from espl_jax.text.stop_strings import stop_finder, trim
from espl_jax.text.thinking import prompt_opens_thinking, strip_thinking
from espl_jax.types import Conversation, Grade, Problem, Rollouts, SystemPrompt


def collect_rollouts(
    model: Model,
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    environment: Environment | Dialogue,
    *,
    key: jax.Array,
    group_size: int,
    sampling: Sampling,
    chat: ChatFormat = ChatFormat(),
    capacity: Capacity = Capacity(),
    past: Sequence[Sequence[np.ndarray]] | None = None,
) -> Rollouts:
    """Samples `group_size` rollouts of every prompt on every problem, and grades the replies.

    With a `Dialogue`, rollouts are conversations of several turns. With several processes, only the first one
    calls the environment's `respond`, `begin` and `grade`.

    Args:
      model: has `.params` (with or without adapters), `.config` and `.tokenizer`.
      prompts: M system prompts; copies of a prompt get different samples.
      problems: B problems.
      environment: formats the user turn and grades replies.
      key: one typed threefry key, which the caller derives from seed, stream and iteration. The ids of prompt
        and problem and the number of the sample are folded into it for each rollout.
      group_size: N.
      sampling: sampling distribution and limits; `max_new_tokens`, T, counts all turns together. If its
        `stop_ids` are None, the model's stop tokens end a turn (see `stop_ids_of`).
      chat: chat template arguments, stop strings, and the handling of thinking and tool calls.
      capacity: memory and devices that rows may use. Set its `longest_problem` to that of the whole run (see
        `encode.longest_problem`), so that all batches share compiled programs.
      past: tokens of earlier rollouts on each problem, in which drafts are looked up, the latest last.

    Returns:
      Rollouts, with arrays of shape [M, B, N, ...].
    """
    tokenizer, arguments = model.tokenizer, chat.template_arguments
    system_tokens, problem_tokens = encode_tree(tokenizer, prompts, problems, environment, arguments)
    context = sampling.context_limit or model.config.max_positions
    _check_room(prompts, problems, system_tokens, problem_tokens, context)
    stop_ids = stop_ids_of(model) if sampling.stop_ids is None else sampling.stop_ids
    sampling = dataclasses.replace(sampling, stop_ids=stop_ids)
    opened = prompt_opens_thinking(tokenizer.decode(problem_tokens[0][0][-8:]))
    turns = None
    if is_dialogue(environment):
        turns = Turns(environment, problems, tokenizer, chat, stop_ids=stop_ids, opened=opened)

    def reply(place: tuple[int, int, int], tokens: np.ndarray) -> str | Conversation:
        """Returns what the environment grades: the visible text, or the conversation of a dialogue."""
        if turns:
            return turns.transcript(place, tokens)
        text = decode_reply(tokenizer, tokens, opened)
        if chat.stop_strings:
            text = trim(text, chat.stop_strings)
        return text if chat.show_thinking else strip_thinking(text, opened)

    begun, finished = {}, None
    if grades_early(environment):

        def begin(place: tuple[int, int, int], tokens: np.ndarray) -> None:
            if processes.is_first():
                begun[place] = reply(place, tokens)
                environment.begin(problems[place[1]], begun[place])

        finished = begin

    samples = sample_tree(
        model.params,
        model.config,
        system_tokens,
        problem_tokens,
        rollout_keys(key, prompts, problems, group_size),
        sampling,
        capacity,
        find_end=stop_finder(tokenizer, chat.stop_strings) if chat.stop_strings else None,
        respond=turns and turns.respond,
        finished=finished,
        past=past,
    )
    shape = samples.lengths.shape

    def graded() -> tuple[list[str], list[Grade]]:
        places = list(np.ndindex(*shape))
        replies = [
            begun[place] if place in begun else reply(place, samples.tokens[place][: samples.lengths[place]])
            for place in places
        ]
        grades = checked_grades(environment, [problems[b] for _, b, _ in places], replies)
        return [each if isinstance(each, str) else as_text(each) for each in replies], grades

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
        routing=samples.routing,
        temperature=sampling.temperature,
        replies=_nested(texts, shape),
        answers=_nested([grade.answer for grade in grades], shape),
        rewards=np.array([grade.reward for grade in grades], np.float32).reshape(shape),
        success=np.array([grade.success for grade in grades], bool).reshape(shape),
        metrics={
            name: np.array([grade.metrics.get(name, 0.0) for grade in grades], np.float32).reshape(shape)
            for name in dict.fromkeys(name for grade in grades for name in grade.metrics)
        },
        feedback=_nested(
            [
                _feedback(grade, bool(samples.truncated[place]), int(samples.lengths[place]))
                for place, grade in zip(np.ndindex(*shape), grades, strict=True)
            ],
            shape,
        ),
    )


def _feedback(grade: Grade, truncated: bool, length: int) -> str:
    """Returns what the environment said, and for a failed rollout that a limit ended it."""
    cut_off = f"The reply was cut off by the token limit, after {length} tokens."
    return " ".join(filter(None, (grade.feedback, cut_off if truncated and not grade.success else "")))


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
    """Raises ValueError, naming the first problem whose prompt leaves no room for an answer."""
    for prompt, system, lane in zip(prompts, system_tokens, problem_tokens, strict=True):
        for problem, tokens in zip(problems, lane, strict=True):
            if (count := len(system) + len(tokens)) >= context:
                raise ValueError(
                    f"problem {problem.id} with prompt {prompt.id}: a prompt of {count} tokens leaves no "
                    f"room in a context of {context}; leave the problem out, shorten one of the two, or "
                    "raise context_limit, at most to the model's max_positions"
                )
