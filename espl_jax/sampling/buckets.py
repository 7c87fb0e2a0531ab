"""Rounds sizes up to a fixed ladder of buckets, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bucket(size: int, smallest: int = 64) -> int:
    """Returns the smallest bucket that holds `size`, from smallest * (1, 2, 3, 4, 6, 8, 12, 16, ...).

    Args:
      size: at least 0.
      smallest: the first rung.
    """
    rung = smallest
    while rung < size:
        if rung + rung // 2 >= size and rung > smallest:
            return rung + rung // 2
        rung *= 2
    return rung


def pad_right(sequences: Sequence[Sequence[int]], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Packs token lists into a right-padded array.

    Args:
      sequences: R lists.
      width: columns; the bucket of the longest by default.

    Returns:
      (int32 [R, width] padded with zeros, int32 [R] lengths).
    """
    lengths = np.array([len(s) for s in sequences], np.int32)
    width = bucket(int(lengths.max(initial=0))) if width is None else width
    out = np.zeros((len(sequences), width), np.int32)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = sequence
    return out, lengths
