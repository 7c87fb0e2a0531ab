"""The parameters of a decoder: one declaration per weight, and their initial values."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax.models import int8
from espl_jax.models.config import DecoderConfig

Params = dict[str, Any]

ADAPTER = ("lora_a", "lora_b")
"""Names of the two factors of an adapter, stored next to the `weight` that it adapts."""

SCALE = "weight_scale"
"""Name of the scales of an int8 weight, stored next to the `weight`."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """Declaration of one weight; initialization, shardings, adapters and memory plans are derived from it.

    Attributes:
      axes: logical name of each dimension; `layers` first for the stacked weights of all layers, then
        `experts` for those of all experts.
      inputs: the axes that a matmul contracts; empty for norm scales, biases, attention sinks and the scales
        of int8 weights.
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

    @property
    def input_axes(self) -> tuple[int, ...]:
        """Positions of `inputs`, counted from the end, so that they also hold for one weight of the stack."""
        return tuple(i - len(self.axes) for i, axis in enumerate(self.axes) if axis in self.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The axes that are neither stacked nor contracted."""
        return tuple(axis for axis in self.axes if axis not in (*self.stack, *self.inputs))

    @property
    def scale(self) -> Weight:
        """Declares the scales of an int8 weight, one per output: [outputs...], in float32."""
        return self._beside((*self.stack, *self.outputs), ())

    def adapter(self, rank: int) -> dict[str, Weight]:
        """Declares the two factors of its adapter, [inputs..., rank] and [rank, outputs...], in float32."""
        factors = (
            self._beside((*self.stack, *self.inputs, "lora"), self.inputs, lora=rank),
            self._beside((*self.stack, "lora", *self.outputs), ("lora",), lora=rank),
        )
        return dict(zip(ADAPTER, factors, strict=True))

    def _beside(self, axes: tuple[str, ...], inputs: tuple[str, ...], **sizes: int) -> Weight:
        """Declares a float32 array of some of its axes, or of others with their `sizes`."""
        sizes = dict(zip(self.axes, self.shape, strict=True)) | sizes
        return Weight(axes, inputs, tuple(sizes[axis] for axis in axes), "float32", first=self.first)


def stacks(decoder: DecoderConfig) -> dict[str, range]:
    """Returns the numbers of the layers in each stack of the params, in the order in which they run.

    Layers of a stack have the same weights. Dense layers before those with experts are the `first_layers`.
    """
    first, last = decoder.first_dense, decoder.num_layers
    return ({"first_layers": range(first)} if first else {}) | {"layers": range(first, last)}


def abstract(decoder: DecoderConfig) -> Params:
    """Returns the params pytree with a `Weight` declaration at every leaf."""
    params = {}
    for stack, numbers in stacks(decoder).items():
        has_experts = decoder.experts is not None and numbers.stop > decoder.first_dense
        params[stack] = _layers(_Declare(decoder, numbers), decoder, has_experts)
    declare = _Declare(decoder, range(0))
    params |= {"embedding": declare.matrix("vocab embed", "embed"), "final_norm": declare.norm("embed")}
    if not decoder.tied_head:
        params["head"] = declare.matrix("vocab embed", "embed")
    return params


class _Declare:
    """Declares weights by the names of their axes."""

    def __init__(self, decoder: DecoderConfig, numbers: range):
        """`numbers` are those of the layers that are stacked along the axis `layers`."""
        self._decoder, self._first = decoder, numbers.start
        self._sizes = _sizes(decoder) | {"layers": len(numbers)}

    def __call__(self, axes: str, inputs: str = "", fill: float = 0.0, dtype: str = "") -> Weight:
        names = tuple(axes.split())
        shape = tuple(self._sizes[axis] for axis in names)
        first = self._first if names[0] == "layers" else 0
        return Weight(names, tuple(inputs.split()), shape, dtype or self._decoder.float_dtype, fill, first)

    def matrix(self, axes: str, inputs: str) -> Params:
        """Declares a matmul weight, with its scales if it is stored in int8."""
        weight = self(axes, inputs, dtype=self._decoder.param_dtype)
        return {"weight": weight} | ({SCALE: weight.scale} if weight.dtype == "int8" else {})

    def linear(
        self, inputs: str, outputs: str, bias: bool = False, stack: str = "layers", exact: bool = False
    ) -> Params:
        """Declares a linear layer; an `exact` one is never stored in int8."""
        axes = f"{stack} {inputs} {outputs}"
        layer = {"weight": self(axes, inputs)} if exact else self.matrix(axes, inputs)
        return layer | ({"bias": self(f"{stack} {outputs}")} if bias else {})

    def norm(self, axes: str) -> Params:
        return {"scale": self(axes, fill=1.0 - self._decoder.norm_offset)}

    def mlp(self, width: str, bias: bool = False, stack: str = "layers") -> Params:
        return {
            "gate": self.linear("embed", width, bias, stack),
            "up": self.linear("embed", width, bias, stack),
            "down": self.linear(width, "embed", bias, stack),
        }


def _sizes(decoder: DecoderConfig) -> dict[str, int]:
    """Returns the size of every logical axis but `layers`."""
    sizes = {
        "embed": decoder.embed_dim,
        "heads": decoder.num_heads,
        "kv_heads": decoder.num_kv_heads,
        "head": decoder.head_dim,
        "mlp": decoder.mlp_dim,
        "vocab": decoder.vocab_size,
    }
    if latent := decoder.latent:
        sizes |= {
            "latent": latent.kv_rank,
            "latent_and_rope": latent.kv_rank + latent.rope_dim,
            "query_latent": latent.query_rank,
            "key_and_value": decoder.head_dim - latent.rope_dim + latent.value_dim,
            "value": latent.value_dim,
        }
    if experts := decoder.experts:
        sizes |= {
            "experts": experts.count,
            "scores": experts.count,  # an output of the router, which no mesh axis splits
            "expert_mlp": experts.mlp_dim,
            "shared_mlp": experts.shared_dim,
        }
    return sizes


def _layers(declare: _Declare, decoder: DecoderConfig, has_experts: bool) -> Params:
    layer = {
        "attention_norm": declare.norm("layers embed"),
        "attention": (_latent_attention if decoder.latent else _attention)(declare, decoder),
        "mlp_norm": declare.norm("layers embed"),
        "mlp": _mixture(declare, decoder) if has_experts else declare.mlp("mlp", decoder.mlp_bias),
    }
    if decoder.post_norms:
        names = ("post_attention_norm", "post_mlp_norm")
        layer |= {name: declare.norm("layers embed") for name in names}
    return layer


def _attention(declare: _Declare, decoder: DecoderConfig) -> Params:
    attention = {
        "query": declare.linear("embed", "heads head", decoder.qkv_bias),
        "key": declare.linear("embed", "kv_heads head", decoder.qkv_bias),
        "value": declare.linear("embed", "kv_heads head", decoder.qkv_bias),
        "out": declare.linear("heads head", "embed", decoder.out_bias),
    }
    if decoder.qk_norm:
        attention |= {name: declare.norm("layers head") for name in ("query_norm", "key_norm")}
    if decoder.attention_sinks:
        attention["sinks"] = {"logit": declare("layers heads")}
    return attention


def _latent_attention(declare: _Declare, decoder: DecoderConfig) -> Params:
    assert decoder.latent is not None
    attention = {
        "kv_down": declare.linear("embed", "latent_and_rope", decoder.qkv_bias),
        "kv_norm": declare.norm("layers latent"),
        "kv_up": declare.linear("latent", "heads key_and_value"),
        "out": declare.linear("heads value", "embed", decoder.out_bias),
    }
    if not decoder.latent.query_rank:
        return attention | {"query": declare.linear("embed", "heads head")}
    return attention | {
        "query_down": declare.linear("embed", "query_latent", decoder.qkv_bias),
        "query_norm": declare.norm("layers query_latent"),
        "query_up": declare.linear("query_latent", "heads head"),
    }


def _mixture(declare: _Declare, decoder: DecoderConfig) -> Params:
    experts = decoder.experts
    assert experts is not None
    mlp = declare.mlp("expert_mlp", experts.bias, "layers experts")
    # Rounding the router to int8, or the correction at all, would change the choice of experts.
    mlp["router"] = declare.linear("embed", "scores", experts.bias, exact=True)
    if experts.corrected:
        mlp["router"]["correction"] = declare("layers scores", dtype="float32")
    if experts.shared_dim:
        mlp["shared"] = declare.mlp("shared_mlp")
    return mlp


def init(key: jax.Array, decoder: DecoderConfig) -> Params:
    """Initializes params: norms at 1, biases and sinks at 0, others normal.

    Their standard deviation is 1 / sqrt(fan in).

    Consumes `key`.
    """
    leaves, tree = jax.tree.flatten(abstract(decoder.replace(param_dtype=decoder.float_dtype)))
    keys = jax.random.split(key, len(leaves))

    def draw(weight: Weight, key: jax.Array) -> jax.Array:
        if not weight.inputs:
            return jnp.full(weight.shape, weight.fill, weight.dtype)
        return (weight.fan_in**-0.5 * jax.random.normal(key, weight.shape)).astype(weight.dtype)

    params = jax.tree.unflatten(tree, [draw(w, k) for w, k in zip(leaves, keys, strict=True)])
    return to_storage(params, decoder)


def to_storage(params: Params, decoder: DecoderConfig) -> Params:
    """Returns float params in the storage dtypes of the decoder, with scales next to int8 weights.

    Args:
      params: without adapters, jax or numpy arrays in any float dtype.
      decoder: the model's configuration.
    """

    def walk(declared: Params, node: Params) -> Params:
        kept: Params = {}
        for name, child in node.items():
            if isinstance(child, dict):
                kept[name] = walk(declared[name], child)
            elif name == "weight" and SCALE in declared:
                kept[name], kept[SCALE] = int8.quantize(child, declared[name].input_axes)
            else:
                kept[name] = child.astype(jnp.dtype(declared[name].dtype), copy=False)
        return kept

    return walk(abstract(decoder), params)
