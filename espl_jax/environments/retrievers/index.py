"""The inverted index of bm25s, and importing bm25s without its side effects."""

from __future__ import annotations

import array
import logging
import sys
import threading
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from espl_jax.environments.retrievers.words import Stems, stems_of
from espl_jax.types import Passage

if TYPE_CHECKING:
    import bm25s

K1, B = 0.9, 0.4
"""How soon repeated words count no more, and how much long passages are marked down: Pyserini's defaults,
with which Search-R1 searches."""

_import_lock = threading.Lock()


def import_bm25s() -> ModuleType:
    """Imports bm25s as if jax were not installed.

    Where jax is, bm25s calls it at import, which takes hold of all devices: of a TPU that belongs to another
    process, or before the processes of a run have met. Its messages at the level of debugging are left out.
    """
    name = "jax.lax"
    with _import_lock:
        if "bm25s" not in sys.modules:
            present = sys.modules.get(name)
            sys.modules[name] = None  # type: ignore[assignment] (what makes an import fail)
            try:
                import bm25s  # noqa: F401
            finally:
                del sys.modules[name]
                if present is not None:
                    sys.modules[name] = present
            logging.getLogger("bm25s").setLevel(logging.WARNING)
        return sys.modules["bm25s"]


def build(passages: Iterable[Passage], name: str) -> bm25s.BM25:
    """Indexes passages by the words of title and text.

    Args:
      passages: read once, in order; the n-th one has the number n.
      name: of the passages, for messages.

    Returns:
      An index whose `vocab_dict` maps stems to their numbers.

    Raises:
      ValueError: there are no passages, or no words in them.
    """
    stems, vocabulary = Stems(), {}
    documents = [
        array.array(
            "i",
            [
                vocabulary.setdefault(stem, len(vocabulary))
                for stem in stems_of(f"{passage.title}\n{passage.text}", stems)
            ],
        )
        for passage in passages
    ]
    if not vocabulary:
        raise ValueError(
            f"{name}: nothing to search in {len(documents)} passages; give at least one that has words"
        )
    bm25 = import_bm25s().BM25(k1=K1, b=B, method="lucene", backend="numpy")
    bm25.index((documents, vocabulary), create_empty_token=False, show_progress=False)
    return bm25
