"""Indexes kept on disk, because building one of millions of passages takes minutes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from espl_jax.environments.retrievers import index, words
from espl_jax.environments.retrievers.passage_file import scan
from espl_jax.storage import user_cache
from espl_jax.types import Passage

if TYPE_CHECKING:
    import bm25s

VERSION = 1
"""Part of every entry's name: raise it when the files of an entry change."""

Opened = tuple["bm25s.BM25", np.ndarray]
"""The index, and int64 [passages + 1]: where the line of each passage begins, and the file's size."""

_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError)
"""What reading files may raise that are not there, cut short, or of another kind."""


def open_cached(path: Path) -> Opened:
    """Opens the index of a file of passages, building it if the cache does not have it.

    An entry is known by the file's path, size and time of change, by the settings of the index, and by the
    version of bm25s. It appears in the folder whole or not at all; one that is damaged is built anew. Its
    arrays are mapped into memory and not read. A folder that cannot be written is no error: the index is
    then built every time and held in memory, with a warning. Entries of files that have changed since, and
    what a kill leaves of a new one (`.writing-*`), stay; anything in the folder may be deleted at any time.

    Raises:
      ValueError: naming file, line and field, for a line that holds no passage.
    """
    status = path.stat()
    file = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    settings = [VERSION, words.VERSION, index.K1, index.B, index.import_bm25s().__version__]
    digest = hashlib.sha256(json.dumps([*file, *settings]).encode()).hexdigest()
    entry = cache_folder() / f"{path.stem}-{digest[:16]}"
    with contextlib.suppress(*_DAMAGED):
        return _read(entry)
    built = _build(path)
    try:
        _write(entry, *built)
        return _read(entry)
    except _DAMAGED as error:
        warnings.warn(
            f"the index of {path} could not be cached in {entry.parent} ({error}); "
            "set the environment variable ESPL_JAX_CACHE to a folder with room that you can write",
            stacklevel=2,
        )
        return built


def cache_folder() -> Path:
    """Where indexes are kept: `~/.cache/espl_jax/bm25`, or `bm25` in the folder that ESPL_JAX_CACHE names."""
    return user_cache.cache_folder() / "bm25"


def _build(path: Path) -> Opened:
    offsets: list[int] = []

    def passages() -> Iterator[Passage]:
        for offset, passage in scan(path):
            offsets.append(offset)
            yield passage

    bm25 = index.build(passages(), str(path))
    return bm25, np.array([*offsets, path.stat().st_size], np.int64)


def _write(entry: Path, bm25: bm25s.BM25, offsets: np.ndarray) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".writing-") as folder:
        new = Path(folder, "new")
        bm25.save(new, show_progress=False)
        np.save(new / "offsets.npy", offsets)
        with contextlib.suppress(FileNotFoundError):
            os.rename(entry, Path(folder, "old"))
        try:
            os.rename(new, entry)
        except OSError:
            if not entry.exists():  # else another process was first, and its entry is as good
                raise


def _read(entry: Path) -> Opened:
    bm25 = index.import_bm25s().BM25.load(entry, mmap=True, show_progress=False)
    offsets = np.load(entry / "offsets.npy", mmap_mode="r")
    sizes = {name: len(bm25.scores[name]) for name in ("data", "indices")}
    if (
        sizes != dict.fromkeys(sizes, bm25.scores["indptr"][-1])
        or len(offsets) != bm25.scores["num_docs"] + 1
    ):
        raise ValueError(f"the files of {entry} do not belong together")
    return bm25, offsets
