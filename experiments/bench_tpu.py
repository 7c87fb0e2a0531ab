"""Estimates the cost of a run's programs on TPU without one: compiles them for a topology and reads the HLO.

    python -m experiments.bench_tpu --topology=v5e:2x4
    python -m experiments.bench_tpu --mesh=data=2,tensor=4 --programs=decode --notunix
    python -m experiments.bench_tpu --mesh=fsdp=8 --model=qwen3-1.7b --programs=full,tree --notunix

Truncation, temperature and adapters are those of configs/hmmt.py; flags set the rest. By default all devices
are on the mesh axis `tensor`.

For each program, the table shows per device: HBM traffic (counted from the optimized HLO, see
espl_jax/plan/hlo) and flops, per decode step for decode chunks; the least possible traffic, which reads
weights and filled caches once; memory; and the seconds to compile. No weights are allocated.

`drafts` are decode chunks with drafts of 0, 2, 4 and 8 tokens.
`full` is an update of all weights on 16 sequences of 2,048 tokens without shared prefixes, with `--remat`.
Its flops are compared with the usual estimate, 6 x params x tokens plus attention.
`tree` is an update of adapters on 150 rollouts of 500 tokens, of 10 problems of 150 tokens under 3 system
prompts of 1,000 tokens, once as a prefix tree and once as separate sequences.

The decode step of google-tunix's sampler, with its own Qwen3, is analyzed in the same way. Its packages are
installed into a separate environment, `.bench/tunix`; skip it with `--notunix`. Its caches are always sharded
over the tensor axis, whatever `--mesh` is.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from configs import hmmt
from espl_jax.choices import CACHE_DTYPES, PARAM_DTYPES, REMATS
from espl_jax.console.tables import table
from espl_jax.parallel import sharding
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.plan import tpu_compiler
from espl_jax.plan.hlo.traffic import breakdown, traffic
from espl_jax.pretrained.hf_config import from_hf_config
from espl_jax.sampling import decode
from espl_jax.sampling.drafts import Texts
from espl_jax.sampling.sizes import steps_for
from espl_jax.sampling.truncation import HALVINGS, UNTRUNCATED, Truncation
from espl_jax.training.optimizer import make_optimizer
from espl_jax.training.step import policy_gradient_step
from espl_jax.types import TrainBatch
from experiments.bench import peers
from experiments.bench.tpu_shapes import MODELS, Shapes

PROGRAMS = ["decode", "prefill", "train", "drafts", "full", "tree"]
TEXTS = 8, 16_384
"""Problems, and tokens of the texts on each, in which `drafts` are looked up."""

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", "v5e:2x4", "TPU to compile for, e.g. v5e:2x4, v4:2x2x2, v6e:4x4.")
flags.DEFINE_list("mesh", ["tensor=-1"], "Devices by axis, e.g. fsdp=2,tensor=4; one may be -1.")
flags.DEFINE_enum("model", "qwen3-8b", sorted(MODELS), "Model whose shapes to use.")
flags.DEFINE_enum("param_dtype", "bfloat16", PARAM_DTYPES, "Storage dtype of frozen weights.")
flags.DEFINE_enum("remat", "full", REMATS, "Activation checkpointing of updates.")
flags.DEFINE_enum("cache_dtype", "same", CACHE_DTYPES, "Dtype of the cached keys and values of rows.")
flags.DEFINE_list("programs", PROGRAMS[:3], f"Our programs to compile, some of {', '.join(PROGRAMS)}.")
flags.DEFINE_bool("tunix", True, "Compile google-tunix's decode step too.")
flags.DEFINE_integer("rows", 64, "Rows of a decode chunk.")
flags.DEFINE_integer("filled", 2048, "Tokens of each row, in the cache or trained on.")
flags.DEFINE_integer("capacity", 4096, "Columns of a slot; unfilled ones should cost nothing.")
flags.DEFINE_integer("steps", 32, "Steps of a decode chunk.")
flags.DEFINE_integer("train_rows", 8, "Rollouts of a policy-gradient step, a power of two and at least 4.")
flags.DEFINE_integer("breakdown", 0, "Number of most expensive operations to list for each program.")

MICROBATCH = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One program, a line of the table.

    Attributes:
      name: label in the table.
      lower: lowers the program for the mesh.
      floor: least bytes that a device has to move per step.
      steps: number of steps, by which all figures are divided.
      unknown_trips: trip counts of loops that may end early, by op_name suffix.
      flops: estimated flops of a device without recomputation; 0 if not compared.
    """

    name: str
    lower: Callable[[], Any]
    floor: float
    steps: int = 1
    unknown_trips: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: float = 0.0


