"""The sizes that a sampling compiles for: slots, their columns, and the widths of its chunks.

They follow from what is known beforehand (the longest prompt, the limits, the size of the memory) and not
from the moment, so that every iteration of a run, and a resumed one, has the same.

Where memory does not hold all rows at the longest they may get, rows run in stages: many slots of few columns
first, then, for the rows that have outgrown them, fewer and longer slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import sharding
from espl_jax.parallel.memory import device_memory
from espl_jax.sampling.buckets import bucket

CHUNK = 32
"""Decode steps between two looks at which rows are done."""

SMALLEST = 32
"""The fewest columns of a short slot, and what its columns are a multiple of."""

TPU_LANES = 128
"""What the columns of a longer slot are a multiple of, and those of it that a chunk attends to: how TPUs lay
out the last axis of an array. Any other number of columns cannot be read in place: for a chunk of 32 or 192
columns the compiler copies all keys, half of what is reserved."""

EXTENDED_ROWS, EXTENDED_TOKENS = 8, 256
"""Most rows of a shard, and most tokens of each, that are prefilled at once behind what their slots hold."""

EXTENDED_COLUMNS = 16_384
"""Most columns that these rows together attend to, which bounds the scores of long conversations."""

SHARE = 0.8
"""Part of a device's memory to plan with; the rest is for caches of prompts and problems, and temporaries."""

FEWEST_ROWS = 4
"""The narrowest chunk of a coarse ladder, unless there are fewer rows. One row alone runs faster on CPUs, but
its program takes seconds to compile."""

_LOGITS = 3 * 4
"""Bytes that drawing needs for each row and token of the vocabulary: float32 logits and two copies."""


