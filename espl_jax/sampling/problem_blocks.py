"""Prefills the problems of a tree in blocks, to bound memory.

A block is prefilled when its first row is admitted and dropped after its last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from espl_jax.models.attention import KVCache
from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import sharding
from espl_jax.parallel.ahead import CompileAhead
from espl_jax.sampling import decode
from espl_jax.sampling.buckets import pad_right

PREFILL_TOKENS = 4096
"""Most tokens in a block, unless one problem per lane already exceeds it."""


def block_size(lanes: int, problems: int, width: int) -> int:
    """Returns the number of problems per lane in a block, for problems of at most `width` columns."""
    fitting = PREFILL_TOKENS // (lanes * width)
    count = -(-problems // max(1, min(fitting, problems)))
    return -(-problems // count)


class ProblemBlocks:
    """M lanes of B problems, split into blocks with the same number of problems from every lane."""

    def __init__(
        self, problem_tokens: Sequence[Sequence[Sequence[int]]], widths: Sequence[int], mesh: Mesh | None
    ):
        """Splits the problems into blocks.

        Args:
          problem_tokens: M lists of B token lists. The last token of each is not prefilled; its rows start
            with it.
          widths: allowed numbers of columns of a block, ascending; the last one holds any problem.
          mesh: the mesh, or None.
        """
        self._tokens = problem_tokens
        self._widths = widths
        self._mesh = mesh
        self.lanes, self.problems = len(problem_tokens), len(problem_tokens[0])
        self._size = block_size(self.lanes, self.problems, widths[-1])

    def rows(self, group: int) -> Iterator[int]:
        """Yields the numbers of all rows, block by block."""
        for first in range(0, self.problems, self._size):
            for lane in range(self.lanes):
                for problem in range(first, min(first + self._size, self.problems)):
                    start = (lane * self.problems + problem) * group
                    yield from range(start, start + group)

    def place(self, node: int) -> tuple[int, int]:
        """Returns (block, index within the block) of node lane * B + problem."""
        lane, problem = divmod(node, self.problems)
        block, index = divmod(problem, self._size)
        return block, lane * self._size + index

    def padded(self, block: int) -> tuple[jax.Array, jax.Array]:
        """Returns the tokens of a block, int32 [M * P, Q], and their lengths, int32 [M * P]."""
        first = block * self._size
        nodes: list[Sequence[int]] = []
        for lane in self._tokens:
            tokens = [t[:-1] for t in lane[first : first + self._size]]
            nodes += [*tokens, *[()] * (self._size - len(tokens))]
        longest = max(map(len, nodes))
        width = next(width for width in self._widths if width >= longest)
        return sharding.place_rows(pad_right(nodes, width), self._mesh)

    def prefill(
        self, block: int, params: Any, decoder: DecoderConfig, system: KVCache, ahead: CompileAhead
    ) -> KVCache:
        """Returns the KV cache of a block, given that of the M system prompts."""
        given = params, decoder, *self.padded(block), system
        return ahead.call(decode.prefill, *given, mesh=self._mesh)
