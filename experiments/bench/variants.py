"""What benchmarks of several variants share: the command line, the workload, a process for each variant."""

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
    """The command line, checked.

    Args:
      description: for `--help`.
      known: peers to choose among.
      repeats, timeout: the defaults.
      cases: what else to choose among, where a benchmark has several.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=",".join(known), help="what to measure, with commas")
    if cases:
        parser.add_argument("--cases", default=",".join(cases), help="in which cases, with commas")
    parser.add_argument("--repeats", type=int, default=repeats, help="calls after the first one")
    parser.add_argument("--torch", default="torch==2.13.0", help="the build of torch, as pip takes it")
    parser.add_argument("--timeout", type=float, default=timeout, help="seconds that one variant may take")
    parser.add_argument("--out", type=Path, help="a file for the results as JSON")
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
        # torch by itself and first: its options are not meant for what the others need.
        peers.install(peer, {"transformers": shlex.split(torch)}.get(peer, ()))


def call(script: str, peer: str, repeats: int, settings: dict[str, Any], timeout: float) -> dict[str, Any]:
    """What a variant's process reports; see bench/measure.py.

    Raises:
      RuntimeError: if it fails or takes longer than `timeout` seconds.
    """
    python = sys.executable if peer == "ours" else peers.python(peer)
    asked = json.dumps({"repeats": repeats, "settings": settings})
    said = peers.run([python, str(SCRIPTS / script), str(peers.FOLDER), asked], timeout)
    return json.loads(said.splitlines()[-1])


def write_results(out: Path | None, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes what was measured so far, and on which machine, to the file that was asked for, if any was."""
    if out:
        described = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        results = described | {"instructions": instructions(), **more, "rows": rows}
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def instructions() -> list[str]:
    """Which sets of instructions for products this processor has, as Linux tells; empty elsewhere."""
    told = Path("/proc/cpuinfo")
    flags = told.read_text(encoding="utf-8").split() if told.exists() else []
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
