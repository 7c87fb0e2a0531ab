"""Any server that speaks Search-R1's `/retrieve`: how an index of all Wikipedia is run."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

from espl_jax.environments.retrievers.base import RetrievalError, check_count
from espl_jax.environments.retrievers.passage_file import BlankPassageError, read_passage
from espl_jax.storage import json_values
from espl_jax.types import Passage

MAX_RESPONSE_BYTES = 16 * 2**20
"""A longer answer of a server is a failure."""

ATTEMPTS = 3
"""How often a server is asked that cannot be reached, or closes the connection without an answer."""

FIRST_WAIT = 0.2
"""Seconds before the second attempt; doubled before the third."""


class SearchServer:
    """A `Retriever` that asks a server.

    The protocol is that of Search-R1 (Jin et al. 2025, search_r1/search/retrieval_server.py in
    https://github.com/PeterGriffinJin/Search-R1). A POST of `{"queries": [...], "topk": n, "return_scores":
    true}` is answered by `{"result": [...]}`, for each query a list of `{"document": {...}, "score": x}`, or
    of documents alone. A document is read by `read_passage`. Documents that are null, blank or cannot be read
    are skipped.

    Args:
      url: the whole address, e.g. http://localhost:8000/retrieve. Proxies of the environment are not used.
      timeout: seconds that one search may take, attempts and waits included, whatever the server does.

    Raises:
      ValueError: naming the argument and the fix.
    """

    def __init__(self, url: str, timeout: float):
        parts = urllib.parse.urlsplit(url) if is_address(url) else None
        if parts is None or parts.path in ("", "/"):
            raise ValueError(
                f"retriever={url!r} is not the whole address of a server: give, e.g., "
                "http://localhost:8000/retrieve"
            )
        if timeout <= 0:
            raise ValueError(f"timeout={timeout} of the retriever: give more than 0 seconds")
        self.url, self.timeout = url, timeout
        self._parts = parts

    def search(self, queries: Sequence[str], count: int) -> list[list[Passage]]:
        """The passages that the server finds, as `Retriever` has it; blank queries are not sent.

        Raises:
          RetrievalError: no whole answer in time, no connection, a status other than 200, or an answer that
            is too long, no JSON, or of another shape, as one whose documents cannot be read.
          ValueError: for a count below 1.
        """
        check_count(count)
        asked = [query for query in queries if query.strip()]
        if not asked:
            return [[] for _ in queries]
        request = {"queries": asked, "topk": count, "return_scores": True}
        results = iter(self._read(self._ask(json.dumps(request).encode()), asked, count))
        return [next(results) if query.strip() else [] for query in queries]

    def _ask(self, body: bytes) -> bytes:
        """What the server answers; asks again where there was no connection."""
        deadline = time.monotonic() + self.timeout
        said = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(max(0.0, min(FIRST_WAIT * 2 ** (attempt - 1), deadline - time.monotonic())))
            try:
                return self._attempt(body, deadline)
            except (OSError, UnicodeError, http.client.HTTPException) as error:  # UnicodeError: of host names
                said = f"{type(error).__name__}: {error}"
            if time.monotonic() >= deadline:
                raise self._failure(f"no whole answer within {self.timeout:g} seconds")
        raise self._failure(f"no connection ({said})")

    def _attempt(self, body: bytes, deadline: float) -> bytes:
        host = self._parts.hostname
        assert host is not None
        secure = self._parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        left = max(0.01, deadline - time.monotonic())
        with contextlib.closing(connect(host, self._parts.port, timeout=left)) as connection:
            connection.connect()
            # The connection's own limit is for each read, so a server that dribbles would never meet it.
            left = max(0.0, deadline - time.monotonic())
            watchdog = threading.Timer(left, _cut, [connection.sock])
            watchdog.daemon = True
            watchdog.start()
            try:
                target = self._parts._replace(scheme="", netloc="", fragment="").geturl()
                headers = {"Content-Type": "application/json", "Connection": "close"}
                connection.request("POST", target, body, headers)
                response = connection.getresponse()
                answer = response.read(MAX_RESPONSE_BYTES + 1)
                whole = not response.length
            finally:
                watchdog.cancel()
        if time.monotonic() >= deadline:
            raise TimeoutError
        if response.status != 200:
            said = " ".join(answer.decode(errors="replace").split())[:200]
            raise self._failure(f"status {response.status} {response.reason}: {said or '(nothing more)'}")
        if len(answer) > MAX_RESPONSE_BYTES:
            raise self._failure(f"an answer of more than {MAX_RESPONSE_BYTES} bytes")
        if not whole:
            raise ConnectionError("the answer was cut short")
        return answer

    def _read(self, answer: bytes, queries: Sequence[str], count: int) -> list[list[Passage]]:
        """The passages in an answer."""
        try:
            content = json_values.parse(answer)
        except ValueError:
            raise self._failure(f"an answer that is no JSON: {answer[:100]!r}") from None
        results = content.get("result") if isinstance(content, dict) else None
        if not isinstance(results, list) or not all(isinstance(result, list) for result in results):
            raise self._failure("an answer without a 'result' that is a list of lists")
        if len(results) != len(queries):
            raise self._failure(f"{len(results)} results for {len(queries)} queries")
        found, error = [], None
        for result in results:
            passages = []
            for item in result:
                try:
                    passages.append(_read_item(item))
                except BlankPassageError:
                    continue
                except ValueError as said:
                    error = error or said
            found.append(passages[:count])
        # Single bad documents are skipped. If there are no others, the server's documents have another form.
        if error and not any(found):
            raise self._failure(f"an answer with a document that cannot be read: {error}")
        return found

    def _failure(self, what: str) -> RetrievalError:
        return RetrievalError(f"the search server {self.url} failed: {what[:300]}")


def is_address(spec: str) -> bool:
    """Whether a spec is the address of a server, and not a path."""
    try:
        parts = urllib.parse.urlsplit(spec)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        return False


def _read_item(item: Any) -> Passage:
    document = item["document"] if isinstance(item, dict) and "document" in item else item
    if document is None or document == {}:
        raise BlankPassageError("no document")
    fields = document if isinstance(document, dict) else {}
    texts = [fields[name] for name in ("text", "contents") if name in fields]
    if texts and all(text is None for text in texts):
        raise BlankPassageError("a document without text")
    return read_passage(document)


def _cut(connection: socket.socket) -> None:
    """Ends a connection from another thread. Not by a TLS socket's own method, which is not made for that."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
