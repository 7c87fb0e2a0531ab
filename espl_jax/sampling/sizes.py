"""Chooses the shapes that sampling compiles for: slots, their columns, and the widths of chunks.

They depend only on what is known in advance (the longest prompt, the limits, the total memory), so every
iteration of a run uses the same shapes, and so does a resumed run.

If memory does not hold all rows at full length, rows run in stages: first many short slots, then fewer and
longer ones for the rows that outgrow them.
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
"""Decode steps between two looks by the host."""

SMALLEST = 32
"""Slots of up to `TPU_LANES` columns have a multiple of this many columns."""

TPU_LANES = 128
"""Longer slots have a multiple of this many columns, and chunks attend to a multiple of it: the tile size of
the last axis of an array on TPU. Other numbers of columns cannot be read in place: for a chunk of 32 or 192
columns, the compiler copies all keys, half of the slots' memory."""

EXTENDED_ROWS, EXTENDED_TOKENS = 8, 256
"""Most rows of a shard, and most tokens of each, that one call of `decode.extend` prefills."""

EXTENDED_COLUMNS = 16_384
"""Most columns that these rows attend to in total, to bound the attention scores of long conversations."""

SHARE = 0.8
"""Fraction of a device's memory to plan with; the rest is for shared caches and temporaries."""

FEWEST_ROWS = 4
"""Narrowest chunk of a coarse ladder, unless there are fewer rows. A single row runs faster on CPU, but its
program takes seconds to compile."""

_LOGITS = 3 * 4
"""Bytes that sampling a token needs per row and vocabulary entry: float32 logits and two copies."""


