"""Lists the programs that a run compiles, from shapes alone, for `plan` and `--dry_run`."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from espl_jax.models import lora
from espl_jax.models.attention import KVCache
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params, abstract
from espl_jax.parallel import sharding
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.run.check_groups import records_routing, trains
from espl_jax.run.config import Config
from espl_jax.run.parts import objective_of
from espl_jax.run.weights import abstract_trainable, declared_trainable
from espl_jax.run.workloads import Lengths, Workload, lanes_of
from espl_jax.sampling import decode
from espl_jax.sampling.buckets import bucket
from espl_jax.sampling.layout import for_sampling
from espl_jax.sampling.problem_blocks import block_size
from espl_jax.sampling.sizes import EXTENDED_TOKENS, Sizes
from espl_jax.sampling.truncation import HALVINGS, Truncation
from espl_jax.training.batches import abstract_batch
from espl_jax.training.state import TrainState, abstract_train_state, sampling_params
from espl_jax.training.step import batch_logprobs, place_batch, policy_gradient_step

PHASES = ("rollouts", "reflection", "update", "evaluation")


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
      name, shape: description, for display.
      lower: lowers it for its shapes; `.compile()` of the result gives the program.
      phase: one of `PHASES`.
      runs: executions in an iteration with rollouts of maximum length; 0 for reflection and evaluation, and
        for programs of negligible time.
      uses: bytes of `Held` that are among its arguments.
      beside: bytes that rollouts hold while it runs and that are not among its arguments.
      loops: trip counts of loops that the HLO does not contain, as for `hlo.traffic.traffic`.
      function: name of the jitted function.
    """

    name: str
    shape: str
    lower: functools.partial[jax.stages.Lowered]
    phase: str
    runs: float
    uses: int = 0
    beside: int = 0
    loops: dict[str, int] = dataclasses.field(default_factory=dict)
    function: str = ""

    @property
    def shapes(self) -> str:
        """All arguments of the function, as text: equal for two names of the same program."""
        return repr((self.lower.args, self.lower.keywords))


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
                key = program.function, program.shapes
                if key not in seen:
                    seen.add(key)
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
    chunks at full width; and the programs that admit, move and extend rows.

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
    params, decoder = for_sampling(params, decoder, mesh)
    lanes, lengths, counted = sampling.lanes, sampling.lengths, sampling.phase == "rollouts"
    title = "" if counted else f"{sampling.name}: "

    def program(
        name: str,
        shape: str,
        function: Any,
        *arguments: Any,
        runs: float = 0.0,
        uses: int = 0,
        beside: int = 0,
        loops: Mapping[str, int] = MappingProxyType({}),
        **static: Any,
    ) -> Program:
        lower = functools.partial(function.lower, *arguments, **static, mesh=mesh)
        memory = uses, beside, dict(loops), function.__name__
        return Program(title + name, shape, lower, sampling.phase, runs if counted else 0.0, *memory)

    def numbers(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def cache(nodes: int, columns: int) -> KVCache:
        arrays = decode.abstract_slots(decoder, nodes, columns, mesh, everywhere=True)
        return KVCache(*cast(decode.Slots, arrays), *(sharding.replicate(numbers(nodes), mesh),) * 2)

    uses = bytes_per_device(params)
    shape = (lanes, bucket(lengths.system))
    tokens = numbers(*shape), numbers(lanes)
    yield program(
        "prefill, prompts", _tokens(shape), decode.prefill, params, decoder, *tokens, uses=uses, runs=1
    )
    system = cache(*shape)
    widths = stages[0].problem_widths
    size = block_size(lanes, sampling.problems, widths[-1])
    shape = (lanes * size, next(width for width in widths if width >= lengths.problem - 1))
    tokens = sharding.place_rows((numbers(*shape), numbers(shape[0])), mesh)
    first = decode.abstract_slots(decoder, stages[0].slots, stages[0].capacity, mesh)
    yield program(
        "prefill, a block of problems",
        _tokens(shape),
        decode.prefill,
        params,
        decoder,
        *tokens,
        system,
        uses=uses,
        beside=bytes_per_device(first),
        runs=-(-sampling.problems // size),
    )

    def chunk(
        name: str, sizes: Sizes, rows: int, columns: int, aligned: bool, runs: float, constrained: bool
    ) -> Program:
        allowed = ()
        if constrained:
            words = numbers(rows, -(-decoder.vocab_size // 32), dtype=jnp.uint32)
            allowed = (sharding.place_rows(words, mesh),)
        return program(
            name,
            f"{rows} rows x {columns} columns",
            decode.decode_chunk,
            params,
            decoder,
            system,
            decode.abstract_slots(decoder, sizes.slots, sizes.capacity, mesh),
            decode.abstract_rows(rows, mesh),
            numbers(stop_ids),
            numbers(dtype=jnp.float32),
            *allowed,
            uses=uses,
            runs=runs,
            loops={"jit(decode_chunk)/while": 1 if constrained else sizes.steps, "/while": HALVINGS},
            columns=columns,
            steps=1 if constrained else sizes.steps,
            greedy=sampling.greedy,
            truncation=sampling.truncation,
            aligned=aligned,
            record_routing=sampling.record_routing,
        )

    filled = lengths.problem - 1
    most = stages[-1].longest
    free_until = filled + sampling.reasoning if sampling.constrained else most
    for number, sizes in enumerate(stages, 1):
        of_stage = f" of stage {number}" if len(stages) > 1 else ""
        # Rows are ordered by lane as long as no row has ended.
        aligned = lanes == 1 or (sizes.shards == 1 and sizes.slots == sampling.rows)
        kinds = {"decode chunk" if counted else "chunk": (False, min(free_until, sizes.longest))}
        kinds["constrained step"] = (True, sizes.longest)
        for kind, (constrained, until) in kinds.items():
            starts = range(filled, until, 1 if constrained else sizes.steps)
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
                yield chunk(name + of_stage, sizes, sizes.slots, columns, aligned, count, constrained)
            if aligned and lanes > 1 and len(sizes.widths) > 1:
                name = f"{kind}, rows mixed{of_stage}"
                yield chunk(name, sizes, sizes.widths[-2], sizes.columns[-1], False, 0, constrained)
        yield from _in_place(
            program, sampling, decoder, params, system, stages, number - 1, cache(*shape), mesh
        )


def _in_place(
    program: Callable[..., Program],
    sampling: Workload,
    decoder: DecoderConfig,
    params: Params,
    system: KVCache,
    stages: Sequence[Sizes],
    number: int,
    block: KVCache,
    mesh: Mesh | None,
) -> Iterator[Program]:
    """Yields the programs that change the slots of a stage between chunks: rows are admitted in the first
    stage, and extended when they enter a later stage or get tool output."""
    sizes = stages[number]
    of_stage = f" of stage {number + 1}" if len(stages) > 1 else ""
    slots = decode.abstract_slots(decoder, sizes.slots, sizes.capacity, mesh)
    each = f"{sizes.slots} rows"

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return sharding.place_rows(jax.ShapeDtypeStruct(shape, jnp.int32), mesh)

    table, counts = numbers(sizes.shards, sizes.per_shard), numbers(sizes.shards)
    loops = {"/while": sizes.per_shard}
    if number == 0:
        rows = slots, block, table, table, counts
        yield program(f"admit{of_stage}", each, decode.admit, *rows, loops=loops)
    yield program(f"move{of_stage}", each, decode.move, slots, table, table, counts, loops=loops)
    if not (sampling.turns or number > 0):
        return
    most = {sizes.extended_rows(columns): columns for columns in sizes.columns}
    for count, columns in {min(most): most[min(most)], max(most): most[max(most)]}.items():
        rows = sizes.shards * count
        yield program(
            f"extend{of_stage}",
            f"{rows} rows x {columns} columns",
            decode.extend,
            params,
            decoder,
            system,
            slots,
            numbers(sizes.shards, count),
            decode.abstract_rows(rows, mesh),
            numbers(rows, EXTENDED_TOKENS),
            numbers(rows),
            uses=bytes_per_device(params),
            columns=columns,
        )


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
    prompts = lanes_of(config)
    groups = prompts * config.batch_size
    truncated = bool(Truncation(config.sampling.top_k, config.sampling.top_p, config.sampling.min_p))
    batch = abstract_batch(
        prompts=prompts,
        groups=-(-groups // config.loss.minibatches),
        group_size=config.num_prompts // prompts * config.group_size,
        system_tokens=lengths.system,
        problem_tokens=lengths.problem,
        new_tokens=lengths.new,
        cutoffs=truncated,
        routing=decoder.routing_shape if decoder.experts and records_routing(config) else None,
        shards=sharding.row_shards(mesh),
        microbatch_rows=config.loss.microbatch_rows,
    )
    shape = " x ".join(map(str, batch.inputs.shape)) + " new tokens"
    batch = place_batch(batch, mesh)
    frozen = held.base if config.lora.rank else None
    reference = held.base if config.loss.kl_coef else None
    state = held.state
    assert state is not None
    uses = bytes_per_device((state, frozen or reference))
    objective, microbatch_rows = objective_of(config), config.loss.microbatch_rows
    if config.loss.epochs * config.loss.minibatches > 1 and objective.loss.needs_old_logprobs:
        score = functools.partial(
            batch_logprobs.lower,
            state.trainable,
            frozen,
            batch,
            decoder,
            temperature=objective.temperature,
            replay_routing=objective.replay_routing,
            microbatch_rows=microbatch_rows,
        )
        uses_less = bytes_per_device((state.trainable, frozen))
        count = config.loss.minibatches
        function = batch_logprobs.__name__  # pyright: ignore[reportAttributeAccessIssue]
        yield Program("logprobs", shape, score, "update", count, uses_less, function=function)
        batch = batch._replace(old_logprobs=batch.sampler_logprobs)
    given = state, frozen, reference, batch, decoder, optimizer, objective
    step = functools.partial(policy_gradient_step.lower, *given, microbatch_rows=microbatch_rows)
    steps = config.loss.epochs * config.loss.minibatches
    function = policy_gradient_step.__name__  # pyright: ignore[reportAttributeAccessIssue]
    yield Program("policy-gradient step", shape, step, "update", steps, uses, function=function)


def _tokens(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]} tokens"
