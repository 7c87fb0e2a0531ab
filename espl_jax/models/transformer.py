"""The decoder: one declaration per weight, and one `forward` over a prefix tree.

A batch of sequences that share prefixes is a tree: system prompts [M], under each its problems [M*B],
under each of those its rollouts [M*B*N]. Each node holds its own tokens once. `forward` runs one level over
the KV caches of the levels above: prefill, decode step, scoring and policy gradient are all this function.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from espl_jax.models import layers, rope, splash
from espl_jax.models.attention import ATTENTION, KVCache, RowsView, Source, attend, of_owners
from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import sharding

Params = dict[str, Any]

LAYER_INPUT = "layer_input"
"""What the residual stream before a layer is called, for policies of recomputation to name."""

ADAPTER = ("lora_a", "lora_b")
"""Names of an adapter's two factors, beside the `weight` that it adapts."""


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

    def adapter(self, rank: int) -> dict[str, Weight]:
        """Its adapter's two factors, [inputs..., rank] and [rank, outputs...], in float32."""
        sizes = dict(zip(self.axes, self.shape, strict=True)) | {"lora": rank}
        stack = tuple(axis for axis in self.axes if axis == "layers")
        outputs = tuple(axis for axis in self.axes if axis not in (*stack, *self.inputs))

        def declare(axes: tuple[str, ...], inputs: tuple[str, ...]) -> Weight:
            return Weight(axes, inputs, tuple(sizes[axis] for axis in axes), "float32")

        factors = (
            declare((*stack, *self.inputs, "lora"), self.inputs),
            declare((*stack, "lora", *outputs), ("lora",)),
        )
        return dict(zip(ADAPTER, factors, strict=True))


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
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    ancestors: Sequence[KVCache | RowsView] = (),
) -> tuple[jax.Array, KVCache]:
    """Runs one level of the tree over its ancestors' caches.

    Args:
      params: with adapters attached or not.
      config: the decoder.
      tokens: int32 [R, T], right padded.
      lengths: int32 [R] real tokens of each node, at least none; all of them by default.
      ancestors: caches of the levels above, outermost first; each one's number of nodes divides R, and
        neighbouring nodes share an ancestor, or it names the `owner` of every row.

    Returns:
      (hidden, cache): float [R, T, D] after the final norm, and the level's own KVCache with capacity T.
      Values at padding are finite and meaningless.

    Raises:
      ValueError: if the nodes do not divide among those of a level above, or a token that is known is not in
        the vocabulary.
    """
    layers.check_ids("tokens", tokens, config, lengths)
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
    x = layers.embed(tokens.reshape(-1), params["embedding"], config)

    ropes = (config.rope,) if config.local_rope is None else (config.rope, config.local_rope)
    layer = functools.partial(
        _layer,
        config=config,
        rotations=[rope.tables(positions, each, config.head_dim) for each in ropes],
        shape=(nodes, steps),
        start=start,
        ancestors=tuple(ancestors),
    )
    stacked = tuple(None if isinstance(c, RowsView) else (c.key, c.value) for c in ancestors)
    index = jnp.arange(config.num_layers)
    weights, layer = _with_unstacked(layer, params["layers"])
    x, (key, value) = _run_layers(layer, config, x, (weights, stacked, index))

    x = sharding.move(layers.rms_norm(x, params["final_norm"], config), *_TOKENS, config.phase)
    return x.reshape(nodes, steps, -1), KVCache(key, value, start, lengths)


def _with_unstacked(layer: Callable[..., Any], weights: Params) -> tuple[Params, Callable[..., Any]]:
    """The stacked part of the layers' weights, and a layer that adds to its slice what is unstacked."""

    def stacked(node: Params) -> Params:
        return {
            name: stacked(child) if isinstance(child, dict) else child
            for name, child in node.items()
            if name != layers.OUTPUTS_FIRST
        }

    def join(part: Params, whole: Params, index: jax.Array) -> Params:
        joined = {name: join(x, whole[name], index) if isinstance(x, dict) else x for name, x in part.items()}
        if layers.OUTPUTS_FIRST in whole:
            joined[layers.OUTPUTS_FIRST] = layers.Unstacked(whole[layers.OUTPUTS_FIRST], index)
        return joined

    def complete(x: jax.Array, part: Params, above: Any, index: jax.Array, **window: Any) -> Any:
        return layer(x, join(part, weights, index), above, index, **window)

    return stacked(weights), complete


