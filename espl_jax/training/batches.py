"""Turns `Rollouts` into training batches, padded to few static shapes."""

from __future__ import annotations

import jax
import numpy as np

from espl_jax.sampling.buckets import bucket, pad_right
from espl_jax.types import Rollouts, TrainBatch


def prompt_numbers(rollouts: Rollouts) -> np.ndarray:
    """Returns int32 [M], equal for copies of one prompt; for `advantages(prompt_ids=...)`."""
    ids = list(rollouts.slots())
    return np.array([ids.index(prompt.id) for prompt in rollouts.prompts], np.int32)


def train_batches(
    rollouts: Rollouts,
    advantages: np.ndarray,
    *,
    shards: int = 1,
    microbatch_rows: int = 0,
    minibatches: int = 1,
    rng: np.random.Generator | None = None,
    every_group: bool = False,
    mask_truncated: bool = False,
) -> list[TrainBatch]:
    """Returns the batches of an iteration's updates: all rollouts in one, or minibatches of whole groups.

    Groups without a gradient are left out. The remaining rollouts are split into equal shards. A group may be
    split between two shards, since its advantages are already computed.

    Args:
      rollouts: the rollouts of one iteration.
      advantages: float32 [M, B, N].
      shards: D, groups of devices that share rows (`sharding.row_shards`).
      microbatch_rows: pads the rows of a shard to a multiple of this number that holds every group, so that
        shapes do not change with the number of groups left; 0 pads to all, 1/2, 1/4 ... of the rollouts.
      minibatches: number of updates; groups are assigned to them at random.
      rng: assigns groups to minibatches; required, and advanced, if there is more than one.
      every_group: keep groups whose advantages are all zero, for objectives with another term (KL).
      mask_truncated: mask rollouts that a limit ended (overlong filtering, Yu et al. 2025, arXiv 2503.14476);
        they still count in baselines, `num_rollouts` and `num_tokens`.

    Returns:
      One batch per minibatch that has a gradient; an empty list if none has.

    Raises:
      ValueError: if the rollouts are greedy.
    """
    if rollouts.temperature == 0:
        raise ValueError(
            "rollouts.temperature=0: greedy rollouts cannot be trained on, as they are not samples of the "
            "policy; sample with a positive temperature"
        )
    counts = np.asarray(rollouts.drawn.any(axis=-1))
    if mask_truncated:
        counts = np.logical_and(counts, ~rollouts.truncated)
    has_gradient = (counts & ((advantages != 0) | every_group)).any(axis=2)
    groups = np.argwhere(np.ones_like(has_gradient))
    if minibatches > 1:
        assert rng is not None
        groups = rng.permutation(groups)
    batches = []
    for share in np.array_split(groups, minibatches):
        useful = share[has_gradient[tuple(share.T)]]
        if len(useful):
            useful = useful[np.lexsort(useful.T[::-1])]
            most = -(-len(groups) // minibatches)
            batches.append(_batch(rollouts, advantages, counts, share, useful, most, shards, microbatch_rows))
    return batches


def abstract_batch(
    *,
    prompts: int,
    groups: int,
    group_size: int,
    system_tokens: int,
    problem_tokens: int,
    new_tokens: int,
    cutoffs: bool,
    routing: tuple[int, int] | None = None,
    shards: int = 1,
    microbatch_rows: int = 0,
) -> TrainBatch:
    """Returns the shapes of a batch in which every group has a gradient, for ahead-of-time compilation.

    Args:
      prompts: M.
      groups: pairs of system prompt and problem, M * B.
      group_size: N.
      system_tokens, problem_tokens, new_tokens: most tokens of a node of each level; 0 if the tree has no
        such level.
      cutoffs: whether sampling is truncated.
      routing: (L, A) if the sampler's choices of experts are recorded (`DecoderConfig.routing_shape`).
      shards, microbatch_rows: as in `train_batches`.
    """
    rows = rows_of_a_shard(groups, groups, group_size, shards, microbatch_rows)
    problems = problems_of_a_shard(rows, group_size, shards, microbatch_rows)
    width, system = bucket(new_tokens, smallest=16), bucket(system_tokens) if system_tokens else 0
    problem = bucket(problem_tokens - 1, smallest=16) if problem_tokens else 0

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32)

    return TrainBatch(
        system_tokens=integers(prompts, system),
        system_lengths=integers(prompts),
        problem_tokens=integers(shards, problems, problem),
        problem_lengths=integers(shards, problems),
        problem_system=integers(shards, problems),
        rollout_problem=integers(shards, rows),
        inputs=integers(shards, rows, width),
        targets=integers(shards, rows, width),
        mask=jax.ShapeDtypeStruct((shards, rows, width), np.bool_),
        sampler_logprobs=numbers(shards, rows, width),
        cutoffs=numbers(shards, rows, width) if cutoffs else None,
        advantages=numbers(shards, rows),
        num_rollouts=numbers(),
        num_tokens=numbers(),
        routing=jax.ShapeDtypeStruct((shards, rows, width, *routing), np.int16) if routing else None,
    )


