"""Samples a prefix tree: the host loop around decode chunks, stop conditions and multi-turn answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from espl_jax.models.config import DecoderConfig
from espl_jax.models.layers import check_ids
from espl_jax.parallel.ahead import abstract
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.sampling import draw, programs
from espl_jax.sampling.answers import Answers, Place, Respond
from espl_jax.sampling.buckets import bucket
from espl_jax.sampling.constraint import Constraint
from espl_jax.sampling.layout import for_sampling
from espl_jax.sampling.scheduler import Scheduler
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.sampling.sizes import choose_sizes
from espl_jax.sampling.truncation import Truncation

FindEnd = Callable[[np.ndarray, int], int | None]
"""Called with the tokens of a turn and how many of them earlier calls have checked. Returns how many tokens
to keep if the turn ends among them, else None."""

Finished = Callable[[Place, np.ndarray], None]
"""Called with a row's place and all its tokens when the row is done."""


class Samples(NamedTuple):
    """New tokens of every row. Leading axes are [M, B, N] for a tree of prompts, [P, N] for a plain list.

    Attributes:
      tokens: int32 [..., T], zero past the length.
      lengths: int32 [...], stop token and appended tokens included.
      logprobs: float32 [..., T], under the sampling distribution (zero when greedy, which is deterministic);
        zero for tokens that the model did not sample.
      untruncated_logprobs: float32 [..., T], under softmax(logits / temperature); when greedy, under
        softmax(logits).
      truncated: bool [...], whether a limit ended the row rather than the model.
      cutoffs: float32 [..., T], untruncated logprob below which tokens were cut; -inf where nothing was cut.
      drawn: bool [..., T], True for tokens that the model sampled, False for those that `respond` appended.
      row_steps: total decode steps times rows per step, idle rows included; a single number.
      routing: int16 [..., T, L, A], experts that the routers chose when each token was drawn, for the token
        before it; -1 for tokens that were not drawn. None if not recorded (`Sampling.record_routing`).
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    untruncated_logprobs: np.ndarray
    truncated: np.ndarray
    cutoffs: np.ndarray
    drawn: np.ndarray
    row_steps: int
    routing: np.ndarray | None = None


_OF_ROWS = Samples._fields[:7]
"""Fields with an entry for every row."""


def generate(
    params: Any,
    decoder: DecoderConfig,
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
    draft_tokens: int = 0,
) -> Samples:
    """Samples `group_size` continuations of every prompt; the common prefix of prompts is prefilled once.

    Args:
      params: with or without adapters.
      decoder: the model's configuration.
      prompts: P token lists; or M lists of B token lists each, where the B lists start with the same system
        prompt. The longest common prefix of the P lists (of each B lists) is prefilled once.
      key: one typed key; m, b and n are folded into it for row (m, b, n), so samples do not change with batch
        layout.
      group_size: N.
      max_new_tokens: T.
      temperature: 0 takes the most likely token.
      top_p, top_k, min_p: see `Truncation`.
      stop_ids: token ids that end a row.
      draft_tokens: see `Sampling`.

    Returns:
      Samples with leading axes [P, N] or [M, B, N].

    Raises:
      ValueError: if a prompt is empty, B differs, an option is out of range, or an id is outside the
        vocabulary.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        truncation=Truncation(top_k, top_p, min_p),
        stop_ids=tuple(stop_ids),
        draft_tokens=draft_tokens,
    )
    flat = bool(prompts) and all(isinstance(token, int | np.integer) for token in prompts[0])
    lanes = cast(Sequence[Sequence[Sequence[int]]], [prompts] if flat else prompts)
    if (
        not lanes
        or len({len(lane) for lane in lanes}) != 1
        or not all(len(p) for lane in lanes for p in lane)
    ):
        raise ValueError(
            "prompts: lists are missing, empty or of unequal number; give at least one non-empty token list, "
            "and the same number of lists for every system prompt"
        )
    check_ids("prompts", np.concatenate([prompt for lane in lanes for prompt in lane]), decoder)
    shared = [_common_start(lane) for lane in lanes]
    m, b, n = np.ogrid[: len(lanes), : len(lanes[0]), :group_size]
    samples = sample_tree(
        params,
        decoder,
        [lane[0][:size] for lane, size in zip(lanes, shared, strict=True)],
        [[prompt[size:] for prompt in lane] for lane, size in zip(lanes, shared, strict=True)],
        draw.row_keys(key, m, b, n),
        sampling,
    )
    return samples._replace(**{name: getattr(samples, name)[0] for name in _OF_ROWS}) if flat else samples


