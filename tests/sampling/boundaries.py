"""Truncated distributions by a plain sort in float64, and how near a draw came to another token."""

import jax.numpy as jnp
import numpy as np

from espl_jax.sampling import draw
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation
from tests.support import tiny


def kept_tokens(logprobs, truncation):
    """Which tokens truncation keeps: bool [R, V] for logprobs [R, V]."""
    kept = []
    for row in np.asarray(logprobs, np.float64):
        order = np.argsort(-row, kind="stable")
        probs = np.exp(row[order])
        least = order[-1]
        if 0 < truncation.top_k < len(row):
            least = order[truncation.top_k - 1]
            probs = np.where(row[order] >= row[least], probs, 0)
        if truncation.top_p < 1:
            needed = int((np.cumsum(probs) < truncation.top_p * probs.sum()).sum())
            least = order[min(needed, len(row) - 1)]
        floor = row[order[0]] + np.log(truncation.min_p) if truncation.min_p else -np.inf
        kept.append((row >= max(row[least], floor)) | (row == row[order[0]]))
    return np.array(kept)


def distribution(logits, temperature, truncation=None):
    """Exact probabilities [R, V] of the tokens under softmax(logits / temperature), truncated. Float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    probs = np.exp(scaled)
    probs /= probs.sum(axis=-1, keepdims=True)
    if truncation:
        with np.errstate(divide="ignore"):
            probs = np.where(kept_tokens(np.log(probs), truncation), probs, 0)
    return probs / probs.sum(axis=-1, keepdims=True)


def boundary_distance(logits, uniform, temperature, truncation=None):
    """How far each row's uniform lies from the nearest bound between the token it draws and its neighbours.

    Args:
      logits: [V], for all rows, or [R, V].
      uniform: [R] in [0, 1).
      temperature: above zero.
      truncation: a `Truncation`, or None.

    Returns:
      float32 [R]; the ends 0 and 1 of the distribution are no bounds.
    """
    uniform = np.asarray(uniform, np.float64)
    probs = distribution(np.atleast_2d(logits), temperature, truncation or Truncation())
    bounds = np.broadcast_to(np.cumsum(probs, axis=-1), (len(uniform), probs.shape[-1]))
    inner = np.where((bounds > 0) & (bounds < 1 - 1e-12), bounds, np.inf)
    return np.abs(inner - uniform[:, None]).min(axis=-1).astype(np.float32)


def cut_distance(logits, temperature, top_p):
    """How near rounding is to keeping another set under top-p, float32 [R] for logits [R, V].

    The least of how near the probability of some most likely tokens comes to `top_p`, and how far apart in
    logprob the last token kept and the first one cut are.
    """
    probs = -np.sort(-distribution(logits, temperature), axis=-1)
    held = np.cumsum(probs, axis=-1)
    last = (held < top_p).sum(axis=-1, keepdims=True)
    gap = -np.diff(np.log(probs), axis=-1)
    apart = np.take_along_axis(gap, np.minimum(last, gap.shape[-1] - 1), axis=-1)[:, 0]
    return np.minimum(np.abs(held - top_p).min(axis=-1), apart).astype(np.float32)


def same_row(first, other, params, config, prompt, key, place, temperature=1.0, truncation=UNTRUNCATED):
    """Whether a row has the same tokens in two `Samples`. Asserts that it has, or that it first differs where
    its uniform is so near a boundary between tokens that rounding decides.

    Args:
      first, other: the samples.
      params, config: the model.
      prompt: the tokens of the row's prompt.
      key: uint32 [2], key data of the row.
      place: (m, b, n) of the row.
      temperature, truncation: of both samples; a temperature of 0 is greedy.
    """
    if np.array_equal(first.tokens[place], other.tokens[place]):
        assert first.lengths[place] == other.lengths[place]
        assert first.truncated[place] == other.truncated[place]
        pair = first.untruncated_logprobs[place], other.untruncated_logprobs[place]
        np.testing.assert_allclose(*pair, atol=1e-4)
        return True
    at = int(np.argmax(first.tokens[place] != other.tokens[place]))
    tokens = np.array([*prompt, *first.tokens[place]])[None]
    scores = tiny.logits(params, config, tokens)[0, len(prompt) - 1 + at]
    if not temperature:
        second, best = np.sort(np.asarray(scores))[-2:]
        assert best - second < 1e-4
        return False
    uniform = draw.uniforms(jnp.asarray(key)[None], jnp.array([at]))
    near = boundary_distance(scores[None], uniform, temperature, truncation)[0]
    if truncation:  # rounding also decides which is the last token kept
        near = min(near, cut_distance(scores[None], temperature, truncation.top_p)[0])
    assert near < 1e-4
    return False