def decode_case(
    shapes: Shapes,
    name: str,
    lanes: int,
    shared: int,
    aligned: bool = True,
    truncation: Truncation = UNTRUNCATED,
    drafted: int = 0,
) -> Case:
    """Returns a decode chunk whose rows share `shared` filled positions, `aligned` by lane or not."""
    rows, own, steps = FLAGS.rows, FLAGS.filled - shared, steps_for(FLAGS.steps, drafted)
    filled = [shapes.keys_and_values(rows, own, False)]
    if shared:
        filled.append(shapes.keys_and_values(lanes, shared, True))

    texts = None
    if drafted:
        given = (
            shapes.array(shape, jnp.int32, ("rows",)) for shape in ((rows,), (rows, FLAGS.filled), (rows,))
        )
        texts = Texts(shapes.array(TEXTS, jnp.int32), *given)

    def lower() -> Any:
        return decode.decode_chunk.lower(
            shapes.params(),
            shapes.sampling(),
            shapes.shared_level(lanes, shared or 64),  # a nearly empty level
            shapes.keys_and_values(rows, max(FLAGS.capacity, own + steps * (drafted + 1)), False),
            shapes.rows(rows),
            shapes.array((2,), jnp.int32),
            shapes.array((), jnp.float32),
            None,
            texts,
            columns=own,
            steps=steps,
            drafted=drafted,
            aligned=aligned,
            truncation=truncation,
            mesh=shapes.mesh,
        )

    floor = shapes.weight_bytes(with_head=True) + bytes_per_device(filled)
    # The other loops are the searches for cut-offs, which end early.
    loop = {"jit(decode_chunk)/while": steps, "/while": HALVINGS}
    return Case(f"decode step, {rows} x {FLAGS.filled}, {name}", lower, floor, steps, loop)


def prefill_case(shapes: Shapes, nodes: int, tokens: int) -> Case:
    """Returns the prefill of a shared level, which reads the weights and writes the cache."""

    def lower() -> Any:
        arguments = shapes.array((nodes, tokens), jnp.int32), shapes.array((nodes,), jnp.int32)
        return decode.prefill.lower(shapes.params(), shapes.sampling(), *arguments, mesh=shapes.mesh)

    cache = shapes.keys_and_values(nodes, tokens, True)
    floor = shapes.weight_bytes(with_head=False) + bytes_per_device(cache)
    return Case(f"prefill, {nodes} x {tokens}", lower, floor)


def train_case(shapes: Shapes, rows: int) -> Case:
    """Returns an update of adapters. Floor: weights forward and backward; train state read and written."""
    optimizer = make_optimizer(1e-5)
    state = shapes.train_state(hmmt.get_config(), optimizer)

    def lower() -> Any:
        batch = shapes.train_batch(rows, FLAGS.filled, MICROBATCH)
        arguments = (state, shapes.params(), None, batch, shapes.config, optimizer)
        return policy_gradient_step.lower(*arguments, microbatch_rows=MICROBATCH)

    floor = 2 * (shapes.weight_bytes(with_head=True) + bytes_per_device(state))
    return Case(f"policy gradient, {rows} x {FLAGS.filled}, LoRA and cut-offs", lower, floor)


