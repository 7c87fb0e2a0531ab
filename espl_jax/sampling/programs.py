"""Lists the programs of one `sample_tree` call from shapes alone: for `plan`, and to compile them ahead.

A listed call has the same structure, shapes, shardings and static arguments as the call by the scheduler:
otherwise `jax.jit` would not find the compiled program. tests/sampling/programs_test.py compares the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from espl_jax.models.attention import KVCache
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params
from espl_jax.parallel import sharding
from espl_jax.parallel.ahead import Call, counted
from espl_jax.sampling import decode
from espl_jax.sampling.draft_texts import shared_columns
from espl_jax.sampling.drafts import Texts
from espl_jax.sampling.problem_blocks import block_size
from espl_jax.sampling.settings import Sampling
from espl_jax.sampling.sizes import EXTENDED_TOKENS, SMALLEST, Sizes
from espl_jax.sampling.sizes import describe as describe_sizes

FIRST, BETWEEN, LATER = range(3)
"""Urgencies of calls (`Call`): what rollouts need as long as none has ended; the update; the rest."""


def of_chunk(
    sampling: Sampling,
    decoder: DecoderConfig,
    sizes: Sizes,
    *,
    columns: int,
    aligned: bool,
    constrained: bool,
    drafted: int,
) -> dict[str, Any]:
    """Returns the static arguments of `decode_chunk`, except for `mesh`."""
    return {
        "columns": columns,
        "steps": 1 if constrained else sizes.steps_for(drafted),
        "drafted": drafted,
        "greedy": sampling.temperature == 0,
        "truncation": sampling.truncation,
        "aligned": aligned,
        "record_routing": sampling.record_routing and decoder.experts is not None,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the programs of one `sample_tree` call depend on. Every method returns one call.

    Attributes:
      params, decoder: as returned by `layout.for_sampling`; `params` are abstract (`ahead.abstract`).
      stages: sizes of the stages.
      lanes, problems, rows: M, B, and M * B * N.
      system: columns of the cache of the system prompts.
      problem: tokens of the longest problem of this call.
      sampling: the sampling settings.
      turns: whether tokens may be appended to rows.
      mesh: the mesh, or None.
    """

    params: Params
    decoder: DecoderConfig
    stages: Sequence[Sizes]
    lanes: int
    problems: int
    rows: int
    system: int
    problem: int
    sampling: Sampling
    turns: bool = False
    mesh: Mesh | None = None

    @property
    def block(self) -> int:
        """Nodes in a block of problems."""
        return self.lanes * block_size(self.lanes, self.problems, self.stages[0].problem_widths[-1])

    @property
    def device(self) -> Sharding | None:
        """The device that params are committed to, and so are all caches. None with a mesh, and if params are
        not committed."""
        if self.mesh is not None:
            return None
        return next((x.sharding for x in jax.tree.leaves(self.params) if x.sharding is not None), None)

    def _committed(self, tree: Any) -> Any:
        """Returns shapes as they are after a program that also takes params."""
        if self.device is None:
            return tree
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.device), tree)

    def _cache(self, nodes: int, columns: int) -> KVCache:
        """Returns what `prefill` returns."""
        key, value = decode.abstract_slots(self.decoder, nodes, columns, self.mesh, everywhere=True)
        of_node = sharding.replicate(_integers(nodes), self.mesh)
        return self._committed(KVCache(cast(jax.Array, key), cast(jax.Array, value), of_node, of_node))

    def _slots(self, stage: int) -> decode.Slots:
        """Returns the slots of a stage."""
        sizes = self.stages[stage]
        slots = decode.abstract_slots(self.decoder, sizes.slots, sizes.capacity, self.mesh)
        return cast(decode.Slots, self._committed(slots))

    def prefill_prompts(self) -> Call:
        """Prefills the system prompts."""
        tokens = _integers(self.lanes, self.system), _integers(self.lanes)
        return Call(decode.prefill, (self.params, self.decoder, *tokens), {"mesh": self.mesh})

    def prefill_block(self, width: int) -> Call:
        """Prefills a block of problems of `width` columns."""
        tokens = sharding.place_rows((_integers(self.block, width), _integers(self.block)), self.mesh)
        system = self._cache(self.lanes, self.system)
        return Call(decode.prefill, (self.params, self.decoder, *tokens, system), {"mesh": self.mesh})

    def admit(self, width: int) -> Call:
        """Copies problems of `width` columns into slots of the first stage."""
        table, counts = self._table(0)
        given = self._slots(0), self._cache(self.block, width), table, table, counts
        return Call(decode.admit, given, {"mesh": self.mesh})

    def move(self, stage: int) -> Call:
        """Moves rows to other slots."""
        table, counts = self._table(stage)
        return Call(decode.move, (self._slots(stage), table, table, counts), {"mesh": self.mesh})

    def _table(self, stage: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        sizes = self.stages[stage]
        return _integers(sizes.shards, sizes.per_shard), _integers(sizes.shards)

    def extend(self, stage: int, count: int, tokens: int, columns: int) -> Call:
        """Prefills `tokens` tokens at the end of `count` rows of each shard."""
        rows = self.stages[stage].shards * count
        given = (
            self.params,
            self.decoder,
            self._cache(self.lanes, self.system),
            self._slots(stage),
            _integers(self.stages[stage].shards, count),
            decode.abstract_rows(rows, self.mesh),
            *sharding.place_rows((_integers(rows, tokens), _integers(rows)), self.mesh),
        )
        return Call(decode.extend, given, {"columns": columns, "mesh": self.mesh})

    def orders(self, stage: int, rows: int) -> tuple[bool, ...]:
        """Returns the possible values of `aligned` for chunks of `rows` rows, the likely one first."""
        sizes = self.stages[stage]
        if self.lanes == 1:
            return (True,)
        if rows < sizes.slots or sizes.shards > 1 or rows % self.lanes:
            return (False,)
        # Rows are ordered by lane as long as no row has ended, if all have a slot.
        return (True, False) if sizes.slots == self.rows else (False, True)

    def _texts(self, rows: int) -> Texts | None:
        """Returns the texts that drafts of a chunk are looked up in."""
        if not self.sampling.draft_tokens:
            return None
        new = int(self.sampling.max_new_tokens)
        shared = _integers(self.problems, shared_columns(self.rows // self.problems, new))
        own = _integers(rows, self.system + self.stages[-1].longest)
        of_rows = sharding.place_rows((_integers(rows), own, _integers(rows)), self.mesh)
        return Texts(sharding.replicate(shared, self.mesh), *of_rows)

    def chunk(
        self,
        stage: int,
        rows: int,
        columns: int,
        aligned: bool,
        constrained: bool = False,
        drafted: int = 0,
    ) -> Call:
        """Runs a chunk of decode steps."""
        allowed = None
        if constrained:
            words = jax.ShapeDtypeStruct((rows, -(-self.decoder.vocab_size // 32)), jnp.uint32)
            allowed = sharding.place_rows(words, self.mesh)
        given = (
            self.params,
            self.decoder,
            self._cache(self.lanes, self.system),
            self._slots(stage),
            decode.abstract_rows(rows, self.mesh),
            _integers(len(self.sampling.stop_ids or ()) or 1),
            jax.ShapeDtypeStruct((), jnp.float32),
            allowed,
            None if constrained else self._texts(rows),
        )
        static = of_chunk(
            self.sampling,
            self.decoder,
            self.stages[stage],
            columns=columns,
            aligned=aligned,
            constrained=constrained,
            drafted=drafted,
        )
        return Call(decode.decode_chunk, given, static | {"mesh": self.mesh})


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def every_call(shapes: Shapes) -> Iterator[Call]:
    """Yields every call that sampling without a constraint can make, roughly in the order of the first calls:
    in each stage the widest chunks, the shortest first, then narrower ones."""
    widths = shapes.stages[0].problem_widths
    first = next(width for width in widths if width >= shapes.problem - 1)
    yield shapes.prefill_prompts()
    yield from _problems(shapes, first, FIRST)
    for stage in range(len(shapes.stages)):
        yield from _chunks(shapes, stage)
    for width in widths:
        if width != first:
            yield from _problems(shapes, width, FIRST)


def describe(shapes: Shapes) -> str:
    """Describes the sizes of all stages and the number of programs."""
    count = sum(1 for _ in every_call(shapes))
    return f"{describe_sizes(shapes.stages)}; {counted(count)} for each bucket of system prompts"


def _problems(shapes: Shapes, width: int, urgency: int) -> Iterator[Call]:
    """Yields the calls that prefill and admit problems of `width` columns."""
    yield _with(shapes.prefill_block(width), urgency)
    yield _with(shapes.admit(width), urgency)


def _chunks(shapes: Shapes, stage: int) -> Iterator[Call]:
    """Yields the chunks of a stage, and the calls that move and extend its rows."""
    sizes = shapes.stages[stage]
    # What the longest row has filled, unless all problems are short, or a row returns after a long wait.
    least = sizes.columns_for(shapes.stages[stage - 1].longest if stage else shapes.problem - 1)
    possible = [columns for columns in sizes.columns if columns >= least or stage == 0 or shapes.turns]

    def order(rows: int, columns: int, likely: bool) -> tuple[float, ...]:
        if columns < least or not likely:
            return 2, -rows, columns
        if rows == sizes.slots:
            return 0, columns
        # Rows end at different lengths: the fewer are left, the longer they are, though they may be longer.
        short = (1 - rows / sizes.slots) - columns / sizes.longest
        return 1, max(4 * short, -short), -rows

    kinds = [(rows, columns) for rows in sizes.widths for columns in possible]
    chunks = [
        ((*order(rows, columns, number == 0), -drafted), rows, columns, aligned, drafted)
        for rows, columns in kinds
        for number, aligned in enumerate(shapes.orders(stage, rows))
        for drafted in sizes.drafts
    ]
    if stage:  # rows are prefilled again before the first chunk
        for columns in sizes.columns:
            for call in _extensions(shapes, stage, columns):
                yield _with(call, LATER)
    for number, ((rank, *_), rows, columns, aligned, drafted) in enumerate(sorted(chunks)):
        urgency = FIRST if rank == 0 and stage == 0 else LATER
        yield _with(shapes.chunk(stage, rows, columns, aligned, drafted=drafted), urgency)
        if number == 0:
            yield _with(shapes.move(stage), urgency)
        likely = aligned == shapes.orders(stage, rows)[0] and drafted == 0
        if stage == 0 and rows == sizes.slots and likely:
            for call in _extensions(shapes, stage, columns):
                yield _with(call, urgency)


def _with(call: Call, urgency: int) -> Call:
    return dataclasses.replace(call, urgency=urgency)


def _extensions(shapes: Shapes, stage: int, columns: int) -> Iterator[Call]:
    """Yields the calls that extend rows attending to `columns` columns. Without turns, rows are extended when
    they enter a later stage."""
    if not (shapes.turns or stage > 0):
        return
    for count in sorted({1, shapes.stages[stage].extended_rows(columns)}, reverse=True):
        for tokens in (EXTENDED_TOKENS, SMALLEST):
            yield shapes.extend(stage, count, tokens, columns)
