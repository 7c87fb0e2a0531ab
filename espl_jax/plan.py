"""Says whether a run fits on a TPU slice, and how long an iteration takes at least, before one is paid for.

    python -m espl_jax.plan --config=configs/hmmt.py --topology=v5e:4x4
    python -m espl_jax.plan --config=configs/hmmt.py --topology=v5p:2x2x2 --config.mesh.tensor=4

Every program of the run is compiled for that topology, by the compiler that TPUs have, on this machine, up
to where memory is assigned, or with `--codegen` to the end. Of rollouts these are prefill, the decode chunk
of every bucket at its full width, and what admits, moves and extends rows; of reflection on device and of
evaluation the same at the largest bucket, with constrained decoding; of updates the policy-gradient step, and
scoring where there are several. For each it prints what a device needs of HBM, what it computes and moves,
and the larger of the two bounds that follow. As in the run, sampling reserves as many slots as the chip has
room for. No weight is allocated, and of a model on the hub config.json alone is fetched.

An iteration is reckoned at its longest: every rollout draws all tokens that it may, every group has a
gradient, and prompts are as long as the flags say. The time of reflection and evaluation is not in it. A
bound is what the chip could do at best, and leaves out what devices send each other.

The exit code is 0 if everything fits, else 1; then other settings are tried, and those that fit are
printed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from espl_jax import tpu_compiler  # isort: skip; before jax is imported

import jax
import jax.numpy as jnp
from absl import app, flags

from espl_jax import command_line, pretrained, programs, sharding
from espl_jax.assemble import make_optimizer_of, numerics
from espl_jax.check_config import check_config
from espl_jax.chips import Chip, find_chip
from espl_jax.evolution.templates import load_template, template_names
from espl_jax.hlo_traffic import traffic
from espl_jax.metrics import table
from espl_jax.models.config import DecoderConfig
from espl_jax.pretrained.numerics import resolve
from espl_jax.programs import Program
from espl_jax.sampling.sizes import Sizes, describe
from espl_jax.samplings import Lengths, Sampling, samplings
from espl_jax.task import has_turns
from espl_jax.tpu_compiler import Compiled

GIB = 2**30

EVALUATED = 64
"""Problems of the validation set, and of the test set, unless a flag says."""

CHARS_PER_TOKEN = 3
"""Fewer than most tokenizers take of English instructions."""

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "The slice, e.g. v5e:4x4, v5p:2x2x2, v6e:2x4.")
_SYSTEM = flags.DEFINE_integer("system_tokens", 1024, "Tokens of the longest system prompt.")
_PROBLEM = flags.DEFINE_integer(
    "problem_tokens", 512, "Tokens of the longest problem, its turn's frame included."
)
_EVALUATED = flags.DEFINE_integer(
    "evaluated_problems", EVALUATED, "Problems of the validation set, and of the test set."
)
_CODEGEN = flags.DEFINE_bool(
    "codegen", False, "Generate code too: takes ten times as long, and finds kernels too large for the chip."
)
_ADVICE = flags.DEFINE_bool("advice", True, "Try other settings where these do not fit.")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program needs of one device.

    Attributes:
      program: which one.
      arguments, temporaries, outputs: bytes; outputs without those that take the place of arguments.
      beside: bytes of what the run holds meanwhile.
      flops, moved: operations and bytes of HBM in one execution.
      error: why it could not be compiled, or nothing.
      seconds: that compiling took.
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
        """Bytes of HBM while it runs."""
        return self.arguments + self.temporaries + self.outputs + self.beside

    def fits(self, chip: Chip) -> bool:
        """Whether the chip has room for it."""
        return not self.error and self.total <= chip.memory

    def bound(self, chip: Chip) -> float:
        """Seconds that one execution takes at least."""
        return max(self.flops / chip.flops, self.moved / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a slice.

    Attributes:
      topology, chip: the slice.
      mesh: devices by axis.
      held: bytes of one device by what they are for.
      slots: what sampling reserves, in words; why nothing can be, where `error` is set.
      costs: of every program.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    held: dict[str, float]
    slots: str
    costs: tuple[Cost, ...]
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return not self.error and all(cost.fits(self.chip) for cost in self.costs)

    @property
    def largest(self) -> float:
        """Most bytes of HBM that any program needs."""
        return max((cost.total for cost in self.costs), default=0.0)

    @property
    def iteration(self) -> float:
        """Seconds that an iteration takes at least."""
        return sum(cost.program.runs * cost.bound(self.chip) for cost in self.costs)


def plan(
    c: Any,
    topology: str,
    lengths: Lengths,
    *,
    phases: Sequence[str] = programs.PHASES,
    every_bucket: bool = True,
    evaluated: int = EVALUATED,
    codegen: bool = False,
    say: Callable[[str], None] = print,
) -> Plan:
    """Compiles a run's programs for a slice.

    Args:
      c: the ConfigDict of the run.
      topology: the slice.
      lengths: of prompts and problems; what is drawn follows from the configuration.
      phases: whose programs.
      every_bucket: all decode chunks, or the smallest and the largest in the place of all.
      evaluated: problems of the validation set, and of the test set.
      codegen: see `tpu_compiler.compile_each`.
      say: told about each program when it is compiled.

    Raises:
      ValueError: for an unknown topology, a mesh that it does not hold, or a model that cannot be read.
    """
    chip = find_chip(topology)
    asked = c, topology, lengths, phases, every_bucket, evaluated
    run = _run(*asked)
    said = run.error or describe(run.stages)
    lower = functools.partial(_lower, *asked)
    count, preload = len(run.programs), [programs.__name__]
    costs = []
    for program, compiled in zip(
        run.programs, tpu_compiler.compile_each(lower, count, codegen, preload), strict=True
    ):
        costs.append(_cost(program, compiled, resident(c, run.sizes, program.phase)))
        say(f"compiled in {compiled.seconds:.0f} s: {program.name}, {program.shape}")
    return Plan(topology, chip, run.mesh, run.sizes, said, tuple(costs), run.error)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run on a slice: devices by axis, bytes held by what they are for, what sampling reserves, or why it
    cannot reserve anything, and all programs."""

    mesh: dict[str, int]
    sizes: dict[str, int]
    stages: tuple[Sizes, ...]
    error: str
    programs: list[Program]


