"""Logprobs, entropy and KL of tokens from hidden states, the vocabulary taken in chunks.

The array [tokens, V] never exists: a scan over chunks of the head keeps running sums and recomputes each
chunk in the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from espl_jax.models import layers
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import Params, forward, head

VOCAB_CHUNK = 8192


class TokenStats(NamedTuple):
    """Per token, of the shape of the targets; float32 but for `cut`.

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
    and the target itself; which tokens those are has no gradient, nor have `entropy` and `untruncated` then.

    Args:
      params: the head's weight is read from them.
      config: the decoder.
      hidden: [..., D], after the final norm.
      targets: int32 [...].
      temperature: divides the logits.
      cutoffs: float32 [...], the sampler's cut-off logprobs, -inf where it cut nothing; None for no cut-offs.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)

    def body(carry, chunk):
        largest, total, weighted, target = carry
        scores, columns, fresh = _chunk_scores(params, config, flat, chunk, temperature)
        scores = jnp.where(fresh, scores, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.maximum(largest, scores.max(axis=1)))
        shrink, parts = jnp.exp(largest - top), jnp.exp(scores - top[:, None])
        total = total * shrink + parts.sum(axis=1)
        weighted = weighted * shrink + (parts * jnp.where(fresh, scores, 0.0)).sum(axis=1)
        target = target + jnp.where((wanted[:, None] == columns) & fresh, scores, 0.0).sum(axis=1)
        return (top, total, weighted, target), None

    zeros = jnp.zeros(flat.shape[0], jnp.float32)
    carry = (jnp.full_like(zeros, -jnp.inf), zeros, zeros, zeros)
    (largest, total, weighted, target), _ = jax.lax.scan(jax.checkpoint(body), carry, _chunks(config))
    normalizer = largest + jnp.log(total)
    untruncated, entropy = target - normalizer, normalizer - weighted / total
    logprobs, cut = untruncated, jnp.zeros(wanted.shape, bool)
    if cutoffs is not None:
        largest, normalizer, target, untruncated, entropy = jax.lax.stop_gradient(
            (largest, normalizer, target, untruncated, entropy)
        )
        bounds = cutoffs.reshape(-1)
        cut = untruncated < bounds
        logprobs = _kept_logprobs(
            params, config, flat, wanted, temperature, bounds + normalizer, largest, target
        )
    stats = TokenStats(logprobs, entropy, untruncated, cut)
    return TokenStats(*(x.reshape(targets.shape) for x in stats))


def _kept_logprobs(
    params: Params,
    config: DecoderConfig,
    flat: jax.Array,
    wanted: jax.Array,
    temperature: jax.Array | float,
    bounds: jax.Array,
    largest: jax.Array,
    target: jax.Array,
) -> jax.Array:
    """Logprobs of the targets among the tokens whose score (logit / temperature) reaches a bound.

    Args:
      params, config, temperature: of the scores.
      flat: [tokens, D]; wanted: int32 [tokens], the targets, which are always kept.
      bounds: float32 [tokens], least score kept.
      largest, target: float32 [tokens], the largest score and the target's; no gradient flows through them.
    """
    # The largest score of those kept: if not the largest of all, nothing but the target is.
    top = jnp.where(largest >= bounds, largest, target)

    def body(carry, chunk):
        total, target = carry
        scores, columns, fresh = _chunk_scores(params, config, flat, chunk, temperature)
        is_target = (wanted[:, None] == columns) & fresh
        kept = ((scores >= bounds[:, None]) & fresh) | is_target
        shifted = jnp.where(kept, scores - top[:, None], 0.0)
        total = total + jnp.where(kept, jnp.exp(shifted), 0.0).sum(axis=1)
        return (total, target + jnp.where(is_target, shifted, 0.0).sum(axis=1)), None

    zeros = jnp.zeros(flat.shape[0], jnp.float32)
    (total, target), _ = jax.lax.scan(jax.checkpoint(body), (zeros, zeros), _chunks(config))
    return target - jnp.log(total)


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

    def body(carry, chunk):
        largest, total, gap, largest_ref, total_ref = carry
        scores, _, fresh = _chunk_scores(params, config, flat, chunk, temperature)
        scores_ref, _, _ = _chunk_scores(reference, config, flat_reference, chunk, temperature)
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
        jax.checkpoint(body), carry, _chunks(config)
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
    """
    hidden, _ = forward(params, config, tokens[:, :-1])
    return target_logprobs(params, config, hidden, tokens[:, 1:], temperature).logprobs


def _chunks(config: DecoderConfig) -> jax.Array:
    """First column of each vocabulary chunk; the last chunk may reach back over columns already seen."""
    return jnp.arange(0, config.vocab_size, min(VOCAB_CHUNK, config.vocab_size))


def _chunk_scores(params: Params, config: DecoderConfig, flat: jax.Array, first: jax.Array, temperature: Any):
    """Scores [tokens, C] of one chunk, the columns they belong to [C], and which are new."""
    size = min(VOCAB_CHUNK, config.vocab_size)
    start = jnp.minimum(first, config.vocab_size - size)
    linear = dict(head(params))
    linear["weight"] = jax.lax.dynamic_slice_in_dim(linear["weight"], start, size, axis=0)
    if "lora_b" in linear:
        linear["lora_b"] = jax.lax.dynamic_slice_in_dim(linear["lora_b"], start, size, axis=1)
    scores = layers.einsum("td,vd->tv", flat, linear, config, "float32") / temperature
    columns = start + jnp.arange(size)
    return scores, columns, columns >= first
