"""Memory of a device, and of the arrays on it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from espl_jax.parallel import processes

CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Files in which Linux states the memory limit of a container, in bytes (cgroup v2, v1)."""


def device_memory() -> int:
    """Returns the total bytes of one device, measured on the first process and the same on all of them.

    On CPU, this is the memory of the machine or container, divided by the number of local devices.
    """
    return processes.decide(_device_memory)


def _device_memory() -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in CONTAINER_LIMITS:
        if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
            memory = min(memory, int(text))
    return memory // jax.local_device_count()


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that a tree of arrays, or of their shapes, takes on one device."""

    def size(x: Any) -> int:
        where = getattr(x, "sharding", None)
        shape = x.shape if where is None else where.shard_shape(x.shape)
        return math.prod(shape) * jnp.dtype(x.dtype).itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))
