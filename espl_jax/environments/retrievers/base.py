"""What a retriever is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from espl_jax.types import Passage


class RetrievalError(Exception):
    """A search without a result: the retriever is dead, slow, or returns what cannot be read.

    The message is one short sentence, fit for a log and for the model that has searched.
    """


class Retriever(Protocol):
    """Finds passages. Anything with this method serves; it may be called from several threads at once."""

    def search(self, queries: Sequence[str], count: int) -> list[list[Passage]]:
        """The best passages for each query.

        Args:
          queries: any texts; a blank one finds nothing.
          count: most passages for a query, at least 1.

        Returns:
          One list a query, best first, with at most `count` passages, and none where nothing matches.

        Raises:
          RetrievalError: there is no result for these queries.
          ValueError: for a count below 1.
        """
        ...


def check_count(count: int) -> None:
    """Raises ValueError for a number of passages that nobody can want."""
    if count < 1:
        raise ValueError(f"count={count}: ask for at least 1 passage")
