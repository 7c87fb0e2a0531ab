"""The parameters of a decoder: one declaration per weight, and their initial values."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax.models.config import DecoderConfig

Params = dict[str, Any]

ADAPTER = ("lora_a", "lora_b")
"""Names of the two factors of an adapter, stored next to the `weight` that it adapts."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """Declaration of one weight; initialization, shardings, adapters and memory plans are derived from it.

    Attributes:
      axes: logical name of each dimension; `layers` first for the stacked weights of all layers, then
        `experts` for those of all experts.
      inputs: the axes that a matmul contracts; empty for norm scales, biases and attention sinks.
      shape: size of each dimension.
      dtype: storage dtype.
      fill: initial value of a weight without inputs.
      first: number of the first layer of the stack, in the model.
    """

    axes: tuple[str, ...]
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    fill: float = 0.0
    first: int = 0

    @property
    def stack(self) -> tuple[str, ...]:
        """Leading axes along which separate weights are stacked: `layers`, then `experts`."""
        return tuple(itertools.takewhile(lambda axis: axis in ("layers", "experts"), self.axes))

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the axes in `stack`."""
        return self.shape[: len(self.stack)]

    @property
    def members(self) -> list[tuple[int, ...]]:
        """Numbers of the layer, and of the expert, of each weight in the stack; [()] for a single weight."""
        places = np.ndindex(*self.stack_shape)
        return [(self.first + place[0], *place[1:]) if place else () for place in places]

    @property
    def fan_in(self) -> int:
        """Number of inputs that are summed into one output."""
        return math.prod(
            size for axis, size in zip(self.axes, self.shape, strict=True) if axis in self.inputs
        )

    def adapter(self, rank: int) -> dict[str, Weight]:
        """Declares the two factors of its adapter, [inputs..., rank] and [rank, outputs...], in float32."""
        sizes = dict(zip(self.axes, self.shape, strict=True)) | {"lora": rank}
        outputs = tuple(axis for axis in self.axes if axis not in (*self.stack, *self.inputs))

        def declare(axes: tuple[str, ...], inputs: tuple[str, ...]) -> Weight:
            return Weight(axes, inputs, tuple(sizes[axis] for axis in axes), "float32", first=self.first)

        factors = (
            declare((*self.stack, *self.inputs, "lora"), self.inputs),
            declare((*self.stack, "lora", *outputs), ("lora",)),
        )
        return dict(zip(ADAPTER, factors, strict=True))


def stacks(decoder: DecoderConfig) -> dict[str, range]:
    """Returns the numbers of the layers in each stack of the params, in the order in which they run.

    Layers of a stack have the same weights. Dense layers before those with experts are the `first_layers`.
    """
    first, last = decoder.first_dense, decoder.num_layers
    return ({"first_layers": range(first)} if first else {}) | {"layers": range(first, last)}


def abstract(decoder: DecoderConfig) -> Params:
    """Returns the params pytree with a `Weight` declaration at every leaf."""
    params = {}
    for stack in stacks(decoder):
        params |= _with_stack(decoder, stack)
    return params


