"""Specifications of TPU chips, per jax device, keyed by the name used in topologies.

From https://cloud.google.com/tpu/docs/system-architecture-tpu-vm. Memory is what the compiler makes available
to programs, slightly less than the chip has. A tpu7x chip is two devices.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      memory: bytes of HBM available to programs.
      flops: peak bfloat16 flops per second.
      bandwidth: peak HBM bandwidth, in bytes per second.
      slices: available topologies, smallest first.
    """

    memory: float
    flops: float
    bandwidth: float
    slices: tuple[str, ...]


_GIB = 2**30

CHIPS = {
    "v4": Chip(31.75 * _GIB, 275e12, 1228e9, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")),
    "v5e": Chip(15.75 * _GIB, 197e12, 819e9, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": Chip(95.74 * _GIB, 459e12, 2765e9, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")),
    "v6e": Chip(31.25 * _GIB, 918e12, 1640e9, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "tpu7x": Chip(94.75 * _GIB, 1153e12, 3685e9, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")),
}


def find_chip(topology: str) -> Chip:
    """Returns the chip of a topology such as `v5e:4x4`.

    Raises:
      ValueError: for an unknown chip or a malformed topology.
    """
    kind, separator, _ = topology.partition(":")
    if kind not in CHIPS or not separator:
        raise ValueError(
            f"topology={topology!r}: unknown topology; give one of {', '.join(CHIPS)} and a shape, such as "
            "v5e:4x4 or v5p:2x2x2"
        )
    return CHIPS[kind]
