"""Sampling a prefix tree: the loop around the decode chunks, and what is said to rows between their turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from espl_jax.models.config import DecoderConfig
from espl_jax.models.layers import check_ids
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.sampling import draw
from espl_jax.sampling.answers import Answers, Place, Respond
from espl_jax.sampling.constraint import Constraint
from espl_jax.sampling.layout import for_sampling
from espl_jax.sampling.scheduler import Scheduler
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.sampling.sizes import choose_sizes
from espl_jax.sampling.truncation import Truncation

FindEnd = Callable[[np.ndarray, int], int | None]
"""Tokens of a turn, and how many of them were looked at before; how many to keep if the turn ends there."""

Finished = Callable[[Place, np.ndarray], None]
"""A row's place and all its tokens, when nothing more comes to it."""


class Samples(NamedTuple):
    """New tokens of every row. Leading axes [M, B, N] for a tree of prompts, [P, N] for a plain list.

    Attributes:
      tokens: int32 [..., T], zero past the length.
      lengths: int32 [...], stop token and appended tokens included.
      logprobs: float32 [..., T], under the distribution drawn from (zero when greedy: it has one outcome);
        zero where nothing was drawn.
      untruncated_logprobs: float32 [..., T], under softmax(logits / temperature); when greedy,
        softmax(logits).
      truncated: bool [...], ended by a limit and not by itself.
      cutoffs: float32 [..., T], untruncated logprob below which nothing could be drawn; -inf where nothing
        was cut.
      drawn: bool [..., T], tokens that the model drew; those that `respond` appended are none.
      row_steps: decode steps times the rows in them, idle ones included; one number for all.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    untruncated_logprobs: np.ndarray
    truncated: np.ndarray
    cutoffs: np.ndarray
    drawn: np.ndarray
    row_steps: int


def generate(
    params: Any,
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]],
    *,
    key: jax.Array,
    group_size: int = 4,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] = (),
) -> Samples:
    """Samples `group_size` continuations of every prompt; tokens that prompts share are run once.

    Args:
      params: with adapters or not.
      config: the decoder.
      prompts: P token lists, or M lists of B token lists each that begin with the same system prompt. The
        longest common start of the P (of each of the M) is run once.
      key: one typed key; row (m, b, n) draws with m, b and n folded in, so the layout does not matter.
      group_size: N.
      max_new_tokens: T.
      temperature: 0 takes the most likely token.
      top_p, top_k, min_p: see `Truncation`.
      stop_ids: token ids that end a row.

    Returns:
      Samples with leading axes [P, N] or [M, B, N].

    Raises:
      ValueError: for empty prompts, unequal B, options out of range, or ids outside the vocabulary.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        truncation=Truncation(top_k, top_p, min_p),
        stop_ids=tuple(stop_ids),
    )
    flat = bool(prompts) and all(isinstance(token, int | np.integer) for token in prompts[0])
    lanes = cast(Sequence[Sequence[Sequence[int]]], [prompts] if flat else prompts)
    if (
        not lanes
        or len({len(lane) for lane in lanes}) != 1
        or not all(len(p) for lane in lanes for p in lane)
    ):
        raise ValueError(
            "prompts: give at least one non-empty token list, and equally many for every system prompt"
        )
    check_ids("prompts", np.concatenate([prompt for lane in lanes for prompt in lane]), config)
    shared = [_common_start(lane) for lane in lanes]
    m, b, n = np.ogrid[: len(lanes), : len(lanes[0]), :group_size]
    samples = sample_tree(
        params,
        config,
        [lane[0][:size] for lane, size in zip(lanes, shared, strict=True)],
        [[prompt[size:] for prompt in lane] for lane, size in zip(lanes, shared, strict=True)],
        draw.row_keys(key, m, b, n),
        sampling,
    )
    return Samples._make((*(x[0] for x in samples[:-1]), samples.row_steps)) if flat else samples


