"""The host's table of which row is in which slot."""

from __future__ import annotations

import numpy as np

from espl_jax.sampling.sizes import rungs


class SlotTable:
    """Assigns rows to slots. A row never leaves its shard, and moves only when chunks become narrower.

    Attributes:
      row: int64 [shards, slots of a shard], the row number in each slot, -1 for none.
    """

    def __init__(self, shards: int, per_shard: int, coarse: bool = False):
        """Creates an empty table; chunk widths are `rungs(per_shard, coarse)`."""
        self._widths = rungs(per_shard, coarse)
        self.row = np.full((shards, per_shard), -1)

    @property
    def free(self) -> int:
        """Number of slots without a row."""
        return int((self.row < 0).sum())

    def put(self, number: int) -> tuple[int, int]:
        """Puts a row into a free slot.

        With a single shard, row i takes slot i if that is free. Otherwise the row takes the first free slot
        of the emptiest shard.

        Returns:
          (shard, slot within the shard).
        """
        shards, per_shard = self.row.shape
        shard = int((self.row < 0).sum(axis=1).argmax())
        own = shards == 1 and number < per_shard and self.row[0, number] < 0
        slot = number if own else int((self.row[shard] < 0).argmax())
        self.row[shard, slot] = number
        return shard, slot

    def place(self, number: int) -> tuple[int, int]:
        """Returns (shard, slot within the shard) of a row."""
        shard, slot = np.argwhere(self.row == number)[0]
        return int(shard), int(slot)

    def holds(self, number: int) -> bool:
        """Returns whether a row has a slot."""
        return bool((self.row == number).any())

    def remove(self, number: int) -> None:
        """Takes a row out of its slot, if it has one."""
        self.row[self.row == number] = -1

    def narrow(self, running: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Chooses the narrowest chunk that holds all running rows, and moves those beyond it into free slots.

        Args:
          running: bool [rows], whether a row runs in the next chunk; other rows are not moved.

        Returns:
          (width, moves, counts): slots per shard in the next chunk; int32 [shards, k, 2], source and target
          slots within the shard, where k is the slots of a shard; int32 [shards], how many of the k moves to
          make.
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
        for shard, row in enumerate(self.row):
            high = np.flatnonzero(runs[shard, width:]) + width
            low = np.flatnonzero(empty[shard, :width])[: len(high)]
            row[low], row[high] = row[high], -1
            moves[shard, : len(high)] = np.stack([high, low], axis=1)
            counts[shard] = len(high)
        return width, moves, counts

    def first(self, width: int) -> np.ndarray:
        """Returns the rows in the first `width` slots of each shard, -1 for none. int64 [shards * width]."""
        return self.row[:, :width].reshape(-1)
