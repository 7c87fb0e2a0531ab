"""The decoder: one declaration per weight, and one `forward` over a prefix tree.

A batch of sequences that share prefixes is a tree: system prompts [M], under each its problems [M*B],
under each of those its rollouts [M*B*N]. Each node holds its own tokens once. `forward` runs one level, or
several at once, over the KV caches of the levels above: prefill, decode step, scoring and policy gradient
are all this function.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax.models import layers
from espl_jax.models.attention import KVCache, Source, attend
from espl_jax.models.config import DecoderConfig

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Weight:
    """The declaration of one weight, from which init, shardings, adapters and memory plans derive.

    Attributes:
      axes: a logical name for each dimension; `layers` first for the stacked weights of all layers.
      inputs: the axes that a product contracts; empty for norm scales.
      shape: a size for each axis.
      dtype: storage dtype.
    """

    axes: tuple[str, ...]
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def fan_in(self) -> int:
        """Number of values summed into one output."""
        return math.prod(
            size for axis, size in zip(self.axes, self.shape, strict=True) if axis in self.inputs
        )


def abstract(config: DecoderConfig) -> Params:
    """The params pytree with a `Weight` at every leaf."""
    sizes = {
        "layers": config.num_layers,
        "embed": config.embed_dim,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head": config.head_dim,
        "mlp": config.mlp_dim,
        "vocab": config.vocab_size,
    }

    def weight(axes: str, inputs: str = "") -> Weight:
        names = tuple(axes.split())
        return Weight(names, tuple(inputs.split()), tuple(sizes[a] for a in names), config.param_dtype)

    params = {
        "embedding": {"weight": weight("vocab embed", inputs="embed")},
        "layers": {
            "attention_norm": {"scale": weight("layers embed")},
            "attention": {
                "query": {"weight": weight("layers embed heads head", inputs="embed")},
                "key": {"weight": weight("layers embed kv_heads head", inputs="embed")},
                "value": {"weight": weight("layers embed kv_heads head", inputs="embed")},
                "out": {"weight": weight("layers heads head embed", inputs="heads head")},
            },
            "mlp_norm": {"scale": weight("layers embed")},
            "mlp": {
                "gate": {"weight": weight("layers embed mlp", inputs="embed")},
                "up": {"weight": weight("layers embed mlp", inputs="embed")},
                "down": {"weight": weight("layers mlp embed", inputs="mlp")},
            },
        },
        "final_norm": {"scale": weight("embed")},
    }
    if not config.tied_head:
        params["head"] = {"weight": weight("vocab embed", inputs="embed")}
    return params


def init(key: jax.Array, config: DecoderConfig) -> Params:
    """Random params: norms at one, the rest normal with deviation 1 / sqrt(fan in). Consumes `key`."""
    leaves, tree = jax.tree.flatten(abstract(config))
    keys = jax.random.split(key, len(leaves))

    def draw(weight: Weight, key: jax.Array) -> jax.Array:
        if not weight.inputs:
            return jnp.ones(weight.shape, weight.dtype)
        return (weight.fan_in**-0.5 * jax.random.normal(key, weight.shape)).astype(weight.dtype)

    return jax.tree.unflatten(tree, [draw(w, k) for w, k in zip(leaves, keys, strict=True)])


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array | Sequence[jax.Array],
    lengths: jax.Array | Sequence[jax.Array] | None = None,
    ancestors: Sequence[KVCache] = (),
) -> tuple[Any, Any]:
    """Runs one level of the tree, or several, over their ancestors' caches.

    Args:
      params: with adapters attached or not.
      config: the decoder.
      tokens: int32 [R, T], right padded; or a tuple of such levels, outermost first, in which each level
        attends to those before it. The linear layers see the tokens of all levels as one matrix.
      lengths: int32 [R] real tokens of each node (of each level), at least none; all of them by default.
      ancestors: caches of the levels above, outermost first; each one's number of nodes divides R, and
        neighbouring nodes share an ancestor.

    Returns:
      (hidden, cache): float [R, T, D] after the final norm, and the level's own KVCache with capacity T;
      tuples of them when `tokens` is one. Values at padding are finite and meaningless.

    Raises:
      ValueError: if a level's nodes do not divide among those of a level above.
    """
    single = not isinstance(tokens, tuple | list)
    levels = (tokens,) if single else tuple(tokens)
    if lengths is None:
        lengths = tuple(jnp.full(level.shape[:1], level.shape[1], jnp.int32) for level in levels)
    elif single:
        lengths = (lengths,)

    starts = []
    ends = [cache.end for cache in ancestors]
    for level, length in zip(levels, lengths, strict=True):
        nodes = level.shape[0]
        for end in ends:
            if nodes % end.shape[0]:
                raise ValueError(
                    f"tokens of shape {level.shape}: {nodes} nodes cannot share {end.shape[0]} ancestors "
                    "evenly; pad the level so that every ancestor has the same number of children"
                )
        above = ends[-1] if ends else jnp.zeros(nodes, jnp.int32)
        starts.append(jnp.repeat(above, nodes // above.shape[0], total_repeat_length=nodes))
        ends.append(starts[-1] + length)

    shapes = tuple(level.shape for level in levels)
    positions = [start[:, None] + jnp.arange(x.shape[1]) for start, x in zip(starts, levels, strict=True)]
    angles = layers.rope_angles(jnp.concatenate([p.reshape(-1) for p in positions]), config)
    x = layers.embed(jnp.concatenate([level.reshape(-1) for level in levels]), params["embedding"])

    layer = functools.partial(
        _layer,
        config=config,
        angles=angles,
        shapes=shapes,
        filled=tuple(jnp.arange(cache.key.shape[3]) < cache.length[:, None] for cache in ancestors),
        own_filled=tuple(
            jnp.arange(level.shape[1]) < length[:, None]
            for level, length in zip(levels, lengths, strict=True)
        ),
    )
    if config.remat:
        layer = jax.checkpoint(layer)
    above = tuple((cache.key, cache.value) for cache in ancestors)
    if config.scan_layers:
        x, written = jax.lax.scan(lambda x, xs: layer(x, *xs), x, (params["layers"], above))
    else:
        written = []
        for i in range(config.num_layers):
            x, new = layer(x, *jax.tree.map(lambda leaf, i=i: leaf[i], (params["layers"], above)))
            written.append(new)
        written = jax.tree.map(lambda *leaves: jnp.stack(leaves), *written)

    x = layers.rms_norm(x, params["final_norm"], config)
    hidden = tuple(_split(x, shapes))
    caches = tuple(KVCache(k, v, start, n) for (k, v), start, n in zip(written, starts, lengths, strict=True))
    return (hidden[0], caches[0]) if single else (hidden, caches)


def _layer(x, weights, above, *, config, angles, shapes, filled, own_filled):
    """One decoder layer on the flattened tokens of all levels. Returns x and each level's (key, value)."""
    y = layers.rms_norm(x, weights["attention_norm"], config)
    query = layers.einsum("td,dnh->tnh", y, weights["attention"]["query"], config)
    key = layers.einsum("td,dkh->tkh", y, weights["attention"]["key"], config)
    value = layers.einsum("td,dkh->tkh", y, weights["attention"]["value"], config).astype(config.dtype)
    query = layers.rope(query, angles).astype(config.dtype)
    key = layers.rope(key, angles).astype(config.dtype)

    sources = [Source(k, v, mask) for (k, v), mask in zip(above, filled, strict=True)]
    mixed, written = [], []
    levels = (_split(part, shapes) for part in (query, key, value))
    for q, k, v, mask in zip(*levels, own_filled, strict=True):
        mixed.append(attend(q, k, v, sources, config).reshape(-1, *query.shape[1:]))
        written.append((k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3)))
        sources.append(Source(*written[-1], mask))

    out = layers.einsum("tnh,nhd->td", jnp.concatenate(mixed), weights["attention"]["out"], config)
    x = x + out
    y = layers.rms_norm(x, weights["mlp_norm"], config)
    return x + layers.gated_mlp(y, weights["mlp"], config), tuple(written)


def _split(x: jax.Array, shapes: Sequence[tuple[int, int]]) -> list[jax.Array]:
    """Cuts flattened tokens [T, ...] into levels [R, T, ...]."""
    parts = jnp.split(x, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return [part.reshape(*shape, *x.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]


def head(params: Params) -> layers.Linear:
    """The output head's weight, [V, D]: the embedding where the two are tied."""
    return params.get("head", params["embedding"])


def unembed(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Hidden states after the final norm to logits. [..., D] -> float32 [..., V]."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = layers.einsum("td,vd->tv", flat, head(params), config, "float32")
    return out.reshape(*hidden.shape[:-1], -1)


def logits(params: Params, config: DecoderConfig, tokens: jax.Array) -> jax.Array:
    """Next-token logits of plain sequences, causal. int32 [B, T] -> float32 [B, T, V]."""
    hidden, _ = forward(params, config, tokens)
    return unembed(params, config, hidden)
