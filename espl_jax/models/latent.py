"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

A token has one latent, from which the keys and values of all heads are linear functions, and one rotated key,
which all heads share. The KV cache holds just these two: the latent as the value and the rotated key as the
key of a single head. A head's key is its part of the expanded latent and the rotated key, side by side.

A level attends in one of two ways, with the same result:

- Absorbed: the map from latents to keys is applied to the queries instead, and that from latents to values to
  the result of the attention. Nothing is expanded: this is multi-query attention whose values are also a part
  of its keys.
- Expanded: the keys and values of all heads are formed, for every ancestor node once, and the attention is
  ordinary multi-head attention with narrower heads.

Shape letters besides those of `layers.py`: C width of a latent, P width of the rotated part of a head, U the
unrotated part of keys and queries, V the width of values; H = U + P.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from espl_jax.models import layers, rope
from espl_jax.models.attention import Source, is_decoding
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import SCALE, Params
from espl_jax.parallel import sharding


def project(
    x: jax.Array, weights: Params, decoder: DecoderConfig, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes queries, and what the cache holds of keys and values.

    Args:
      x: [T, D], normalized.
      weights: the attention's weights of one layer.
      decoder: the model's configuration.
      cos, sin: float32 [T, P / 2], from `rope.tables`.

    Returns:
      (query, key, latent): [T, N, H] with the rotated part last, the rotated key [T, 1, P], and [T, 1, C].
    """
    latent = decoder.latent
    assert latent is not None

    def rotated(x: jax.Array) -> jax.Array:
        return rope.rotate(x, cos, sin, decoder.rope.interleaved)

    if latent.query_rank:
        low = layers.einsum("td,dc->tc", x, weights["query_down"], decoder)
        low = layers.rms_norm(low, weights["query_norm"], decoder, latent.norm_eps)
        query = layers.einsum("tc,cnh->tnh", low, weights["query_up"], decoder)
    else:
        query = layers.einsum("td,dnh->tnh", x, weights["query"], decoder)
    plain, turning = jnp.split(query, [_unrotated(decoder)], axis=-1)
    query = jnp.concatenate([plain, rotated(turning)], axis=-1)

    both = layers.einsum("td,dc->tc", x, weights["kv_down"], decoder)
    low, key = jnp.split(both, [latent.kv_rank], axis=-1)
    low = layers.rms_norm(low, weights["kv_norm"], decoder, latent.norm_eps)
    return query, rotated(key[:, None]), low[:, None]


def attend(
    plainly: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    latent: jax.Array,
    ancestors: Sequence[Source],
    kv_up: layers.Linear,
    decoder: DecoderConfig,
) -> jax.Array:
    """Attends to the ancestors and, causally, to the level itself, with a single softmax over both.

    Args:
      plainly: `attention.attend` with everything but the first four of its arguments given.
      query, key, latent: [R, T, N, H], [R, T, 1, P] and [R, T, 1, C], from `project`.
      ancestors: outermost first, with keys and values as in the cache.
      kv_up: the layer that expands latents, with its adapter.
      decoder: the model's configuration.

    Returns:
      [R, T, N, V].
    """
    rows, steps = query.shape[:2]

    def by_node(x: jax.Array) -> jax.Array:
        """[.., N, x] -> [R, T, N, x], sharded for attention."""
        x = x.reshape(rows, steps, *x.shape[-2:])
        return sharding.constrain(x, ("rows", None, "kv_heads", None), decoder.phase)

    if absorbs(rows, steps, ancestors, decoder):
        query = absorb(query.reshape(-1, *query.shape[2:]), kv_up, decoder)
        out = plainly(by_node(query), key, latent, ancestors)
        return by_node(values(out.reshape(-1, *out.shape[2:]), kv_up, decoder))
    key, value = map(by_node, expand(key, latent, kv_up, decoder))
    return plainly(query, key, value, [expand_source(source, kv_up, decoder) for source in ancestors])


def absorbs(rows: int, steps: int, ancestors: Sequence[Source], decoder: DecoderConfig) -> bool:
    """Returns whether a level of `rows` nodes with `steps` tokens each should attend absorbed.

    A decode step always does: it reads every cached latent once for few queries, and expanding would write
    and read N heads for each. Longer levels take what needs less arithmetic. Per head, absorbing costs
    2 C - U - V multiply-adds more for every pair of a query and a column, and expanding C (U + V) for every
    column of an ancestor node; on the level's own tokens, they need the same up-projections.
    """
    latent = decoder.latent
    assert latent is not None
    if is_decoding(steps, decoder):
        return True
    expanded = _unrotated(decoder) + latent.value_dim
    columns = steps + sum(source.filled.shape[1] for source in ancestors)
    held = sum(math.prod(source.filled.shape) for source in ancestors)
    return rows * steps * columns * (2 * latent.kv_rank - expanded) <= held * latent.kv_rank * expanded


def absorb(query: jax.Array, kv_up: layers.Linear, decoder: DecoderConfig) -> jax.Array:
    """Returns queries that are compared with rotated keys and latents: [T, N, U + P] -> [T, N, P + C]."""
    plain, turned = jnp.split(query, [_unrotated(decoder)], axis=-1)
    keys = _columns(kv_up, slice(None, plain.shape[-1]))
    # The outputs of the map from latents to keys are contracted here, so their scales belong to the queries.
    scaled = plain.astype(jnp.float32) * keys[SCALE] if SCALE in keys else plain
    out = layers.product_by_head("tnh,cnh->tnc", scaled.astype(plain.dtype), keys["weight"], decoder)
    if "lora_a" in keys:
        low = layers.product_by_head("tnh,rnh->tnr", plain, keys["lora_b"], decoder)
        out = out + decoder.lora_scale * layers.product("tnr,cr->tnc", low, keys["lora_a"], decoder)
    return jnp.concatenate([turned, out.astype(turned.dtype)], axis=-1)


def values(attended: jax.Array, kv_up: layers.Linear, decoder: DecoderConfig) -> jax.Array:
    """Returns the values that belong to averaged latents, [T, N, C] -> [T, N, V]."""
    up = _columns(kv_up, slice(_unrotated(decoder), None))
    out = layers.product_by_head("tnc,cnh->tnh", attended, up["weight"], decoder, up.get(SCALE))
    if "lora_a" in up:
        low = layers.product("tnc,cr->tnr", attended, up["lora_a"], decoder)
        out = out + decoder.lora_scale * layers.product_by_head("tnr,rnh->tnh", low, up["lora_b"], decoder)
    return out


def _columns(kv_up: layers.Linear, cut: slice) -> layers.Linear:
    """Returns the part of `kv_up` that makes keys, or values."""
    return {name: x if name == "lora_a" else x[..., cut] for name, x in kv_up.items()}


def expand(
    key: jax.Array, latent: jax.Array, kv_up: layers.Linear, decoder: DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values of all heads: [A, c, 1, P], [A, c, 1, C] -> [A, c, N, H], [A, c, N, V]."""
    nodes, columns = key.shape[:2]
    both = layers.einsum("tc,cnh->tnh", latent.reshape(nodes * columns, -1), kv_up, decoder)
    both = both.astype(latent.dtype).reshape(nodes, columns, *both.shape[1:])
    plain, value = jnp.split(both, [_unrotated(decoder)], axis=-1)
    shared = jnp.broadcast_to(key, (*plain.shape[:-1], key.shape[-1]))
    return jnp.concatenate([plain, shared], axis=-1), value


def expand_source(source: Source, kv_up: layers.Linear, decoder: DecoderConfig) -> Source:
    """Returns an ancestor with the keys [N, A, H, C] and values [N, A, C, V] of all heads."""
    key, value = expand(source.key.transpose(1, 3, 0, 2), source.value.transpose(1, 2, 0, 3), kv_up, decoder)
    return source._replace(key=key.transpose(2, 0, 3, 1), value=value.transpose(2, 0, 1, 3))


def _unrotated(decoder: DecoderConfig) -> int:
    """Returns U, the width of the part of queries and keys without positions."""
    return decoder.head_dim - decoder.rope_dim
