"""Flops of dots and convolutions. On TPU, the compiler turns dots into convolutions."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence

from espl_jax.models.grouped import SCOPE
from espl_jax.plan.hlo.text import Computation, Instruction


def flops(computations: Mapping[str, Computation], computation: Computation, x: Instruction) -> int:
    """Returns the flops of one execution of an instruction, two per multiply-add; elementwise work counts 0.

    A fusion or an asynchronous operation has the flops of its computation. A custom kernel has those of its
    cost estimate (for a grouped product, the share of the device's experts), or for jax's splash attention
    the flops under a causal mask.
    """
    if x.opcode == "fusion" or (x.opcode == "async-start" and "calls=" in x.attributes):
        inner = computations[x.called("calls")]
        return sum(flops(computations, inner, y) for y in inner.instructions.values())
    if x.opcode == "custom-call":
        estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', x.attributes)
        if estimate is None:
            return _splash(x)
        local, total = experts(x) or (1, 1)
        return int(estimate[1]) * local // total
    if x.opcode not in ("dot", "convolution"):
        return 0
    left, right = (computation.instructions[name].arrays[0].dims for name in x.operands)
    result = x.arrays[0].dims
    if x.opcode == "convolution":
        return _convolution(left, right, result, x.attributes)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2 * math.prod(result) * math.prod(left[axis] for axis in axes)


def experts(x: Instruction) -> tuple[int, int] | None:
    """Returns (experts on the device, all experts) of a grouped product; None for other instructions.

    The kernel of a grouped product has room for the rows of all experts, and computes those of its device:
    with an even load, that share of them.
    """
    found = re.search(SCOPE.format(r"(\d+)", r"(\d+)"), x.op_name)
    return (int(found[1]), int(found[2])) if found else None


_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Kernel of splash attention -> number of matmuls over (query, column) pairs."""


def _splash(x: Instruction) -> int:
    """Returns the flops of a splash attention kernel over causal (query, column) pairs; 0 for other kernels.

    Ignores that a window reduces the pairs, and that partly masked blocks are computed in full.
    """
    products = next((count for name, count in _SPLASH.items() if x.name.startswith(name)), 0)
    arrays = re.findall(r"\w+\[(\d+),(\d+),(\d+),(\d+)\]", x.attributes)
    if not products or len(arrays) < 3:
        return 0
    rows, heads, queries, head = map(int, arrays[0])
    columns = int(arrays[2][2])  # of the values [rows, kv heads, columns, head]
    pairs = queries * (columns - queries) + queries * (queries + 1) // 2
    return 2 * products * rows * heads * head * pairs


def _convolution(left: Sequence[int], right: Sequence[int], result: Sequence[int], attributes: str) -> int:
    """Returns flops on real elements: in convolutions made from dots, the batch is a dilated dimension."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    flops = 2 * result[labels[3].index("b")] * result[labels[3].index("f")] * right[labels[2].index("i")]
    for axis, size in enumerate(fields["size"].split("x") if "size" in fields else ()):
        of = {name: values.split("x")[axis] for name, values in fields.items()}
        flops *= _positions(
            left[labels[1].index(str(axis))],
            result[labels[3].index(str(axis))],
            int(size),
            int(of.get("stride", 1)),
            int(of.get("pad", "0_0").split("_")[0]),
            int(of.get("lhs_dilate", 1)),
            int(of.get("rhs_dilate", 1)),
        )
    return flops


@functools.cache
def _positions(
    inputs: int, outputs: int, size: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Returns the number of (output, window) position pairs that hit an input, along one dimension."""
    last = (inputs - 1) * lhs_dilate
    return sum(
        0 <= (at := out * stride + inside * rhs_dilate - pad) <= last and at % lhs_dilate == 0
        for out in range(outputs)
        for inside in range(size)
    )
