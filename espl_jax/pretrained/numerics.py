"""Resolves "auto" numerics for the machine."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import abstract
from espl_jax.parallel.memory import device_memory

AUTO = "auto"

CHOSEN = ("dtype", "param_dtype", "matmul_precision", "sampling_layout")
"""Fields of DecoderConfig that may be "auto"."""

BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""CPU flags in Linux for bfloat16 multiplication on x86-64 and Arm."""

CPUINFO = Path("/proc/cpuinfo")

SHARE = 0.25
"""Fraction of device memory that float32 weights may take; their copy for sampling takes as much again."""


def resolve(
    given: Mapping[str, Any],
    decoder: Callable[[], DecoderConfig],
    platform: str | None = None,
    devices: int | None = None,
) -> dict[str, Any]:
    """Returns the numerics with every "auto" resolved for the machine.

    TPUs and GPUs compute in bfloat16. CPUs compute in float32; those with bfloat16 instructions round matmul
    operands to bfloat16 and store frozen weights in bfloat16. Other CPUs would have to convert bfloat16
    weights in every matmul, so they store float32 if it fits.

    Args:
      given: DecoderConfig fields; those in `CHOSEN` may be "auto".
      decoder: reads the model's config; called only if its size matters.
      platform: "cpu", "tpu" or "gpu"; by default that of the local devices.
      devices: number of devices in the mesh; by default all devices.
    """
    platform = platform or jax.default_backend()
    cpu, fast = platform == "cpu", platform != "cpu" or multiplies_bfloat16()

    def param_dtype() -> str:
        if not fast:
            size = sum(4 * math.prod(weight.shape) for weight in jax.tree.leaves(abstract(decoder())))
            return "float32" if size < SHARE * device_memory() else "bfloat16"
        return "bfloat16"

    one = (devices or jax.device_count()) == 1
    suitable: dict[str, Callable[[], str]] = {
        "dtype": lambda: "float32" if cpu else "bfloat16",
        "param_dtype": param_dtype,
        "matmul_precision": lambda: "bfloat16" if cpu and fast else "default",
        "sampling_layout": lambda: "unstacked" if cpu and one else "stacked",
    }
    asked = {name for name in CHOSEN if isinstance(given.get(name), str) and given[name] == AUTO}
    return {**given, **{name: suitable[name]() for name in asked}}


def multiplies_bfloat16() -> bool:
    """Returns whether the CPU has instructions for bfloat16 multiplication, according to Linux."""
    words = set(re.findall(r"\w+", CPUINFO.read_text())) if CPUINFO.is_file() else set()
    return bool(words & BFLOAT16_INSTRUCTIONS)
