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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax.models import layers, rope, splash
from espl_jax.models.attention import KVCache, RowsView, Source, attend
from espl_jax.models.config import DecoderConfig

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Weight:
    """The declaration of one weight, from which init, shardings, adapters and memory plans derive.

    Attributes:
      axes: a logical name for each dimension; `layers` first for the stacked weights of all layers.
      inputs: the axes that a product contracts; empty for norm scales and biases.
      shape: a size for each axis.
      dtype: storage dtype.
      fill: what a norm scale or a bias begins with.
    """

    axes: tuple[str, ...]
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    fill: float = 0.0

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

    def declare(axes: str, inputs: str = "", fill: float = 0.0) -> Weight:
        names = tuple(axes.split())
        shape = tuple(sizes[axis] for axis in names)
        return Weight(names, tuple(inputs.split()), shape, config.param_dtype, fill)

    def linear(inputs: str, outputs: str, bias: bool) -> Params:
        layer = {"weight": declare(f"layers {inputs} {outputs}", inputs)}
        return layer | ({"bias": declare(f"layers {outputs}")} if bias else {})

    def norm(axes: str) -> Params:
        return {"scale": declare(axes, fill=1.0 - config.norm_offset)}

    attention = {
        "query": linear("embed", "heads head", config.qkv_bias),
        "key": linear("embed", "kv_heads head", config.qkv_bias),
        "value": linear("embed", "kv_heads head", config.qkv_bias),
        "out": linear("heads head", "embed", config.out_bias),
    }
    if config.qk_norm:
        attention |= {"query_norm": norm("layers head"), "key_norm": norm("layers head")}
    layer = {
        "attention_norm": norm("layers embed"),
        "attention": attention,
        "mlp_norm": norm("layers embed"),
        "mlp": {
            "gate": linear("embed", "mlp", config.mlp_bias),
            "up": linear("embed", "mlp", config.mlp_bias),
            "down": linear("mlp", "embed", config.mlp_bias),
        },
    }
    if config.post_norms:
        layer |= {"post_attention_norm": norm("layers embed"), "post_mlp_norm": norm("layers embed")}
    params = {
        "embedding": {"weight": declare("vocab embed", "embed")},
        "layers": layer,
        "final_norm": norm("embed"),
    }
    if not config.tied_head:
        params["head"] = {"weight": declare("vocab embed", "embed")}
    return params


def init(key: jax.Array, config: DecoderConfig) -> Params:
    """Random params: norms at one, biases at zero, the rest normal with deviation 1 / sqrt(fan in).

    Consumes `key`.
    """
    leaves, tree = jax.tree.flatten(abstract(config))
    keys = jax.random.split(key, len(leaves))

    def draw(weight: Weight, key: jax.Array) -> jax.Array:
        if not weight.inputs:
            return jnp.full(weight.shape, weight.fill, weight.dtype)
        return (weight.fan_in**-0.5 * jax.random.normal(key, weight.shape)).astype(weight.dtype)

    return jax.tree.unflatten(tree, [draw(w, k) for w, k in zip(leaves, keys, strict=True)])


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array | Sequence[jax.Array],
    lengths: jax.Array | Sequence[jax.Array] | None = None,
    ancestors: Sequence[KVCache | RowsView] = (),
) -> tuple[Any, Any]:
    """Runs one level of the tree, or several, over their ancestors' caches.

    Args:
      params: with adapters attached or not.
      config: the decoder.
      tokens: int32 [R, T], right padded; or a tuple of such levels, outermost first, in which each level
        attends to those before it. The linear layers see the tokens of all levels as one matrix.
      lengths: int32 [R] real tokens of each node (of each level), at least none; all of them by default.
      ancestors: caches of the levels above, outermost first; each one's number of nodes divides R, and
        neighbouring nodes share an ancestor, or it names the `owner` of every row. The last one has no owner.

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
    ends = [cache.end for cache in ancestors if cache.owner is None]
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
    positions = jnp.concatenate([p.reshape(-1) for p in positions])
    x = layers.embed(jnp.concatenate([level.reshape(-1) for level in levels]), params["embedding"], config)

    ropes = (config.rope,) if config.local_rope is None else (config.rope, config.local_rope)
    layer = functools.partial(
        _layer,
        config=config,
        rotations=[rope.tables(positions, each, config.head_dim) for each in ropes],
        shapes=shapes,
        starts=starts,
        ancestors=tuple(ancestors),
        own_filled=tuple(
            jnp.arange(level.shape[1]) < length[:, None]
            for level, length in zip(levels, lengths, strict=True)
        ),
    )
    stacked = tuple(None if isinstance(c, RowsView) else (c.key, c.value) for c in ancestors)
    index = jnp.arange(config.num_layers)
    x, written = _run_layers(layer, config, x, (params["layers"], stacked, index))

    x = layers.rms_norm(x, params["final_norm"], config)
    hidden = tuple(_split(x, shapes))
    caches = tuple(KVCache(k, v, start, n) for (k, v), start, n in zip(written, starts, lengths, strict=True))
    return (hidden[0], caches[0]) if single else (hidden, caches)


def _run_layers(layer: Callable[..., Any], config: DecoderConfig, x: jax.Array, stacked: Any) -> Any:
    """Runs all layers, each with its slice of `stacked`: (x, what the layers returned, stacked)."""
    windows = config.windows or (0,) * config.num_layers

    def checkpointed(window: int | None) -> Callable[..., Any]:
        """The layer with a window known to the compiler, or given with each layer's slice."""
        known = layer if window is None else functools.partial(layer, window=window)
        return jax.checkpoint(known) if config.remat else known

    if config.scan_layers:
        if len(set(windows)) == 1:
            body = checkpointed(windows[0])
            return jax.lax.scan(lambda x, xs: body(x, *xs), x, stacked)
        body = checkpointed(None)
        return jax.lax.scan(
            lambda x, xs: body(x, *xs[0], window=xs[1]), x, (stacked, jnp.array(windows, jnp.int32))
        )
    written = []
    for i, window in enumerate(windows):
        x, new = checkpointed(window)(x, *jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        written.append(new)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *written)


