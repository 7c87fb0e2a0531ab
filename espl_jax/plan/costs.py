"""Memory and time of the programs of a run on a TPU slice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from espl_jax.evolution.templates import Templates, template_names
from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import sharding
from espl_jax.plan import programs, tpu_compiler
from espl_jax.plan.chips import Chip, find_chip
from espl_jax.plan.hlo.traffic import traffic
from espl_jax.plan.programs import Program
from espl_jax.plan.tpu_compiler import Compiled
from espl_jax.pretrained import load
from espl_jax.pretrained.numerics import resolve
from espl_jax.run.config import Config
from espl_jax.run.parts import make_optimizer_of
from espl_jax.run.tasks import has_turns
from espl_jax.run.weights import numerics
from espl_jax.run.workloads import Lengths, Workload, workloads
from espl_jax.sampling.programs import describe
from espl_jax.sampling.sizes import Sizes

GIB = 2**30

EVALUATED = 64
"""Default size of the validation set, and of the test set."""

TOKENS_PER_STEP = 2.0
"""Default number of tokens that a row draws in a decode step with drafts; see experiments/bench_drafts.py."""

CHARS_PER_TOKEN = 3
"""Characters per token: lower than with most tokenizers on English, so lengths are overestimated."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Memory and time of a program on one device.

    Attributes:
      program: the program.
      arguments, temporaries, outputs: bytes; outputs without those that alias arguments.
      beside: other bytes that the run holds while the program runs.
      flops, moved: flops and HBM traffic in bytes of one execution.
      error: why it could not be compiled, or empty.
      seconds: compile time in seconds.
    """

    program: Program
    arguments: float = 0.0
    temporaries: float = 0.0
    outputs: float = 0.0
    beside: float = 0.0
    flops: float = 0.0
    moved: float = 0.0
    error: str = ""
    seconds: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of HBM in use while the program runs."""
        return self.arguments + self.temporaries + self.outputs + self.beside

    def fits(self, chip: Chip) -> bool:
        """Returns whether the program fits into the memory of the chip."""
        return not self.error and self.total <= chip.memory

    def bound(self, chip: Chip) -> float:
        """Returns a lower bound on the seconds of one execution."""
        return max(self.flops / chip.flops, self.moved / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a slice.

    Attributes:
      topology, chip: the slice.
      mesh: devices by axis.
      held: bytes per device that the run holds throughout, by purpose.
      slots: description of the slots that sampling reserves; the reason if it cannot reserve any.
      costs: costs of every program.
      error: why sampling cannot reserve any slots, or empty.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    held: Mapping[str, float]
    slots: str
    costs: tuple[Cost, ...]
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether every program fits."""
        return not self.error and all(cost.fits(self.chip) for cost in self.costs)

    @property
    def largest(self) -> float:
        """Bytes of HBM of the largest program."""
        return max((cost.total for cost in self.costs), default=0.0)

    @property
    def iteration(self) -> float:
        """Lower bound on the seconds of an iteration."""
        return sum(cost.program.runs * cost.bound(self.chip) for cost in self.costs)


def plan(
    config: Config,
    topology: str,
    lengths: Lengths,
    *,
    phases: Sequence[str] = programs.PHASES,
    every_bucket: bool = True,
    evaluated: int = EVALUATED,
    tokens_per_step: float = TOKENS_PER_STEP,
    codegen: bool = False,
    say: Callable[[str], None] = print,
) -> Plan:
    """Compiles the programs of a run for a slice.

    Args:
      config: the run's configuration.
      topology: the slice.
      lengths: maximum tokens of system prompts, problems and rollouts.
      phases: the phases whose programs are compiled.
      every_bucket: whether to compile all decode chunks, or only the smallest and the largest.
      evaluated: size of the validation set, and of the test set.
      tokens_per_step: tokens that a row draws in a decode step, if there are drafts.
      codegen: see `tpu_compiler.compile_each`.
      say: called with a line of progress for each program.

    Raises:
      ValueError: for an unknown topology, a mesh that does not fit it, or a model that cannot be read.
    """
    chip = find_chip(topology)
    asked = config, topology, lengths, phases, every_bucket, evaluated, tokens_per_step
    run = _run(*asked)
    lower = functools.partial(_lower, *asked)
    count, preload = len(run.programs), [programs.__name__]
    costs = []
    for program, compiled in zip(
        run.programs, tpu_compiler.compile_each(lower, count, codegen, preload), strict=True
    ):
        costs.append(_cost(program, compiled, resident(config, run.sizes, program.phase)))
        say(f"compiled in {compiled.seconds:.0f} s: {program.name}, {program.shape}")
    return Plan(topology, chip, run.mesh, run.sizes, run.slots, tuple(costs), run.error)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run on a slice: devices by axis, bytes held by purpose, the slots that rollouts reserve, their
    description, the reason why sampling cannot reserve any, and all programs."""

    mesh: dict[str, int]
    sizes: dict[str, int]
    stages: tuple[Sizes, ...]
    slots: str
    error: str
    programs: list[Program]


def reflector_of(config: Config) -> DecoderConfig | None:
    """Returns the configuration of the model of `reflection.source`, or None."""
    source = config.reflection.source
    return load.read_config(source, **on_tpu(config)) if source and config.mode != "rl" else None


def on_tpu(config: Config) -> dict[str, Any]:
    """Returns the DecoderConfig fields that the run would have on a TPU."""

    def unread() -> DecoderConfig:
        raise AssertionError("on a TPU no default depends on the model's size")

    return resolve(numerics(config), unread, platform="tpu")


def _run(
    config: Config,
    topology: str,
    lengths: Lengths,
    phases: Sequence[str],
    every_bucket: bool,
    evaluated: int,
    tokens_per_step: float,
) -> _Run:
    mesh = sharding.make_mesh(dict(config.mesh), tpu_compiler.devices(topology))
    assert mesh is not None
    decoder = load.read_config(config.model.source, **on_tpu(config))
    optimizer = make_optimizer_of(config)
    held = programs.held(config, decoder, optimizer, mesh, reflector_of(config))
    sizes, axes = held.sizes(), dict(mesh.shape)
    splits = ("validation", "test") if config.data.test else ("validation",)
    templates = Templates(config.reflection.templates)
    longest = max(len(templates.load(name).system) for name in template_names())
    every = workloads(
        config,
        decoder,
        lengths,
        longest_problem=lengths.problem,
        turns=has_turns(config),
        evaluated=dict.fromkeys(splits, evaluated),
        instructions=longest // CHARS_PER_TOKEN,
        tokens_per_step=tokens_per_step,
    )
    stages: dict[Workload, tuple[Sizes, ...]] = {}
    for sampling in every:
        try:
            memory = int(find_chip(topology).memory)
            stages[sampling] = sampling.sizes(decoder, sum(sizes.values()), mesh, memory)
        except ValueError as error:
            reason = f"{sampling.name}: {error}"
            return _Run(axes, sizes, (), reason, reason, [])
    listed = programs.run_programs(
        config, decoder, held, optimizer, stages, mesh, phases=phases, every_bucket=every_bucket
    )
    reserved = stages[every[0]]
    slots = describe(every[0].shapes(decoder, held.policy, reserved, mesh))
    return _Run(axes, sizes, reserved, slots, "", list(listed))


def _lower(*asked: Any) -> jax.stages.Lowered:
    """Lowers one program, by its number (the last argument), in the process that compiles it."""
    *run, number = asked
    return _run(*run).programs[number].lower()


def least_memory(config: Config, topology: str, lengths: Lengths) -> float:
    """Returns a lower bound on the bytes per device of an update: what the run holds, the gradient, and the
    stored layer inputs of one microbatch. If it exceeds the chip, compilation is unnecessary."""
    mesh = sharding.make_mesh(dict(config.mesh), tpu_compiler.devices(topology))
    assert mesh is not None
    decoder = load.read_config(config.model.source, **on_tpu(config))
    held = programs.held(config, decoder, make_optimizer_of(config), mesh, reflector_of(config))
    sizes = held.sizes()
    shards = sharding.row_shards(mesh)
    groups = -(-config.num_prompts * config.batch_size // config.loss.minibatches)
    rows = -(-groups * config.group_size // shards)
    tokens = min(config.loss.microbatch_rows or rows, rows) * lengths.new
    stored = {"rounded": jnp.dtype(decoder.dtype).itemsize, "offload": 0}.get(decoder.remat, 4)
    inputs = stored * tokens * decoder.embed_dim * decoder.num_layers / mesh.shape["tensor"]
    return sum(sizes.values()) - sizes["sampling copy"] + sizes["trained"] + inputs


def resident(config: Config, sizes: Mapping[str, float], phase: str) -> float:
    """Returns the bytes of `Held.sizes` that a device holds in a phase. The copy in the sampling layout is
    freed before reflection and update, unless the current weights reflect."""
    kept = phase in ("rollouts", "evaluation") or (
        config.mode != "rl" and config.reflection.policy == "current"
    )
    return sum(size for name, size in sizes.items() if kept or name != "sampling copy")


def _cost(program: Program, compiled: Compiled, held: float) -> Cost:
    if compiled.error:
        return Cost(program, error=compiled.error, seconds=compiled.seconds)
    counted = traffic(compiled.text, program.loops)
    return Cost(
        program,
        arguments=compiled.arguments,
        temporaries=compiled.temporaries,
        outputs=compiled.outputs,
        beside=held - program.uses + program.beside,
        flops=counted.flops,
        moved=counted.total,
        seconds=compiled.seconds,
    )