def full_case(shapes: Shapes, rows: int = 16, tokens: int = 2048) -> Case:
    """Returns an update of all weights on sequences without shared prefixes, a tree of one level."""
    c = hmmt.get_config()
    c.lora.rank = 0
    optimizer = make_optimizer(1e-5)
    state = shapes.train_state(c, optimizer)
    batch = shapes.flat_batch(rows, tokens)

    def lower() -> Any:
        return policy_gradient_step.lower(state, None, None, batch, shapes.config, optimizer)

    # Every weight except the embedding table is used for every token, once forward and twice backward.
    weights = sum(x.size for x in jax.tree.leaves(shapes.params()))
    if not shapes.config.tied_head:
        weights -= shapes.config.vocab_size * shapes.config.embed_dim
    pairs = rows * tokens * (tokens + 1) / 2
    attention = 12 * shapes.config.num_layers * shapes.config.num_heads * shapes.config.head_dim * pairs
    flops = (6 * weights * rows * tokens + attention) / shapes.mesh.size
    floor = 2 * bytes_per_device(state)
    return Case(f"all weights, {rows} x {tokens}", lower, floor, flops=flops)


def tree_case(shapes: Shapes, name: str, batch: TrainBatch) -> Case:
    """Returns an update of adapters on a batch, with microbatches of one rollout per shard."""
    optimizer = make_optimizer(1e-5)
    state = shapes.train_state(hmmt.get_config(), optimizer)

    def lower() -> Any:
        arguments = (state, shapes.params(), None, batch, shapes.config, optimizer)
        return policy_gradient_step.lower(*arguments, microbatch_rows=1)

    floor = 2 * (shapes.weight_bytes(with_head=True) + bytes_per_device(state))
    return Case(name, lower, floor)


def cases(shapes: Shapes) -> Iterator[Case]:
    """Yields our programs."""
    if "decode" in FLAGS.programs:
        half, sampling = FLAGS.filled // 2, hmmt.get_config().sampling
        cut = Truncation(sampling.top_k, sampling.top_p, sampling.min_p)
        yield decode_case(shapes, "nothing shared", 1, 0)
        yield decode_case(shapes, f"nothing shared, top-p {sampling.top_p}", 1, 0, truncation=cut)
        for lanes in (8, 4):
            yield decode_case(shapes, f"{half} shared by {lanes} lanes", lanes, half)
            name = f"{half} shared by {lanes} lanes, in any order"
            yield decode_case(shapes, name, lanes, half, aligned=False)
            yield decode_case(shapes, f"{name}, top-p {sampling.top_p}", lanes, half, False, cut)
        yield decode_case(shapes, f"{half} shared by 1 lane", 1, half)
    if "drafts" in FLAGS.programs:
        for drafted in (0, 2, 4, 8):
            yield decode_case(shapes, f"{drafted} drafted", 1, 0, drafted=drafted)
    if "prefill" in FLAGS.programs:
        yield prefill_case(shapes, 4, 1536)
        yield prefill_case(shapes, 1, 8192)
    if "train" in FLAGS.programs:
        yield train_case(shapes, FLAGS.train_rows)
    if "full" in FLAGS.programs:
        yield full_case(shapes)
    if "tree" in FLAGS.programs:
        yield tree_case(shapes, "150 rollouts as a tree", shapes.tree_batch(3, 10, 5, 1000, 150, 500))
        yield tree_case(shapes, "150 rollouts flattened", shapes.flat_batch(150, 1000 + 150 + 500))


HEADER = ["program", "HBM GB", "least", "ratio", "Gflop", "arguments GiB", "temporaries GiB", "compiled in"]


