"""Shared by benchmarks with several variants: command line, workload, and a process for each variant."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench import peers

SCRIPTS = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a table: who is measured, with which settings."""

    peer: str
    name: str
    settings: dict[str, Any]


def arguments(
    description: str, known: Sequence[str], repeats: int, timeout: float, cases: Sequence[str] = ()
) -> argparse.Namespace:
    """Parses and checks the command line.

    Args:
      description: for `--help`.
      known: peers to choose among.
      repeats, timeout: the defaults.
      cases: what else to choose among, where a benchmark has several.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=",".join(known), help="peers to measure, comma-separated")
    if cases:
        parser.add_argument("--cases", default=",".join(cases), help="cases to measure, comma-separated")
    parser.add_argument("--repeats", type=int, default=repeats, help="calls after the first one")
    parser.add_argument("--torch", default="torch==2.13.0", help="build of torch, for pip install")
    parser.add_argument(
        "--timeout", type=float, default=timeout, help="time limit of one variant, in seconds"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    for flag, choices in {"peers": known, "cases": cases}.items():
        if choices:
            chosen = getattr(args, flag).split(",")
            setattr(args, flag, chosen)
            if unknown := set(chosen) - set(choices):
                parser.error(
                    f"--{flag}: {', '.join(sorted(unknown))} unknown; choose among {', '.join(choices)}"
                )
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats}: give at least 1")
    return args


def write_workload(*options: str) -> dict[str, Any]:
    """Makes the folder that every process reads, with options of bench/workload.py; returns the workload."""
    peers.make_folder()
    for name in ("model", "adapter"):
        shutil.rmtree(peers.FOLDER / name, ignore_errors=True)
    peers.run([sys.executable, str(SCRIPTS / "workload.py"), str(peers.FOLDER), *options])
    return json.loads((peers.FOLDER / "workload.json").read_text(encoding="utf-8"))


def install(peer: str, torch: str) -> None:
    """Makes the environment of a peer, if it needs one; `torch` is the build of it that was asked for."""
    if peer in peers.REQUIREMENTS:
        # Install torch first and separately, because its pip options must not apply to other packages.
        peers.install(peer, {"transformers": shlex.split(torch)}.get(peer, ()))


def call(script: str, peer: str, repeats: int, settings: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Runs a variant's process and returns its report; see bench/measure.py.

    Raises:
      RuntimeError: if it fails or takes longer than `timeout` seconds.
    """
    python = sys.executable if peer == "ours" else peers.python(peer)
    asked = json.dumps({"repeats": repeats, "settings": settings})
    said = peers.run([python, str(SCRIPTS / script), str(peers.FOLDER), asked], timeout)
    return json.loads(said.splitlines()[-1])


def write_results(out: Path | None, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes the results so far, and a description of the machine, to `out` if it is given."""
    if out:
        described = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        results = described | {"instructions": instructions(), **more, "rows": rows}
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def instructions() -> list[str]:
    """Returns the matmul-related instruction sets of this CPU, from /proc/cpuinfo; empty except on Linux."""
    told = Path("/proc/cpuinfo")
    flags = told.read_text(encoding="utf-8").split() if told.exists() else []
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
