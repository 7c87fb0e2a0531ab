"""BM25 in this process, over passages in memory or in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from espl_jax.environments.retrievers import index
from espl_jax.environments.retrievers.base import check_count
from espl_jax.environments.retrievers.index_cache import open_cached
from espl_jax.environments.retrievers.passage_file import PassageFile
from espl_jax.environments.retrievers.words import Stems, stems_of
from espl_jax.types import Passage

MAX_QUERY_WORDS = 256
"""Further words of a query are not searched: a model may ask with a book, and every word takes its time."""


class Bm25:
    """A `Retriever` by BM25 (Robertson and Zaragoza 2009), in Lucene's variant as the package bm25s has it.

    Title and text are searched alike. A word that a query repeats counts as often. Passages of the same score
    come in the order of their numbers, so that the same search always finds the same.

    Args:
      passages: at least one, with at least one word that is searched.

    Raises:
      ValueError: there is nothing to search.
    """

    def __init__(self, passages: Sequence[Passage]):
        self._passages: Sequence[Passage] | PassageFile = passages
        self._index = index.build(passages, "the passages given")

    @classmethod
    def open(cls, path: str | Path) -> Bm25:
        """Opens a file of passages, one JSON object a line, `text` and `title` or `contents`.

        The index is built once and cached (see `open_cached`), which takes about 2.5 GiB of memory for a
        million passages. Afterwards index and passages stay on the disk and are read where they are needed.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: naming file, line and field, for a line that holds no passage.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path} of passages; correct the path of the retriever")
        opened = cls.__new__(cls)
        opened._index, offsets = open_cached(path)
        opened._passages = PassageFile(path, offsets)
        return opened

    def __len__(self) -> int:
        """How many passages are searched."""
        return len(self._passages)

    def search(self, queries: Sequence[str], count: int) -> list[list[Passage]]:
        """The best passages for each query, as `Retriever` has it."""
        return [[self.passage(number) for number, _ in self.rank(query, count)] for query in queries]

    def rank(self, query: str, count: int) -> list[tuple[int, float]]:
        """Numbers and scores of the best passages, best first: at most `count`, all above 0.

        Raises:
          ValueError: for a count below 1.
        """
        check_count(count)
        vocabulary = self._index.vocab_dict
        stems = stems_of(query, Stems())[:MAX_QUERY_WORDS]
        known = [vocabulary[stem] for stem in stems if stem in vocabulary]
        if not known:
            return []
        scores = self._index.get_scores_from_ids(known)
        found = np.flatnonzero(scores > 0)
        if len(found) > count:
            worst = np.partition(scores[found], -count)[-count]
            found = found[scores[found] >= worst]
        best = found[np.argsort(-scores[found], kind="stable")][:count]
        return [(int(number), float(scores[number])) for number in best]

    def passage(self, number: int) -> Passage:
        """The passage with this number, counted from 0."""
        return self._passages[number]
