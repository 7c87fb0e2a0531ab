"""Trees of tokens, ragged at every level, and the same rollouts as plain sequences."""

from typing import NamedTuple

import numpy as np

from espl_jax.types import TrainBatch


class Flat(NamedTuple):
    """The rollouts of a tree as sequences of their own.

    Attributes:
      tokens: int32 [R, width], prompt and new tokens, right padded with zeros.
      starts: int [R], where in `tokens` a rollout's first input lies; column t of a rollout is `starts + t`.
    """

    tokens: np.ndarray
    starts: np.ndarray


def random_batch(seed, vocab_size, shape=(2, 3, 2), widths=(7, 5, 6), filler=None):
    """A TrainBatch of random tokens.

    Lengths are ragged, a problem without tokens of its own and an empty rollout among them; the padding holds
    random tokens, or `filler`, so that code which looks at it is found out.
    """
    rng, padding = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    prompts, problems, _ = shape
    system, problem, new = widths

    def ragged(nodes, width, special=()):
        lengths = rng.integers(1, width + 1, nodes)
        for node, length in special:
            lengths[node] = length
        tokens = rng.integers(0, vocab_size, (*nodes, width))
        other = padding.integers(0, vocab_size, tokens.shape) if filler is None else filler
        tokens = np.where(np.arange(width) < lengths[..., None], tokens, other)
        return tokens.astype(np.int32), lengths.astype(np.int32)

    system_tokens, system_lengths = ragged((prompts,), system)
    problem_tokens, problem_lengths = ragged((prompts, problems), problem, [((0, 0), 0)])
    targets, lengths = ragged(shape, new, [((0, 0, 0), new), ((-1, -1, -1), 0)])
    last = np.broadcast_to(rng.integers(0, vocab_size, (prompts, problems, 1, 1)), (*shape, 1))
    return TrainBatch(
        system_tokens=system_tokens,
        system_lengths=system_lengths,
        problem_tokens=problem_tokens,
        problem_lengths=problem_lengths,
        inputs=np.concatenate([last, targets[..., :-1]], axis=-1).astype(np.int32),
        targets=targets,
        mask=np.arange(new) < lengths[..., None],
        sampler_logprobs=rng.normal(-4, 0.3, targets.shape).astype(np.float32),
        cutoffs=None,
        advantages=rng.normal(size=shape).astype(np.float32),
        num_rollouts=np.float32(np.prod(shape) + 3),
    )


def flatten(batch):
    """The tree's rollouts as plain sequences, in the order of `inputs.reshape(R, T)`."""
    rows, starts = [], []
    for m, p, n in np.ndindex(batch.advantages.shape):
        prompt = [
            *batch.system_tokens[m, : batch.system_lengths[m]],
            *batch.problem_tokens[m, p, : batch.problem_lengths[m, p]],
        ]
        length = int(batch.mask[m, p, n].sum())
        new = [batch.inputs[m, p, n, 0], *batch.targets[m, p, n, :length]]
        rows.append([*prompt, *new])
        starts.append(len(prompt))
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, sequence in zip(tokens, rows, strict=True):
        row[: len(sequence)] = sequence
    return Flat(tokens, np.array(starts))


def pick(values, batch):
    """Values [R, width, ...] of flat sequences at the inputs of the tree's rollouts: [R, T, ...]."""
    columns = flatten(batch).starts[:, None] + np.arange(batch.inputs.shape[-1])
    rows = np.arange(len(columns))[:, None]
    return np.asarray(values)[rows, np.minimum(columns, values.shape[1] - 1)]


def on_policy(batch, logprobs, noise=0.0, seed=0):
    """The batch with sampler logprobs from the policy's own, [R, width - 1], plus noise."""
    own = pick(logprobs, batch).reshape(batch.mask.shape)
    own = own + noise * np.random.default_rng(seed).normal(size=own.shape)
    return batch._replace(sampler_logprobs=np.where(batch.mask, own, np.nan).astype(np.float32))
