"""The programs of a run, from shapes alone: what `plan` and `--dry_run` compile, and a run will."""

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
from espl_jax.models.transformer import Params, abstract
from espl_jax.parallel import sharding
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.run.check_groups import trains
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
      name, shape: what it is, and what of, to read.
      lower: traces it for its shapes; `.compile()` of the result gives the program.
      phase: one of `PHASES`.
      runs: how often it runs in an iteration in which every rollout is as long as it may be; 0 for reflection
        and evaluation, and for what takes no time to speak of.
      uses: bytes of what the run holds (`Held`) that are among its arguments.
      beside: bytes of what rollouts hold while it runs and that are not.
      loops: how often its loops run, where the program does not say, as `hlo_traffic.traffic` takes it.
      function: the name of the jitted function.
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
        """All that the function is called with, as text: equal for one program under two names."""
        return repr((self.lower.args, self.lower.keywords))


@dataclasses.dataclass(frozen=True)
class Held:
    """What a run holds on its devices between programs, as shapes with their places.

    Attributes:
      base: the model as loaded: the reference policy, and the frozen base of adapters.
      state: the train state; None where only prompts change.
      policy: the params that sampling is given; shares the base where adapters are trained.
    """

    base: Params
    state: TrainState | None
    policy: Params

    @property
    def copies(self) -> Params:
        """What of the policy is not the base."""
        if self.policy is self.base:
            return {}
        _, adapters = lora.detach(self.policy)
        return adapters or self.policy

    def sizes(self) -> dict[str, int]:
        """Bytes on one device, by what they are."""
        state = self.state
        return {
            "weights": bytes_per_device(self.base),
            "trained": bytes_per_device(state and state.trainable),
            "optimizer": bytes_per_device(state and state.opt_state),
            "sampling copy": bytes_per_device(self.copies),
        }


def held(
    config: Config, decoder: DecoderConfig, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> Held:
    """Shapes of all that a run of this configuration holds."""
    declared = abstract(decoder)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(w.dtype)), declared)
    base = sharding.place(shapes, declared, mesh, "sampling")
    if not trains(config):
        return Held(base, None, base)
    state = abstract_train_state(abstract_trainable(config, decoder, mesh), optimizer, mesh)
    frozen = base if config.lora.rank else None
    policy = sampling_params(state.trainable, frozen, declared_trainable(config, decoder), decoder, mesh)
    return Held(base, state, policy)


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
    """Every program of a run, each once; the programs of `sampling_programs` stand for smaller ones.

    Left out are those that move or draw a few numbers, and those that make the first state.

    Args:
      config: the run's configuration.
      decoder: the model's shape.
      held: shapes of what the run holds.
      optimizer: of the run.
      stages: the samplings of the run, rollouts first, and what each reserves.
      mesh: of devices.
      phases: whose programs.
      stop_ids: how many tokens end a turn.
      every_bucket: of rollouts all lengths of the chunks, or the shortest and the longest in the place of
        all.
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
    """Prefill of both shared levels; of every stage the decode chunks at their full width; what puts rows
    into slots, moves them between slots, and prefills behind them.

    Narrower chunks, of which there are more, need less of everything, but for those whose rows do not lie
    lane by lane: the widest of these is listed too.

    Args:
      sampling: what is sampled.
      decoder: the model's shape.
      params: shapes of what is sampled from.
      stages: what it reserves.
      mesh: of devices.
      stop_ids: how many tokens end a turn.
      every_bucket: all lengths of the chunks, or the shortest and the longest in the place of all.
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

    def chunk(name: str, sizes: Sizes, rows: int, columns: int, aligned: bool, runs: float) -> Program:
        allowed = ()
        if sampling.constrained:
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
            loops={"jit(decode_chunk)/while": sizes.steps, "/while": HALVINGS},
            columns=columns,
            steps=sizes.steps,
            greedy=sampling.greedy,
            truncation=sampling.truncation,
            aligned=aligned,
        )

    filled = lengths.problem - 1
    for number, sizes in enumerate(stages, 1):
        of_stage = f" of stage {number}" if len(stages) > 1 else ""
        starts = range(filled, sizes.longest, sizes.steps)
        chunks = collections.Counter(sizes.columns_for(start) for start in starts)
        filled += len(starts) * sizes.steps
        runs = {columns: float(chunks[columns]) for columns in sizes.columns}
        # As chunks are where nothing has ended yet.
        aligned = lanes == 1 or (sizes.shards == 1 and sizes.slots == sampling.rows)
        kind = "decode chunk" if counted else "constrained step" if sampling.constrained else "chunk"
        for columns, count in (runs if every_bucket else _ends(runs)).items():
            name = kind
            if not every_bucket:
                name += ", largest" if columns == sizes.columns[-1] else ", smallest"
            count *= -(-sampling.rows // sizes.slots)
            yield chunk(name + of_stage, sizes, sizes.slots, columns, aligned, count)
        if aligned and lanes > 1 and len(sizes.widths) > 1:
            name = f"{kind}, rows mixed{of_stage}"
            yield chunk(name, sizes, sizes.widths[-2], sizes.columns[-1], False, 0)
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
    """The programs that change the slots of a stage between its chunks: all rows are admitted in the first
    one, and those that return, or are answered, are extended."""
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
    """Runs of the fewest and the most columns, in the place of all between them: what a chunk takes grows
    with its columns as a line does."""
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
    """The policy-gradient step on a batch in which every group counts and every rollout is as long as it may
    be, and with several steps the scoring before the first."""
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
