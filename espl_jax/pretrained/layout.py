"""How one weight lies in checkpoint files: `[outputs, inputs]`, as torch's linear layers have it.

Everything follows from the weight's declaration. Files hold a tensor for each layer; ours are stacked.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from espl_jax.models.transformer import Weight


def _layer_sizes(weight: Weight) -> tuple[dict[str, int], list[str]]:
    """Sizes of one layer's axes, and those axes in the order of files: outputs, then inputs."""
    sizes = dict(zip(weight.axes, weight.shape, strict=True))
    sizes.pop("layers", None)
    outputs = [axis for axis in sizes if axis not in weight.inputs]
    return sizes, outputs + [axis for axis in sizes if axis in weight.inputs]


def file_shape(weight: Weight) -> tuple[int, ...]:
    """Shape of one layer's tensor in a file: `[outputs, inputs]`, or `[outputs]` for scales and biases."""
    sizes, _ = _layer_sizes(weight)
    outputs = math.prod(size for axis, size in sizes.items() if axis not in weight.inputs)
    return (outputs, weight.fan_in) if weight.inputs else (outputs,)


def from_file(weight: Weight, tensor: Any) -> Any:
    """One layer of ours out of a file's tensor of shape `file_shape(weight)`; a view of it."""
    sizes, order = _layer_sizes(weight)
    return tensor.reshape([sizes[axis] for axis in order]).transpose([order.index(axis) for axis in sizes])


def to_file(weight: Weight, layer: np.ndarray) -> np.ndarray:
    """The inverse of `from_file`, contiguous."""
    sizes, order = _layer_sizes(weight)
    axes = list(sizes)
    return np.ascontiguousarray(
        layer.transpose([axes.index(axis) for axis in order]).reshape(file_shape(weight))
    )
