"""Compiles programs in the background, before they are called.

A background thread lowers a jitted function for abstract arguments and compiles the result. jax keeps both
under the same keys as an ordinary call (function, shapes, dtypes, shardings, static arguments), so a later
call finds the program and compiles nothing. A call that was not listed compiles as without this module. Which
program runs, and with it every result, does not depend on the threads.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from absl import logging


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a jitted function, with abstract arguments.

    Attributes:
      function: the jitted function.
      arguments: positional arguments; arrays are `jax.ShapeDtypeStruct`s.
      static: keyword arguments.
      urgency: calls with smaller numbers are compiled first.
    """

    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any]
    urgency: int = 0

    def lower(self) -> jax.stages.Lowered:
        """Lowers the function for the arguments."""
        return self.function.lower(*self.arguments, **self.static)

    @property
    def signature(self) -> Hashable:
        """Equal for two calls of the same program."""
        # By the shapes of shards: jax has several names for one sharding.
        shards = (
            x.sharding and x.sharding.shard_shape(x.shape)
            for x in jax.tree.leaves(self.arguments)
            if isinstance(x, jax.ShapeDtypeStruct)
        )
        return _shapes(self.function, self.arguments, self.static), *shards


def _shapes(function: Any, arguments: tuple[Any, ...], static: dict[str, Any]) -> Hashable:
    """Returns the same key for a call with arrays and for one with their shapes."""
    leaves, structure = jax.tree.flatten(arguments)
    sizes = ((getattr(x, "shape", x), getattr(x, "dtype", None)) for x in leaves)
    return function, structure, *sizes, *sorted(static.items())


def abstract(tree: Any) -> Any:
    """Returns the shapes of arrays, with the shardings of those that are committed to devices."""

    def one(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x
        kept = x.sharding if x.committed else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kept, weak_type=jax.typeof(x).weak_type)

    return jax.tree.map(one, tree)


def threads_for(choice: str) -> int:
    """Returns the number of threads for `compile_ahead`: none if it is off; else one for every four cores, at
    least one and at most eight."""
    if choice == "off" or (choice == "auto" and jax.default_backend() == "cpu"):
        return 0
    return max(1, min(8, (os.cpu_count() or 1) // 4))


class CompileAhead:
    """Compiles calls in background threads; a context manager.

        with CompileAhead(threads=2) as ahead:
            ahead.add("Rollouts", calls)
            out = ahead.call(function, *arguments, **static)

    When the context ends, no further program is begun. The process ends after the programs that are being
    compiled: a thread that is killed inside the compiler aborts the process. An error in a thread is logged
    once, and no further program is compiled ahead.
    """

    def __init__(
        self,
        threads: int,
        finished: Callable[[str, int, float], None] = lambda title, count, seconds: None,
    ):
        """Creates the threads.

        Args:
          threads: number of threads; 0 compiles nothing ahead.
          finished: called from a thread when all calls of an `add` are compiled, with its title, the number
            of programs, and seconds since they were queued.
        """
        self.on = threads > 0
        self._finished = finished
        self._pool = ThreadPoolExecutor(max(1, threads), "compile-ahead")
        self._guard = threading.Lock()
        """Guards the attributes below."""
        self._ended = not self.on
        self._queue: list[tuple[int, int, Call, _Group]] = []
        self._order = itertools.count()
        self._seen: set[Hashable] = set()
        self._locks: dict[Hashable, threading.Lock] = collections.defaultdict(threading.Lock)
        self._left = 0
        # Tracing and lowering hold the interpreter, which the host loop of the rollouts needs too.
        self._lowering = threading.Lock()

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end()

    def add(self, title: str, calls: Iterable[Call]) -> int:
        """Queues those calls that have not been queued before.

        Args:
          title: what the calls are for; passed to `finished`.
          calls: in the order in which they will probably be met.

        Returns:
          How many calls were queued.
        """
        if self._ended:
            return 0
        with self._guard:
            new = []
            for call in calls:
                if (signature := call.signature) not in self._seen:
                    self._seen.add(signature)
                    new.append(call)
            group = _Group(title, len(new), time.monotonic())
            for call in new:
                heapq.heappush(self._queue, (call.urgency, next(self._order), call, group))
            self._left += len(new)
            if not self._ended:
                for _ in new:
                    self._pool.submit(self._compile_next)
        return len(new)

    def call(self, function: Any, *arguments: Any, **static: Any) -> Any:
        """Calls a jitted function. If its program is being compiled in the background, waits for it; if it is
        queued, compiles it now."""
        if not self._left:
            return function(*arguments, **static)
        with self._lock(function, arguments, static):
            return function(*arguments, **static)

    def _lock(self, function: Any, arguments: tuple[Any, ...], static: dict[str, Any]) -> threading.Lock:
        """Returns the lock that is held while a program is compiled, in the background or by a call."""
        key = _shapes(function, arguments, static)
        with self._guard:
            return self._locks[key]

    def _compile_next(self) -> None:
        with self._guard:
            if self._ended:
                return
            _, _, call, group = heapq.heappop(self._queue)
        try:
            with self._lock(call.function, call.arguments, call.static):
                with self._lowering:
                    lowered = call.lower()
                lowered.compile()
        except Exception as error:
            if not self._end():
                logging.warning(
                    "compile_ahead: %s: %s; the run compiles its programs when it first needs them",
                    type(error).__name__,
                    error,
                )
            return
        with self._guard:
            if self._ended:
                return
            self._left -= 1
            group.left -= 1
            if not group.left:
                self._finished(group.title, group.count, time.monotonic() - group.since)

    def _end(self) -> bool:
        """Begins no further program. Returns whether that was so already."""
        with self._guard:
            before, self._ended = self._ended, True
            self._left = 0
            self._queue.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
        return before


class _Group:
    """The calls of one `add`: their number, how many are not compiled yet, and when they were queued."""

    def __init__(self, title: str, count: int, since: float):
        self.title, self.count, self.left, self.since = title, count, count, since


def counted(programs: int) -> str:
    """Returns `1 program` or `28 programs`."""
    return f"{programs} program{'' if programs == 1 else 's'}"


OFF = CompileAhead(threads=0)
"""Compiles nothing ahead."""
