"""Derives random keys from names, so that a rollout's random numbers do not depend on other rollouts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax
import numpy as np

from espl_jax.sampling.draw import row_keys
from espl_jax.types import Problem, SystemPrompt


def stream_key(seed: int, stream: str, iteration: int) -> jax.Array:
    """Returns the key of a random stream (`train`, `validation`, `reflection`, ...) in one iteration."""
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, stable_hash(stream)), iteration)


def stable_hash(text: str) -> int:
    """Returns a 32-bit hash that is the same in every process, to fold into random keys."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def rollout_keys(
    key: jax.Array, prompts: Sequence[SystemPrompt], problems: Sequence[Problem], group_size: int
):
    """Returns key data, uint32 [M, B, N, 2]. Sample numbers continue across copies of a prompt."""
    seen: dict[str, int] = {}
    sample = np.zeros((len(prompts), 1, group_size), np.uint32)
    for i, prompt in enumerate(prompts):
        sample[i, 0] = seen.get(prompt.id, 0) * group_size + np.arange(group_size)
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
    prompt_words = np.array([stable_hash(prompt.id) for prompt in prompts], np.uint32)[:, None, None]
    problem_words = np.array([stable_hash(problem.id) for problem in problems], np.uint32)[None, :, None]
    attempt = turn = np.uint32(0)
    return row_keys(key, prompt_words, problem_words, sample, attempt, turn)
