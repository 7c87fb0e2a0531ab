"""Creates the virtual environments of peers, and runs the processes of benchmarks."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / ".bench"

REQUIREMENTS = {
    "transformers": ["transformers==5.23.0", "peft==0.21.2"],
    "tunix": ["google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8"],
}


def make_folder() -> None:
    """Creates `.bench` in this checkout, with a .gitignore for itself."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n", encoding="utf-8")


def python(peer: str) -> str:
    """Returns the Python executable of a peer's environment."""
    return str(FOLDER / peer / "bin" / "python")


def install(peer: str, first: Sequence[str] = ()) -> None:
    """Creates the environment of a peer, unless it exists with the same requirements.

    Args:
      peer: one of `REQUIREMENTS`.
      first: arguments of `pip install` for what has to be there before.

    Raises:
      RuntimeError: with the end of pip's output, if it fails.
    """
    steps = [list(step) for step in (first, REQUIREMENTS[peer]) if step]
    folder, wanted = FOLDER / peer, "".join(f"{shlex.join(step)}\n" for step in steps)
    marker = folder / "requirements.txt"
    if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return
    print(f"installing {peer}: {', then '.join(wanted.splitlines())}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(folder)])
    for step in steps:
        run([python(peer), "-m", "pip", "install", "--quiet", *step])
    marker.write_text(wanted, encoding="utf-8")


def run(command: list[str], timeout: float | None = None) -> str:
    """Runs a command and returns its standard output.

    Our own scripts import espl_jax from PYTHONPATH or this checkout; the environments of peers see neither.

    Raises:
      RuntimeError: with the last lines of what it said, if it fails or takes longer than `timeout` seconds.
    """
    environment = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", **os.environ}
    path = environment.pop("PYTHONPATH", None)
    if command[0] == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(ROOT)]))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=FOLDER, timeout=timeout
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"not finished after {timeout:.0f} s") from late
    if done.returncode:
        tail = (done.stderr or done.stdout).strip().splitlines()[-5:]
        if done.returncode < 0 or not tail:  # killed, by a lack of memory perhaps, it says nothing itself
            tail.append(f"ended with exit code {done.returncode}")
        raise RuntimeError("\n".join(tail))
    return done.stdout
