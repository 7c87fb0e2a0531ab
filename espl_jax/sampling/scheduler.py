"""Continuous batching: admits the rows of a tree into slots, decodes them in chunks, and extends them.

The rows of a lane share the cache of its system prompt and are otherwise independent. The host keeps the
state of every row and makes all decisions; the device holds the slots. A row loses its slot when it outgrows
it, or to another row while it waits for an answer, and is later prefilled again in another slot.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import sharding
from espl_jax.parallel.ahead import CompileAhead
from espl_jax.sampling import decode, programs
from espl_jax.sampling.buckets import pad_right
from espl_jax.sampling.constraint import Constraint
from espl_jax.sampling.draft_lengths import FIRST_RATE, FIRST_RATE_WITH_PAST, Acceptance
from espl_jax.sampling.draft_texts import DraftTexts
from espl_jax.sampling.problem_blocks import ProblemBlocks
from espl_jax.sampling.settings import Sampling
from espl_jax.sampling.sizes import EXTENDED_TOKENS, SMALLEST, Sizes, column_bytes
from espl_jax.sampling.slots import SlotTable


class Scheduler:
    """State of all rows of one `sample_tree` call, indexed by row number in [M * B * N].

    Attributes:
      running: bool [rows], the row has a slot and is decoded. Other rows in slots wait for an answer.
      idle: int [rows], chunks for which a row in a slot has waited.
      position: int32 [rows], tokens since the prompt.
      limit: int32 [rows], largest allowed `position`.
      tokens: int32 [rows, T], tokens after the prompt, as in `Samples`.
      logprobs, untruncated_logprobs, cutoffs: float32 [rows, T], as in `Samples`.
      drawn: bool [rows, T], as in `Samples`.
      routing: int16 [rows, T, L, A], as in `Samples`, or None.
      row_steps: total decode steps times rows per step, idle rows included.
    """

    def __init__(
        self,
        params: Any,
        decoder: DecoderConfig,
        system_tokens: Sequence[Sequence[int]],
        problem_tokens: Sequence[Sequence[Sequence[int]]],
        keys: np.ndarray,
        limits: np.ndarray,
        stages: Sequence[Sizes],
        sampling: Sampling,
        *,
        constraint: Constraint | None,
        mesh: Mesh | None,
        ahead: CompileAhead,
        past: Sequence[Sequence[Sequence[int] | np.ndarray]] | None = None,
    ):
        """Prefills the system prompts and allocates the slots of the first stage.

        Args:
          params, decoder: as returned by `layout.for_sampling`.
          system_tokens, problem_tokens: as for `sample_tree`.
          keys: uint32 [rows, 2].
          limits: int32 [rows], most new tokens of each row.
          stages: sizes of the stages, in order.
          sampling: temperature, truncation and stop tokens; `max_new_tokens` is an int, T.
          constraint: masks tokens before every step, or None.
          mesh: the mesh, or None.
          past: earlier texts on each of the B problems, in which drafts are looked up, the latest last.
          ahead: compiles programs in the background.
        """
        max_new_tokens = sampling.max_new_tokens
        self.params, self.decoder, self.mesh = params, decoder, mesh
        self.sampling, self.constraint, self.ahead = sampling, constraint, ahead
        self.stop_ids = jnp.asarray(sorted(sampling.stop_ids or ()) or [-1], jnp.int32)
        self.blocks = ProblemBlocks(problem_tokens, stages[0].problem_widths, mesh)
        self.prompts = prompts = [tokens for lane in problem_tokens for tokens in lane]
        count = len(limits)
        group = count // len(prompts)

        self.node = np.arange(count) // group
        self.lane = (self.node // self.blocks.problems).astype(np.int32)
        self.start = np.array([len(tokens) for tokens in system_tokens], np.int32)[self.lane]
        self.length = np.array([len(tokens) - 1 for tokens in prompts], np.int32)[self.node]
        self.token = np.array([tokens[-1] for tokens in prompts], np.int32)[self.node]
        self.position = np.zeros(count, np.int32)
        self.limit, self.keys = limits, keys
        self.running = np.zeros(count, bool)
        self.idle = np.zeros(count, int)
        self.tokens = np.zeros((count, max_new_tokens), np.int32)
        self.logprobs, self.untruncated_logprobs = np.zeros((2, count, max_new_tokens), np.float32)
        self.cutoffs = np.full((count, max_new_tokens), -np.inf, np.float32)
        self.drawn = np.zeros((count, max_new_tokens), bool)
        self.routing = None
        if sampling.record_routing and decoder.experts:
            self.routing = np.full((count, max_new_tokens, *decoder.routing_shape), -1, np.int16)
        self.row_steps = 0

        padded, lengths = pad_right(system_tokens)
        self.system = ahead.call(decode.prefill, params, decoder, padded, lengths, mesh=mesh)
        self.texts = None
        self.acceptance = Acceptance(count, FIRST_RATE_WITH_PAST if past and all(past) else FIRST_RATE)
        # Filled columns of the cache with as many bytes as the weights.
        weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        self.columns_as_weights = weights / column_bytes(decoder)
        if sampling.draft_tokens:
            prompts_of = [
                [*system_tokens[n // self.blocks.problems], *prompt] for n, prompt in enumerate(prompts)
            ]
            self.texts = DraftTexts(
                [prompts_of[node] for node in self.node],
                self.node % self.blocks.problems,
                past or [()] * self.blocks.problems,
                own_columns=padded.shape[1] + stages[-1].longest,
                new_tokens=int(max_new_tokens),
                mesh=mesh,
            )
        self.stages = collections.deque(stages)
        self._begin_stage()
        self.queue = collections.deque(row for row in self.blocks.rows(group) if limits[row])
        self.queued = collections.Counter(self._block(row) for row in self.queue)
        self.problems: dict[int, Any] = {}
        # Rows without a slot: those to be prefilled again, and those too long for this stage.
        self.returning: collections.deque[int] = collections.deque()
        self.outgrown: list[int] = []

    @property
    def done(self) -> bool:
        """Whether no row is left, except rows that wait for an answer."""
        return not (self.queue or self.returning or self.outgrown or self.running.any())

    def _begin_stage(self) -> None:
        self.sizes = self.stages.popleft()
        self.slots = None  # before the next ones are reserved
        sizes = self.sizes.slots, self.sizes.capacity
        self.slots = decode.reserve(self.decoder, *sizes, self.mesh, self.system)
        self.table = SlotTable(self.sizes.shards, self.sizes.per_shard, self.sizes.coarse)

    def _block(self, row: int) -> int:
        return self.blocks.place(int(self.node[row]))[0]

    def admit(self) -> None:
        """Fills free slots with returning rows, then with rows from the queue.

        If there are neither and no row runs, starts the next stage that is long enough for some outgrown row.
        """
        for row in np.flatnonzero(self.running & self._too_long(self.length)).tolist():
            self.release(row)
            self.outgrown.append(row)
        if self.outgrown and not (self.queue or self.returning or self.running.any()):
            filled = [(row, self._filled(row)) for row in self.outgrown]
            # A long answer can carry rows past several stages: skip stages too short for all of them.
            while len(self.stages) > 1 and min(columns for _, columns in filled) >= self.stages[0].longest:
                self.stages.popleft()
            self._begin_stage()
            self.returning.extend(row for row, columns in filled if not self._too_long(columns))
            self.outgrown = [row for row, columns in filled if self._too_long(columns)]
        if self.queue or self.returning:
            self._free_slots_of_waiting_rows(wanted=len(self.queue) + len(self.returning))
        back = {}
        while self.returning and self.table.free:
            row = self.returning.popleft()
            self.table.put(row)
            self.length[row], self.running[row] = 0, True
            back[row] = [*self.prompts[self.node[row]], *self.tokens[row, : self.position[row] - 1].tolist()]
        self._feed(back)
        while self.queue and self.table.free:
            block = self._block(self.queue[0])
            if block not in self.problems:
                self.problems[block] = self.blocks.prefill(
                    block, self.params, self.decoder, self.system, self.ahead
                )
            nodes, into = np.zeros((2, *self.table.row.shape), np.int32)
            counts = np.zeros(len(nodes), np.int32)
            while self.queue and self.table.free and self._block(self.queue[0]) == block:
                row = self.queue.popleft()
                shard, slot = self.table.put(row)
                nodes[shard, counts[shard]] = self.blocks.place(int(self.node[row]))[1]
                into[shard, counts[shard]] = slot
                counts[shard] += 1
                self.queued[block] -= 1
                self.running[row] = True
            self.slots = self.ahead.call(
                decode.admit, self.slots, self.problems[block], nodes, into, counts, mesh=self.mesh
            )
            if not self.queued[block]:
                del self.problems[block]

    def decode(self) -> list[tuple[int, int, bool]]:
        """Runs one chunk. Returns (row, tokens sampled, whether it stopped) for every row that ran."""
        width, moves, counts = self.table.narrow(self.running)
        if counts.any():
            self.slots = self.ahead.call(
                decode.move, self.slots, moves[..., 0], moves[..., 1], counts, mesh=self.mesh
            )
        numbers = self.table.first(width)
        live = (numbers >= 0) & self.running[numbers]
        constrained = self._constrained(numbers, live)
        drafted = 0
        if self.texts is not None and not constrained.any():
            copies = sharding.replicas(self.mesh)
            read = 1.0 + float(self.length[numbers[live]].sum()) / copies / self.columns_as_weights
            rows = len(numbers) // copies
            drafted = self.acceptance.choose(numbers[live], rows, read, self.sizes.drafts)
        self.slots, drawn = self.ahead.call(
            decode.decode_chunk,
            self.params,
            self.decoder,
            self.system,
            self.slots,
            self._rows(numbers, live),
            self.stop_ids,
            jnp.float32(self.sampling.temperature or 1.0),
            self._allowed(numbers, constrained),
            None if self.texts is None or constrained.any() else self.texts.of_rows(numbers),
            **programs.of_chunk(
                self.sampling,
                self.decoder,
                self.sizes,
                columns=self._columns(numbers[live]),
                aligned=self._aligned(numbers, live),
                constrained=bool(constrained.any()),
                drafted=drafted,
            ),
            mesh=self.mesh,
        )
        in_slots = self.table.row[self.table.row >= 0]
        self.idle[in_slots] = np.where(self.running[in_slots], 0, self.idle[in_slots] + 1)
        drawn = jax.device_get(drawn)
        self.row_steps += int(drawn.steps) * len(numbers)
        if self.texts is not None:
            self.acceptance.add(numbers[live], drawn.hits[live], drawn.misses[live])
        ran = []
        for i in np.flatnonzero(live):
            row, count = int(numbers[i]), int(drawn.count[i])
            where = slice(self.position[row], self.position[row] + count)
            self.tokens[row, where] = drawn.tokens[i, :count]
            self.logprobs[row, where] = drawn.logprobs[i, :count]
            self.untruncated_logprobs[row, where] = drawn.untruncated_logprobs[i, :count]
            if self.sampling.truncation:
                self.cutoffs[row, where] = drawn.cutoffs[i, :count]
            if self.routing is not None:
                self.routing[row, where] = drawn.routing[i, :count]
            self.drawn[row, where] = True
            self._move(row, count)
            ran.append((row, count, bool(drawn.stopped[i])))
        if self.constraint is not None and constrained.any():
            self.constraint.accept(numbers[constrained], drawn.tokens[constrained, 0])
        return ran

    def take_back(self, row: int, count: int) -> None:
        """Discards the last `count` tokens of a row; at least one token of the current turn must remain."""
        where = slice(self.position[row] - count, self.position[row])
        for array, nothing in (
            (self.tokens, 0),
            (self.logprobs, 0.0),
            (self.untruncated_logprobs, 0.0),
            (self.cutoffs, -np.inf),
            (self.drawn, False),
            (self.routing, -1),
        ):
            if array is not None:
                array[row, where] = nothing
        self._move(row, -count)

    def append(self, answers: Mapping[int, Sequence[int]]) -> None:
        """Appends given tokens to rows, prefills them, and resumes these rows."""
        left = {}
        for row, answer in answers.items():
            # The row's last token is not in the cache yet: it is fed first, and the answer's last token
            # becomes the row's last token.
            fed = [int(self.token[row]), *answer[:-1]]
            self.tokens[row, self.position[row] : self.position[row] + len(answer)] = answer
            self._write_text(row, int(self.position[row]), answer)
            self.position[row] += len(answer)
            self.token[row] = answer[-1]
            if self._too_long(self._filled(row)):
                self.release(row)
                self.outgrown.append(row)
            elif self.table.holds(row):
                left[row] = fed
                self.running[row] = True
            else:
                self.returning.append(row)
        self._feed(left)

    def _feed(self, left: dict[int, list[int]]) -> None:
        """Prefills tokens at the end of slots, in pieces of at most `EXTENDED_TOKENS`. Empties `left`."""
        while left:
            self._extend({row: tokens[:EXTENDED_TOKENS] for row, tokens in left.items()}, left)

    def _extend(self, pieces: Mapping[int, Sequence[int]], left: dict[int, list[int]]) -> None:
        """Prefills one piece for as many rows as fit into one call, and removes it from `left`."""
        columns = self._columns(np.array(list(pieces)))
        most = self.sizes.extended_rows(columns)
        by_shard: list[list[tuple[int, int]]] = [[] for _ in self.table.row]
        for row in pieces:
            shard, slot = self.table.place(row)
            if len(by_shard[shard]) < most:
                by_shard[shard].append((row, slot))
        width = 1 if max(map(len, by_shard)) == 1 else most
        filled = [rows + [(-1, 0)] * (width - len(rows)) for rows in by_shard]
        numbers, at = np.moveaxis(np.array(filled), 2, 0)
        numbers = numbers.reshape(-1)
        fed = [pieces[row] if row >= 0 else () for row in numbers.tolist()]
        tokens, lengths = pad_right(fed, SMALLEST if max(map(len, fed)) <= SMALLEST else EXTENDED_TOKENS)
        self.slots = self.ahead.call(
            decode.extend,
            self.params,
            self.decoder,
            self.system,
            self.slots,
            at.astype(np.int32),
            self._rows(numbers, numbers >= 0),
            *sharding.place_rows((tokens, lengths), self.mesh),
            columns=columns,
            mesh=self.mesh,
        )
        for row, tokens in zip(numbers.tolist(), fed, strict=True):
            if row >= 0:
                self.length[row] += len(tokens)
                left[row] = left[row][len(tokens) :]
                if not left[row]:
                    del left[row]

    def finish(self, row: int) -> None:
        """Releases a row that is done, and looks up drafts of other rows in its text."""
        self.release(row)
        if self.texts is not None:
            self.texts.share(row, self.tokens[row, : self.position[row]])

    def release(self, row: int) -> None:
        """Takes a row out of its slot, if it has one."""
        self.running[row] = False
        self.table.remove(row)

    def _free_slots_of_waiting_rows(self, wanted: int) -> None:
        """Removes waiting rows from their slots until `wanted` slots are free or none can be removed.

        Rows that have not waited for a full chunk keep their slots while other rows run, because their answer
        may arrive sooner than prefilling them again would take.
        """
        for row in self.table.row[self.table.row >= 0].tolist():
            patient = self.idle[row] < 1 and self.running.any()
            if not (self.running[row] or patient) and self.table.free < wanted:
                self.table.remove(row)

    def _too_long(self, length: np.ndarray | int) -> np.ndarray | bool:
        """Returns whether a row with this many filled columns has to continue in a later stage."""
        return (length >= self.sizes.longest) & bool(self.stages)

    def _filled(self, row: int) -> int:
        """Returns the columns that a row fills when its slot holds all its tokens except the last."""
        return len(self.prompts[self.node[row]]) - 1 + int(self.position[row])

    def _move(self, row: int, count: int) -> None:
        start = int(self.position[row]) + min(count, 0)
        self.position[row] += count
        self._write_text(row, start, self.tokens[row, start : self.position[row]])
        self.length[row] += count
        self.token[row] = self.tokens[row, self.position[row] - 1]

    def _write_text(self, row: int, position: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Replaces what the text of a row has from a position on."""
        if self.texts is not None:
            self.texts.write(row, position, tokens)

    def _rows(self, numbers: np.ndarray, live: np.ndarray) -> decode.Rows:
        """Returns the `Rows` of a call; where `live` is False there is nothing to decode.

        A row that waits keeps its length, so a chunk writes after its filled columns and not over them.
        """
        state = (self.lane, self.start, self.length, self.token, self.position, self.limit)
        there = (live, live, numbers >= 0, live, live, live)
        values = (np.where(ok, x[numbers], 0).astype(np.int32) for ok, x in zip(there, state, strict=True))
        return sharding.place_rows(decode.Rows._make((*values, self.keys[numbers])), self.mesh)

    def _constrained(self, numbers: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Returns which rows of a chunk are constrained: bool, in the shape of `numbers`."""
        constrained = np.zeros_like(live)
        if self.constraint is not None:
            constrained[live] = self.constraint.active(numbers[live])
        return constrained

    def _allowed(self, numbers: np.ndarray, constrained: np.ndarray) -> np.ndarray | jax.Array | None:
        """Returns the token mask for `decode_chunk`, or None. Unconstrained rows allow all tokens."""
        if self.constraint is None or not constrained.any():
            return None
        allowed = np.full((len(numbers), -(-self.decoder.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        allowed[constrained] = self.constraint.allowed(numbers[constrained])
        return sharding.place_rows(allowed, self.mesh)

    def _columns(self, numbers: np.ndarray) -> int:
        """Returns how many columns these rows need, rounded up to a compiled size."""
        return self.sizes.columns_for(int(self.length[numbers].max()))

    def _aligned(self, numbers: np.ndarray, live: np.ndarray) -> bool:
        """Returns whether the chunk covers all slots, with rows ordered by lane, equally many per lane."""
        if self.blocks.lanes == 1:
            return True
        each, rest = divmod(len(numbers), self.blocks.lanes)
        whole = len(numbers) == self.sizes.slots and self.sizes.shards == 1 and not rest
        places = np.flatnonzero(live)
        return whole and bool((self.lane[numbers[places]] == places // each).all())
