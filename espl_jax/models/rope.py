"""Rotary position embeddings (RoPE) and their extensions to longer contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Returns the radians per position of each pair of dimensions, fastest first. float32 [H / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1.0) / np.float32(rope.theta) ** exponents
    match rope.scaling:
        case "linear":
            return plain / np.float32(rope.factor)
        case "llama3":
            return _llama3(plain, rope)
        case "yarn":
            return _yarn(plain, rope)
    return plain


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """Returns YaRN's scale of cosines and sines for a context extended by `factor` (its section 3.4).

    `weight` is DeepSeek's `mscale`; the paper uses 1.
    """
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(plain: np.ndarray, rope: Rope) -> np.ndarray:
    """Scales frequencies as Llama 3.1 does (Dubey et al. 2024, arXiv 2407.21783, as released).

    Frequencies below `low_freq_factor` turns in the original context are divided by `factor`, those above
    `high_freq_factor` turns are kept, and those in between are interpolated linearly in the turns.
    """
    turns = rope.original_positions * plain / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (kept * plain + (1 - kept) * plain / rope.factor).astype(np.float32)


def _yarn(plain: np.ndarray, rope: Rope) -> np.ndarray:
    """Scales frequencies by NTK-by-parts (YaRN, Peng et al. 2023, arXiv 2309.00071, section 3.2).

    The ramp is linear in the frequency index, as in the paper's released code and in transformers.
    """
    half = len(plain)

    def index(turns: float) -> float:
        """Returns the fractional index of the frequency with `turns` turns in the original context."""
        return half * math.log(rope.original_positions / (turns * 2 * math.pi)) / math.log(rope.theta)

    first, last = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first or 0.001
    divided = np.clip((np.arange(half, dtype=np.float32) - first) / width, 0.0, 1.0)
    return (divided * plain / rope.factor + (1 - divided) * plain).astype(np.float32)


def tables(positions: jax.Array, rope: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines of every position. int32 [T] -> two of float32 [T, H / 2]."""
    angles = positions[:, None].astype(jnp.float32) * frequencies(rope, head_dim)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotates heads by their positions (Su et al. 2021, arXiv 2104.09864), half-split convention.

    Args:
      x: [T, heads, H].
      cos, sin: float32 [T, H / 2], from `tables`.
      interleaved: whether x has the two dimensions of a pair beside each other; the result has not.

    Returns:
      [T, heads, H] in x's dtype.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]
    x32 = x.astype(jnp.float32)
    first, second = (x32[..., ::2], x32[..., 1::2]) if interleaved else jnp.split(x32, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