def _common_start(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts share, leaving each at least one of its own."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    same = [len(set(column)) == 1 for column in zip(*(prompt[:shortest] for prompt in prompts), strict=True)]
    return same.index(False) if False in same else shortest


def sample_tree(
    params: Any,
    config: DecoderConfig,
    system_tokens: Sequence[Sequence[int]],
    problem_tokens: Sequence[Sequence[Sequence[int]]],
    keys: jax.Array,
    sampling: Sampling,
    capacity: Capacity = Capacity(),
    *,
    find_end: FindEnd | None = None,
    respond: Respond | None = None,
    finished: Finished | None = None,
    constraint: Constraint | None = None,
) -> Samples:
    """Samples the third level of the tree under its first two.

    Rows run in slots that are reserved once, or, where memory does not hold all of them at their longest, in
    stages of fewer and longer slots. A row that ends makes room for the next one of the queue, whatever its
    system prompt; when the queue is empty, the rows that are left move together and chunks get narrower.

    Args:
      params: with adapters or not.
      config: the decoder.
      system_tokens: M lists, the start of every prompt of a lane; may be empty.
      problem_tokens: M lists of B lists, the rest of each prompt, at least one token.
      keys: uint32 [M, B, N, 2], as `row_keys` makes them.
      sampling: how tokens are drawn, and where rows end.
      capacity: what of the devices rows may take.
      find_end: ends turns by what they say, after each chunk; tokens past the end are taken back.
      respond: what is said to a row whose turn ended by itself, see `Respond`; without it every turn is the
        last. A row that waits for long makes room for others, and is prefilled anew in another slot. When an
        answer does not fit into the row's limit, the row ends truncated. Results are the same bits whenever
        futures are done within `answers.GRACE`; later ones change which rows share a chunk, and so rounding.
      finished: told of each row that is done, while others go on.
      constraint: decides on the host, before every token, what it may be; see `Constraint`. Chunks then have
        one step, and logprobs are those among the allowed tokens.

    Returns:
      Samples, leading axes [M, B, N], T = the largest of max_new_tokens.

    Raises:
      ValueError: if an argument is out of range, an id is not in the vocabulary, a prompt leaves no room in
        the context, or `find_end` or `respond` comes with a constraint.
    """
    if constraint is not None and (find_end is not None or respond is not None):
        raise ValueError(
            "constraint: rows under one end by their stop tokens alone; leave out find_end, respond"
        )
    context = config.max_positions if sampling.context_limit is None else sampling.context_limit
    if context > config.max_positions:
        raise ValueError(f"context_limit={context}: the model was made for {config.max_positions} tokens")
    stop_ids, mesh = sampling.stop_ids or (), capacity.mesh
    limits = row_limits(system_tokens, problem_tokens, sampling.max_new_tokens, keys.shape[:3], context)
    check_ids("system_tokens", np.concatenate(system_tokens), config)
    check_ids(
        "problem_tokens", np.concatenate([tokens for lane in problem_tokens for tokens in lane]), config
    )
    check_ids("stop_ids", [stop for stop in stop_ids if stop >= 0], config)  # models without any name -1
    laid_out, config = for_sampling(params, config, mesh)
    held_bytes = capacity.held_bytes
    if held_bytes is None:
        arrays = {id(x): x for x in jax.tree.leaves((params, laid_out))}
        held_bytes = bytes_per_device(list(arrays.values()))
    params = laid_out
    most = int(np.max(sampling.max_new_tokens))
    longest = max(len(tokens) for lane in problem_tokens for tokens in lane)
    stages = choose_sizes(
        config,
        lanes=len(system_tokens),
        rows=limits.size,
        longest_problem=max(capacity.longest_problem, longest),
        max_new_tokens=most,
        context_limit=sampling.context_limit,
        chunk=capacity.chunk if constraint is None else 1,
        turns=respond is not None,
        coarse=capacity.coarse or constraint is not None,
        max_rows=capacity.max_rows,
        held=held_bytes,
        mesh=mesh,
    )
    scheduler = Scheduler(
        params,
        config,
        system_tokens,
        problem_tokens,
        np.asarray(keys).reshape(-1, 2),
        limits.reshape(-1),
        stages,
        dataclasses.replace(sampling, max_new_tokens=most, stop_ids=stop_ids),
        constraint=constraint,
        mesh=mesh,
    )
    truncated = _run(scheduler, limits.shape, config, find_end, respond, finished)
    arrays = scheduler.tokens, scheduler.position, scheduler.logprobs, scheduler.untruncated_logprobs
    arrays = *arrays, truncated, scheduler.cutoffs, scheduler.drawn
    shaped = (x.reshape(*limits.shape, *x.shape[1:]) for x in arrays)
    return Samples._make((*shaped, scheduler.row_steps))


def _run(
    scheduler: Scheduler,
    shape: tuple[int, ...],
    config: DecoderConfig,
    find_end: FindEnd | None,
    respond: Respond | None,
    finished: Finished | None,
) -> np.ndarray:
    """Runs all rows to their ends: chunks, and what is said between turns.

    Args:
      scheduler: of the rows, none of them admitted.
      shape: (M, B, N).
      config: the decoder.
      find_end, respond, finished: as for `sample_tree`.

    Returns:
      bool [M * B * N], which rows a limit ended.
    """
    truncated = scheduler.limit > 0
    turn_start = np.zeros_like(scheduler.limit)
    answers = Answers(respond)

    def so_far(row: int) -> tuple[Place, np.ndarray]:
        m, b, n = (int(i) for i in np.unravel_index(row, shape))
        return (m, b, n), scheduler.tokens[row, : scheduler.position[row]].copy()

    while not scheduler.done or answers.waiting:
        scheduler.admit()
        ended, done = {}, []
        decoding = scheduler.running.any()
        if decoding:
            for row, count, stopped in scheduler.decode():
                if find_end is not None:
                    turn = scheduler.tokens[row, turn_start[row] : scheduler.position[row]]
                    kept = find_end(turn, len(turn) - count)
                    if kept is not None:
                        scheduler.take_back(row, len(turn) - kept)
                        stopped = True
                if stopped:
                    ended[row] = so_far(row)
                elif scheduler.position[row] >= scheduler.limit[row]:
                    done.append(row)
        appended = answers.gather(ended, wait=not decoding)
        scheduler.running[list(answers.waiting)] = False
        for row, answer in list(appended.items()):
            if not answer or scheduler.position[row] + len(answer) >= scheduler.limit[row]:
                truncated[row] = bool(appended.pop(row))
                done.append(row)
        for row in done:
            scheduler.release(row)
            if finished is not None:
                finished(*so_far(row))
        for answer in appended.values():
            check_ids("respond", answer, config)
        scheduler.append(appended)
        for row in appended:
            turn_start[row] = scheduler.position[row]
    return truncated


def row_limits(
    system_tokens: Sequence[Sequence[int]],
    problem_tokens: Sequence[Sequence[Sequence[int]]],
    max_new_tokens: int | np.ndarray,
    shape: tuple[int, ...],
    context_limit: int,
) -> np.ndarray:
    """How many tokens may follow each prompt: `max_new_tokens`, or what the context leaves. int32 [M, B, N].

    Raises:
      ValueError: if a prompt has no token of its own, or leaves no room.
    """
    if np.max(max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: give at least 1")
    limits = np.broadcast_to(max_new_tokens, shape).astype(np.int32)
    for m, (system, lane) in enumerate(zip(system_tokens, problem_tokens, strict=True)):
        for b, problem in enumerate(lane):
            if not len(problem):
                raise ValueError(
                    "problem_tokens: every prompt needs at least one token after its shared start"
                )
            room = context_limit - len(system) - len(problem)
            if room < 1:
                raise ValueError(
                    f"a prompt of {len(system) + len(problem)} tokens leaves no room in a context of "
                    f"{context_limit}; shorten the prompt, or raise context_limit up to max_positions"
                )
            limits[m, b] = np.minimum(limits[m, b], room)
    return limits