def _common_start(prompts: Sequence[Sequence[int]]) -> int:
    """Returns the length of the longest common prefix that leaves each prompt at least one more token."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    same = [len(set(column)) == 1 for column in zip(*(prompt[:shortest] for prompt in prompts), strict=True)]
    return same.index(False) if False in same else shortest


def sample_tree(
    params: Any,
    decoder: DecoderConfig,
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
    past: Sequence[Sequence[Sequence[int] | np.ndarray]] | None = None,
) -> Samples:
    """Samples the rollouts of a prefix tree under its system prompts and problems.

    All rows share one set of slots. If memory does not hold every row at full length, rows run in stages with
    fewer and longer slots each. When a row ends, its slot goes to the next row in the queue, whatever its
    system prompt. Once the queue is empty, the remaining rows are moved to the first slots and chunks become
    narrower.

    Args:
      params: with or without adapters.
      decoder: the model's configuration.
      system_tokens: M lists, the common prefix of the prompts of each lane; may be empty.
      problem_tokens: M lists of B lists, the rest of each prompt, at least one token.
      keys: uint32 [M, B, N, 2], from `row_keys`.
      sampling: temperature, truncation and limits.
      capacity: the memory and devices that rows may use.
      find_end: called after each chunk to end turns by their content, such as stop strings; tokens past the
        end are discarded.
      respond: called with each turn that the model ended (see `Respond`); without it, rows end after one
        turn. A row that waits for its answer may lose its slot and is then prefilled again in another. If the
        answer exceeds the row's limit, the row ends truncated. Results are bit-identical as long as futures
        complete within `answers.GRACE`; slower ones change which rows share a chunk, and with it rounding.
      finished: called with each row that is done, while others still run.
      constraint: masks tokens on the host before every step (see `Constraint`). While any row is constrained,
        chunks have one step; logprobs are renormalized over the allowed tokens.
      past: earlier texts on each of the B problems, in which drafts are looked up, the latest last.

    Returns:
      Samples with leading axes [M, B, N]; T is the largest `max_new_tokens`.

    Raises:
      ValueError: if an argument is out of range, an id is outside the vocabulary, a prompt leaves no room in
        the context, `past` is not one list for each problem, or `find_end` is combined with a constraint.
    """
    if constraint is not None and find_end is not None:
        raise ValueError("constraint: constrained rows end only at stop tokens; leave out find_end")
    context = decoder.max_positions if sampling.context_limit is None else sampling.context_limit
    if context > decoder.max_positions:
        raise ValueError(
            f"context_limit={context}: exceeds the model's max_positions={decoder.max_positions}; lower it"
        )
    stop_ids, mesh = sampling.stop_ids or (), capacity.mesh
    limits = row_limits(system_tokens, problem_tokens, sampling.max_new_tokens, keys.shape[:3], context)
    check_ids("system_tokens", np.concatenate(system_tokens), decoder)
    check_ids(
        "problem_tokens", np.concatenate([tokens for lane in problem_tokens for tokens in lane]), decoder
    )
    if past and len(past) != len(problem_tokens[0]):
        raise ValueError(
            f"past: {len(past)} lists for {len(problem_tokens[0])} problems; give one list for each problem, "
            "which may be empty"
        )
    check_ids("stop_ids", [stop for stop in stop_ids if stop >= 0], decoder)  # -1: no stop token
    laid_out, decoder = for_sampling(params, decoder, mesh)
    held_bytes = capacity.held_bytes
    if held_bytes is None:
        arrays = {id(x): x for x in jax.tree.leaves((params, laid_out))}
        held_bytes = bytes_per_device(list(arrays.values()))
    params = laid_out
    most = int(np.max(sampling.max_new_tokens))
    longest = max(len(tokens) for lane in problem_tokens for tokens in lane)
    stages = choose_sizes(
        decoder,
        lanes=len(system_tokens),
        rows=limits.size,
        longest_problem=max(capacity.longest_problem, longest),
        max_new_tokens=most,
        context_limit=sampling.context_limit,
        chunk=1 if constraint is not None and respond is None else capacity.chunk,
        turns=respond is not None,
        coarse=capacity.coarse or constraint is not None,
        draft_tokens=sampling.draft_tokens,
        max_rows=capacity.max_rows,
        held=held_bytes,
        mesh=mesh,
    )
    sampling = dataclasses.replace(sampling, max_new_tokens=most, stop_ids=stop_ids)
    if capacity.ahead.on:
        shapes = programs.Shapes(
            params=abstract(params),
            decoder=decoder,
            stages=stages,
            lanes=len(system_tokens),
            problems=len(problem_tokens[0]),
            rows=limits.size,
            system=bucket(max(map(len, system_tokens))),
            problem=longest,
            sampling=sampling,
            turns=respond is not None,
            mesh=mesh,
        )
        capacity.ahead.add("Rollouts", programs.every_call(shapes))
    scheduler = Scheduler(
        params,
        decoder,
        system_tokens,
        problem_tokens,
        np.asarray(keys).reshape(-1, 2),
        limits.reshape(-1),
        stages,
        sampling,
        constraint=constraint,
        mesh=mesh,
        past=past,
        ahead=capacity.ahead,
    )
    truncated = _run(scheduler, limits.shape, sampling.max_first_turn, find_end, respond, finished)
    arrays = scheduler.tokens, scheduler.position, scheduler.logprobs, scheduler.untruncated_logprobs
    arrays = dict(zip(_OF_ROWS, (*arrays, truncated, scheduler.cutoffs, scheduler.drawn), strict=True))

    def shaped(x: np.ndarray) -> np.ndarray:
        return x.reshape(*limits.shape, *x.shape[1:])

    routing = None if scheduler.routing is None else shaped(scheduler.routing)
    rows = {name: shaped(x) for name, x in arrays.items()}
    return Samples(**rows, row_steps=scheduler.row_steps, routing=routing)


def _run(
    scheduler: Scheduler,
    shape: tuple[int, ...],
    max_first_turn: int | None,
    find_end: FindEnd | None,
    respond: Respond | None,
    finished: Finished | None,
) -> np.ndarray:
    """Runs all rows to completion, alternating between decode chunks and answers.

    Args:
      scheduler: holds the rows; none of them is admitted yet.
      shape: (M, B, N).
      max_first_turn: see `Sampling`.
      find_end, respond, finished: as for `sample_tree`.

    Returns:
      bool [M * B * N], whether a limit ended the row.
    """
    truncated = scheduler.limit > 0
    limit, turn_start = scheduler.limit, np.zeros_like(scheduler.limit)
    if max_first_turn is not None:
        scheduler.limit = np.minimum(limit, max_first_turn)
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
            if not answer or scheduler.position[row] + len(answer) >= limit[row]:
                truncated[row] = bool(appended.pop(row))
                done.append(row)
        for row in done:
            scheduler.finish(row)
            if finished is not None:
                finished(*so_far(row))
        for answer in appended.values():
            check_ids("respond", answer, scheduler.decoder)
        scheduler.append(appended)
        rows = np.array(list(appended), int)
        turn_start[rows], scheduler.limit[rows] = scheduler.position[rows], limit[rows]
        if scheduler.constraint is not None and len(rows):
            scheduler.constraint.answered(rows)
    return truncated


def row_limits(
    system_tokens: Sequence[Sequence[int]],
    problem_tokens: Sequence[Sequence[Sequence[int]]],
    max_new_tokens: int | np.ndarray,
    shape: tuple[int, ...],
    context_limit: int,
) -> np.ndarray:
    """Returns the most new tokens of each row: `max_new_tokens`, or what the context leaves. int32 [M, B, N].

    Raises:
      ValueError: if a prompt has no token after its shared prefix, or leaves no room in the context.
    """
    if np.max(max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: give at least 1")
    limits = np.broadcast_to(max_new_tokens, shape).astype(np.int32)
    for m, (system, lane) in enumerate(zip(system_tokens, problem_tokens, strict=True)):
        for b, problem in enumerate(lane):
            if not len(problem):
                raise ValueError(
                    "problem_tokens: a prompt has no tokens after the shared prefix; give at least one token"
                )
            room = context_limit - len(system) - len(problem)
            if room < 1:
                raise ValueError(
                    f"a prompt of {len(system) + len(problem)} tokens leaves no room in a context of "
                    f"{context_limit}; shorten the prompt, or raise context_limit up to max_positions"
                )
            limits[m, b] = np.minimum(limits[m, b], room)
    return limits