def line(case: Case, text: str, arguments: int, temporaries: int, seconds: float) -> list[str]:
    """Returns the table row of a program: figures per device and step."""
    counted = traffic(text, case.unknown_trips)
    if FLAGS.breakdown:
        print(f"\n{case.name}, steps: {case.steps}\n{breakdown(counted, FLAGS.breakdown)}", flush=True)
    moved = counted.total / case.steps
    if case.flops:
        usual = f"the {case.flops / 1e9:.0f} Gflop of 6 x params x tokens plus attention"
        print(f"{case.name}: {counted.flops / case.flops:.2f} times {usual}", flush=True)
    return [
        case.name,
        f"{moved / 1e9:.3f}",
        f"{case.floor / 1e9:.3f}",
        f"{moved / case.floor:.2f}",
        f"{counted.flops / case.steps / 1e9:.1f}",
        f"{arguments / 2**30:.2f}",
        f"{temporaries / 2**30:.2f}",
        f"{seconds:.0f} s",
    ]


def failed(name: str, error: str) -> list[str]:
    """Returns the table row of a program that could not be compiled."""
    return [name, f"not compiled: {error.strip().splitlines()[-1][:150]}"] + [""] * (len(HEADER) - 2)


def ours(case: Case) -> list[str]:
    """Compiles one of our programs and returns its table row."""
    since = time.time()
    try:
        compiled = case.lower().compile()
    except jax.errors.JaxRuntimeError as error:  # such as out of memory
        return failed(case.name, str(error).split("\n\n")[0])
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return line(case, compiled.as_text(), *sizes, time.time() - since)


def tunix() -> subprocess.CompletedProcess[str]:
    """Compiles google-tunix's decode loop in its own virtual environment, which writes `tunix_hlo()`."""
    peers.make_folder()
    peers.install("tunix")
    python = peers.python("tunix")
    # The same compiler for both.
    peers.run([python, "-m", "pip", "install", "--quiet", f"libtpu=={version('libtpu')}"])
    request = {"config": MODELS[FLAGS.model], "rows": FLAGS.rows, "filled": FLAGS.filled}
    request |= {"topology": FLAGS.topology, "hlo": str(tunix_hlo())}
    command = [python, Path(__file__).parent / "bench" / "lower_tunix.py"]
    return subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)


def tunix_hlo() -> Path:
    """Returns the path of tunix's HLO."""
    return peers.FOLDER / "tunix_decode.hlo"


def tunix_line(shapes: Shapes, done: subprocess.CompletedProcess[str]) -> list[str]:
    """Returns the table row of tunix's decode step, with the floor of the same step of ours."""
    steps = FLAGS.steps
    case = decode_case(shapes, "google-tunix's", 1, 0)
    case = dataclasses.replace(case, unknown_trips={"jit(_decode_fn)/while": steps})
    if done.returncode:
        return failed(case.name, done.stderr)
    return line(case, tunix_hlo().read_text(encoding="utf-8"), **json.loads(done.stdout.splitlines()[-1]))


def main(_: list[str]) -> None:
    """Prints the table."""
    if unknown := set(FLAGS.programs) - set(PROGRAMS):
        raise app.UsageError(
            f"--programs={','.join(FLAGS.programs)}: {sorted(unknown)} are unknown; choose from {PROGRAMS}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise app.UsageError("libtpu, the TPU compiler, is missing; pip install libtpu")
    numerics = {"dtype": "bfloat16", "param_dtype": FLAGS.param_dtype, "remat": FLAGS.remat}
    numerics["cache_dtype"] = FLAGS.cache_dtype
    config = from_hf_config(MODELS[FLAGS.model], **numerics)
    peer = tunix() if FLAGS.tunix else None
    devices = tpu_compiler.devices(FLAGS.topology)
    sizes = dict(pair.split("=") for pair in FLAGS.mesh)
    mesh = sharding.make_mesh({axis: int(size) for axis, size in sizes.items()}, devices)
    shapes = Shapes(config, mesh)
    rows = [HEADER]
    for case in cases(shapes):
        rows.append(ours(case))
        print(f"{case.name}: {rows[-1][1]}", flush=True)
    if peer is not None:
        rows.append(tunix_line(shapes, peer))
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    print(f"\n{FLAGS.model} on {FLAGS.topology}, {axes}; remat={FLAGS.remat}; per device and step")
    print(table(rows))


if __name__ == "__main__":
    app.run(main)