def _layer(x, weights, above, index, *, window, config, rotations, shapes, starts, ancestors, own_filled):
    """One decoder layer on the flattened tokens of all levels. Returns x and each level's (key, value).

    `above` has the layer's (key, value) of each ancestor, or None for one that is read by the layer's
    `index`. `window` is the number of tokens that a token sees, 0 for all: a plain number, or a traced one
    where scanned layers differ.
    """
    y = layers.rms_norm(x, weights["attention_norm"], config)
    attention = weights["attention"]
    query = layers.einsum("td,dnh->tnh", y, attention["query"], config)
    key = layers.einsum("td,dkh->tkh", y, attention["key"], config)
    value = layers.einsum("td,dkh->tkh", y, attention["value"], config).astype(config.dtype)
    if config.qk_norm:
        query = layers.rms_norm(query, attention["query_norm"], config)
        key = layers.rms_norm(key, attention["key_norm"], config)
    cos, sin = _rotation(rotations, window)
    query = rope.rotate(query, cos, sin).astype(config.dtype)
    key = rope.rotate(key, cos, sin).astype(config.dtype)

    if isinstance(window, jax.Array):
        window = jnp.where(window == 0, jnp.iinfo(jnp.int32).max, window)
    sources = [
        Source(*(arrays or cache.layer(index)), cache.filled, cache.start, cache.owner)
        for arrays, cache in zip(above, ancestors, strict=True)
    ]
    mixed, written = [], []
    levels = (_split(part, shapes) for part in (query, key, value))
    for q, k, v, mask, start in zip(*levels, own_filled, starts, strict=True):
        if splash.on_tpu(q) and splash.fits(q.shape[1], sources, config, window):
            out = splash.splash_attend(q, k, v, sources, config, window)
        else:
            out = attend(q, k, v, sources, config, start, window)
        mixed.append(out.reshape(-1, *query.shape[1:]))
        written.append((k.transpose(2, 0, 3, 1), v.transpose(2, 0, 1, 3)))
        sources.append(Source(*written[-1], mask, start))

    out = layers.einsum("tnh,nhd->td", jnp.concatenate(mixed), attention["out"], config)
    x = x + (layers.rms_norm(out, weights["post_attention_norm"], config) if config.post_norms else out)
    y = layers.rms_norm(x, weights["mlp_norm"], config)
    out = layers.gated_mlp(y, weights["mlp"], config)
    x = x + (layers.rms_norm(out, weights["post_mlp_norm"], config) if config.post_norms else out)
    return x, tuple(written)


def _rotation(rotations: Sequence[Any], window: jax.Array | int) -> Any:
    """The cosines and sines of a layer: the second ones belong to layers with a window."""
    if len(rotations) == 1:
        return rotations[0]
    if isinstance(window, int):
        return rotations[1 if window else 0]
    return jax.tree.map(lambda full, local: jnp.where(window == 0, full, local), *rotations)


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
