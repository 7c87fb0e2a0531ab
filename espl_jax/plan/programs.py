"""Lists the programs that a run compiles, from shapes alone, for `plan` and `--dry_run`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from espl_jax.models import lora
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params, abstract
from espl_jax.parallel import sharding
from espl_jax.parallel.ahead import Call
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.run.check_groups import trains
from espl_jax.run.config import Config
from espl_jax.run.update import update_calls
from espl_jax.run.weights import abstract_trainable, declared_trainable
from espl_jax.run.workloads import Lengths, Workload
from espl_jax.sampling import decode
from espl_jax.sampling.sizes import EXTENDED_TOKENS, Sizes
from espl_jax.sampling.truncation import HALVINGS
from espl_jax.training.state import TrainState, abstract_train_state, sampling_params
from espl_jax.training.step import policy_gradient_step
from espl_jax.types import TrainBatch

PHASES = ("rollouts", "reflection", "update", "evaluation")


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
      name, shape: description, for display.
      call: the call that it serves.
      phase: one of `PHASES`.
      runs: executions in an iteration with rollouts of maximum length; 0 for reflection and evaluation, and
        for programs of negligible time.
      uses: bytes of `Held` that are among its arguments.
      beside: bytes that rollouts hold while it runs and that are not among its arguments.
      loops: trip counts of loops that the HLO does not contain, as for `hlo.traffic.traffic`.
    """

    name: str
    shape: str
    call: Call
    phase: str
    runs: float
    uses: int = 0
    beside: int = 0
    loops: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def function(self) -> str:
        """Name of the jitted function."""
        return self.call.function.__name__

    def lower(self) -> jax.stages.Lowered:
        """Lowers the program; `.compile()` of the result compiles it."""
        return self.call.lower()


@dataclasses.dataclass(frozen=True)
class Held:
    """What a run holds on its devices between programs, as abstract arrays with shardings.

    Attributes:
      base: the model as loaded: the reference policy, and the frozen base of adapters.
      state: the train state; None if only prompts change.
      policy: the params used for sampling; shares the base if adapters are trained.
      reflector: params of the model of `reflection.source`; None if there is none.
    """

    base: Params
    state: TrainState | None
    policy: Params
    reflector: Params | None = None

    @property
    def copies(self) -> Params:
        """Params of the policy that are not shared with the base."""
        if self.policy is self.base:
            return {}
        _, adapters = lora.detach(self.policy)
        return adapters or self.policy

    def sizes(self) -> dict[str, int]:
        """Returns bytes per device, by purpose."""
        state = self.state
        return {
            "weights": bytes_per_device(self.base),
            "trained": bytes_per_device(state and state.trainable),
            "optimizer": bytes_per_device(state and state.opt_state),
            "sampling copy": bytes_per_device(self.copies),
            **({} if self.reflector is None else {"reflector": bytes_per_device(self.reflector)}),
        }


def held(
    config: Config,
    decoder: DecoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
    reflector: DecoderConfig | None = None,
) -> Held:
    """Returns the abstract arrays that a run of this configuration holds.

    Args:
      config: the run's configuration.
      decoder: the model's configuration.
      optimizer: the optimizer of the run.
      mesh: the device mesh.
      reflector: configuration of the model of `reflection.source`.
    """

    def params(of: DecoderConfig) -> Params:
        declared = abstract(of)
        shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(w.dtype)), declared)
        return sharding.place(shapes, declared, mesh, "sampling")

    base, other = params(decoder), None if reflector is None else params(reflector)
    if not trains(config):
        return Held(base, None, base, other)
    state = abstract_train_state(abstract_trainable(config, decoder, mesh), optimizer, mesh)
    frozen = base if config.lora.rank else None
    policy = sampling_params(state.trainable, frozen, declared_trainable(config, decoder), decoder, mesh)
    return Held(base, state, policy, other)


