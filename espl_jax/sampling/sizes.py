"""The sizes that a sampling compiles for: slots, their columns, and the widths of its chunks.

They follow from what is known beforehand (the longest prompt, the limits, the size of the memory) and not
from the moment, so that every iteration of a run, and a resumed one, has the same.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from espl_jax import sharding
from espl_jax.models.config import DecoderConfig
from espl_jax.sampling.buckets import bucket

CHUNK = 32
"""Decode steps between two looks at which rows are done."""

SMALLEST = 32
"""The fewest columns that a chunk attends to, and what columns are a multiple of."""

SHARE = 0.8
"""Part of a device's memory to plan with; the rest is for caches of prompts and problems, and temporaries."""


def rungs(most: int) -> list[int]:
    """The widths that chunks come in: `most`, and 3/4, 1/2, 3/8, 1/4, ... of it, rounded up; ascending.

    Neighbours are at most a half apart, so that few rows are run for nothing and few programs compiled.
    """
    sizes = {1}
    part = 1
    while part < most:
        sizes |= {-(-most // part), -(-3 * most // (4 * part))}
        part *= 2
    return sorted(sizes)


def rung(size: int, most: int) -> int:
    """The narrowest of `rungs(most)` that holds `size`."""
    return next(width for width in rungs(most) if width >= size)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a sampling reserves, and what its chunks are compiled for.

    Attributes:
      parts: groups of devices that share the rows.
      per_part: slots of each.
      capacity: columns of a slot.
      longest: columns that a row can fill.
      problem: columns that hold any problem.
      steps: of a chunk.
    """

    parts: int
    per_part: int
    capacity: int
    longest: int
    problem: int
    steps: int

    @property
    def slots(self) -> int:
        """Rows in flight at most."""
        return self.parts * self.per_part

    @property
    def widths(self) -> list[int]:
        """Rows of a chunk, ascending."""
        return [self.parts * width for width in rungs(self.per_part)]

    @property
    def columns(self) -> list[int]:
        """Columns that a chunk attends to, ascending."""
        return sorted({self.columns_for(filled) for filled in range(self.longest)})

    def columns_for(self, filled: int) -> int:
        """The columns that a chunk attends to when its longest row has filled so many."""
        return min(self.capacity, bucket(filled, SMALLEST))

    def __str__(self) -> str:
        return (
            f"{self.slots} slots of {self.capacity} columns; chunks of {self.steps} steps come in "
            f"{len(self.widths)} widths, {_listed(self.widths)} rows, and {len(self.columns)} lengths, "
            f"{_listed(self.columns)} columns: at most {self.programs} programs for each bucket of "
            "system prompts"
        )

    @property
    def programs(self) -> int:
        """Most decode programs ever compiled: all widths and columns, the full width in two forms."""
        return (len(self.widths) + 1) * len(self.columns)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def choose_sizes(
    config: DecoderConfig,
    *,
    lanes: int,
    rows: int,
    longest_problem: int,
    max_new_tokens: int,
    context_limit: int | None = None,
    chunk: int = CHUNK,
    extension: int = 0,
    max_rows: int | None = None,
    held: int = 0,
    mesh: Mesh | None = None,
) -> Sizes:
    """Sizes for `rows` rows under `lanes` system prompts.

    Args:
      config: the decoder.
      lanes: M; rows: M * B * N.
      longest_problem: tokens.
      max_new_tokens: most tokens after a prompt.
      context_limit: most tokens of a row with its prompt; the model's `max_positions` by default.
      chunk: decode steps at a time.
      extension: most tokens that are written behind a row at once, beside those of a chunk.
      max_rows: M times as many slots are there for all lanes; by default as many as fit into memory.
      held: bytes on one device that stay taken while rows are sampled, params included.
      mesh: of devices.
    """
    parts = sharding.row_parts(mesh)
    steps = min(chunk, max_new_tokens)
    context = min(context_limit or config.max_positions, config.max_positions)
    problem = bucket(longest_problem, SMALLEST)
    # What is written behind a row is written whole, however little of it will count.
    longest = min(problem + max_new_tokens, max(problem, context))
    capacity = -(-(longest + max(steps, extension)) // SMALLEST) * SMALLEST
    wanted = slots_that_fit(config, capacity, held, mesh) if max_rows is None else lanes * max_rows
    return Sizes(parts, -(-min(wanted, rows) // parts), capacity, longest, problem, steps)


def slots_that_fit(config: DecoderConfig, capacity: int, held: int, mesh: Mesh | None) -> int:
    """Most slots of `capacity` columns beside the `held` bytes of a device; at least one for each part."""
    parts = sharding.row_parts(mesh)
    shape = (config.num_layers, config.num_kv_heads, parts, capacity, config.head_dim)
    if mesh is not None:
        shape = sharding.cache_sharding(mesh, shape).shard_shape(shape)
    slot = 2 * math.prod(shape) * jnp.dtype(config.dtype).itemsize
    return max(1, int((SHARE * device_memory() - held) // slot)) * parts


def device_memory() -> int:
    """Bytes of one device; on CPU the machine's memory, divided among its devices."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def bytes_per_device(tree: Any) -> int:
    """Bytes that arrays, or their shapes, take on one device."""

    def size(x: Any) -> int:
        where = getattr(x, "sharding", None)
        shape = x.shape if where is None else where.shard_shape(x.shape)
        return math.prod(shape) * jnp.dtype(x.dtype).itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))
