"""What rows may draw where the host has a say in it, token by token."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """Rows that are kept to something, each by its number in [M * B * N].

    Before every token of a row the sampler asks what it may be, and afterwards says what was drawn. It never
    asks about a row that may draw nothing at all (a limit of 0).
    """

    def allowed(self, rows: np.ndarray) -> np.ndarray:
        """Which tokens each of these rows may draw next, at least one.

        Args:
          rows: int [R].

        Returns:
          uint32 [R, ceil(V / 32)]; token v is bit v % 32 of word v // 32.
        """
        ...

    def accept(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Takes note of what these rows drew, stop tokens too. int [R], int32 [R]."""
        ...
