"""How weights are laid out while sampling.

XLA's CPU backend copies each layer's slice out of the stacked weights before it multiplies, and it multiplies
a few rows with a weight two to three times as fast if the weight's output axes come first. On CPUs each layer
therefore gets separate arrays, outputs first. Elsewhere the weights stay stacked.
"""

from __future__ import annotations

import weakref

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espl_jax.models.config import DecoderConfig
from espl_jax.models.layers import OUTPUTS_FIRST
from espl_jax.models.transformer import ADAPTER, Params, Weight, abstract

_Layers = tuple[jax.Array | jax.ShapeDtypeStruct, ...]

_unstacked: dict[int, tuple[weakref.ref, _Layers]] = {}
"""The layers of each stacked weight, by the `id` of the stacked array, as long as that array lives.

Frozen weights are thus laid out once, however often they are sampled with.
"""


def for_sampling(
    params: Params, config: DecoderConfig, mesh: Mesh | None = None
) -> tuple[Params, DecoderConfig]:
    """Returns params and config as `prefill` and `decode_chunk` take them.

    Args:
      params: arrays or their shapes, with adapters or not; already laid out is fine.
      config: the decoder. `sampling_layout` "auto" means "unstacked" on one CPU device, else "stacked".
      mesh: of devices, or None.
    """
    layout = config.sampling_layout
    if layout == "auto":
        layout = "unstacked" if mesh is None and jax.default_backend() == "cpu" else "stacked"
    if layout == "unstacked" and isinstance(params["layers"], dict):
        params = params | {"layers": unstack(params["layers"], config)}
    return params, config.replace(remat="none", phase="sampling", sampling_layout=layout)


def unstack(layers: Params, config: DecoderConfig) -> tuple[Params, ...]:
    """Returns one tree for each layer, the axes of every product's outputs first.

    Args:
      layers: the stacked weights of all layers, arrays or their shapes.
      config: the decoder.
    """

    def walk(node: Params, declared: Params) -> list[Params]:
        trees: list[Params] = [{} for _ in range(config.num_layers)]
        for name, child in node.items():
            key = name
            if isinstance(child, dict):
                each = walk(child, declared[name])
            elif name in ADAPTER:
                each = _layers_of(child, None)
            else:
                weight = declared[name]
                each = _layers_of(child, weight if weight.inputs else None)
                key = OUTPUTS_FIRST if weight.inputs else name
            for tree, leaf in zip(trees, each, strict=True):
                tree[key] = leaf
        return trees

    return tuple(walk(layers, abstract(config)["layers"]))


def _layers_of(x: jax.Array | jax.ShapeDtypeStruct, weight: Weight | None) -> _Layers:
    """Each layer's slice of a stacked array; of a product's weight with the outputs' axes first."""
    axes = weight.axes[1:] if weight else ()
    order = sorted(range(len(axes)), key=lambda i: axes[i] in weight.inputs) if weight else None
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = x.shape[1:] if order is None else tuple(x.shape[1 + i] for i in order)
        return (jax.ShapeDtypeStruct(shape, x.dtype),) * x.shape[0]
    held = _unstacked.get(id(x))
    if held is not None and held[0]() is x:
        return held[1]
    # By numpy, which sees the array in place: a jitted copy of all layers takes seconds to compile.
    whole = np.asarray(x)
    each = tuple(
        jnp.asarray(np.ascontiguousarray(layer if order is None else layer.transpose(order)))
        for layer in whole
    )
    if weight is not None:
        number = id(x)
        _unstacked[number] = weakref.ref(x, lambda _: _unstacked.pop(number, None)), each
    return each
