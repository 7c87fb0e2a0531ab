"""Converts weights to and from the layout of checkpoint files: `[outputs, inputs]`, as in torch.

The conversion follows from the declaration of a weight. Files have one tensor per layer, or per expert of a
layer; ours are stacked.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from espl_jax.models.params import Weight


def _tensor_sizes(weight: Weight) -> tuple[dict[str, int], list[str]]:
    """Returns the axis sizes of one tensor of the stack, and its axes in file order: outputs, then inputs."""
    sizes = dict(zip(weight.axes, weight.shape, strict=True))
    sizes = {axis: size for axis, size in sizes.items() if axis not in weight.stack}
    outputs = [axis for axis in sizes if axis not in weight.inputs]
    return sizes, outputs + [axis for axis in sizes if axis in weight.inputs]


def file_shape(weight: Weight) -> tuple[int, ...]:
    """Returns the shape of a tensor in a file: `[outputs, inputs]`, or `[outputs]` for scales and biases."""
    sizes, _ = _tensor_sizes(weight)
    outputs = math.prod(size for axis, size in sizes.items() if axis not in weight.inputs)
    return (outputs, weight.fan_in) if weight.inputs else (outputs,)


def from_file(weight: Weight, tensor: Any) -> Any:
    """Returns one layer in our layout, as a view of a file's tensor of shape `file_shape(weight)`."""
    sizes, order = _tensor_sizes(weight)
    return tensor.reshape([sizes[axis] for axis in order]).transpose([order.index(axis) for axis in sizes])


def to_file(weight: Weight, layer: np.ndarray) -> np.ndarray:
    """Inverse of `from_file`; returns a contiguous array."""
    sizes, order = _tensor_sizes(weight)
    axes = list(sizes)
    return np.ascontiguousarray(
        layer.transpose([axes.index(axis) for axis in order]).reshape(file_shape(weight))
    )
