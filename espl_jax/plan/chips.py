"""What TPUs can do, by the names that topologies are called: figures of one jax device.

From https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; memory is what the compiler lets programs
have, which is a little less than what the chip has. Chips of tpu7x are two devices each.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      memory: bytes of HBM that programs can have.
      flops: bfloat16 operations a second at most.
      bandwidth: bytes a second between HBM and the chip at most.
      slices: topologies that can be had, with their devices, smallest first.
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
    """The chip of a topology such as `v5e:4x4`.

    Raises:
      ValueError: for a chip or a form of the name that is unknown.
    """
    kind, separator, _ = topology.partition(":")
    if kind not in CHIPS or not separator:
        raise ValueError(
            f"topology={topology!r} is unknown; give a chip out of {', '.join(CHIPS)} and its devices, such "
            "as v5e:4x4 or v5p:2x2x2"
        )
    return CHIPS[kind]
