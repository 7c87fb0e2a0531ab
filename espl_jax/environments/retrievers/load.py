"""Retrievers of the search environment: BM25 in this process, or a server with Search-R1's protocol."""

from __future__ import annotations

from espl_jax.environments.retrievers.base import RetrievalError, Retriever
from espl_jax.environments.retrievers.bm25 import Bm25
from espl_jax.environments.retrievers.server import SearchServer, is_address

__all__ = ["Bm25", "RetrievalError", "Retriever", "SearchServer", "open_retriever"]


def open_retriever(spec: str, timeout: float) -> Retriever:
    """Opens the retriever that a configuration names.

    Args:
      spec: the address of a server, `http://host:port/retrieve`, or a file of passages, `passages.jsonl`,
        whose index is built at the first time and cached.
      timeout: seconds that one search of a server may take. BM25 has no limit and needs none.

    Raises:
      ValueError: naming the spec and the fix, or file, line and field of a passage that cannot be read.
      FileNotFoundError: there is no such file.
    """
    if is_address(spec):
        return SearchServer(spec, timeout)
    if spec.endswith(".jsonl"):
        return Bm25.open(spec)
    raise ValueError(
        f"retriever={spec!r} is neither a server nor a file of passages: give a whole address, e.g. "
        "http://localhost:8000/retrieve, or a path that ends in .jsonl"
    )
