"""Where the worlds meet: prompts and problems in, `Rollouts` out, and `Rollouts` into a `TrainBatch`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from espl_jax.environments.base import Environment
from espl_jax.models.config import DecoderConfig
from espl_jax.sampling.buckets import bucket, pad_right
from espl_jax.sampling.draw import row_keys
from espl_jax.sampling.generate import sample_tree
from espl_jax.text.chat import common_length, encode_conversation
from espl_jax.text.thinking import prompt_opens_thinking, strip_thinking
from espl_jax.types import Conversation, Problem, Rollouts, SystemPrompt, TrainBatch


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


def conversation(prompt: SystemPrompt, problem: Problem, environment: Environment) -> Conversation:
    """The messages of one rollout. An empty prompt has no system turn: the template's own default stands."""
    system = prompt.render()
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": environment.user_message(problem)}]


def encode_tree(
    tokenizer: Any,
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    environment: Environment,
    chat_template_kwargs: Mapping[str, Any],
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[tuple[int, ...], ...], ...]]:
    """Tokens of the two shared levels: (M starts of conversations, M tuples of B rests)."""
    encoded = [
        [
            encode_conversation(tokenizer, conversation(prompt, problem, environment), **chat_template_kwargs)
            for problem in problems
        ]
        for prompt in prompts
    ]
    # Without an added token right before the problem, starts may differ within a slot: only what is common
    # is shared.
    shared = [min(common_length(slot[0][0], system) for system, _ in slot) for slot in encoded]
    systems = tuple(tuple(slot[0][0][:size]) for slot, size in zip(encoded, shared, strict=True))
    return systems, tuple(
        tuple((*system[size:], *rest) for system, rest in slot)
        for slot, size in zip(encoded, shared, strict=True)
    )


def collect_rollouts(
    model: Model,
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    environment: Environment,
    *,
    key: jax.Array,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    show_thinking: bool = False,
    max_rows: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Rollouts:
    """Runs every prompt on every problem, `group_size` times, and grades the replies.

    Args:
      model: `.params` (adapters attached or not), `.config`, `.tokenizer`.
      prompts: M system prompts; one that appears several times draws different rollouts each time.
      problems: B problems.
      environment: words the user turn and grades.
      key: one typed threefry key, folded by the caller from seed, stream and iteration. Each rollout's own
        key is folded from it, the ids of prompt and problem and the number of the sample.
      group_size: N.
      max_new_tokens: T.
      temperature: 0 for greedy.
      stop_ids: tokens that end a reply; by default the model's own, see `stop_ids_of`.
      chat_template_kwargs: passed to the chat template.
      show_thinking: let grader and reflection see thinking blocks too.
      max_rows: most rollouts of one prompt in flight at once.
      mesh: shard rows over its data axes.

    Returns:
      Rollouts, shapes [M, B, N, ...].
    """
    tokenizer = model.tokenizer
    system_tokens, problem_tokens = encode_tree(
        tokenizer, prompts, problems, environment, chat_template_kwargs or {}
    )
    samples = sample_tree(
        model.params,
        model.config,
        system_tokens,
        problem_tokens,
        _rollout_keys(key, prompts, problems, group_size),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=stop_ids_of(model) if stop_ids is None else stop_ids,
        max_rows=max_rows,
        mesh=mesh,
    )
    shape = samples.lengths.shape
    opened = prompt_opens_thinking(tokenizer.decode(problem_tokens[0][0][-8:]))
    texts = tokenizer.batch_decode(
        [
            tokens[:n]
            for tokens, n in zip(
                samples.tokens.reshape(-1, max_new_tokens), samples.lengths.flat, strict=True
            )
        ],
        skip_special_tokens=True,
    )
    if not show_thinking:
        texts = [strip_thinking(text, opened) for text in texts]
    asked = [problems[b] for _, b, _ in np.ndindex(*shape)]
    grades = environment.grade(asked, texts)
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
        replies=_nested(texts, shape),
        answers=_nested([grade.answer for grade in grades], shape),
        rewards=np.array([grade.reward for grade in grades], np.float32).reshape(shape),
        success=np.array([grade.success for grade in grades], bool).reshape(shape),
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


def prompt_numbers(rollouts: Rollouts) -> np.ndarray:
    """int32 [M], equal for slots that hold copies of one prompt; for `advantages(prompt_ids=...)`."""
    ids = list(rollouts.slots())
    return np.array([ids.index(prompt.id) for prompt in rollouts.prompts], np.int32)


def train_batch(
    rollouts: Rollouts, advantages: np.ndarray, groups_multiple: int = 1, every_group: bool = False
) -> TrainBatch | None:
    """The tree of one policy-gradient step, padded to few static shapes.

    Groups without a gradient are left out: in each slot the others move up, and P is the largest number that
    any slot still has, rounded up.

    Args:
      rollouts: the iteration's.
      advantages: float32 [M, B, N].
      groups_multiple: P is a multiple of it.
      every_group: keep groups without an advantage too, for losses that have a gradient there (KL).

    Returns:
      The batch, or None if no group has a gradient.
    """
    slots, problems, group = advantages.shape
    useful = [np.flatnonzero(np.any(advantages[i] != 0, axis=1) | every_group) for i in range(slots)]
    if not any(len(chosen) for chosen in useful):
        return None
    count = problems
    while (count + 1) // 2 >= max(map(len, useful)) and count > 1:
        count = (count + 1) // 2
    count = -(-count // groups_multiple) * groups_multiple

    # Places without a group hold the slot's first problem, under an empty mask.
    pick = np.zeros((slots, count), np.int64)
    filled = np.zeros((slots, count), bool)
    for i, chosen in enumerate(useful):
        pick[i, : len(chosen)], filled[i, : len(chosen)] = chosen, True
    lane = np.arange(slots)[:, None]
    width = bucket(int((rollouts.lengths[lane, pick] * filled[:, :, None]).max()), smallest=16)
    flat = [rollouts.problem_tokens[i][b] for i in range(slots) for b in pick[i]]
    system_tokens, system_lengths = pad_right(rollouts.system_tokens)
    longest = max(len(tokens) for slot in rollouts.problem_tokens for tokens in slot)
    problem_tokens, problem_lengths = pad_right([tokens[:-1] for tokens in flat], bucket(longest - 1))

    def columns(x: np.ndarray) -> np.ndarray:
        x = x[lane, pick][..., :width]
        return np.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])

    targets = columns(rollouts.tokens)
    last = np.array([tokens[-1] for tokens in flat], np.int32).reshape(slots, count, 1, 1)
    first = np.broadcast_to(last, (slots, count, group, 1))
    mask = np.arange(width) < rollouts.lengths[lane, pick][..., None]
    return TrainBatch(
        system_tokens=system_tokens,
        system_lengths=system_lengths,
        problem_tokens=problem_tokens.reshape(slots, count, -1),
        problem_lengths=problem_lengths.reshape(slots, count),
        inputs=np.concatenate([first, targets[..., :-1]], axis=-1),
        targets=targets,
        mask=mask & filled[:, :, None, None],
        sampler_logprobs=columns(rollouts.untruncated_logprobs),
        advantages=np.asarray(advantages[lane, pick] * filled[:, :, None], np.float32),
        num_rollouts=np.float32(slots * problems * group),
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
    return {
        "reward": rollouts.rewards.mean(dtype=np.float64),
        "success": rollouts.success.mean(dtype=np.float64),
        "truncated": rollouts.truncated.mean(dtype=np.float64),
        "new_tokens": rollouts.lengths.mean(dtype=np.float64),
        "mixed_groups": np.sum(mixed),
        "groups": np.size(mixed),
    }
