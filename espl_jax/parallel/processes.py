"""Keeps the processes of a multi-host run in agreement.

All processes run the same program on the same values. Values that could differ, because they come from text,
files, servers or the clock, are computed by the first process and broadcast (`decide`). Values that must be
equal are compared (`agree`). Results of work that is split between processes are summed (`total`). Call all
three from the main thread only, which also dispatches device work: every process must make these calls in the
same order. With a single process, they do no communication.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint.multihost import get_barrier_sync_fn

T = TypeVar("T")

_meetings = itertools.count()


def start(address: str = "", count: int = 0, index: int = 0) -> None:
    """Initializes jax.distributed. Must be called before any other use of jax.

    Without an address, jax detects the cluster (TPU pods, Slurm, MPI). If there is none, or with
    JAX_PLATFORMS=cpu, the run has a single process.

    Args:
      address: `host:port` of the first process.
      count: number of processes.
      index: index of this process, from 0.

    Raises:
      ValueError: if `count` is given without `address`, or `index` is not in [0, count).
    """
    if count and not address:
        raise ValueError(
            f"num_processes={count}: coordinator_address is missing; give host:port of the first process"
        )
    if address:
        if not 0 <= index < count:
            raise ValueError(
                f"coordinator_address={address}, num_processes={count}, process_id={index}: process_id must "
                "be in [0, num_processes); give the number of processes, and each its own process_id"
            )
        jax.distributed.initialize(address, count, index, shutdown_timeout_seconds=60)
    elif os.environ.get("JAX_PLATFORMS", "") != "cpu":
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=60)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise


def is_first() -> bool:
    """Returns whether this is the first process, which makes decisions, writes logs and prints."""
    return jax.process_index() == 0


def decide(make: Callable[[], T]) -> T:
    """Calls `make` on the first process and returns its value on every process; all must call this.

    The other processes wait for as long as `make` takes.

    Args:
      make: called on the first process only. Its value must be picklable.

    Raises:
      Exception: on every process, whatever `make` raises, so that no process waits forever; a RuntimeError
        instead if the exception cannot be pickled.
    """
    if jax.process_count() == 1:
        return make()
    message = b""
    if is_first():
        try:
            message = pickle.dumps((True, make()))
        except Exception as error:
            message = _pickled_error(error)
    good, value = pickle.loads(_broadcast(message))
    if not good:
        raise value
    return value


def only_first(make: Callable[[], T]) -> T | None:
    """Calls `make` on the first process and returns its value, such as an open file, there; None elsewhere.

    Raises:
      Exception: on every process, whatever `make` raises.
    """
    made: list[T] = []
    decide(lambda: made.append(make()))
    return made[0] if made else None


def total(array: np.ndarray) -> np.ndarray:
    """Sums arrays over processes, on every process; all must call this, with equal shapes."""
    if jax.process_count() == 1:
        return array
    _meet()
    return np.asarray(multihost_utils.process_allgather(array)).sum(axis=0, dtype=array.dtype)


def whole(array: jax.Array) -> np.ndarray:
    """Returns an array that may be sharded over processes as a numpy array, on every process."""
    if jax.process_count() == 1:
        return np.asarray(array)
    _meet()
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def agree(what: str, value: Any) -> None:
    """Checks that a value is equal on all processes.

    Args:
      what: name of the value in the error message.
      value: numpy arrays, bytes, and other values whose `repr` identifies them, nested in dicts, lists,
        tuples and dataclasses.

    Raises:
      RuntimeError: on every process, if the value differs on any.
    """
    if jax.process_count() == 1:
        return
    sha256 = hashlib.sha256()
    _hash(sha256, value)
    _meet()
    digests = multihost_utils.process_allgather(np.frombuffer(sha256.digest(), np.uint8))
    others = [i for i, row in enumerate(digests) if (row != digests[0]).any()]
    if others:
        named = ", ".join(map(str, others))
        raise RuntimeError(
            f"{what} differs between process 0 and {named}: restart all processes with the same flags, "
            "files, code and package versions"
        )


def _hash(sha256: Any, value: Any) -> None:
    """Adds a value to a hash. Not via pickle, whose bytes also depend on which parts share an object."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item]
    if isinstance(value, np.ndarray):
        sha256.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, list | tuple):
        sha256.update(f"[{len(value)}]".encode())
        for part in value:
            _hash(sha256, part)
    else:
        sha256.update(repr(value).encode() + b"\0")


def _pickled_error(error: Exception) -> bytes:
    try:
        message = pickle.dumps((False, error))
        pickle.loads(message)
    except Exception:  # some exceptions cannot be unpickled
        message = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return message


def _broadcast(message: bytes) -> bytes:
    """Broadcasts the first process's message, padded to a power of two: every size compiles a program."""
    _meet()
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(message))))
    buffer = np.zeros(1 << max(10, (size - 1).bit_length()), np.uint8)
    buffer[: len(message)] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer))[:size].tobytes()


def _meet() -> None:
    """Waits for all processes, up to a week. (A collective on CPU would time out after 30 seconds.)"""
    get_barrier_sync_fn()(key=f"espl_jax_{next(_meetings)}", timeout_ms=7 * 24 * 3600 * 1000)
