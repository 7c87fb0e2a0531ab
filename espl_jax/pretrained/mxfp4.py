"""Dequantizes MXFP4: blocks of 32 four-bit numbers that share a power of two.

Open Compute Project, Microscaling Formats (MX) Specification 1.0, 2023, sections 5.3.3 and 5.4.1. Every value
is exact in float32, and in bfloat16 unless it underflows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

BLOCK = 32
"""Numbers that share a scale; two of them are stored in a byte."""

_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)
"""Twice the values of E2M1 without the sign, which is its highest bit."""

_NUMBERS = np.concatenate([_DOUBLED, -_DOUBLED])

_PAIRS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=1)
"""The two numbers of a byte, doubled, the one in the low bits first. float32 [256, 2]."""

_HALVED = np.ldexp(np.float32(1), np.arange(256) - 128)
"""Half the values of E8M0, so that all are finite. float32 [256]; the last one stands for NaN, and is read as
a number, as by transformers."""


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """A matrix in MXFP4. Indexing it dequantizes a part.

    Attributes:
      blocks: uint8 [rows, columns / 32, 16].
      scales: uint8 [rows, columns / 32].
    """

    blocks: np.ndarray
    scales: np.ndarray

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """Returns float32 [rows, columns] for a slice of rows and a slice of columns."""
        rows, columns = index
        start, stop, step = columns.indices(self.blocks.shape[1] * BLOCK)
        groups = slice(start // BLOCK, -(-stop // BLOCK))
        pairs = _PAIRS[self.blocks[rows, groups]]  # [rows, groups, 16, 2]
        with np.errstate(over="ignore"):
            values = pairs.reshape(*pairs.shape[:2], BLOCK) * _HALVED[self.scales[rows, groups]][..., None]
        before = groups.start * BLOCK
        return values.reshape(len(values), -1)[:, start - before : stop - before : step]