def on_tpu(config: Any) -> dict[str, Any]:
    """The DecoderConfig fields that the run would have on a TPU."""

    def unread() -> DecoderConfig:
        raise AssertionError("on a TPU no default depends on the model's size")

    return resolve(numerics(config), unread, platform="tpu")


def _run(
    c: Any, topology: str, lengths: Lengths, phases: Sequence[str], every_bucket: bool, evaluated: int
) -> _Run:
    mesh = sharding.make_mesh(dict(c.mesh), tpu_compiler.devices(topology))
    config = pretrained.read_config(c.model.source, **on_tpu(c))
    optimizer = make_optimizer_of(c)
    held = programs.held(c, config, optimizer, mesh)
    sizes, axes = held.sizes(), dict(mesh.shape)
    splits = ("validation", "test") if c.data.test else ("validation",)
    longest = max(len(load_template(name).system) for name in template_names())
    every = samplings(
        c,
        config,
        lengths,
        longest_problem=lengths.problem,
        turns=has_turns(c),
        evaluated=dict.fromkeys(splits, evaluated),
        instructions=longest // CHARS_PER_TOKEN,
    )
    stages: dict[Sampling, tuple[Sizes, ...]] = {}
    for sampling in every:
        try:
            memory = int(find_chip(topology).memory)
            stages[sampling] = sampling.sizes(config, sum(sizes.values()), mesh, memory)
        except ValueError as error:
            return _Run(axes, sizes, (), f"{sampling.name}: {error}", [])
    listed = programs.run_programs(
        c, config, held, optimizer, stages, mesh, phases=phases, every_bucket=every_bucket
    )
    return _Run(axes, sizes, stages[every[0]], "", list(listed))


