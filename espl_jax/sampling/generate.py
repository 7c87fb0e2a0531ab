"""The loop around the decode chunks: which rows are in flight, in which slots, with which capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax import sharding
from espl_jax.models.config import DecoderConfig
from espl_jax.models.layers import as_integers
from espl_jax.sampling import decode, draw
from espl_jax.sampling.buckets import bucket, pad_right

CHUNK = 32
"""Decode steps between two looks at which rows are done."""


class Samples(NamedTuple):
    """New tokens of every row. Leading axes [M, B, N] for a tree of prompts, [P, N] for a plain list.

    Attributes:
      tokens: int32 [..., T], zero past the length.
      lengths: int32 [...], the stop token included.
      logprobs: float32 [..., T], under the distribution drawn from (zero when greedy: it has one outcome).
      untruncated_logprobs: float32 [..., T], under softmax(logits / temperature); when greedy,
        softmax(logits).
      truncated: bool [...], ended by `max_new_tokens` and not by a stop token.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    untruncated_logprobs: np.ndarray
    truncated: np.ndarray


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
      top_p, top_k: not supported yet; only 1.0 and 0 are accepted.
      stop_ids: token ids that end a row.

    Returns:
      Samples with leading axes [P, N] or [M, B, N].

    Raises:
      ValueError: for empty prompts, unequal B, or options out of range.
    """
    if top_p != 1.0 or top_k != 0:
        raise ValueError(
            f"top_p={top_p}, top_k={top_k}: truncated sampling is not supported yet, because the trainer "
            "could not reproduce its logprobs; use top_p=1.0 and top_k=0"
        )
    flat = bool(prompts) and all(isinstance(token, int | np.integer) for token in prompts[0])
    lanes = [prompts] if flat else prompts
    if (
        not lanes
        or len({len(lane) for lane in lanes}) != 1
        or not all(len(p) for lane in lanes for p in lane)
    ):
        raise ValueError(
            "prompts: give at least one non-empty token list, and equally many for every system prompt"
        )
    shared = [_common_start(lane) for lane in lanes]
    m, b, n = np.ogrid[: len(lanes), : len(lanes[0]), :group_size]
    samples = sample_tree(
        params,
        config,
        [lane[0][:size] for lane, size in zip(lanes, shared, strict=True)],
        [[prompt[size:] for prompt in lane] for lane, size in zip(lanes, shared, strict=True)],
        draw.row_keys(key, m, b, n),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=stop_ids,
    )
    return Samples(*(x[0] for x in samples)) if flat else samples


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
    *,
    max_new_tokens: int | np.ndarray,
    temperature: float,
    stop_ids: Sequence[int] = (),
    max_rows: int | None = None,
    chunk: int = CHUNK,
    mesh: jax.sharding.Mesh | None = None,
) -> Samples:
    """Samples the third level of the tree under its first two.

    Rows that are done make room: the rest move together into the next smaller bucket of rows, or, when not
    all rows fit at once, the next ones of the lane's queue take their place.

    Args:
      params: with adapters or not.
      config: the decoder.
      system_tokens: M lists, the start of every prompt of a lane; may be empty.
      problem_tokens: M lists of B lists, the rest of each prompt, at least one token.
      keys: uint32 [M, B, N, 2], as `row_keys` makes them.
      max_new_tokens: at most so many, for every row, or an int array that broadcasts to [M, B, N]; rows that
        may draw nothing take up no room.
      temperature: 0 takes the most likely token.
      stop_ids: token ids that end a row.
      max_rows: most rows of one lane in flight at once; all of them by default.
      chunk: decode steps between two looks at which rows are done.
      mesh: shard rows over its data axes.

    Returns:
      Samples, leading axes [M, B, N], T = the largest of max_new_tokens.

    Raises:
      ValueError: if temperature or max_new_tokens is out of range, or a sequence could outgrow the model.
    """
    lanes, problems, group = keys.shape[:3]
    limits = np.broadcast_to(max_new_tokens, keys.shape[:3]).astype(np.int32).reshape(-1)
    most = int(limits.max())
    check_lengths(config, system_tokens, problem_tokens, most, temperature)
    flat = [tokens for lane in problem_tokens for tokens in lane]
    width = bucket(max(len(tokens) for tokens in flat) - 1)
    systems = pad_right(system_tokens)
    nodes = pad_right([tokens[:-1] for tokens in flat], width)
    params, config = for_sampling(params, config)
    system, shared = decode.prefill(params, config, *systems, *nodes)

    steps = min(chunk, most)
    stops = jnp.asarray(sorted(stop_ids) or [-1], jnp.int32)
    last_tokens = np.array([tokens[-1] for tokens in flat], np.int32)
    keys = np.asarray(keys).reshape(-1, 2)
    total = problems * group
    queues = [[r for r in range(lane * total, (lane + 1) * total) if limits[r]] for lane in range(lanes)]
    flying: list[list[int]] = [[] for _ in range(lanes)]  # row numbers in flight, by lane
    slot_of: dict[int, int] = {}
    filled = np.repeat(nodes[1], group)  # columns of each row's cache in use
    out = Samples(
        np.zeros((lanes * total, most), np.int32),
        np.zeros(lanes * total, np.int32),
        np.zeros((lanes * total, most), np.float32),
        np.zeros((lanes * total, most), np.float32),
        limits > 0,
    )

    rows, capacity = None, 0
    while any(queues) or any(flying):
        fresh = [queue[: (max_rows or total) - len(lane)] for queue, lane in zip(queues, flying, strict=True)]
        queues = [queue[len(new) :] for queue, new in zip(queues, fresh, strict=True)]
        flying = [lane + new for lane, new in zip(flying, fresh, strict=True)]
        longest = max(int(filled[r]) for lane in flying for r in lane)
        wanted = rows_bucket(max(map(len, flying)), min(total, max_rows or total)), bucket(longest + steps)
        new = [r for lane in fresh for r in lane]
        if new or rows is None or wanted != (rows.token.shape[0] // lanes, capacity):
            rows, slot_of = _arrange(
                rows, shared, flying, new, slot_of, last_tokens, keys, group, limits, *wanted
            )
            rows = sharding.place_rows(rows, mesh)
            capacity = wanted[1]

        rows, drawn = decode.decode_chunk(
            params,
            config,
            system,
            rows,
            stops,
            jnp.float32(temperature or 1.0),
            steps=steps,
            greedy=temperature == 0,
        )
        drawn, done = jax.device_get((drawn, rows.done))
        for lane in flying:
            for row in lane:
                slot = slot_of[row]
                count, first = int(drawn.count[slot]), int(out.lengths[row])
                where = slice(first, first + count)
                out.tokens[row, where] = drawn.tokens[slot, :count]
                out.logprobs[row, where] = drawn.logprobs[slot, :count]
                out.untruncated_logprobs[row, where] = drawn.untruncated_logprobs[slot, :count]
                out.lengths[row] += count
                filled[row] += count
                out.truncated[row] = not drawn.stopped[slot]
        flying = [[row for row in lane if not done[slot_of[row]]] for lane in flying]
    return Samples(*(x.reshape(lanes, problems, group, *x.shape[1:]) for x in out))


def for_sampling(params: Any, config: DecoderConfig) -> tuple[Any, DecoderConfig]:
    """Params and config as `prefill` and `decode_chunk` are given them."""
    if config.slice_as_integers and config.scan_layers:
        # Outside the jitted functions: inside, the compiler would see through it.
        params = params | {"layers": as_integers(params["layers"])}
    return params, config.replace(remat=False)


def rows_bucket(rows: int, most: int) -> int:
    """Slots of a lane: `most` halved as often as the rows still fit."""
    while (most + 1) // 2 >= rows and most > 1:
        most = (most + 1) // 2
    return most


def _arrange(rows, shared, flying, new, slot_of, last_tokens, keys, group, limits, slots, capacity):
    """Puts rows in flight into `slots` slots a lane. Returns (rows, slot of each row number)."""
    number = np.full((len(flying), slots), -1)
    for i, lane in enumerate(flying):
        number[i, : len(lane)] = lane
    number = number.ravel()
    live = number >= 0
    placed = {row: slot for slot, row in enumerate(number.tolist()) if row >= 0}

    def admit(numbers: np.ndarray, capacity: int) -> decode.Rows:
        node = numbers // group
        arrays = (jnp.asarray(x) for x in (node, last_tokens[node], limits[numbers], keys[numbers]))
        return decode.admit(shared, *arrays, capacity=capacity)

    if rows is None:
        return admit(np.maximum(number, 0), capacity).replace(done=jnp.asarray(~live)), placed
    count, held = rows.token.shape[0], rows.cache.key.shape[3]
    admitted = None
    if new:
        if held < capacity:
            rows = decode.rearrange(rows, None, jnp.arange(count), ~rows.done, capacity=capacity)
        # Shapes stay few: as many rows are admitted as there are slots, the surplus is never looked at.
        admitted = admit(np.resize(new, len(number)), max(held, capacity))
    came_from = slot_of | {row: count + i for i, row in enumerate(new)}
    order = np.array([came_from.get(row, 0) for row in number.tolist()], np.int32)
    return decode.rearrange(rows, admitted, jnp.asarray(order), jnp.asarray(live), capacity=capacity), placed


def check_lengths(
    config: DecoderConfig,
    system_tokens: Sequence[Sequence[int]],
    problem_tokens: Sequence[Sequence[Sequence[int]]],
    max_new_tokens: int,
    temperature: float,
) -> None:
    """Raises ValueError if `sample_tree` could not take these arguments."""
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: give 0 for the most likely token, or a positive number")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: give at least 1")
    for system, lane in zip(system_tokens, problem_tokens, strict=True):
        for problem in lane:
            if not len(problem):
                raise ValueError(
                    "problem_tokens: every prompt needs at least one token after its shared start"
                )
            if len(system) + len(problem) + max_new_tokens > config.max_positions:
                raise ValueError(
                    f"a prompt of {len(system) + len(problem)} tokens and max_new_tokens={max_new_tokens} "
                    f"exceed the model's max_positions={config.max_positions}; lower it or shorten "
                    "the prompt"
                )
