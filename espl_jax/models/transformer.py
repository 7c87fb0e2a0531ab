"""The decoder: a single `forward` over a prefix tree.

A batch of sequences that share prefixes is a tree: system prompts [M], the problems of each [M*B], and the
rollouts of each of those [M*B*N]. Every node stores only its own tokens. `forward` runs one level given the
KV caches of the levels above; prefill, decode steps, scoring and the policy gradient all use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from espl_jax.models import experts, grouped, latent, layers, rope, splash
from espl_jax.models.attention import ATTENTION, GappedCache, KVCache, RowsView, Source, attend, of_owners
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import ADAPTER, Params, Weight, abstract, stacks
from espl_jax.models.stack import LAYER_INPUT, run_layers
from espl_jax.parallel import sharding

Cache = KVCache | GappedCache | RowsView
"""Keys and values of a level above."""


class Level(NamedTuple):
    """One level of the tree after `forward`.

    Attributes:
      hidden: float [R, T, D], after the final norm.
      cache: the level's own keys and values, with capacity T.
      routing: of the layers with experts, each array [L, R, T, ...] (see `Routing`); None without experts.
    """

    hidden: jax.Array
    cache: KVCache
    routing: experts.Routing | None


def forward(
    params: Params,
    decoder: DecoderConfig,
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    ancestors: Sequence[Cache] = (),
    replay: jax.Array | None = None,
) -> Level:
    """Runs one level of the tree, given its ancestors' caches.

    Args:
      params: with or without adapters.
      decoder: the model's configuration.
      tokens: int32 [R, T], right-padded.
      lengths: int32 [R], number of real tokens of each node, may be 0; all T by default.
      ancestors: caches of the levels above, outermost first. The number of nodes of each divides R and
        adjacent rows share a node, unless the cache has an `owner` for every row.
      replay: int [L, R, T, A], experts to use instead of those that the routers prefer; a negative number
        keeps the preferred one. None for no replay.

    Returns:
      The level. Values at padding are finite but meaningless.

    Raises:
      ValueError: if the rows cannot be divided equally among the nodes of a level above, or a token id is
        outside the vocabulary (not checked under jit).
    """
    layers.check_ids("tokens", tokens, decoder, lengths)
    nodes, steps = tokens.shape
    if lengths is None:
        lengths = jnp.full(nodes, steps, jnp.int32)
    for cache in ancestors:
        if cache.owner is None and nodes % cache.end.shape[0]:
            raise ValueError(
                f"tokens of shape {tokens.shape}: {nodes} nodes cannot share {cache.end.shape[0]} ancestors "
                "evenly; pad the level so that every ancestor has the same number of children, or name owners"
            )
    start = _start(ancestors, nodes)
    positions = (start[:, None] + jnp.arange(steps)).reshape(-1)
    x = layers.embed(tokens.reshape(-1), params["embedding"], decoder)

    ropes = (decoder.rope,) if decoder.local_rope is None else (decoder.rope, decoder.local_rope)
    layer = functools.partial(
        _layer,
        decoder=decoder,
        rotations=[rope.tables(positions, each, decoder.rope_dim) for each in ropes],
        shape=(nodes, steps),
        start=start,
        ancestors=tuple(ancestors),
    )
    above = tuple(None if isinstance(c, RowsView) else (c.key, c.value) for c in ancestors)
    if replay is not None:
        replay = replay.reshape(replay.shape[0], nodes * steps, -1)
    written, routing = [], None
    for stack, numbers in stacks(decoder).items():
        given = params[stack], abstract(decoder)[stack], numbers
        has_experts = numbers.stop > decoder.first_dense
        x, (*own, routing) = _run_stack(layer, decoder, *given, x, above, replay if has_experts else None)
        written.append(own)
    key, value = written[0] if len(written) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *written)

    x = sharding.move(layers.rms_norm(x, params["final_norm"], decoder), *_TOKENS, decoder.phase)
    by_node = jax.tree.map(lambda each: each.reshape(-1, nodes, steps, *each.shape[2:]), routing)
    return Level(x.reshape(nodes, steps, -1), KVCache(key, value, start, lengths), by_node)


def _run_stack(
    layer: Callable[..., Any],
    decoder: DecoderConfig,
    weights: Params,
    declared: Params,
    numbers: range,
    x: jax.Array,
    above: Any,
    replay: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, experts.Routing | None]]:
    """Runs a stack: the layers with these numbers.

    `above` has the keys and values of all layers, `replay` the experts of this stack's.
    """
    layer = functools.partial(layer, declared=declared)
    weights, layer = _with_whole(layer, weights, declared, decoder, numbers.start)
    if len(numbers) < decoder.num_layers:
        above = jax.tree.map(lambda x: x[numbers.start : numbers.stop], above)
    windows = (decoder.windows or (0,) * decoder.num_layers)[numbers.start : numbers.stop]
    index = jnp.arange(numbers.start, numbers.stop)
    return run_layers(layer, decoder, windows, x, (weights, above, index, replay))


def _with_whole(
    layer: Callable[..., Any], weights: Params, declared: Params, decoder: DecoderConfig, first: int
) -> tuple[Params, Callable[..., Any]]:
    """Separates the weights that a scan over layers slices from those that a layer reads out of all layers'.

    The latter are unstacked weights and, while sampling, the weights of experts: a slice would copy all
    experts of the layer, and a decode step needs few of them.

    Returns:
      The weights to slice, and `layer` wrapped so that it also receives the others, with its place in their
      stack: its index minus `first`.
    """

    def is_whole(name: str, declared: Params) -> bool:
        if name == layers.OUTPUTS_FIRST:
            return True
        return decoder.phase == "sampling" and any("experts" in x.stack for x in declared.values())

    def sliced(node: Params, declared: Params) -> Params:
        return {
            name: sliced(child, declared[name]) if isinstance(child, dict) else child
            for name, child in node.items()
            if isinstance(child, dict) or not is_whole(name, declared)
        }

    def join(part: Params, whole: Params, index: jax.Array) -> Params:
        joined = {}
        for name, child in whole.items():
            if isinstance(child, dict):
                joined[name] = join(part[name], child, index)
            elif name in part:
                joined[name] = part[name]
            else:
                of_layer = layers.Unstacked if name == layers.OUTPUTS_FIRST else grouped.InStack
                joined[name] = of_layer(child, index)
        return joined

    def complete(x: jax.Array, part: Params, above: Any, index: jax.Array, *rest: Any, **window: Any) -> Any:
        return layer(x, join(part, weights, index - first), above, index, *rest, **window)

    return sliced(weights, declared), complete


def _start(ancestors: Sequence[Cache], nodes: int) -> jax.Array:
    """Returns int32 [R], the position after the last token of the last ancestor."""
    if not ancestors:
        return jnp.zeros(nodes, jnp.int32)
    last = ancestors[-1]
    if last.owner is not None:
        return of_owners(last.end, last.owner, last.parts)
    return jnp.repeat(last.end, nodes // last.end.shape[0], total_repeat_length=nodes)


_TOKENS = ("tokens", None), ("residual", None)
"""Logical axes of activations in matmuls and between them. In matmuls, every device has all tokens of its row
shard, forward and backward; between matmuls, the devices of a row shard each hold a part of the tokens."""


def _layer(
    x: jax.Array,
    weights: Params,
    above: Sequence[tuple[jax.Array, jax.Array] | None],
    index: jax.Array | int,
    replay: jax.Array | None,
    *,
    window: jax.Array | int,
    declared: Params,
    decoder: DecoderConfig,
    rotations: Sequence[Any],
    shape: tuple[int, int],
    start: jax.Array,
    ancestors: Sequence[Cache],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, experts.Routing | None]]:
    """Runs one decoder layer on the flattened tokens of a level. Returns x and the level's key, value and
    routing.

    `above` has this layer's (key, value) of each ancestor, or None for a `RowsView`, which is read at layer
    `index`. `window` is the number of tokens that a token attends to, 0 for no window: an int, or traced if
    scanned layers have different windows. `replay` has this layer's experts, as for `experts.route`.
    `declared` has the declarations of the layer's stack.
    """
    weights = _gathered(weights, declared, decoder)
    x = checkpoint_name(x, LAYER_INPUT)

    def by_node(x: jax.Array) -> jax.Array:
        """[.., heads, H] -> [R, T, heads, H], sharded for attention."""
        x = x.reshape(*shape, *x.shape[-2:])
        return sharding.constrain(x, ("rows", None, "kv_heads", None), decoder.phase)

    def normalized(x: jax.Array, norm: dict[str, jax.Array]) -> jax.Array:
        return sharding.move(layers.rms_norm(x, norm, decoder), *_TOKENS, decoder.phase)

    def joined(x: jax.Array, out: jax.Array) -> jax.Array:
        out = sharding.move(out, _TOKENS[1], _TOKENS[0], decoder.phase)
        return sharding.constrain(x + out, ("residual", None), decoder.phase)

    y = normalized(x, weights["attention_norm"])
    attention = weights["attention"]
    cos, sin = _rotation(rotations, window)
    if decoder.latent:
        query, key, value = latent.project(y, attention, decoder, cos, sin)
    else:
        query, key, value = _project(y, attention, decoder, cos, sin)
    query, key, value = (by_node(x.astype(decoder.dtype)) for x in (query, key, value))
    written = key.transpose(2, 0, 3, 1), value.transpose(2, 0, 1, 3)

    if isinstance(window, jax.Array):
        window = jnp.where(window == 0, jnp.iinfo(jnp.int32).max, window)
    sources = []
    for arrays, cache in zip(above, ancestors, strict=True):
        if isinstance(cache, RowsView):
            sources.append(cache.source(index, window))
        else:
            assert arrays is not None
            sources.append(Source(*arrays, cache.filled, cache.positions, cache.owner, cache.parts))
    sinks = attention["sinks"]["logit"] if decoder.attention_sinks else None
    attending = functools.partial(_attend, decoder=decoder, start=start, window=window, sinks=sinks)
    if decoder.latent:
        out = latent.attend(attending, query, key, value, sources, attention["kv_up"], decoder)
    else:
        out = attending(query, key, value, sources)

    out = by_node(out).reshape(-1, *out.shape[-2:])
    out = sharding.constrain(out, ("tokens", "heads", None), decoder.phase)
    out = layers.einsum("tnh,nhd->td", out, attention["out"], decoder, contracts="heads")
    x = joined(
        x, layers.rms_norm(out, weights["post_attention_norm"], decoder) if decoder.post_norms else out
    )
    y = normalized(x, weights["mlp_norm"])
    if "router" in weights["mlp"]:
        out, routing = experts.mixture(y, weights["mlp"], declared["mlp"], decoder, replay)
        if "shared" in weights["mlp"]:
            out += layers.gated_mlp(y, weights["mlp"]["shared"], decoder)
    else:
        out, routing = layers.gated_mlp(y, weights["mlp"], decoder), None
    x = joined(x, layers.rms_norm(out, weights["post_mlp_norm"], decoder) if decoder.post_norms else out)
    return x, (*written, routing)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sources: Sequence[Source],
    *,
    decoder: DecoderConfig,
    start: jax.Array,
    window: jax.Array | int,
    sinks: jax.Array | None,
) -> jax.Array:
    """Computes `attention.attend`, with the TPU kernel where it fits."""
    fits = query.shape[-1] == key.shape[-1] and splash.fits(query.shape[1], sources, decoder, window)
    if isinstance(window, int) and fits and splash.on_tpu(query):
        return splash.splash_attend(query, key, value, sources, decoder, window, sinks)
    return checkpoint_name(attend(query, key, value, sources, decoder, start, window, sinks), ATTENTION)


def _project(
    x: jax.Array, weights: Params, decoder: DecoderConfig, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the queries [T, N, H], keys and values [T, K, H] of grouped-query attention; x is [T, D]."""
    query = layers.einsum("td,dnh->tnh", x, weights["query"], decoder)
    key = layers.einsum("td,dkh->tkh", x, weights["key"], decoder)
    value = layers.einsum("td,dkh->tkh", x, weights["value"], decoder)
    if decoder.qk_norm:
        query = layers.rms_norm(query, weights["query_norm"], decoder)
        key = layers.rms_norm(key, weights["key_norm"], decoder)
    query, key = (rope.rotate(each, cos, sin, decoder.rope.interleaved) for each in (query, key))
    return query, key, value