def _lower(*asked: Any) -> jax.stages.Lowered:
    """The program of a number, the last of what is given, for a process that compiles it."""
    *run, number = asked
    return _run(*run).programs[number].lower()


def least_memory(c: Any, topology: str, lengths: Lengths) -> float:
    """Bytes that a device needs at least for an update: what is held, the gradient, and the stored inputs of
    all layers for one microbatch. What exceeds the chip need not be compiled."""
    mesh = sharding.make_mesh(dict(c.mesh), tpu_compiler.devices(topology))
    config = pretrained.read_config(c.model.source, **on_tpu(c))
    sizes = programs.held(c, config, make_optimizer_of(c), mesh).sizes()
    parts = sharding.row_parts(mesh)
    groups = -(-c.num_prompts * c.batch_size // c.loss.minibatches)
    rows = -(-groups * c.group_size // parts)
    tokens = min(c.loss.microbatch_rows or rows, rows) * lengths.new
    stored = {"rounded": jnp.dtype(config.dtype).itemsize, "offload": 0}.get(config.remat, 4)
    inputs = stored * tokens * config.embed_dim * config.num_layers / mesh.shape["tensor"]
    return sum(sizes.values()) - sizes["sampling copy"] + sizes["trained"] + inputs


def resident(c: Any, sizes: dict[str, float], phase: str) -> float:
    """Bytes of `Held.sizes` that a device holds in a phase: what was laid out for sampling is gone when
    reference weights reflect and when weights are updated, unless the current weights reflect in between."""
    kept = phase in ("rollouts", "evaluation") or (c.mode != "rl" and c.reflection.policy == "current")
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


def report(result: Plan) -> str:
    """The plan as text: what is held, a line for each program, and the verdict."""
    chip, axes = result.chip, ", ".join(f"{axis}={size}" for axis, size in result.mesh.items() if size > 1)
    held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in result.held.items() if size)
    lines = [f"{result.topology}, {axes or 'one device'}: {chip.memory / GIB:.2f} GiB of HBM a device."]
    lines += [f"Held throughout, GiB a device: {held}."]
    if result.error:
        return "\n".join([*lines, f"It does not fit: {result.error}"])
    lines += [f"Rollouts: {result.slots}.", ""]
    rows = [["program", "shape", "arguments", "temporaries", "held beside", "total GiB", "fits"]]
    rows[0] += ["Tflop", "HBM GB", "bound", "at least ms", "runs"]
    for cost in result.costs:
        program = cost.program
        row = [program.name, program.shape]
        if cost.error:
            rows.append([*row, *[""] * 4, "no", *[""] * 4, f"{program.runs:.0f}"])
            continue
        sizes = cost.arguments, cost.temporaries, cost.beside + cost.outputs, cost.total
        row += [f"{size / GIB:.2f}" for size in sizes] + ["yes" if cost.fits(chip) else "no"]
        by = "flops" if cost.flops / chip.flops > cost.moved / chip.bandwidth else "bytes"
        row += [f"{cost.flops / 1e12:.2f}", f"{cost.moved / 1e9:.2f}", by]
        rows.append([*row, f"{1e3 * cost.bound(chip):.1f}", f"{program.runs:.0f}"])
    lines += [table(rows), ""]
    lines += [
        f"{cost.program.name}, {cost.program.shape}: {cost.error}" for cost in result.costs if cost.error
    ]
    if result.fits:
        lines.append(
            f"It fits: {result.largest / GIB:.2f} of {chip.memory / GIB:.2f} GiB. The longest iteration "
            f"takes at least {result.iteration:.0f} s, without reflection and evaluation."
        )
    else:
        worst = [cost for cost in result.costs if not cost.fits(chip)]
        lines.append(f"It does not fit: {', '.join(dict.fromkeys(cost.program.name for cost in worst))}.")
    return "\n".join(lines)


def alternatives(c: Any, topology: str) -> Iterator[tuple[str, Any, str]]:
    """Other settings for a run that does not fit, those first that change the least: (words, ConfigDict,
    topology)."""
    kind, _, shape = topology.partition(":")
    chip = find_chip(topology)
    devices = _count(shape)

    def changed(**fields: Any) -> Any:
        other = copy.deepcopy(c)
        with other.unlocked():
            other.update_from_flattened_dict({name.replace("__", "."): x for name, x in fields.items()})
        return other

    def said(fields: dict[str, Any]) -> str:
        return " ".join(f"--config.{name.replace('__', '.')}={x}" for name, x in fields.items())

    changes: list[dict[str, Any]] = [{"loss__microbatch_rows": 1}]
    changes += [{"model__remat": remat, "loss__microbatch_rows": 1} for remat in ("rounded", "offload")]
    for tensor in (2, 4, 8):
        if devices % tensor == 0 and tensor != c.mesh.tensor:
            mesh = {"mesh__data": 1, "mesh__fsdp": -1, "mesh__tensor": tensor}
            changes += [mesh, mesh | {"loss__microbatch_rows": 1}]
    if not c.lora.rank:
        changes.append({"optimizer__kind": "adafactor", "loss__microbatch_rows": 1})
    tried = [c.to_dict()]
    for fields in changes:
        other = changed(**fields)
        if other.to_dict() not in tried:
            tried.append(other.to_dict())
            yield said(fields), other, topology
    for larger in chip.slices:
        if _count(larger) > devices:
            yield f"--topology={kind}:{larger}", c, f"{kind}:{larger}"
            fields = {"mesh__data": 1, "mesh__fsdp": -1, "mesh__tensor": 8, "loss__microbatch_rows": 1}
            yield f"--topology={kind}:{larger} {said(fields)}", changed(**fields), f"{kind}:{larger}"
    if not c.lora.rank:
        yield "--config.lora.rank=32", changed(lora__rank=32), topology


def _count(shape: str) -> int:
    count = 1
    for size in shape.split("x"):
        count *= int(size)
    return count


def advice(c: Any, topology: str, lengths: Lengths, evaluated: int = EVALUATED, most: int = 3) -> list[str]:
    """The first settings that fit, found by compiling the largest programs with each."""
    found = []
    for words, other, where in alternatives(c, topology):
        if least_memory(other, where, lengths) > find_chip(where).memory:
            continue
        result = plan(other, where, lengths, every_bucket=False, evaluated=evaluated, say=lambda _: None)
        print(f"tried {words}: {'fits' if result.fits else 'does not fit'}", flush=True)
        if result.fits:
            found.append(f"{words}: {result.largest / GIB:.2f} GiB, at least {result.iteration:.0f} s")
        if len(found) == most:
            break
    return found


def main(argv: list[str]) -> None:
    """Prints the plan; exits with 1 if the run does not fit."""
    if len(argv) > 1:
        sys.exit(f"not understood: {' '.join(argv[1:])}; fields are set as --config.name=value")
    c, topology = _CONFIG.value, _TOPOLOGY.value
    try:
        check_config(c, files=False)
        find_chip(topology)
    except ValueError as error:
        sys.exit(str(error))
    lengths = Lengths(_SYSTEM.value, _PROBLEM.value, c.sampling.max_new_tokens)
    with command_line.without_traceback():
        result = plan(
            c,
            topology,
            lengths,
            evaluated=_EVALUATED.value,
            codegen=_CODEGEN.value,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        print(report(result))
        if result.fits:
            return
        found = advice(c, topology, lengths, _EVALUATED.value) if _ADVICE.value else []
        if _ADVICE.value:
            print("\nThese would fit:" if found else "\nNothing that was tried would fit.")
        for line in found:
            print(f"  {line}")
    sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=command_line.parse_flags)
