"""Which row is in which slot, decided on the host."""

from __future__ import annotations

import numpy as np

from espl_jax.sampling.sizes import rungs


class SlotTable:
    """Rows in slots. A row stays in its part of the slots, and moves only when chunks become narrower.

    Widths of chunks are `rungs` of a part's slots, `coarse` or not.

    Attributes:
      row: int64 [parts, slots of a part], each slot's row number, -1 for none.
    """

    def __init__(self, parts: int, per_part: int, coarse: bool = False):
        self._widths = rungs(per_part, coarse)
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

    def holds(self, number: int) -> bool:
        """Whether a row has a slot."""
        return bool((self.row == number).any())

    def remove(self, number: int) -> None:
        """Takes a row out of its slot, if it has one."""
        self.row[self.row == number] = -1

    def narrow(self, running: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Moves the rows that run into the first slots of their parts, where these are empty.

        Args:
          running: bool [rows], whether a row runs in the next chunk; others stay where they are.

        Returns:
          (width, moves, counts): slots of each part in the next chunk; int32 [parts, k, 2], from which slot
          of the part to which, k = slots of a part; int32 [parts], how many of the k.
        """
        empty = self.row < 0
        runs = ~empty & running[self.row]
        width = next(
            width
            for width in self._widths
            if (runs[:, width:].sum(axis=1) <= empty[:, :width].sum(axis=1)).all()
        )
        moves = np.zeros((*self.row.shape, 2), np.int32)
        counts = np.zeros(len(self.row), np.int32)
        for part, row in enumerate(self.row):
            high = np.flatnonzero(runs[part, width:]) + width
            low = np.flatnonzero(empty[part, :width])[: len(high)]
            row[low], row[high] = row[high], -1
            moves[part, : len(high)] = np.stack([high, low], axis=1)
            counts[part] = len(high)
        return width, moves, counts

    def first(self, width: int) -> np.ndarray:
        """Row numbers of the first `width` slots of each part, -1 for none. int64 [parts * width]."""
        return self.row[:, :width].reshape(-1)
