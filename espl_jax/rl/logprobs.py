"""Logprobs, entropy and KL of tokens from hidden states, the vocabulary taken in chunks.

The array [tokens, V] never exists: a scan over chunks of the head keeps running sums, and the backward pass
computes each chunk again. Written by hand, that pass adds each chunk's gradient of the head into its place;
derived automatically, it would add an array as large as the head for every chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from espl_jax.models import layers
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import Params, forward, head
from espl_jax.parallel import sharding
from espl_jax.rl import vocab_chunks


class TokenStats(NamedTuple):
    """Per token, of the shape of the targets; float32 but for `cut`. Only `logprobs` has a gradient.

    Attributes:
      logprobs: of the targets, under the distribution they were drawn from.
      entropy: of softmax(logits / temperature), in nats.
      untruncated: logprobs of the targets under softmax(logits / temperature).
      cut: bool, whether a target lies below its cut-off here, so that sampler and trainer disagree about it.
    """

    logprobs: jax.Array
    entropy: jax.Array
    untruncated: jax.Array
    cut: jax.Array


def target_logprobs(
    params: Params,
    config: DecoderConfig,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: jax.Array | float = 1.0,
    cutoffs: jax.Array | None = None,
) -> TokenStats:
    """Logprobs of given tokens and the entropy of the distributions they were drawn from.

    With cut-offs, the distribution of a token is renormalized over `{v: untruncated logprob of v >= cut-off}`
    and the target itself; which tokens those are has no gradient.

    Args:
      params: the head's weight is read from them.
      config: the decoder.
      hidden: [..., D], after the final norm.
      targets: int32 [...].
      temperature: divides the logits.
      cutoffs: float32 [...], the sampler's cut-off logprobs, -inf where it cut nothing; None for no cut-offs.
    """
    chex.assert_shape(targets, hidden.shape[:-1])
    if cutoffs is not None:
        chex.assert_equal_shape([targets, cutoffs])
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    bounds = None if cutoffs is None else cutoffs.reshape(-1)
    stats = _stats(flat, dict(head(params)), wanted, bounds, jnp.float32(temperature), config)
    return jax.tree.map(lambda x: x.reshape(targets.shape), stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _stats(
    flat: jax.Array,
    linear: layers.Linear,
    wanted: jax.Array,
    cutoffs: jax.Array | None,
    temperature: jax.Array,
    config: DecoderConfig,
) -> TokenStats:
    """`target_logprobs` of flat [tokens, D] and wanted int32 [tokens] with the head `linear`."""
    return _forward(flat, linear, wanted, cutoffs, temperature, config)[0]


def _forward(flat, linear, wanted, cutoffs, temperature, config):
    chunks = vocab_chunks.chunks(linear, len(flat))

    def body(carry, first):
        largest, total, weighted, target = carry
        scores = vocab_chunks.scores(flat, chunks.cut(linear, first), temperature, config)
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
        # In scores, as the sampler's cut-off is in logprobs.
        bounds = cutoffs + normalizer
        normalizer = _kept_normalizer(
            flat, linear, wanted, bounds, jnp.where(largest >= bounds, largest, target), temperature, config
        )
        logprobs, cut = target - normalizer, untruncated < cutoffs
    stats = TokenStats(logprobs, entropy, untruncated, cut)
    return stats, (flat, linear, wanted, bounds, normalizer, temperature)


def _kept_normalizer(flat, linear, wanted, bounds, top, temperature, config):
    """Log of the summed exponentials of the scores that reach their bound, and the target's.

    `top` is the largest of them: if not the largest of all, nothing but the target is kept.
    """

    chunks = vocab_chunks.chunks(linear, len(flat))

    def body(total, first):
        scores = vocab_chunks.scores(flat, chunks.cut(linear, first), temperature, config)
        columns, fresh = chunks.columns(first)
        kept = _kept(scores, columns, wanted, bounds) & fresh
        return total + jnp.where(kept, jnp.exp(jnp.where(kept, scores - top[:, None], 0.0)), 0.0).sum(1), None

    total, _ = jax.lax.scan(body, jnp.zeros_like(top), chunks.firsts)
    return top + jnp.log(total)


def _kept(scores, columns, wanted, bounds):
    return (scores >= bounds[:, None]) | (wanted[:, None] == columns)


def _backward(config, residuals, cotangents):
    flat, linear, wanted, bounds, normalizer, temperature = residuals
    chunks = vocab_chunks.chunks(linear, len(flat))

    def body(carry, first):
        of_flat, of_linear = carry
        scores, pull_back = jax.vjp(
            lambda flat, part: vocab_chunks.scores(flat, part, temperature, config),
            flat,
            chunks.cut(linear, first),
        )
        columns, fresh = chunks.columns(first)
        kept = fresh if bounds is None else _kept(scores, columns, wanted, bounds) & fresh
        probability = jnp.where(kept, jnp.exp(jnp.where(kept, scores - normalizer[:, None], 0.0)), 0.0)
        is_target = (wanted[:, None] == columns) & fresh
        more, part = pull_back(cotangents.logprobs[:, None] * (is_target - probability))
        return (of_flat + more.astype(jnp.float32), chunks.add(of_linear, part, first)), None

    zeros = jnp.zeros(flat.shape, jnp.float32), jax.tree.map(jnp.zeros_like, linear)
    zeros[1]["weight"] = sharding.constrain(zeros[1]["weight"], vocab_chunks.axes(config), config.phase)
    (of_flat, of_linear), _ = jax.lax.scan(body, zeros, chunks.firsts)
    return of_flat.astype(flat.dtype), of_linear, None, None, jnp.zeros_like(temperature)


_stats.defvjp(_forward, _backward)


def token_kl(
    params: Params,
    hidden: jax.Array,
    reference: Params,
    reference_hidden: jax.Array,
    config: DecoderConfig,
    temperature: jax.Array | float = 1.0,
) -> jax.Array:
    """KL(policy || reference) of the next-token distributions, summed over the whole vocabulary, not sampled.

    Args:
      params, hidden: the policy and its hidden states, [..., D].
      reference, reference_hidden: the reference policy's, [..., D].
      config: the decoder of both.
      temperature: divides both sides' logits.

    Returns:
      float32 [...], in nats, at least zero up to rounding.
    """
    flat, flat_reference = (x.reshape(-1, x.shape[-1]) for x in (hidden, reference_hidden))
    linear, linear_ref = dict(head(params)), dict(head(reference))
    chunks = vocab_chunks.chunks(linear, len(flat))

    def body(carry, first):
        largest, total, gap, largest_ref, total_ref = carry
        scores = vocab_chunks.scores(flat, chunks.cut(linear, first), temperature, config)
        scores_ref = vocab_chunks.scores(flat_reference, chunks.cut(linear_ref, first), temperature, config)
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
    params: Params, config: DecoderConfig, tokens: jax.Array, temperature: jax.Array | float = 1.0
) -> jax.Array:
    """Logprob of every token but the first, given those before it.

    Args:
      params: with adapters or not.
      config: the decoder.
      tokens: int32 [B, T].
      temperature: divides the logits.

    Returns:
      float32 [B, T - 1].

    Raises:
      ValueError: if a token that is known is not in the vocabulary.
    """
    layers.check_ids("tokens", tokens, config)
    hidden, _ = forward(params, config, tokens[:, :-1])
    return target_logprobs(params, config, hidden, tokens[:, 1:], temperature).logprobs