def run_programs(
    config: Config,
    decoder: DecoderConfig,
    held: Held,
    optimizer: optax.GradientTransformation,
    stages: Mapping[Workload, Sequence[Sizes]],
    mesh: Mesh | None,
    *,
    phases: Sequence[str] = PHASES,
    stop_ids: int = 2,
    every_bucket: bool = True,
) -> Iterator[Program]:
    """Yields every program of a run once; those of `sampling_programs` also represent smaller variants.

    Leaves out programs that move or draw a few numbers, and those that create the initial state.

    Args:
      config: the run's configuration.
      decoder: the model's configuration.
      held: abstract arrays that the run holds.
      optimizer: the optimizer of the run.
      stages: sampling workload -> sizes that it reserves; rollouts first.
      mesh: the device mesh.
      phases: the phases whose programs to yield.
      stop_ids: number of tokens that end a turn.
      every_bucket: whether to yield the decode chunks of rollouts for all numbers of columns, or only for the
        smallest and the largest.
    """
    seen = set()
    rollouts = next(iter(stages))
    reflecting = held.policy if config.reflection.policy == "current" else held.base
    for sampling, sizes in stages.items():
        params = reflecting if sampling.phase == "reflection" else held.policy
        if sampling.phase in phases:
            every = every_bucket and sampling is rollouts
            for program in sampling_programs(sampling, decoder, params, sizes, mesh, stop_ids, every):
                if program.call.signature not in seen:
                    seen.add(program.call.signature)
                    yield program
    if "update" in phases and held.state is not None:
        yield from update_programs(config, decoder, held, optimizer, rollouts.lengths, mesh)


