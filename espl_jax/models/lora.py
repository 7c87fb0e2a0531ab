"""Low-rank adapters, LoRA (Hu et al. 2021, arXiv 2106.09685).

`adapters` is a subtree of the params that has `lora_a` and `lora_b` in place of `weight`. Once attached to
the params, they are stored next to `weight`, and every matmul with that weight applies them. The params
without adapters are the reference policy. Experts have one adapter each, stacked like their weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from espl_jax.choices import LATENT_TARGETS, LORA_TARGETS
from espl_jax.models import int8
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import ADAPTER, SCALE, Params, Weight, abstract

_STANDS_FOR = {"query": LATENT_TARGETS[:2], "key": LATENT_TARGETS[2:], "value": LATENT_TARGETS[2:]}
"""Targets -> those of latent attention."""


def abstract_adapters(decoder: DecoderConfig, rank: int, targets: Sequence[str] = LORA_TARGETS[:7]) -> Params:
    """Returns the pytree of the adapters with a float32 `Weight` declaration at every leaf.

    Args:
      decoder: the model's configuration.
      rank: r.
      targets: names from `LORA_TARGETS`.

    Raises:
      ValueError: if a target is unknown, there are no targets, `head` is a target but tied to the embedding,
        `router` is one but the model has no experts, one of `LATENT_TARGETS` is one but the model has no such
        latents, or the rank is below 1.
    """
    unknown = sorted(set(targets) - set(LORA_TARGETS))
    if unknown or not targets:
        raise ValueError(f"lora targets={tuple(targets)!r}: choose some of {LORA_TARGETS}")
    if "router" in targets and decoder.experts is None:
        raise ValueError("lora targets='router': this model has no experts; leave it out")
    if "head" in targets and decoder.tied_head:
        raise ValueError("lora targets='head': this model ties its head to the embedding; leave it out")
    if absent := (set(targets) & set(LATENT_TARGETS)) - set(targets_of(decoder)):
        raise ValueError(
            f"lora targets={sorted(absent)[0]!r}: this model has no such latents; name query, key or value"
        )
    if rank < 1:
        raise ValueError(f"lora rank={rank}: give at least 1")

    named = {*targets, *(part for target in targets for part in _STANDS_FOR.get(target, ()))}

    def walk(tree: Params) -> Params:
        chosen = {}
        for name, node in tree.items():
            if name in named:
                chosen[name] = node["weight"].adapter(rank)
            elif isinstance(node, dict) and (below := walk(node)):
                chosen[name] = below
        return chosen

    return walk(abstract(decoder))


def targets_of(decoder: DecoderConfig) -> tuple[str, ...]:
    """Returns the names in `LORA_TARGETS` that this decoder has."""
    paths = jax.tree_util.tree_leaves_with_path(abstract(decoder))
    present = {path[-2].key for path, _ in paths if path[-1].key == "weight"}
    return tuple(target for target in LORA_TARGETS if target in present)


def init(
    key: jax.Array, decoder: DecoderConfig, rank: int, targets: Sequence[str] = LORA_TARGETS[:7]
) -> dict[str, Any]:
    """Initializes adapters with zero effect: A uniform in +-1 / sqrt(fan in), B zero. Consumes `key`."""
    declared = abstract_adapters(decoder, rank, targets)
    paths, tree = jax.tree_util.tree_flatten_with_path(declared)
    keys = jax.random.split(key, len(paths))

    def draw(path: tuple, weight: Weight, key: jax.Array) -> jax.Array:
        if path[-1].key == "lora_b":
            return jnp.zeros(weight.shape, weight.dtype)
        bound = weight.fan_in**-0.5
        # Flat gives the same numbers, and XLA's CPU backend compiles it ten times as fast.
        flat = jax.random.uniform(key, (math.prod(weight.shape),), weight.dtype, -bound, bound)
        return flat.reshape(weight.shape)

    return jax.tree.unflatten(tree, [draw(p, w, k) for (p, w), k in zip(paths, keys, strict=True)])


def attach(params: Params, adapters: Params) -> Params:
    """Returns params with adapters next to the weights they adapt; arrays are shared with the arguments."""
    joined = dict(params)
    for name, node in adapters.items():
        joined[name] = attach(params[name], node) if isinstance(node, dict) else node
    return joined


def detach(params: Params) -> tuple[Params, Params]:
    """Inverts `attach`: returns (base, adapters)."""
    base, adapters = {}, {}
    for name, node in params.items():
        if isinstance(node, dict):
            base[name], below = detach(node)
            if below:
                adapters[name] = below
        else:
            (adapters if name in ADAPTER else base)[name] = node
    return base, adapters


def merge(params: Params, decoder: DecoderConfig) -> Params:
    """Returns equivalent params without adapters: W + lora_scale * A B, rounded to the storage of W.

    Int8 weights get new scales.
    """

    def fold(weight: Weight, node: Params) -> Params:
        product = jnp.tensordot
        for _ in weight.stack:
            product = jax.vmap(product, in_axes=(0, 0, None))
        update = product(node["lora_a"], node["lora_b"], 1)  # [stack..., inputs..., outputs...]
        order = [*weight.stack, *weight.inputs]
        order += [a for a in weight.axes if a not in order]
        update = decoder.lora_scale * update.transpose([order.index(a) for a in weight.axes])
        if SCALE not in node:
            return {"weight": (node["weight"] + update).astype(node["weight"].dtype)}
        whole = int8.dequantize(node["weight"], node[SCALE], weight.input_axes) + update
        return dict(zip(("weight", SCALE), int8.quantize(whole, weight.input_axes), strict=True))

    def walk(declared: Params, node: Params) -> Params:
        if "lora_a" in node:
            kept = {name: leaf for name, leaf in node.items() if name not in ADAPTER}
            return kept | fold(declared["weight"], node)
        return {k: walk(declared[k], v) if isinstance(v, dict) else v for k, v in node.items()}

    return walk(abstract(decoder), params)
