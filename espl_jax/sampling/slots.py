"""Which row is in which slot, decided on the host."""

from __future__ import annotations

import numpy as np

from espl_jax.sampling.sizes import rungs


class SlotTable:
    """Rows in slots. A row stays in its shard of the slots, and moves only when chunks become narrower.

    Widths of chunks are `rungs` of a shard's slots, `coarse` or not.

    Attributes:
      row: int64 [shards, slots of a shard], each slot's row number, -1 for none.
    """

    def __init__(self, shards: int, per_shard: int, coarse: bool = False):
        self._widths = rungs(per_shard, coarse)
        self.row = np.full((shards, per_shard), -1)

    @property
    def free(self) -> int:
        """Slots without a row."""
        return int((self.row < 0).sum())

    def put(self, number: int) -> tuple[int, int]:
        """Gives a row a slot: that of its number if there is one shard, else one of the emptiest shard.

        Returns:
          (shard, slot of the shard).
        """
        shards, per_shard = self.row.shape
        shard = int((self.row < 0).sum(axis=1).argmax())
        own = shards == 1 and number < per_shard and self.row[0, number] < 0
        slot = number if own else int((self.row[shard] < 0).argmax())
        self.row[shard, slot] = number
        return shard, slot

    def place(self, number: int) -> tuple[int, int]:
        """(shard, slot of the shard) of a row."""
        shard, slot = np.argwhere(self.row == number)[0]
        return int(shard), int(slot)

    def holds(self, number: int) -> bool:
        """Whether a row has a slot."""
        return bool((self.row == number).any())

    def remove(self, number: int) -> None:
        """Takes a row out of its slot, if it has one."""
        self.row[self.row == number] = -1

    def narrow(self, running: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Moves the rows that run into the first slots of their shards, where these are empty.

        Args:
          running: bool [rows], whether a row runs in the next chunk; others stay where they are.

        Returns:
          (width, moves, counts): slots of each shard in the next chunk; int32 [shards, k, 2], from which slot
          of the shard to which, k = slots of a shard; int32 [shards], how many of the k.
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
        """Row numbers of the first `width` slots of each shard, -1 for none. int64 [shards * width]."""
        return self.row[:, :width].reshape(-1)