def rungs(most: int, coarse: bool = False) -> list[int]:
    """The widths that chunks come in: `most`, and 3/4, 1/2, 3/8, 1/4, ... of it, rounded up; ascending.

    Neighbours are at most a half apart, so that few rows are run for nothing and few programs compiled. A
    `coarse` ladder has `most`, 1/4, 1/16, ... alone, down to `FEWEST_ROWS`.
    """
    if coarse:
        sizes, width = {most}, most
        while (width := -(-width // 4)) >= FEWEST_ROWS:
            sizes.add(width)
        return sorted(sizes)
    sizes = {1}
    divisor = 1
    while divisor < most:
        sizes |= {-(-most // divisor), -(-3 * most // (4 * divisor))}
        divisor *= 2
    return sorted(sizes)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one stage of a sampling reserves, and what its chunks are compiled for.

    Attributes:
      shards: groups of devices that share the rows.
      per_shard: slots of each.
      capacity: columns of a slot.
      longest: columns that a row of this stage can fill before a chunk.
      problem: columns that hold any problem.
      steps: of a chunk.
      coarse: whether chunks come in few widths and columns, for samplings that are short: compiling more of
        them would take longer than they save.
    """

    shards: int
    per_shard: int
    capacity: int
    longest: int
    problem: int
    steps: int
    coarse: bool = False

    @property
    def slots(self) -> int:
        """Rows in flight at most."""
        return self.shards * self.per_shard

    @property
    def widths(self) -> list[int]:
        """Rows of a chunk, ascending."""
        return [self.shards * width for width in rungs(self.per_shard, self.coarse)]

    @property
    def columns(self) -> list[int]:
        """Columns that a chunk attends to, ascending."""
        return sorted({self.columns_for(filled) for filled in range(self.longest)})

    @property
    def problem_widths(self) -> list[int]:
        """Columns that a block of problems is padded to, ascending: `problem` and its halves."""
        widths = [self.problem]
        while widths[0] % 2 == 0 and widths[0] // 2 >= SMALLEST:
            widths.insert(0, widths[0] // 2)
        return widths

    def columns_for(self, filled: int) -> int:
        """The columns that a chunk attends to when its longest row has filled so many."""
        if self.coarse:
            return min(self.capacity, max(TPU_LANES, 1 << (filled - 1).bit_length()))
        return min(self.capacity, bucket(filled, _unit(self.capacity)))

    def extended_rows(self, columns: int) -> int:
        """Most rows of a shard that are extended at once, where the longest attends to this many columns."""
        return min(EXTENDED_ROWS, max(1, EXTENDED_COLUMNS // columns))

    def __str__(self) -> str:
        return (
            f"{self.slots} slots of {self.capacity} columns; chunks of {self.steps} steps come in "
            f"{len(self.widths)} widths, {_listed(self.widths)} rows, and {len(self.columns)} lengths, "
            f"{_listed(self.columns)} columns: at most {self.programs} programs for each bucket of "
            f"system prompts, and {len(self.problem_widths)} for prefill"
        )

    @property
    def programs(self) -> int:
        """Most decode programs ever compiled: all widths and columns, the full width in two forms."""
        return (len(self.widths) + 1) * len(self.columns)


def _unit(capacity: int) -> int:
    """What the columns of a slot are a multiple of."""
    return TPU_LANES if capacity > TPU_LANES else SMALLEST


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def describe(stages: Sequence[Sizes]) -> str:
    """All stages in a sentence."""
    if len(stages) == 1:
        return str(stages[0])
    return "; ".join(f"stage {number}: {sizes}" for number, sizes in enumerate(stages, 1))


def choose_sizes(
    config: DecoderConfig,
    *,
    lanes: int,
    rows: int,
    longest_problem: int,
    max_new_tokens: int,
    context_limit: int | None = None,
    chunk: int = CHUNK,
    turns: bool = False,
    coarse: bool = False,
    max_rows: int | None = None,
    held: int = 0,
    memory: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Sizes, ...]:
    """Sizes of every stage for `rows` rows under `lanes` system prompts; the last one holds the longest row.

    Args:
      config: the decoder.
      lanes: M; rows: M * B * N.
      longest_problem: tokens.
      max_new_tokens: most tokens after a prompt.
      context_limit: most tokens of a row with its prompt; the model's `max_positions` by default.
      chunk: decode steps at a time.
      turns: whether tokens may be appended to rows.
      coarse: see `Sizes`.
      max_rows: M times as many slots are there for all lanes, in one stage; by default as many as fit into
        memory.
      held: bytes on one device that stay taken while rows are sampled, params included.
      memory: bytes that it has; those of the devices at hand by default.
      mesh: of devices.

    Raises:
      ValueError: if memory does not hold a single row.
    """
    shards = sharding.row_shards(mesh)
    steps = min(chunk, max_new_tokens)
    context = min(context_limit or config.max_positions, config.max_positions)
    problem = bucket(longest_problem, SMALLEST)

    def stage(longest: int, extended: bool) -> Sizes:
        # What is written behind a row is written whole, however little of it will count.
        behind = max(steps, EXTENDED_TOKENS if extended else 0)
        unit = _unit(longest + behind)
        capacity = -(-(longest + behind) // unit) * unit
        if max_rows is None:
            wanted = slots_that_fit(
                config, capacity, steps, extended, held, device_memory() if memory is None else memory, mesh
            )
        else:
            wanted = lanes * max_rows
        return Sizes(shards, -(-min(wanted, rows) // shards), capacity, longest, problem, steps, coarse)

    longest = min(problem + max_new_tokens, max(problem, context))
    stages = [stage(longest, turns)]
    if max_rows is None and stages[0].slots < rows:
        # Rows that come to another stage are prefilled there, in pieces.
        stages = [stage(longest, True)]
        least = problem + max(steps, EXTENDED_TOKENS)
        while stages[0].slots < rows and stages[0].longest // 2 >= least:
            stages.insert(0, stage(stages[0].longest // 2, True))
    return tuple(stages)


def slots_that_fit(
    config: DecoderConfig,
    capacity: int,
    steps: int,
    extended: bool,
    held: int,
    memory: int,
    mesh: Mesh | None,
) -> int:
    """Most slots of `capacity` columns beside the `held` of the `memory` bytes of a device; at least one for
    each shard.

    Each needs room for the columns of a chunk and for drawing too; where rows are extended, what these attend
    to is copied.

    Raises:
      ValueError: if not even one fits.
    """
    shards = sharding.row_shards(mesh)
    shape = (config.num_layers, config.num_kv_heads, shards, 1, config.head_dim)
    if mesh is not None:
        shape = sharding.cache_sharding(mesh, shape).shard_shape(shape)
    column = 2 * math.prod(shape) * jnp.dtype(config.dtype).itemsize
    slot = (capacity + steps) * column + _LOGITS * config.vocab_size
    if memory < held + slot:
        raise ValueError(
            f"no rollout fits: of a device's {memory / 2**30:.2f} GiB {held / 2**30:.2f} are taken, and one "
            f"rollout of {capacity} tokens needs {slot / 2**30:.2f}; spread the model over more devices, or "
            "lower max_new_tokens or context_limit"
        )
    free = SHARE * memory - held - (EXTENDED_COLUMNS * column if extended else 0)
    return max(1, int(free // slot)) * shards
