"""Compiles programs for TPUs on a machine without TPUs, up to buffer assignment.

The compiler determines the memory and the operations of a program within seconds; code generation takes most
of the compile time. So each program is compiled in a separate process, several in parallel, with dumps
enabled, and the process is killed once the compiler has dumped its buffer assignment.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

MOST_AT_ONCE = 8
"""Maximum parallel processes, limited by the number of cores; each needs 1 to 3 GiB."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      arguments, temporaries, outputs: bytes of HBM per device; outputs without those that alias arguments.
      text: the optimized, scheduled HLO, as for `hlo.traffic.traffic`.
      error: why it could not be compiled, or empty.
      seconds: duration of tracing and compiling.
    """

    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    text: str = ""
    error: str = ""
    seconds: float = 0.0


def compile_only() -> None:
    """Configures libtpu to compile without a TPU in this process and its children, alongside other processes.

    `devices` and `compile_each` call it before they load libtpu.
    """
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    jax.config.update("jax_platforms", "cpu")


def devices(topology: str) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    """Returns the devices of a slice, as a compilation target.

    Raises:
      ValueError: if libtpu does not know the topology.
    """
    compile_only()
    # As in runs: the two cores of a v4 chip are one device.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology={topology!r}: {str(error).splitlines()[0]}") from None


def compile_each(
    lower: Callable[[int], jax.stages.Lowered],
    count: int,
    codegen: bool = False,
    preload: Sequence[str] = ("jax",),
) -> Iterator[Compiled]:
    """Compiles programs for TPUs, and yields them in order. It starts processes, so call it below
    `if __name__ == "__main__":`.

    Args:
      lower: lowers the program with a given number; must be picklable, since other processes call it.
      count: number of programs.
      codegen: whether to generate code too. This takes many times longer, but finds kernels that exceed VMEM.
      preload: modules that `lower` needs, imported once for all processes.

    Raises:
      RuntimeError: if a process dies.
    """
    compile_only()
    # Forks of a process that has imported jax without initializing a backend.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(list(preload))

    def one(number: int) -> Compiled:
        since = time.time()
        with tempfile.TemporaryDirectory() as folder:
            receiver, sender = processes.Pipe(duplex=False)
            given = lower, number, sender, folder, codegen
            process = processes.Process(target=_compile, args=given, daemon=True)
            process.start()
            sender.close()
            try:
                found = _wait(receiver, Path(folder))
            except EOFError:
                process.join()
                said = (Path(folder) / _STDERR).read_text(errors="replace")
                raise RuntimeError(
                    f"the process that compiled program {number} ended with exit code {process.exitcode}: "
                    f"{said[-2000:].strip()}"
                ) from None
            finally:
                process.kill()
                process.join()
        return dataclasses.replace(found, seconds=time.time() - since)

    with ThreadPoolExecutor(min(MOST_AT_ONCE, os.cpu_count() or 1)) as threads:
        yield from threads.map(one, range(count))


_STDERR = "stderr.txt"


def _compile(
    lower: Callable[[int], jax.stages.Lowered], number: int, sender: Connection, folder: str, codegen: bool
) -> None:
    """Compiles one program and sends the result, or dumps into the folder until it is killed."""
    # Each process prints that libtpu finds no TPU.
    with open(Path(folder) / _STDERR, "wb") as stderr:
        os.dup2(stderr.fileno(), 2)
    jax.config.update("jax_enable_compilation_cache", False)  # it is for local devices
    try:
        compiled = lower(number).compile(compiler_options=None if codegen else {"xla_dump_to": folder})
    except jax.errors.JaxRuntimeError as error:  # e.g. out of memory
        said = next((line for line in str(error).splitlines() if "hbm" in line.lower()), str(error))
        sender.send(Compiled(error=said.strip()[:200]))
        return
    memory: Any = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, outputs
    text = compiled.as_text()
    assert text is not None
    sender.send(Compiled(*sizes, text=text))


def _wait(receiver: Connection, folder: Path) -> Compiled:
    """Returns what the process sends or the compiler dumps, whichever comes first.

    Raises:
      EOFError: if the process dies without either.
    """
    # The last dump before code generation.
    last = ".after_optimizations_after_buffer_assignment.txt"
    while not receiver.poll(0.05):
        for path in folder.glob(f"*{last}"):
            stem = path.name.removesuffix(last)
            written = folder / f"{stem}.after_optimizations-buffer-assignment.txt"
            text = folder / f"{stem}.after_optimizations.txt"
            return Compiled(*assigned_bytes(written.read_text()), text=text.read_text())
    return receiver.recv()


_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*):$", re.MULTILINE)


def assigned_bytes(text: str) -> tuple[int, int, int]:
    """Returns bytes of arguments, temporaries and outputs in HBM, from a dump of the buffer assignment.

    Allocations in other memories have a color. Outputs that alias arguments count as arguments.
    """
    sizes = {"parameter": 0, "preallocated-temp": 0, "maybe-live-out": 0}
    for size, what in _ALLOCATION.findall(text):
        kind = next((kind for kind in sizes if kind in what), None)
        if kind and "color" not in what:
            sizes[kind] += int(size)
    arguments, temporaries, outputs = sizes.values()
    return arguments, temporaries, outputs