def _with_stack(decoder: DecoderConfig, stack: str) -> Params:
    """Returns the params with one of the stacks of layers."""
    numbers = stacks(decoder)[stack]
    sizes = {
        "layers": len(numbers),
        "embed": decoder.embed_dim,
        "heads": decoder.num_heads,
        "kv_heads": decoder.num_kv_heads,
        "head": decoder.head_dim,
        "mlp": decoder.mlp_dim,
        "vocab": decoder.vocab_size,
    }

    def declare(axes: str, inputs: str = "", fill: float = 0.0, dtype: str = "") -> Weight:
        names = tuple(axes.split())
        shape = tuple(sizes[axis] for axis in names)
        first = numbers.start if names[0] == "layers" else 0
        return Weight(names, tuple(inputs.split()), shape, dtype or decoder.param_dtype, fill, first)

    def linear(inputs: str, outputs: str, bias: bool = False, stack: str = "layers") -> Params:
        layer = {"weight": declare(f"{stack} {inputs} {outputs}", inputs)}
        return layer | ({"bias": declare(f"{stack} {outputs}")} if bias else {})

    def norm(axes: str) -> Params:
        return {"scale": declare(axes, fill=1.0 - decoder.norm_offset)}

    attention = {
        "query": linear("embed", "heads head", decoder.qkv_bias),
        "key": linear("embed", "kv_heads head", decoder.qkv_bias),
        "value": linear("embed", "kv_heads head", decoder.qkv_bias),
        "out": linear("heads head", "embed", decoder.out_bias),
    }
    if decoder.qk_norm:
        attention |= {"query_norm": norm("layers head"), "key_norm": norm("layers head")}
    if decoder.attention_sinks:
        attention["sinks"] = {"logit": declare("layers heads")}
    if decoder.latent:
        sizes |= {
            "latent": decoder.latent.kv_rank,
            "latent_and_rope": decoder.latent.kv_rank + decoder.latent.rope_dim,
            "query_latent": decoder.latent.query_rank,
            "key_and_value": decoder.head_dim - decoder.latent.rope_dim + decoder.latent.value_dim,
            "value": decoder.latent.value_dim,
        }
        attention = {
            "kv_down": linear("embed", "latent_and_rope", decoder.qkv_bias),
            "kv_norm": norm("layers latent"),
            "kv_up": linear("latent", "heads key_and_value"),
            "out": linear("heads value", "embed", decoder.out_bias),
        }
        if decoder.latent.query_rank:
            attention |= {
                "query_down": linear("embed", "query_latent", decoder.qkv_bias),
                "query_norm": norm("layers query_latent"),
                "query_up": linear("query_latent", "heads head"),
            }
        else:
            attention |= {"query": linear("embed", "heads head")}
    if decoder.experts and stack == "layers":
        bias = decoder.experts.bias
        sizes |= {
            "experts": decoder.experts.count,
            "scores": decoder.experts.count,  # an output of the router, which no mesh axis splits
            "expert_mlp": decoder.experts.mlp_dim,
        }
        mlp = {
            "router": linear("embed", "scores", bias),
            "gate": linear("embed", "expert_mlp", bias, "layers experts"),
            "up": linear("embed", "expert_mlp", bias, "layers experts"),
            "down": linear("expert_mlp", "embed", bias, "layers experts"),
        }
        if decoder.experts.corrected:
            # In float32 whatever the dtype of weights: rounding it would change the choice of experts.
            mlp["router"]["correction"] = declare("layers scores", dtype="float32")
        if decoder.experts.shared_dim:
            sizes |= {"shared_mlp": decoder.experts.shared_dim}
            mlp["shared"] = {
                "gate": linear("embed", "shared_mlp"),
                "up": linear("embed", "shared_mlp"),
                "down": linear("shared_mlp", "embed"),
            }
    else:
        mlp = {
            "gate": linear("embed", "mlp", decoder.mlp_bias),
            "up": linear("embed", "mlp", decoder.mlp_bias),
            "down": linear("mlp", "embed", decoder.mlp_bias),
        }
    layer = {
        "attention_norm": norm("layers embed"),
        "attention": attention,
        "mlp_norm": norm("layers embed"),
        "mlp": mlp,
    }
    if decoder.post_norms:
        layer |= {"post_attention_norm": norm("layers embed"), "post_mlp_norm": norm("layers embed")}
    params = {
        "embedding": {"weight": declare("vocab embed", "embed")},
        stack: layer,
        "final_norm": norm("embed"),
    }
    if not decoder.tied_head:
        params["head"] = {"weight": declare("vocab embed", "embed")}
    return params


def init(key: jax.Array, decoder: DecoderConfig) -> Params:
    """Initializes params: norms at 1, biases and sinks at 0, others normal.

    Their standard deviation is 1 / sqrt(fan in).

    Consumes `key`.
    """
    leaves, tree = jax.tree.flatten(abstract(decoder))
    keys = jax.random.split(key, len(leaves))

    def draw(weight: Weight, key: jax.Array) -> jax.Array:
        if not weight.inputs:
            return jnp.full(weight.shape, weight.fill, weight.dtype)
        return (weight.fan_in**-0.5 * jax.random.normal(key, weight.shape)).astype(weight.dtype)

    return jax.tree.unflatten(tree, [draw(w, k) for w, k in zip(leaves, keys, strict=True)])
