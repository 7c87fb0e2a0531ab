"""What rows may draw where the host has a say in it, token by token."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """Decides which tokens rows may draw, each row by its number in [M * B * N].

    While a row is active, the sampler asks before each of its tokens what it may be, and afterwards says what
    was drawn. Other rows draw freely. It never asks for the tokens of a row with a limit of 0.
    """

    def active(self, rows: np.ndarray) -> np.ndarray:
        """Returns which of these rows are constrained now. int [R] -> bool [R]."""
        ...

    def answered(self, rows: np.ndarray) -> None:
        """Takes note that `respond` appended tokens to these rows: they begin another turn. int [R]."""

    def allowed(self, rows: np.ndarray) -> np.ndarray:
        """Which tokens each of these rows may draw next, at least one.

        Args:
          rows: int [R].

        Returns:
          uint32 [R, ceil(V / 32)]; token v is bit v % 32 of word v // 32.
        """

    def accept(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Takes note of what these rows drew, stop tokens too. int [R], int32 [R]."""