def sampling_programs(
    sampling: Workload,
    decoder: DecoderConfig,
    params: Params,
    stages: Sequence[Sizes],
    mesh: Mesh | None,
    stop_ids: int = 2,
    every_bucket: bool = True,
) -> Iterator[Program]:
    """Yields the programs of a sampling workload: prefill of both shared levels; for every stage the decode
    chunks at full width, with drafts of full length; and the programs that admit, move and extend rows.

    Narrower chunks need less time and memory, except for those whose rows are not ordered by lane; the widest
    of these is yielded too.

    Args:
      sampling: the workload.
      decoder: the model's configuration.
      params: abstract params.
      stages: the sizes that it reserves.
      mesh: the device mesh.
      stop_ids: number of tokens that end a turn.
      every_bucket: whether to yield chunks for all numbers of columns, or only the smallest and largest.
    """
    shapes = sampling.shapes(decoder, params, stages, mesh, stop_ids)
    lanes, lengths, counted = sampling.lanes, sampling.lengths, sampling.phase == "rollouts"
    title = "" if counted else f"{sampling.name}: "
    uses = bytes_per_device(shapes.params)
    most_drafted = sampling.draft_tokens

    def program(name: str, shape: str, call: Call, runs: float = 0.0, **of: Any) -> Program:
        return Program(title + name, shape, call, sampling.phase, runs if counted else 0.0, **of)

    def chunk(
        name: str, stage: int, rows: int, columns: int, aligned: bool, runs: float, constrained: bool
    ) -> Program:
        drafted = 0 if constrained else most_drafted
        steps = 1 if constrained else stages[stage].steps_for(drafted)
        loops = {"jit(decode_chunk)/while": steps, "/while": HALVINGS}
        call = shapes.chunk(stage, rows, columns, aligned, constrained, drafted)
        return program(name, f"{rows} rows x {columns} columns", call, runs, uses=uses, loops=loops)

    shape = _tokens((lanes, shapes.system))
    yield program("prefill, prompts", shape, shapes.prefill_prompts(), 1, uses=uses)
    width = next(width for width in stages[0].problem_widths if width >= lengths.problem - 1)
    first = decode.abstract_slots(shapes.decoder, stages[0].slots, stages[0].capacity, mesh)
    yield program(
        "prefill, a block of problems",
        _tokens((shapes.block, width)),
        shapes.prefill_block(width),
        -(-sampling.problems * lanes // shapes.block),
        uses=uses,
        beside=bytes_per_device(first),
    )

    filled = lengths.problem - 1
    most = stages[-1].longest
    free_until = filled + sampling.reasoning if sampling.constrained else most
    for number, sizes in enumerate(stages):
        of_stage = f" of stage {number + 1}" if len(stages) > 1 else ""
        aligned, *_ = shapes.orders(number, sizes.slots)
        kinds = {"decode chunk" if counted else "chunk": (False, min(free_until, sizes.longest))}
        kinds["constrained step"] = (True, sizes.longest)
        for kind, (constrained, until) in kinds.items():
            drawn = 1 if constrained else sizes.steps_for(most_drafted)
            if most_drafted and not constrained:
                drawn = max(1, round(drawn * sampling.tokens_per_step))
            starts = range(filled, until, drawn)
            if not starts:
                continue
            chunks = collections.Counter(sizes.columns_for(start) for start in starts)
            filled += len(starts) * starts.step
            runs = {columns: float(chunks[columns]) for columns in sizes.columns}
            for columns, count in (runs if every_bucket else _ends(runs)).items():
                name = kind
                if not every_bucket:
                    name += ", largest" if columns == sizes.columns[-1] else ", smallest"
                count *= -(-sampling.rows // sizes.slots)
                yield chunk(name + of_stage, number, sizes.slots, columns, aligned, count, constrained)
            if aligned and lanes > 1 and len(sizes.widths) > 1:
                name = f"{kind}, rows mixed{of_stage}"
                yield chunk(name, number, sizes.widths[-2], sizes.columns[-1], False, 0, constrained)

        # Between chunks, rows are admitted in the first stage, and extended when they enter a later stage or
        # get tool output.
        each, loops = f"{sizes.slots} rows", {"/while": sizes.per_shard}
        if number == 0:
            yield program(f"admit{of_stage}", each, shapes.admit(width), loops=loops)
        yield program(f"move{of_stage}", each, shapes.move(number), loops=loops)
        if sampling.turns or number > 0:
            largest = {sizes.extended_rows(columns): columns for columns in sizes.columns}
            for count in sorted({min(largest), max(largest)}):
                columns = largest[count]
                call = shapes.extend(number, count, EXTENDED_TOKENS, columns)
                shape = f"{sizes.shards * count} rows x {columns} columns"
                yield program(f"extend{of_stage}", shape, call, uses=uses)


def _ends(runs: dict[int, float]) -> dict[int, float]:
    """Returns equivalent runs of only the smallest and largest chunks: the time of a chunk is linear in its
    columns."""
    low, high = min(runs), max(runs)
    if low == high:
        return runs
    upper = sum(count * (columns - low) / (high - low) for columns, count in runs.items())
    return {low: sum(runs.values()) - upper, high: upper}


def update_programs(
    config: Config,
    decoder: DecoderConfig,
    held: Held,
    optimizer: optax.GradientTransformation,
    lengths: Lengths,
    mesh: Mesh | None,
) -> Iterator[Program]:
    """Yields the policy-gradient step on the largest batch (all groups, rollouts of maximum length), and the
    scoring before the first of several steps."""
    state = held.state
    assert state is not None
    frozen = held.base if config.lora.rank else None
    reference = held.base if config.loss.kl_coef else None
    updates = config.loss.epochs * config.loss.minibatches
    for call in update_calls(config, decoder, state, held.base, optimizer, lengths, mesh):
        batch = next(x for x in call.arguments if isinstance(x, TrainBatch))
        shape = " x ".join(map(str, batch.inputs.shape)) + " new tokens"
        if call.function is policy_gradient_step:
            uses = bytes_per_device((state, frozen or reference))
            yield Program("policy-gradient step", shape, call, "update", updates, uses)
        else:
            uses = bytes_per_device((state.trainable, frozen))
            yield Program("logprobs", shape, call, "update", config.loss.minibatches, uses)


def _tokens(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]} tokens"
