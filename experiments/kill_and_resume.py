"""Kills a run with SIGKILL at random times, resumes it, and compares it with an uninterrupted run.

    python experiments/kill_and_resume.py --kills=10 --seed=0 --out=runs/kill_and_resume

The run is a small version of the quickstart: SmolLM2, four iterations. It first runs twice without kills,
with a cold and with a warm compilation cache, and then in new folders with kills, resumed each time by the
same command. If a run ends before its kill, another one starts, until all kills have hit. Everything that the
runs write must be bit-identical: the arrays of the last checkpoint, population, logs and results; only the
key `time` of the metrics may differ. The exit code is 1 if anything differs. Takes about 15 minutes on two
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "num_iterations=4",
    "batch_size=4",
    "num_prompts=2",
    "group_size=3",
    "data.validation=addition:digits=2,count=20",
    "data.test=addition:digits=2,count=20",
    "reflection.max_new_tokens=136",
    "evaluation.every=2",
)
FILES = (
    "population.json",
    "results.json",
    "lineage.txt",
    "rollouts.jsonl",
    "reflections.jsonl",
    "lineage.jsonl",
    "evaluations.jsonl",
)


def start(out: Path, name: str) -> subprocess.Popen:
    """Starts or resumes the run `name`; its output is appended to `<name>.log`."""
    settings = [f"--config.{setting}" for setting in (*SETTINGS, f"compilation_cache={out / 'xla'}")]
    command = [
        sys.executable,
        "-m",
        "espl_jax.main",
        "--config=configs/quickstart.py",
        f"--workdir={out / name}",
    ]
    with open(out / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            [*command, *settings], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen, out: Path, name: str) -> None:
    """Waits for a run to end; raises RuntimeError with the end of its log if it failed."""
    if process.wait():
        tail = "\n".join(said(out, name)[-20:])
        raise RuntimeError(f"{name} ended with exit code {process.returncode}:\n{tail}")


def said(out: Path, name: str) -> list[str]:
    """Returns the non-blank lines of a run's log."""
    log = out / f"{name}.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    return [line for line in text.splitlines() if line.strip()]


def newest(workdir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the folder of the newest checkpoint and its parsed COMMIT file, or None."""
    commits = sorted(workdir.glob("checkpoints/*/COMMIT"))
    return (commits[-1].parent, json.loads(commits[-1].read_bytes())) if commits else None


def kill_again_and_again(
    out: Path, kills: int, seconds: float, seed: int
) -> tuple[list[str], list[list[str]]]:
    """Kills runs at times uniform in [0, seconds] until `kills` have hit, then lets the last run finish.

    Returns:
      (names of the runs, all of which finished; one table row per kill).
    """
    rng = np.random.default_rng(seed)
    names, rows = ["killed-1"], []
    while True:
        name = names[-1]
        said_before = len(said(out, name))
        process = start(out, name)
        if len(rows) == kills:
            finish(process, out, name)
            return names, rows
        instant = rng.uniform(0, seconds)
        try:
            process.wait(timeout=instant)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            saved = newest(out / name)
            iteration = str(saved[1]["iteration"]) if saved else "none"
            last = (said(out, name)[said_before:] or ["(nothing yet)"])[-1].strip()[:60]
            rows.append([str(len(rows) + 1), name, f"{instant:.1f} s", iteration, last])
            print(
                f"kill {len(rows)}: {name} after {instant:.1f} s, checkpoint {iteration}, {last!r}",
                flush=True,
            )
        else:
            finish(process, out, name)
            print(f"{name} ended before {instant:.1f} s; starting another run", flush=True)
            names.append(f"killed-{len(names) + 1}")


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of the last checkpoint by name."""
    # Import jax only after the runs have ended: a TPU serves one process at a time.
    import jax
    from orbax.checkpoint import v1 as ocp

    folder, commit = newest(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = {}
    for name, described in commit["arrays"].items():
        dtype, _, shape = described.partition("[")
        shapes[name] = jax.ShapeDtypeStruct(json.loads(f"[{shape}"), dtype, sharding=device)
    return {name: np.asarray(x) for name, x in ocp.load(folder / "arrays", shapes).items()}


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl without their timings."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_bytes().splitlines())
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def differences(one: Path, other: Path) -> list[str]:
    """Lists what differs between two finished runs."""
    found = [name for name in FILES if _content(one / name) != _content(other / name)]
    if metrics(one) != metrics(other):
        found.append("metrics.jsonl")
    if newest(one)[1]["iteration"] != newest(other)[1]["iteration"]:
        found.append("the last checkpoint's iteration")
    mine, theirs = arrays(one), arrays(other)
    found += [
        f"array {name}"
        for name in sorted(mine.keys() | theirs.keys())
        if name not in mine or name not in theirs or mine[name].tobytes() != theirs[name].tobytes()
    ]
    return found


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def main() -> None:
    """Runs everything; exits with code 1 if any run differs from the first one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--out", type=Path, default=Path("runs/kill_and_resume"), help="folder to create")
    args = parser.parse_args()
    out = args.out.expanduser().absolute()
    if out.exists():
        sys.exit(f"--out={out}: already exists; remove it or name another folder")
    out.mkdir(parents=True)

    for name in ("cold", "warm"):
        began = time.monotonic()
        finish(start(out, name), out, name)
        seconds = time.monotonic() - began
        print(f"uninterrupted, {name} compilation cache: {seconds:.0f} s", flush=True)
    names, rows = kill_again_and_again(out, args.kills, seconds, args.seed)

    print()
    for kill, run, instant, checkpoint, last in [
        ("kill", "run", "after", "checkpoint", "last output"),
        *rows,
    ]:
        print(f"{kill:>4}  {run:10}  {instant:>8}  {checkpoint:>10}  {last}")
    print()
    verdicts = {name: differences(out / "cold", out / name) for name in ("warm", *names)}
    for name, found in verdicts.items():
        print(f"cold and {name}: {'differ in ' + ', '.join(found) if found else 'bit-identical'}")
    sys.exit(1 if any(verdicts.values()) else 0)


if __name__ == "__main__":
    main()