def _gathered(weights: Params, declared: Params, decoder: DecoderConfig) -> Params:
    """Gathers one layer's weights for its matmuls: in training, all-gathered along `fsdp`.

    Weights are cast to the compute dtype first, to reduce the bytes moved.
    """
    if decoder.phase != "training":
        return weights

    def gather(name: str, x: jax.Array, declared: dict[str, Weight]) -> jax.Array:
        weight = declared["weight"].adapter(1)[name] if name in ADAPTER else declared[name]
        return sharding.gather(layers.rounded(x, decoder) if weight.inputs else x, weight.axes[1:])

    return {
        name: _gathered(node, declared[name], decoder)
        if isinstance(node, dict)
        else gather(name, node, declared)
        for name, node in weights.items()
    }


def _rotation(rotations: Sequence[Any], window: jax.Array | int) -> Any:
    """Selects the cosines and sines of a layer; the second pair is for layers with a window."""
    if len(rotations) == 1:
        return rotations[0]
    if isinstance(window, int):
        return rotations[1 if window else 0]
    return jax.tree.map(lambda full, local: jnp.where(window == 0, full, local), *rotations)


def head(params: Params) -> layers.Linear:
    """Returns the output head, with weight [V, D]; the embedding if the two are tied."""
    return params.get("head", params["embedding"])


def unembed(params: Params, decoder: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Computes logits from hidden states after the final norm. [..., D] -> float32 [..., V]."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = layers.einsum("td,vd->tv", flat, head(params), decoder, "float32")
    return out.reshape(*hidden.shape[:-1], -1)


def logits(params: Params, decoder: DecoderConfig, tokens: jax.Array) -> jax.Array:
    """Computes next-token logits of independent sequences. int32 [B, T] -> float32 [B, T, V].

    Raises:
      ValueError: as `forward`.
    """
    return unembed(params, decoder, forward(params, decoder, tokens).hidden)
