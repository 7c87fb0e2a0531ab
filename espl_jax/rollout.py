"""Where the worlds meet: prompts and problems in, `Rollouts` out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from espl_jax import processes
from espl_jax.environments.base import (
    Dialogue,
    Environment,
    checked_grades,
    checked_tools,
    checked_user_message,
)
from espl_jax.models.config import DecoderConfig
from espl_jax.sampling.draw import row_keys
from espl_jax.sampling.generate import sample_tree
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation
from espl_jax.text.chat import common_length, encode, encode_conversation, render
from espl_jax.text.stop_strings import stop_finder, trim
from espl_jax.text.thinking import prompt_opens_thinking, strip_thinking
from espl_jax.text.tool_calls import tool_format_of
from espl_jax.text.tools import with_tools
from espl_jax.turns import Turns, as_text
from espl_jax.types import Conversation, Grade, Problem, Rollouts, SystemPrompt

_SOME_PROMPT = SystemPrompt("-")


class Model(Protocol):
    """What sampling needs of a model; `espl_jax.load_pretrained` returns one, which has `stop_ids` too."""

    params: Any
    config: DecoderConfig
    tokenizer: Any


def stop_ids_of(model: Model) -> tuple[int, ...]:
    """Tokens that end a model's replies: its `stop_ids`, else its tokenizer's end of sequence."""
    return getattr(model, "stop_ids", (model.tokenizer.eos_token_id,))


def stable_hash(text: str) -> int:
    """A 32-bit number that is the same in every process, to fold into random keys."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


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
        _rollout_keys(key, prompts, problems, group_size),
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


def _rollout_keys(
    key: jax.Array, prompts: Sequence[SystemPrompt], problems: Sequence[Problem], group_size: int
):
    """Key data [M, B, N, 2]. Copies of a prompt number their samples on."""
    seen: dict[str, int] = {}
    sample = np.zeros((len(prompts), 1, group_size), np.uint32)
    for i, prompt in enumerate(prompts):
        sample[i, 0] = seen.get(prompt.id, 0) * group_size + np.arange(group_size)
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
    prompt_words = np.array([stable_hash(prompt.id) for prompt in prompts], np.uint32)[:, None, None]
    problem_words = np.array([stable_hash(problem.id) for problem in problems], np.uint32)[None, :, None]
    attempt = turn = np.uint32(0)
    return row_keys(key, prompt_words, problem_words, sample, attempt, turn)


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


def records(rollouts: Rollouts) -> list[dict[str, Any]]:
    """One plain dict a rollout, for the work directory's JSON lines."""
    return [
        {
            "prompt": rollouts.prompts[m].id,
            "problem": rollouts.problems[b].id,
            "slot": m,
            "sample": n,
            "reward": rollouts.rewards[m, b, n],
            "success": rollouts.success[m, b, n],
            "truncated": rollouts.truncated[m, b, n],
            "answer": rollouts.answers[m][b][n],
            "reply": rollouts.replies[m][b][n],
            "environment": {name: values[m, b, n] for name, values in rollouts.metrics.items()},
            "tokens": rollouts.tokens[m, b, n, : rollouts.lengths[m, b, n]],
            "logprob": rollouts.logprobs[m, b, n].sum(dtype=np.float64),
        }
        for m, b, n in np.ndindex(*rollouts.rewards.shape)
    ]


def means(rollouts: Rollouts) -> dict[str, Any]:
    """Means over an iteration's rollouts, and how many (prompt, problem) groups had mixed rewards."""
    mixed = [
        rollouts.rewards[slots].max(axis=(0, 2)) > rollouts.rewards[slots].min(axis=(0, 2))
        for slots in rollouts.slots().values()
    ]
    environment = {name: values.mean(dtype=np.float64) for name, values in rollouts.metrics.items()}
    return {
        "reward": rollouts.rewards.mean(dtype=np.float64),
        "success": rollouts.success.mean(dtype=np.float64),
        "truncated": rollouts.truncated.mean(dtype=np.float64),
        "new_tokens": rollouts.drawn.sum(axis=-1).mean(dtype=np.float64),
        "mixed_groups": np.sum(mixed),
        "groups": np.size(mixed),
        **({"environment": environment} if environment else {}),
    }
