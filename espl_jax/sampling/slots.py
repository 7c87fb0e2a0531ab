"""Which row is in which slot, decided on the host."""

from __future__ import annotations

import numpy as np

from espl_jax.sampling.sizes import rung


class SlotTable:
    """Rows in slots. A row stays in its part of the slots, and moves only when chunks become narrower.

    Attributes:
      row: int64 [parts, slots of a part], each slot's row number, -1 for none.
    """

    def __init__(self, parts: int, per_part: int):
        self.row = np.full((parts, per_part), -1)

    @property
    def free(self) -> int:
        """Slots without a row."""
        return int((self.row < 0).sum())

    def put(self, number: int) -> tuple[int, int]:
        """Gives a row a slot: the one of its own number if there is one part, else one of the emptiest part.

        Returns:
          (part, slot of the part).
        """
        parts, per_part = self.row.shape
        part = int((self.row < 0).sum(axis=1).argmax())
        own = parts == 1 and number < per_part and self.row[0, number] < 0
        slot = number if own else int((self.row[part] < 0).argmax())
        self.row[part, slot] = number
        return part, slot

    def place(self, number: int) -> tuple[int, int]:
        """(part, slot of the part) of a row."""
        part, slot = np.argwhere(self.row == number)[0]
        return int(part), int(slot)

    def remove(self, number: int) -> None:
        """Takes a row out of its slot."""
        self.row[self.row == number] = -1

    def narrow(self, running: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Moves the rows that run into the first slots of their parts.

        Args:
          running: bool [rows], whether a row runs in the next chunk; others keep some slot.

        Returns:
          (width, swaps, counts): slots of each part in the next chunk; int32 [parts, k, 2], which slots of
          the part change places, k = slots of a part; int32 [parts], how many of the k.
        """
        runs = (self.row >= 0) & running[self.row]
        width = rung(max(1, int(runs.sum(axis=1).max())), self.row.shape[1])
        swaps = np.zeros((*self.row.shape, 2), np.int32)
        counts = np.zeros(len(self.row), np.int32)
        for part, (row, run) in enumerate(zip(self.row, runs, strict=True)):
            high = np.flatnonzero(run[width:]) + width
            low = np.flatnonzero(~run[:width])[: len(high)]
            row[low], row[high] = row[high], row[low]
            swaps[part, : len(high)] = np.stack([low, high], axis=1)
            counts[part] = len(high)
        return width, swaps, counts

    def first(self, width: int) -> np.ndarray:
        """Row numbers of the first `width` slots of each part, -1 for none. int64 [parts * width]."""
        return self.row[:, :width].reshape(-1)