def _start(ancestors: Sequence[KVCache | RowsView], nodes: int) -> jax.Array:
    """int32 [R], the position after the last ancestor's last token."""
    if not ancestors:
        return jnp.zeros(nodes, jnp.int32)
    last = ancestors[-1]
    if last.owner is not None:
        return of_owners(last.end, last.owner, last.parts)
    return jnp.repeat(last.end, nodes // last.end.shape[0], total_repeat_length=nodes)


def _run_layers(layer: Callable[..., Any], config: DecoderConfig, x: jax.Array, stacked: Any) -> Any:
    """Runs all layers, each with its slice of `stacked`: (x, what the layers returned, stacked)."""
    windows = config.windows or (0,) * config.num_layers

    def checkpointed(window: int | None) -> Callable[..., Any]:
        """The layer with a window known to the compiler, or given with each layer's slice."""
        known = layer if window is None else functools.partial(layer, window=window)
        if config.remat == "none":
            return known
        if config.remat == "rounded":
            return _from_rounded(known, config)
        return jax.checkpoint(known, policy=_SAVED[config.remat])

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


_SAVED = {
    "full": None,
    "products": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _from_rounded(layer: Callable[..., Any], config: DecoderConfig) -> Callable[..., Any]:
    """A layer whose backward pass recomputes it from its input rounded to `config.dtype`."""

    def run(x: jax.Array, *given: Any, **window: jax.Array) -> Any:
        # What the layer closes over has to be among the arguments of what has a gradient of its own.
        jaxpr, shapes = jax.make_jaxpr(layer, return_shape=True)(x, *given, **window)

        def known(closed_over: Any, x: jax.Array, rest: Any) -> Any:
            out = jax.core.eval_jaxpr(jaxpr.jaxpr, closed_over, *jax.tree.leaves((x, rest)))
            return jax.tree.unflatten(jax.tree.structure(shapes), out)

        def forward(closed_over: Any, x: jax.Array, rest: Any) -> Any:
            return known(closed_over, x, rest), (closed_over, x.astype(config.dtype), rest)

        def backward(stored: Any, cotangents: Any) -> Any:
            # Where layers are not scanned, the compiler would keep what the forward pass computed instead.
            closed_over, x, rest = jax.lax.optimization_barrier(stored)
            return jax.vjp(known, closed_over, x.astype(jnp.float32), rest)[1](cotangents)

        recomputed = jax.custom_vjp(known)
        recomputed.defvjp(forward, backward)
        return recomputed(jaxpr.consts, x, (given, window))

    return run


_TOKENS = ("tokens", None), ("residual", None)
"""Products take all tokens of the devices that share their rows, forward and backward; between products each
of these has a part of them."""


def _layer(
    x: jax.Array,
    weights: Params,
    above: Sequence[tuple[jax.Array, jax.Array] | None],
    index: jax.Array | int,
    *,
    window: jax.Array | int,
    config: DecoderConfig,
    rotations: Sequence[Any],
    shape: tuple[int, int],
    start: jax.Array,
    ancestors: Sequence[KVCache | RowsView],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One decoder layer on the level's flattened tokens. Returns x and the level's (key, value).

    `above` has the layer's (key, value) of each ancestor, or None for one that is read by the layer's
    `index`. `window` is the number of tokens that a token sees, 0 for all: a plain number, or a traced one
    where scanned layers differ.
    """
    weights = _gathered(weights, abstract(config)["layers"], config)
    x = checkpoint_name(x, LAYER_INPUT)

    def by_node(x: jax.Array) -> jax.Array:
        """[.., heads, H] -> [R, T, heads, H], lying as attention wants it."""
        x = x.reshape(*shape, *x.shape[-2:])
        return sharding.constrain(x, ("rows", None, "kv_heads", None), config.phase)

    def normalized(x: jax.Array, norm: dict[str, jax.Array]) -> jax.Array:
        return sharding.move(layers.rms_norm(x, norm, config), *_TOKENS, config.phase)

    def joined(x: jax.Array, out: jax.Array) -> jax.Array:
        out = sharding.move(out, _TOKENS[1], _TOKENS[0], config.phase)
        return sharding.constrain(x + out, ("residual", None), config.phase)

    y = normalized(x, weights["attention_norm"])
    attention = weights["attention"]
    query = layers.einsum("td,dnh->tnh", y, attention["query"], config)
    key = layers.einsum("td,dkh->tkh", y, attention["key"], config)
    value = layers.einsum("td,dkh->tkh", y, attention["value"], config).astype(config.dtype)
    if config.qk_norm:
        query = layers.rms_norm(query, attention["query_norm"], config)
        key = layers.rms_norm(key, attention["key_norm"], config)
    cos, sin = _rotation(rotations, window)
    query = by_node(rope.rotate(query, cos, sin).astype(config.dtype))
    key = by_node(rope.rotate(key, cos, sin).astype(config.dtype))
    value = by_node(value)

    if isinstance(window, jax.Array):
        window = jnp.where(window == 0, jnp.iinfo(jnp.int32).max, window)
    sources = []
    for arrays, cache in zip(above, ancestors, strict=True):
        if isinstance(cache, RowsView):
            arrays = cache.layer(index)
        assert arrays is not None
        sources.append(Source(*arrays, cache.filled, cache.start, cache.owner, cache.parts))
    if isinstance(window, int) and splash.on_tpu(query) and splash.fits(shape[1], sources, config, window):
        out = splash.splash_attend(query, key, value, sources, config, window)
    else:
        out = checkpoint_name(attend(query, key, value, sources, config, start, window), ATTENTION)
    written = key.transpose(2, 0, 3, 1), value.transpose(2, 0, 1, 3)

    out = by_node(out).reshape(-1, *out.shape[-2:])
    out = sharding.constrain(out, ("tokens", "heads", None), config.phase)
    out = layers.einsum("tnh,nhd->td", out, attention["out"], config)
    x = joined(x, layers.rms_norm(out, weights["post_attention_norm"], config) if config.post_norms else out)
    out = layers.gated_mlp(normalized(x, weights["mlp_norm"]), weights["mlp"], config)
    x = joined(x, layers.rms_norm(out, weights["post_mlp_norm"], config) if config.post_norms else out)
    return x, written


def _gathered(weights: Params, declared: Params, config: DecoderConfig) -> Params:
    """One layer's weights as its products need them: in training, whole along the axis they are spread over.

    Rounded first, as products round them, so that no more is moved than they use.
    """
    if config.phase != "training":
        return weights

    def gather(name: str, x: jax.Array, declared: dict[str, Weight]) -> jax.Array:
        weight = declared["weight"].adapter(1)[name] if name in ADAPTER else declared[name]
        return sharding.gather(layers.rounded(x, config) if weight.inputs else x, weight.axes[1:])

    return {
        name: _gathered(node, declared[name], config)
        if isinstance(node, dict)
        else gather(name, node, declared)
        for name, node in weights.items()
    }


def _rotation(rotations: Sequence[Any], window: jax.Array | int) -> Any:
    """The cosines and sines of a layer: the second ones belong to layers with a window."""
    if len(rotations) == 1:
        return rotations[0]
    if isinstance(window, int):
        return rotations[1 if window else 0]
    return jax.tree.map(lambda full, local: jnp.where(window == 0, full, local), *rotations)


def head(params: Params) -> layers.Linear:
    """The output head's weight, [V, D]: the embedding where the two are tied."""
    return params.get("head", params["embedding"])


def unembed(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Hidden states after the final norm to logits. [..., D] -> float32 [..., V]."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = layers.einsum("td,vd->tv", flat, head(params), config, "float32")
    return out.reshape(*hidden.shape[:-1], -1)


def logits(params: Params, config: DecoderConfig, tokens: jax.Array) -> jax.Array:
    """Next-token logits of plain sequences, causal. int32 [B, T] -> float32 [B, T, V].

    Raises ValueError as `forward`.
    """
    hidden, _ = forward(params, config, tokens)
    return unembed(params, config, hidden)
