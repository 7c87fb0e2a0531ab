"""Logprobs, entropy and KL of tokens from hidden states, computed in vocabulary chunks.

The logits [tokens, V] are never materialized: a scan over chunks of the head keeps running sums, and the
backward pass recomputes each chunk. The backward pass is written by hand because it accumulates each chunk's
gradient into its slice of the head's gradient; autodiff would add an array of the head's size per chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from espl_jax.models import layers
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import SCALE, Params
from espl_jax.models.transformer import forward, head
from espl_jax.parallel import sharding
from espl_jax.rl import vocab_chunks


class TokenStats(NamedTuple):
    """Statistics per token, with the shape of the targets. Only `logprobs` is differentiable.

    Attributes:
      logprobs: float32, of the targets under the sampling distribution (after truncation).
      entropy: float32, of softmax(logits / temperature), in nats.
      untruncated: float32, logprobs of the targets under softmax(logits / temperature).
      cut: bool, whether the target is below its cut-off under these params: the trainer would have cut a
        token that the sampler kept.
    """

    logprobs: jax.Array
    entropy: jax.Array
    untruncated: jax.Array
    cut: jax.Array


def target_logprobs(
    params: Params,
    decoder: DecoderConfig,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: jax.Array | float = 1.0,
    cutoffs: jax.Array | None = None,
) -> TokenStats:
    """Returns logprobs of given tokens, and the entropy of the next-token distributions.

    With cut-offs, each distribution is renormalized over `{v: untruncated logprob of v >= cut-off}` and the
    target itself. The choice of this set is not differentiated.

    Args:
      params: contains the head's weight.
      decoder: the model's configuration.
      hidden: [..., D], after the final norm.
      targets: int32 [...].
      temperature: divides the logits.
      cutoffs: float32 [...], the sampler's cut-off logprobs, -inf where nothing was cut; None for untruncated
        sampling.
    """
    chex.assert_shape(targets, hidden.shape[:-1])
    if cutoffs is not None:
        chex.assert_equal_shape([targets, cutoffs])
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    bounds = None if cutoffs is None else cutoffs.reshape(-1)
    stats = _stats(flat, dict(head(params)), wanted, bounds, jnp.float32(temperature), decoder)
    return jax.tree.map(lambda x: x.reshape(targets.shape), stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _stats(
    flat: jax.Array,
    linear: layers.Linear,
    wanted: jax.Array,
    cutoffs: jax.Array | None,
    temperature: jax.Array,
    decoder: DecoderConfig,
) -> TokenStats:
    """Computes `target_logprobs` for flat [tokens, D] and wanted int32 [tokens] with the head `linear`."""
    return _forward(flat, linear, wanted, cutoffs, temperature, decoder)[0]


def _forward(flat, linear, wanted, cutoffs, temperature, decoder):
    chunks = vocab_chunks.chunks(linear, len(flat))

    def body(carry, first):
        largest, total, weighted, target = carry
        scores = vocab_chunks.scores(flat, chunks.cut(linear, first), temperature, decoder)
        columns, fresh = chunks.columns(first)
        scores = jnp.where(fresh, scores, -jnp.inf)
        top = jnp.maximum(largest, scores.max(axis=1))
        shrink, parts = jnp.exp(largest - top), jnp.exp(scores - top[:, None])
        total = total * shrink + parts.sum(axis=1)
        weighted = weighted * shrink + (parts * jnp.where(fresh, scores, 0.0)).sum(axis=1)
        target = target + jnp.where((wanted[:, None] == columns) & fresh, scores, 0.0).sum(axis=1)
        return (top, total, weighted, target), None

    zeros = jnp.zeros(flat.shape[0], jnp.float32)
    carry = (jnp.full_like(zeros, -jnp.inf), zeros, zeros, zeros)
    (largest, total, weighted, target), _ = jax.lax.scan(body, carry, chunks.firsts)
    normalizer = largest + jnp.log(total)
    untruncated, entropy = target - normalizer, normalizer - weighted / total
    if cutoffs is None:
        bounds, logprobs, cut = None, untruncated, jnp.zeros(wanted.shape, bool)
    else:
        # Convert the sampler's cut-offs from logprobs to scores.
        bounds = cutoffs + normalizer
        normalizer = _kept_normalizer(
            flat, linear, wanted, bounds, jnp.where(largest >= bounds, largest, target), temperature, decoder
        )
        logprobs, cut = target - normalizer, untruncated < cutoffs
    stats = TokenStats(logprobs, entropy, untruncated, cut)
    return stats, (flat, linear, wanted, bounds, normalizer, temperature)


def _kept_normalizer(flat, linear, wanted, bounds, top, temperature, decoder):
    """Returns the logsumexp of the scores that reach their bound, and the target's score.

    `top` is the largest of them: the largest score of all if that is kept, else the target's.
    """

    chunks = vocab_chunks.chunks(linear, len(flat))

    def body(total, first):
        scores = vocab_chunks.scores(flat, chunks.cut(linear, first), temperature, decoder)
        columns, fresh = chunks.columns(first)
        kept = _kept(scores, columns, wanted, bounds) & fresh
        return total + jnp.where(kept, jnp.exp(jnp.where(kept, scores - top[:, None], 0.0)), 0.0).sum(1), None

    total, _ = jax.lax.scan(body, jnp.zeros_like(top), chunks.firsts)
    return top + jnp.log(total)


def _kept(scores, columns, wanted, bounds):
    return (scores >= bounds[:, None]) | (wanted[:, None] == columns)


def _backward(decoder, residuals, cotangents):
    flat, linear, wanted, bounds, normalizer, temperature = residuals
    chunks = vocab_chunks.chunks(linear, len(flat))
    # An int8 weight and its scales have no gradient.
    frozen = {"weight", SCALE} if SCALE in linear else set()
    trained = {name: x for name, x in linear.items() if name not in frozen}

    def body(carry, first):
        of_flat, of_linear = carry
        whole = chunks.cut(linear, first)
        scores, pull_back = jax.vjp(
            lambda flat, part: vocab_chunks.scores(flat, whole | part, temperature, decoder),
            flat,
            {name: whole[name] for name in trained},
        )
        columns, fresh = chunks.columns(first)
        kept = fresh if bounds is None else _kept(scores, columns, wanted, bounds) & fresh
        probability = jnp.where(kept, jnp.exp(jnp.where(kept, scores - normalizer[:, None], 0.0)), 0.0)
        is_target = (wanted[:, None] == columns) & fresh
        more, part = pull_back(cotangents.logprobs[:, None] * (is_target - probability))
        return (of_flat + more.astype(jnp.float32), chunks.add(of_linear, part, first)), None

    zeros = jnp.zeros(flat.shape, jnp.float32), jax.tree.map(jnp.zeros_like, trained)
    if "weight" in trained:
        zeros[1]["weight"] = sharding.constrain(zeros[1]["weight"], vocab_chunks.axes(decoder), decoder.phase)
    (of_flat, of_linear), _ = jax.lax.scan(body, zeros, chunks.firsts)
    of_linear |= dict.fromkeys(frozen)
    return of_flat.astype(flat.dtype), of_linear, None, None, jnp.zeros_like(temperature)


_stats.defvjp(_forward, _backward)


def token_kl(
    params: Params,
    hidden: jax.Array,
    reference: Params,
    reference_hidden: jax.Array,
    decoder: DecoderConfig,
    temperature: jax.Array | float = 1.0,
) -> jax.Array:
    """Returns the exact KL(policy || reference) of the next-token distributions, over the whole vocabulary.

    Args:
      params, hidden: the policy and its hidden states, [..., D].
      reference, reference_hidden: the reference policy and its hidden states, [..., D].
      decoder: configuration of both models.
      temperature: divides the logits of both.

    Returns:
      float32 [...], in nats, at least zero up to rounding.
    """
    flat, flat_reference = (x.reshape(-1, x.shape[-1]) for x in (hidden, reference_hidden))
    linear, linear_ref = dict(head(params)), dict(head(reference))
    chunks = vocab_chunks.chunks(linear, len(flat))

    def body(carry, first):
        largest, total, gap, largest_ref, total_ref = carry
        scores = vocab_chunks.scores(flat, chunks.cut(linear, first), temperature, decoder)
        scores_ref = vocab_chunks.scores(flat_reference, chunks.cut(linear_ref, first), temperature, decoder)
        _, fresh = chunks.columns(first)
        difference = jnp.where(fresh, scores - scores_ref, 0.0)
        scores, scores_ref = (jnp.where(fresh, x, -jnp.inf) for x in (scores, scores_ref))
        top = jax.lax.stop_gradient(jnp.maximum(largest, scores.max(axis=1)))
        top_ref = jax.lax.stop_gradient(jnp.maximum(largest_ref, scores_ref.max(axis=1)))
        shrink, parts = jnp.exp(largest - top), jnp.exp(scores - top[:, None])
        total, gap = total * shrink + parts.sum(axis=1), gap * shrink + (parts * difference).sum(axis=1)
        total_ref = total_ref * jnp.exp(largest_ref - top_ref)
        total_ref = total_ref + jnp.exp(scores_ref - top_ref[:, None]).sum(axis=1)
        return (top, total, gap, top_ref, total_ref), None

    zeros = jnp.zeros(flat.shape[0], jnp.float32)
    carry = (jnp.full_like(zeros, -jnp.inf), zeros, zeros, jnp.full_like(zeros, -jnp.inf), zeros)
    (largest, total, gap, largest_ref, total_ref), _ = jax.lax.scan(
        jax.checkpoint(body), carry, chunks.firsts
    )
    kl = gap / total - (largest + jnp.log(total)) + largest_ref + jnp.log(total_ref)
    return kl.reshape(hidden.shape[:-1])


def token_logprobs(
    params: Params, decoder: DecoderConfig, tokens: jax.Array, temperature: jax.Array | float = 1.0
) -> jax.Array:
    """Returns the logprob of every token except the first, given the tokens before it.

    Args:
      params: with or without adapters.
      decoder: the model's configuration.
      tokens: int32 [B, T].
      temperature: divides the logits.

    Returns:
      float32 [B, T - 1].

    Raises:
      ValueError: if a token id is outside the vocabulary (not checked under jit).
    """
    layers.check_ids("tokens", tokens, decoder)
    hidden = forward(params, decoder, tokens[:, :-1]).hidden
    return target_logprobs(params, decoder, hidden, tokens[:, 1:], temperature).logprobs