def rungs(most: int, coarse: bool = False) -> list[int]:
    """Returns the chunk widths: 1, 3/4, 1/2, 3/8, 1/4, ... of `most`, rounded up, ascending.

    Neighbouring widths differ by a factor of at most 1.5 (before rounding), a trade-off between idle rows and
    compiled programs. A `coarse` ladder only has 1, 1/4, 1/16, ... of `most`, down to `FEWEST_ROWS`.
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
    """Shapes of one stage: the slots it allocates, and the chunks it compiles.

    Attributes:
      shards: number of row shards.
      per_shard: slots of each shard.
      capacity: columns of a slot.
      longest: most columns that a row of this stage may have filled when a chunk starts.
      problem: columns that hold any problem.
      steps: decode steps of a chunk without drafts.
      coarse: use few chunk widths and column counts. For short runs of sampling, where compiling more
        programs takes longer than they save.
      draft_tokens: most tokens of a draft; 0 for no drafts.
    """

    shards: int
    per_shard: int
    capacity: int
    longest: int
    problem: int
    steps: int
    coarse: bool = False
    draft_tokens: int = 0

    @property
    def slots(self) -> int:
        """Slots of all shards: the most rows in flight."""
        return self.shards * self.per_shard

    @property
    def widths(self) -> list[int]:
        """Possible numbers of rows of a chunk, ascending."""
        return [self.shards * width for width in rungs(self.per_shard, self.coarse)]

    @property
    def columns(self) -> list[int]:
        """Possible numbers of columns that a chunk attends to, ascending."""
        return sorted({self.columns_for(filled) for filled in range(self.longest)})

    @property
    def problem_widths(self) -> list[int]:
        """Widths that a block of problems is padded to, ascending: `problem` halved repeatedly."""
        widths = [self.problem]
        while widths[0] % 2 == 0 and widths[0] // 2 >= SMALLEST:
            widths.insert(0, widths[0] // 2)
        return widths

    @property
    def drafts(self) -> list[int]:
        """Possible lengths of a chunk's drafts, ascending: 0, and `draft_tokens` halved repeatedly."""
        return draft_lengths(self.draft_tokens, self.coarse)

    def steps_for(self, drafted: int) -> int:
        """Returns the decode steps of a chunk with drafts of `drafted` tokens."""
        return steps_for(self.steps, drafted)

    def columns_for(self, filled: int) -> int:
        """Returns the columns that a chunk attends to when its longest row fills `filled` columns."""
        if self.coarse:
            return min(self.capacity, max(TPU_LANES, 1 << (filled - 1).bit_length()))
        return min(self.capacity, bucket(filled, _unit(self.capacity)))

    def extended_rows(self, columns: int) -> int:
        """Returns the most rows of a shard to extend at once when they attend to `columns` columns."""
        return min(EXTENDED_ROWS, max(1, EXTENDED_COLUMNS // columns))

    def __str__(self) -> str:
        return (
            f"{self.slots} slots of {self.capacity} columns; chunks of {self.steps} steps come in "
            f"{len(self.widths)} widths, {_listed(self.widths)} rows, and {len(self.columns)} lengths, "
            f"{_listed(self.columns)} columns"
        )


def draft_lengths(most: int, coarse: bool = False) -> list[int]:
    """Returns the lengths of drafts: 0, `most`, and halves of it down to 2. If coarse, only 0 and `most`."""
    lengths = {0, most}
    while not coarse and most >= 4:
        most //= 2
        lengths.add(most)
    return sorted(lengths)


def steps_for(steps: int, drafted: int) -> int:
    """Returns the decode steps of a chunk with drafts, about as long as one of `steps` steps without.

    On text where drafts pay, a step with a draft draws two to three tokens.
    """
    return max(1, 2 * steps // (drafted + 1)) if drafted else steps


def staged_columns(steps: int, most: int) -> int:
    """Returns the most columns that a chunk writes, with drafts of up to `most` tokens."""
    return max(steps_for(steps, drafted) * (drafted + 1) for drafted in draft_lengths(most))


def _unit(capacity: int) -> int:
    """Returns the number that the columns of a slot are a multiple of."""
    return TPU_LANES if capacity > TPU_LANES else SMALLEST


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def describe(stages: Sequence[Sizes]) -> str:
    """Describes all stages in one sentence."""
    if len(stages) == 1:
        return str(stages[0])
    return "; ".join(f"stage {number}: {sizes}" for number, sizes in enumerate(stages, 1))


def choose_sizes(
    decoder: DecoderConfig,
    *,
    lanes: int,
    rows: int,
    longest_problem: int,
    max_new_tokens: int,
    context_limit: int | None = None,
    chunk: int = CHUNK,
    turns: bool = False,
    coarse: bool = False,
    draft_tokens: int = 0,
    max_rows: int | None = None,
    held: int = 0,
    memory: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Sizes, ...]:
    """Returns the sizes of every stage; the slots of the last one hold the longest row.

    Args:
      decoder: the model's configuration.
      lanes: M, the number of system prompts.
      rows: M * B * N.
      longest_problem: tokens of the longest problem.
      max_new_tokens: most tokens after a prompt.
      context_limit: most tokens of a prompt and its row together; the model's `max_positions` by default.
      chunk: decode steps of a chunk.
      turns: whether tokens may be appended to rows.
      coarse, draft_tokens: see `Sizes`.
      max_rows: allocate M * max_rows slots for all lanes together, in a single stage; by default as many as
        fit into memory.
      held: bytes per device that are not available to rows, params included.
      memory: total bytes of a device; by default measured on the devices of this run.
      mesh: the mesh, or None.

    Raises:
      ValueError: if memory does not hold a single row.
    """
    shards = sharding.row_shards(mesh)
    steps = min(chunk, max_new_tokens)
    staged = staged_columns(steps, draft_tokens)
    context = min(context_limit or decoder.max_positions, decoder.max_positions)
    problem = bucket(longest_problem, SMALLEST)

    def stage(longest: int, extended: bool) -> Sizes:
        # A chunk or an extension always writes all its columns, even if few of them are valid.
        behind = max(staged, EXTENDED_TOKENS if extended else 0)
        unit = _unit(longest + behind)
        capacity = -(-(longest + behind) // unit) * unit
        if max_rows is None:
            wanted = slots_that_fit(
                decoder,
                capacity,
                staged,
                extended,
                held,
                device_memory() if memory is None else memory,
                mesh,
                draft_tokens + 1,
            )
        else:
            wanted = lanes * max_rows
        return Sizes(
            shards, -(-min(wanted, rows) // shards), capacity, longest, problem, steps, coarse, draft_tokens
        )

    longest = min(problem + max_new_tokens, max(problem, context))
    stages = [stage(longest, turns)]
    if max_rows is None and stages[0].slots < rows:
        # Rows that move to another stage are prefilled there, in pieces, with `decode.extend`.
        stages = [stage(longest, True)]
        least = problem + max(steps, EXTENDED_TOKENS)
        while stages[0].slots < rows and stages[0].longest // 2 >= least:
            stages.insert(0, stage(stages[0].longest // 2, True))
    return tuple(stages)


def column_bytes(decoder: DecoderConfig) -> int:
    """Returns the bytes of one column of a slot, over all devices."""
    heads, of_key, of_value = decoder.cache_shape
    return decoder.num_layers * heads * _head_bytes(decoder, of_key + of_value)


def _head_bytes(decoder: DecoderConfig, width: int) -> int:
    """Returns the bytes of one kv head in a column of a slot: numbers in int8 have two scales."""
    if decoder.cache_dtype == "int8":
        return width + 2 * 4
    return width * jnp.dtype(decoder.dtype).itemsize


def slots_that_fit(
    decoder: DecoderConfig,
    capacity: int,
    staged: int,
    extended: bool,
    held: int,
    memory: int,
    mesh: Mesh | None,
    fed: int = 1,
) -> int:
    """Returns how many slots of `capacity` columns fit into memory, over all shards; at least one per shard.

    Each slot also needs the staging columns of a chunk and the buffers of token sampling. `decode.extend`
    copies the columns that its rows attend to.

    Args:
      decoder: the model's configuration.
      capacity: columns of a slot.
      staged: columns that a chunk writes.
      extended: whether `decode.extend` will be used.
      held: bytes per device that are not available to slots.
      memory: total bytes of a device.
      mesh: the mesh, or None.
      fed: most tokens of a row in a decode step.

    Raises:
      ValueError: if not even one slot fits.
    """
    shards = sharding.row_shards(mesh)
    heads, of_key, of_value = decoder.cache_shape
    shape = (decoder.num_layers, heads, shards, 1, of_key + of_value)
    if mesh is not None:
        shape = sharding.cache_sharding(mesh, shape).shard_shape(shape)
    each = math.prod(shape) // (of_key + of_value)
    column = each * (of_key + of_value) * jnp.dtype(decoder.dtype).itemsize
    staged *= 2 if fed > 1 else 1  # with drafts, a chunk ends with a copy without gaps
    slot = capacity * each * _head_bytes(decoder, of_key + of_value) + staged * column
    slot += _LOGITS * fed * decoder.vocab_size
    if memory < held + slot:
        raise ValueError(
            f"no rollout fits: {held / 2**30:.2f} of a device's {memory / 2**30:.2f} GiB are in use, and one "
            f"rollout of {capacity} tokens needs {slot / 2**30:.2f}; shard the model over more devices, or "
            "lower max_new_tokens or context_limit"
        )
    free = SHARE * memory - held - (EXTENDED_COLUMNS * column if extended else 0)
    return max(1, int(free // slot)) * shards
