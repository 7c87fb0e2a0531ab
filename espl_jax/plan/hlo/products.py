"""Flops of dots and convolutions, which on TPU are one: the compiler turns dots into convolutions."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence

from espl_jax.plan.hlo.text import Computation, Instruction


def flops(computations: Mapping[str, Computation], computation: Computation, x: Instruction) -> int:
    """Two for each product that one execution of an instruction needs; 0 where it multiplies elementwise.

    A fusion, or what runs asynchronously, has those of its insides; a custom kernel has those that its author
    estimated, or as one of jax's splash attention those that causality leaves.
    """
    if x.opcode == "fusion" or (x.opcode == "async-start" and "calls=" in x.attributes):
        inner = computations[x.called("calls")]
        return sum(flops(computations, inner, y) for y in inner.instructions.values())
    if x.opcode == "custom-call":
        estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', x.attributes)
        return int(estimate[1]) if estimate else _splash(x)
    if x.opcode not in ("dot", "convolution"):
        return 0
    left, right = (computation.instructions[name].arrays[0].dims for name in x.operands)
    result = x.arrays[0].dims
    if x.opcode == "convolution":
        return _convolution(left, right, result, x.attributes)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2 * math.prod(result) * math.prod(left[axis] for axis in axes)


_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Products of queries, or of the like, with columns that each kernel of splash attention makes."""


def _splash(x: Instruction) -> int:
    """Flops of a kernel of splash attention, 0 for another one: pairs of query and column that causality
    leaves. A window leaves fewer, and blocks that it cuts through are multiplied whole, which is more."""
    products = next((count for name, count in _SPLASH.items() if x.name.startswith(name)), 0)
    arrays = re.findall(r"\w+\[(\d+),(\d+),(\d+),(\d+)\]", x.attributes)
    if not products or len(arrays) < 3:
        return 0
    rows, heads, queries, head = map(int, arrays[0])
    columns = int(arrays[2][2])  # of the values [rows, kv heads, columns, head]
    pairs = queries * (columns - queries) + queries * (queries + 1) // 2
    return 2 * products * rows * heads * head * pairs


def _convolution(left: Sequence[int], right: Sequence[int], result: Sequence[int], attributes: str) -> int:
    """Products that fall on real elements: dots come as convolutions whose batch is a dilated dimension."""
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
    """Pairs of output and window positions that meet an input, along one dimension."""
    last = (inputs - 1) * lhs_dilate
    return sum(
        0 <= (at := out * stride + inside * rhs_dilate - pad) <= last and at % lhs_dilate == 0
        for out in range(outputs)
        for inside in range(size)
    )