def rows_of_a_shard(groups: int, most: int, group_size: int, shards: int, microbatch_rows: int) -> int:
    """Returns R, the rows of a shard in a batch of `groups` groups out of `most`.

    With microbatches, R does not depend on `groups`: a step skips empty microbatches. Without, R is all, a
    half, a quarter ... of the rows, rounded up.
    """
    rows = -(-most * group_size // shards)
    if microbatch_rows:
        return _round_up(rows, min(microbatch_rows, rows))
    while rows > 1 and -(-rows // 2) * shards >= groups * group_size:
        rows = -(-rows // 2)
    return rows


def problems_of_a_shard(rows: int, group_size: int, shards: int, microbatch_rows: int = 0) -> int:
    """Returns P, the most groups that the rows of a shard belong to, for any number of used microbatches."""
    in_use = np.arange(min(microbatch_rows, rows), rows + 1, microbatch_rows) if microbatch_rows else [rows]
    starts = np.multiply.outer(in_use, np.arange(shards))
    ends = starts + np.reshape(in_use, (-1, 1)) - 1
    return int((ends // group_size - starts // group_size).max()) + 1


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _batch(
    rollouts: Rollouts,
    advantages: np.ndarray,
    counts: np.ndarray,
    share: np.ndarray,
    useful: np.ndarray,
    most: int,
    shards: int,
    microbatch_rows: int,
) -> TrainBatch:
    """Builds a batch. `share`, int [.., 2], are its groups (m, b); `useful` [U, 2] those with a gradient."""
    group_size = advantages.shape[2]
    rows = rows_of_a_shard(len(useful), most, group_size, shards, microbatch_rows)
    # Every shard takes the same number of rows, in whole microbatches. Row i, counted over all shards,
    # belongs to group i // N; rows beyond a shard's share or the last group have an empty mask.
    share_rows = rows
    if microbatch_rows:
        share_rows = min(rows, _round_up(-(-len(useful) * group_size // shards), min(microbatch_rows, rows)))
    column = np.arange(rows)
    row = share_rows * np.arange(shards)[:, None] + np.minimum(column, share_rows - 1)
    real = (column < share_rows) & (row < len(useful) * group_size)
    first = row[:, :1] // group_size
    group = np.minimum(row // group_size, len(useful) - 1)
    nodes = first + np.arange(problems_of_a_shard(rows, group_size, shards, microbatch_rows))
    nodes = np.minimum(nodes, len(useful) - 1)
    place = (*np.moveaxis(useful[group], -1, 0), row % group_size)

    lengths = np.where(counts, rollouts.lengths, 0)[place] * real
    width = bucket(int(lengths.max()), smallest=16)

    def columns(x: np.ndarray) -> np.ndarray:
        x = x[:, :, :, :width][place]
        return np.pad(x, [(0, 0)] * 2 + [(0, width - x.shape[2])] + [(0, 0)] * (x.ndim - 3))

    prompts = [rollouts.problem_tokens[m][b] for m, b in useful]
    longest = max(len(tokens) for lane in rollouts.problem_tokens for tokens in lane)
    problem_tokens, problem_lengths = pad_right(
        [tokens[:-1] for tokens in prompts], bucket(longest - 1, smallest=16)
    )
    system_tokens, system_lengths = pad_right(rollouts.system_tokens)
    last = np.array([tokens[-1] for tokens in prompts], np.int32)[group]
    targets = columns(rollouts.tokens)
    was_cut = bool((rollouts.cutoffs[rollouts.drawn] > -np.inf).any())
    return TrainBatch(
        system_tokens=system_tokens,
        system_lengths=system_lengths,
        problem_tokens=problem_tokens[nodes],
        problem_lengths=problem_lengths[nodes],
        problem_system=useful[nodes, 0].astype(np.int32),
        rollout_problem=(row // group_size - first).astype(np.int32),
        inputs=np.concatenate([last[..., None], targets[..., :-1]], axis=-1),
        targets=targets,
        mask=columns(rollouts.drawn & counts[..., None]) & real[..., None],
        sampler_logprobs=columns(rollouts.logprobs),
        cutoffs=columns(rollouts.cutoffs) if was_cut else None,
        advantages=np.where(real, advantages[place], 0).astype(np.float32),
        num_rollouts=np.float32(len(share) * group_size),
        num_tokens=np.float32(rollouts.drawn[tuple(share.T)].sum()),
        routing=None if rollouts.routing is None else columns(rollouts.routing),
    )
