"""The programs of a run, from shapes alone: what `plan` and `--dry_run` compile, and a run will."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from espl_jax import sharding
from espl_jax.assemble import abstract_trainable, declared_trainable, lanes_of, loss_settings, trains
from espl_jax.memory import bytes_per_device
from espl_jax.models import lora
from espl_jax.models.attention import KVCache
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import Params, abstract
from espl_jax.sampling import decode
from espl_jax.sampling.buckets import bucket
from espl_jax.sampling.layout import for_sampling
from espl_jax.sampling.problem_blocks import block_size
from espl_jax.sampling.sizes import Sizes
from espl_jax.sampling.truncation import HALVINGS, Truncation
from espl_jax.train_batch import abstract_batch
from espl_jax.train_step import (
    TrainState,
    abstract_train_state,
    batch_logprobs,
    place_batch,
    policy_gradient_step,
    sampling_params,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
      name, shape: what it is, and what of, to read.
      lower: traces it for its shapes; `.compile()` of the result gives the program.
      phase: `rollouts` or `update`.
      runs: how often it runs in an iteration in which every rollout is as long as it may be.
      uses: bytes of what the run holds (`Held`) that are among its arguments.
      beside: bytes of what rollouts hold while it runs and that are not.
      loops: how often its loops run, where the program does not say, as `hlo_traffic.traffic` takes it.
    """

    name: str
    shape: str
    lower: Callable[[], Any]
    phase: str
    runs: float
    uses: int = 0
    beside: int = 0
    loops: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of the longest of each level: system prompts, problems, and what may follow."""

    system: int
    problem: int
    new: int


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


def held(c: Any, config: DecoderConfig, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> Held:
    """Shapes of all that a run of this ConfigDict holds."""
    declared = abstract(config)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(w.dtype)), declared)
    base = sharding.place(shapes, declared, mesh, "sampling")
    if not trains(c):
        return Held(base, None, base)
    state = abstract_train_state(abstract_trainable(c, config, mesh), optimizer, mesh)
    frozen = base if c.lora.rank else None
    policy = sampling_params(state.trainable, frozen, declared_trainable(c, config), config, mesh)
    return Held(base, state, policy)


def rollout_programs(
    c: Any,
    config: DecoderConfig,
    params: Params,
    stages: Sequence[Sizes],
    lengths: Lengths,
    mesh: Mesh | None,
    stop_ids: int = 2,
    every_bucket: bool = True,
) -> Iterator[Program]:
    """Prefill of both shared levels, and the decode chunks of every stage at their full width.

    Narrower chunks, of which there are more, need less of everything.

    Args:
      c: the ConfigDict of the run.
      config: the decoder.
      params: shapes of what is sampled from.
      stages: as `choose_sizes` gives them.
      lengths: of the longest prompts.
      mesh: of devices.
      stop_ids: how many tokens end a turn.
      every_bucket: all lengths of the chunks, or the shortest and the longest in the place of all.
    """
    params, config = for_sampling(params, config, mesh)
    lanes = lanes_of(c)
    rows = c.num_prompts * c.batch_size * c.group_size
    shape = (lanes, bucket(lengths.system))
    numbers = sharding.replicate(jax.ShapeDtypeStruct((lanes,), jnp.int32), mesh)
    arrays = decode.abstract_slots(config, *shape, mesh, everywhere=True)
    system = KVCache(*arrays, numbers, numbers)
    truncation = Truncation(c.sampling.top_k, c.sampling.top_p, c.sampling.min_p)

    def prefill(shape: tuple[int, int], *above: KVCache) -> Callable[[], Any]:
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        if above:
            tokens = sharding.place_rows(tokens, mesh)
        return lambda: decode.prefill.lower(params, config, *tokens, *above, mesh=mesh)

    uses = bytes_per_device(params)
    yield Program("prefill, prompts", _tokens(shape), prefill(shape), "rollouts", 1, uses)
    widths = stages[0].problem_widths
    size = block_size(lanes, c.batch_size, widths[-1])
    shape = (lanes * size, next(width for width in widths if width >= lengths.problem - 1))
    name, runs = "prefill, a block of problems", -(-c.batch_size // size)
    first = decode.abstract_slots(config, stages[0].slots, stages[0].capacity, mesh)
    beside = bytes_per_device(first)
    yield Program(name, _tokens(shape), prefill(shape, system), "rollouts", runs, uses, beside)

    def chunk(sizes: Sizes, columns: int) -> Callable[[], Any]:
        return lambda: decode.decode_chunk.lower(
            params,
            config,
            system,
            decode.abstract_slots(config, sizes.slots, sizes.capacity, mesh),
            decode.abstract_rows(sizes.slots, mesh),
            jax.ShapeDtypeStruct((stop_ids,), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.float32),
            columns=columns,
            steps=sizes.steps,
            greedy=c.sampling.temperature == 0,
            truncation=truncation,
            # As chunks are where nothing has ended yet.
            aligned=lanes == 1 or (sizes.parts == 1 and sizes.slots == rows),
            mesh=mesh,
        )

    filled = lengths.problem - 1
    for number, sizes in enumerate(stages, 1):
        of_stage = f" of stage {number}" if len(stages) > 1 else ""
        loops = {"jit(decode_chunk)/while": sizes.steps, "/while": HALVINGS}
        starts = range(filled, sizes.longest, sizes.steps)
        chunks = collections.Counter(sizes.columns_for(start) for start in starts)
        filled += len(starts) * sizes.steps
        runs = {columns: float(chunks[columns]) for columns in sizes.columns}
        for columns, count in (runs if every_bucket else _ends(runs)).items():
            name = "decode chunk"
            if not every_bucket:
                name += ", largest" if columns == sizes.columns[-1] else ", smallest"
            shape = f"{sizes.slots} rows x {columns} columns"
            count *= -(-rows // sizes.slots)
            lower = chunk(sizes, columns)
            yield Program(name + of_stage, shape, lower, "rollouts", count, uses, loops=loops)


def _ends(runs: dict[int, float]) -> dict[int, float]:
    """Runs of the fewest and the most columns, in the place of all between them: what a chunk takes grows
    with its columns as a line does."""
    low, high = min(runs), max(runs)
    if low == high:
        return runs
    upper = sum(count * (columns - low) / (high - low) for columns, count in runs.items())
    return {low: sum(runs.values()) - upper, high: upper}


def update_programs(
    c: Any,
    config: DecoderConfig,
    held: Held,
    optimizer: optax.GradientTransformation,
    lengths: Lengths,
    mesh: Mesh | None,
) -> Iterator[Program]:
    """The policy-gradient step on a batch in which every group counts and every rollout is as long as it may
    be, and with several steps the scoring before the first."""
    prompts = lanes_of(c)
    groups = prompts * c.batch_size
    truncated = bool(Truncation(c.sampling.top_k, c.sampling.top_p, c.sampling.min_p))
    batch = abstract_batch(
        prompts=prompts,
        groups=-(-groups // c.loss.minibatches),
        group_size=c.num_prompts // prompts * c.group_size,
        system_tokens=lengths.system,
        problem_tokens=lengths.problem,
        new_tokens=lengths.new,
        cutoffs=truncated,
        parts=sharding.row_parts(mesh),
        microbatch_rows=c.loss.microbatch_rows,
    )
    shape = " x ".join(map(str, batch.inputs.shape)) + " new tokens"
    batch = place_batch(batch, mesh)
    frozen = held.base if c.lora.rank else None
    reference = held.base if c.loss.kl_coef else None
    uses = bytes_per_device((held.state, frozen or reference))
    settings = loss_settings(c)
    if c.loss.epochs * c.loss.minibatches > 1 and settings["loss"].needs_old_logprobs:

        def score() -> Any:
            names = ("temperature", "microbatch_rows")
            few = {name: settings[name] for name in names}
            return batch_logprobs.lower(held.state.trainable, frozen, batch, config, **few)

        uses_less = bytes_per_device((held.state.trainable, frozen))
        yield Program("logprobs", shape, score, "update", c.loss.minibatches, uses_less)
        batch = batch._replace(old_logprobs=batch.sampler_logprobs)

    def step() -> Any:
        return policy_gradient_step.lower(held.state, frozen, reference, batch, config, optimizer, **settings)

    steps = c.loss.epochs * c.loss.minibatches
    yield Program("policy-gradient step", shape, step, "update", steps, uses)


def _tokens(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]} tokens"
