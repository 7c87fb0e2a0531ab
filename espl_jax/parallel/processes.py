"""Several processes of one run, each with devices of its own, that must never disagree.

All of them run the same program on the same values. What could differ between them, because it comes from
text, files, servers or the clock, is decided by the first one and sent to the others (`decide`); what has to
be equal is compared (`agree`); what each did of a common task is added up (`total`). All three are for the
main thread alone, which also dispatches the work of the devices: all processes have to do these things in the
same order. With one process they cost nothing.
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
    """Joins the processes of the run, before jax is used for anything else.

    Without an address the cluster says by itself which processes there are, as TPU pods, Slurm and MPI do;
    where there is none, and on CPUs, the run has this process alone.

    Args:
      address: `host:port` of the first process.
      count: how many processes there are.
      index: which of them this one is, from 0.

    Raises:
      ValueError: for a count without an address, an address without a count, or an index that is not one of
        them.
    """
    if count and not address:
        raise ValueError(
            f"num_processes={count} without coordinator_address: give host:port of the first process"
        )
    if address:
        if not 0 <= index < count:
            raise ValueError(
                f"coordinator_address={address} with num_processes={count} and process_id={index}: give the "
                "number of processes, and to each its own process_id below it"
            )
        jax.distributed.initialize(address, count, index, shutdown_timeout_seconds=60)
    elif os.environ.get("JAX_PLATFORMS", "") != "cpu":
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=60)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise


def is_first() -> bool:
    """Whether this process decides, writes logs and talks to the user."""
    return jax.process_index() == 0


def decide(make: Callable[[], T]) -> T:
    """The value that the first process makes, on every process; all have to call this.

    The others wait as long as it takes.

    Args:
      make: called on the first process alone. Its value has to be picklable.

    Raises:
      Whatever `make` raised, on every process, so that none waits for the others forever; a RuntimeError in
      its place where it cannot be sent.
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
    """What the first process makes for itself, such as an open file; None on the others.

    Raises:
      Whatever `make` raised, on every process.
    """
    made: list[T] = []
    decide(lambda: made.append(make()))
    return made[0] if made else None


def total(array: np.ndarray) -> np.ndarray:
    """The sum of what the processes give, on every process; all have to call this, with equal shapes."""
    if jax.process_count() == 1:
        return array
    _meet()
    return np.asarray(multihost_utils.process_allgather(array)).sum(axis=0, dtype=array.dtype)


def agree(what: str, value: Any) -> None:
    """Compares a value between all processes.

    Args:
      what: what to call it in the error.
      value: arrays of numpy, bytes, and whatever else has a `repr` that says all of it, in dicts, lists,
        tuples and dataclasses.

    Raises:
      RuntimeError: on every process, if it differs on any.
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
            f"{what} differs between process 0 and {named}: give all processes the same flags and files and "
            "the same version of the code and its packages, and start them again"
        )


def _hash(sha256: Any, value: Any) -> None:
    """Adds a value to a hash. Pickles would not do: they also tell which of their parts are one object."""
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
    except Exception:  # some exceptions cannot be made again from what they were pickled to
        message = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return message


def _broadcast(message: bytes) -> bytes:
    """The first process's message. Sizes are rounded up to powers of two: each is a program to compile."""
    _meet()
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(message))))
    buffer = np.zeros(1 << max(10, (size - 1).bit_length()), np.uint8)
    buffer[: len(message)] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer))[:size].tobytes()


def _meet() -> None:
    """Waits for all processes, up to a week. Those that wait in a collective on CPUs give up after 30 s."""
    get_barrier_sync_fn()(key=f"espl_jax_{next(_meetings)}", timeout_ms=7 * 24 * 3600 * 1000)
