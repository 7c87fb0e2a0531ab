"""Constrained decoding: the interface through which the host masks tokens at every step."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """Restricts the tokens of each row; rows are numbered in [M * B * N].

    Before each step, the sampler calls `allowed` for the active rows that run; after it, `accept` with the
    sampled tokens. Other rows sample freely. Rows with a limit of 0 are never passed.
    """

    def active(self, rows: np.ndarray) -> np.ndarray:
        """Returns which of these rows are constrained now. int [R] -> bool [R]."""
        ...

    def answered(self, rows: np.ndarray) -> None:
        """Takes note that `respond` appended tokens to these rows: they begin another turn. int [R]."""

    def allowed(self, rows: np.ndarray) -> np.ndarray:
        """Returns a bit mask of the tokens that each row may sample next; at least one bit must be set.

        Args:
          rows: int [R].

        Returns:
          uint32 [R, ceil(V / 32)]; token v is bit v % 32 of word v // 32.
        """
        ...

    def accept(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Records the token, int32 [R], that each of `rows`, int [R], sampled; stop tokens included."""
        ...
