"""Layout of the weights while sampling.

XLA's CPU backend copies each layer's slice out of the stacked weights before a matmul, and its matmuls with
few rows are two to three times as fast when the output axes of the weight come first. On CPU, each layer
therefore gets separate arrays, outputs first. On other backends the weights stay stacked.
"""

from __future__ import annotations

import weakref

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espl_jax.models.config import DecoderConfig
from espl_jax.models.layers import OUTPUTS_FIRST
from espl_jax.models.params import Params, Weight, abstract, stacks

_Layers = tuple[jax.Array | jax.ShapeDtypeStruct, ...]

_unstacked: dict[int, tuple[weakref.ref, _Layers]] = {}
"""Unstacked layers of each stacked weight, keyed by the `id` of the stacked array, while that array is alive.

The cache makes sure that frozen weights are unstacked only once.
"""


def for_sampling(
    params: Params, decoder: DecoderConfig, mesh: Mesh | None = None
) -> tuple[Params, DecoderConfig]:
    """Returns params and configuration in the layout that `prefill` and `decode_chunk` expect.

    Args:
      params: arrays or their shapes, with or without adapters; may already be in that layout.
      decoder: the model's configuration. `sampling_layout` "auto" means "unstacked" on a single CPU device,
        else "stacked". On a mesh the weights always stay stacked, so that a run can move to more devices.
      mesh: the mesh, or None.
    """
    layout = decoder.sampling_layout
    if mesh is not None:
        layout = "stacked"
    elif layout == "auto":
        layout = "unstacked" if jax.default_backend() == "cpu" else "stacked"
    if layout == "unstacked":
        declared = abstract(decoder)
        params = params | {stack: unstack(params[stack], declared[stack]) for stack in stacks(decoder)}
    return params, decoder.replace(remat="none", phase="sampling", sampling_layout=layout)


def unstack(layers: Params, declared: Params) -> Params:
    """Returns the layers' params with each matmul weight as a tuple of per-layer arrays, outputs first.

    Biases, norms and adapters are small and stay stacked. So do experts, which are read in place
    (`transformer.forward`): a step needs few of them, and a second copy would be most of the model. So do the
    maps from latents to keys and values, which `models.latent` also applies in the other direction.

    Args:
      layers: the stacked weights of all layers, arrays or their shapes.
      declared: their declarations.
    """
    laid_out = {}
    for name, node in layers.items():
        if isinstance(node, dict):
            laid_out[name] = unstack(node, declared[name])
        elif name == "weight" and not {"experts", "latent"} & {*declared[name].stack, *declared[name].inputs}:
            laid_out[OUTPUTS_FIRST] = _layers_of(node, declared[name])
        else:
            laid_out[name] = node
    return laid_out


def _layers_of(stacked: jax.Array | jax.ShapeDtypeStruct, weight: Weight) -> _Layers:
    """Returns each layer's slice of a stacked weight, with the output axes first."""
    axes = weight.axes[1:]
    order = sorted(range(len(axes)), key=lambda i: axes[i] in weight.inputs)
    if isinstance(stacked, jax.ShapeDtypeStruct):
        shape = tuple(stacked.shape[1 + i] for i in order)
        return (jax.ShapeDtypeStruct(shape, stacked.dtype),) * stacked.shape[0]
    number = id(stacked)
    held = _unstacked.get(number)
    if held is None or held[0]() is not stacked:
        # In numpy, which views the array in place: a jitted copy of all layers takes seconds to compile.
        each = tuple(jnp.asarray(np.ascontiguousarray(x.transpose(order))) for x in np.asarray(stacked))
        held = weakref.ref(stacked, lambda _: _unstacked.pop(number, None)), each
        _unstacked[number] = held
    return held[1]
