"""Runs a program in two real processes on this machine, with four CPU devices each."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from tests.support.devices import xla_flags

ROOT = Path(__file__).resolve().parents[2]
# An error ends the process at once: jax would wait for the other one first.
START = """import os, sys, traceback
def ends(*error):
    traceback.print_exception(*error)
    sys.stdout.flush()
    os._exit(1)
sys.excepthook = ends
from espl_jax.parallel import processes
processes.start(sys.argv.pop(), 2, int(sys.argv.pop()))
"""


def run_pair(source_or_module: str, *args: object, timeout: float = 240) -> list[str]:
    """Runs a program in both processes and waits for them.

    Args:
      source_or_module: the text of a program, in which `jax.distributed` has been started before its first
        line, and `tests` can be imported; or the dotted name of a module, which has to start it by itself.
      args: for `sys.argv[1:]`; `{address}` and `{index}` in them become the coordinator's address and the
        number of the process, for modules to start with.
      timeout: seconds after which both are ended.

    Returns:
      Both standard outputs, of process 0 and of process 1.

    Raises:
      AssertionError: one of them failed or took too long; the message contains the output of both.
    """
    address = f"localhost:{_free_port()}"
    with contextlib.ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)] for _ in range(2)]
        children = [_start(source_or_module, args, address, i, *files[i]) for i in range(2)]
        try:
            _wait(children, time.monotonic() + timeout)
        finally:
            for child in children:
                child.kill()
                child.wait()
        said = [[_text(file) for file in both] for both in files]
    if any(child.returncode for child in children):
        raise AssertionError(
            "\n".join(
                f"--- process {i} ended with {child.returncode}\n{out}\n{err}"
                for i, (child, (out, err)) in enumerate(zip(children, said, strict=True))
            )
        )
    return [out for out, _ in said]


def _text(file: IO[bytes]) -> str:
    """Returns the written text without the lines that jax collectives print to standard output."""
    file.seek(0)
    lines = file.read().decode(errors="replace").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo]"))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _start(
    program: str, args: tuple[object, ...], address: str, index: int, out: IO[bytes], err: IO[bytes]
) -> subprocess.Popen[bytes]:
    given = [str(arg).replace("{address}", address).replace("{index}", str(index)) for arg in args]
    command = (
        ["-m", program, *given]
        if re.fullmatch(r"\w+(\.\w+)*", program)
        else ["-c", START + program, *given, str(index), address]
    )
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(4),
    }
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
    )


def _wait(children: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Waits until both have ended, the deadline passes, or 10 seconds after one has failed."""
    while any(child.poll() is None for child in children):
        if any(child.poll() for child in children):
            deadline = min(deadline, time.monotonic() + 10)
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
