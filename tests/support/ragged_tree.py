"""Trees of tokens, ragged at every level, and the same rollouts as plain sequences."""

from typing import NamedTuple

import numpy as np

from espl_jax.types import TrainBatch


class Tree(NamedTuple):
    """M system prompts, P problems under each, N rollouts under each of these; else as in `TrainBatch`."""

    system_tokens: np.ndarray  # int32 [M, S]
    system_lengths: np.ndarray  # int32 [M]
    problem_tokens: np.ndarray  # int32 [M, P, Q]
    problem_lengths: np.ndarray  # int32 [M, P]
    inputs: np.ndarray  # int32 [M, P, N, T], as all that follow
    targets: np.ndarray
    mask: np.ndarray
    sampler_logprobs: np.ndarray
    cutoffs: np.ndarray | None
    advantages: np.ndarray  # float32 [M, P, N]
    num_rollouts: np.float32

    def train_batch(self, shards=1, rows=0, old_logprobs=None):
        """The batch of an update: rollouts in order, in `shards` runs of `rows` each (as many as needed)."""
        prompts, problems, group = self.advantages.shape
        total = prompts * problems * group
        rows = rows or -(-total // shards)
        nodes = prompts * problems
        tokens, lengths = self.problem_tokens.reshape(nodes, -1), self.problem_lengths.reshape(-1)
        # Every shard has all problems, in an order of its own, so that numbers within shards matter.
        order = np.stack([np.roll(np.arange(nodes), shard) for shard in range(shards)])
        number = np.argsort(order, axis=1)
        index = np.arange(shards * rows).reshape(shards, rows)
        real, index = index < total, np.minimum(index, total - 1)

        def of_rows(x):
            return None if x is None else x.reshape(total, *x.shape[3:])[index]

        return TrainBatch(
            system_tokens=self.system_tokens,
            system_lengths=self.system_lengths,
            problem_tokens=tokens[order],
            problem_lengths=lengths[order],
            problem_system=(order // problems).astype(np.int32),
            rollout_problem=np.take_along_axis(number, index // group, axis=1).astype(np.int32),
            inputs=of_rows(self.inputs),
            targets=of_rows(self.targets),
            mask=of_rows(self.mask) & real[..., None],
            sampler_logprobs=of_rows(self.sampler_logprobs),
            cutoffs=of_rows(self.cutoffs),
            advantages=of_rows(self.advantages),
            num_rollouts=self.num_rollouts,
            num_tokens=np.float32(self.mask.sum() + 5),
            old_logprobs=of_rows(old_logprobs),
        )


class Flat(NamedTuple):
    """The rollouts of a tree as separate sequences.

    Attributes:
      tokens: int32 [R, width], prompt and new tokens, right padded with zeros.
      starts: int [R], where in `tokens` a rollout's first input lies; column t of a rollout is `starts + t`.
    """

    tokens: np.ndarray
    starts: np.ndarray


def random_tree(seed, vocab_size, shape=(2, 3, 2), widths=(7, 5, 6), filler=None):
    """A Tree of random tokens.

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
    return Tree(
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


def flatten(tree):
    """The tree's rollouts as plain sequences, in the order of `inputs.reshape(R, T)`."""
    rows, starts = [], []
    for m, p, n in np.ndindex(tree.advantages.shape):
        prompt = [
            *tree.system_tokens[m, : tree.system_lengths[m]],
            *tree.problem_tokens[m, p, : tree.problem_lengths[m, p]],
        ]
        length = int(tree.mask[m, p, n].sum())
        new = [tree.inputs[m, p, n, 0], *tree.targets[m, p, n, :length]]
        rows.append([*prompt, *new])
        starts.append(len(prompt))
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, sequence in zip(tokens, rows, strict=True):
        row[: len(sequence)] = sequence
    return Flat(tokens, np.array(starts))


def pick(values, tree):
    """Values [R, width, ...] of flat sequences at the inputs of the tree's rollouts: [R, T, ...]."""
    columns = flatten(tree).starts[:, None] + np.arange(tree.inputs.shape[-1])
    rows = np.arange(len(columns))[:, None]
    return np.asarray(values)[rows, np.minimum(columns, values.shape[1] - 1)]


def on_policy(tree, logprobs, noise=0.0, seed=0):
    """The tree with sampler logprobs from the policy's own, [R, width - 1], plus noise."""
    own = pick(logprobs, tree).reshape(tree.mask.shape)
    own = own + noise * np.random.default_rng(seed).normal(size=own.shape)
    return tree._replace(sampler_logprobs=np.where(tree.mask, own, np.nan).astype(np.float32))
