"""Compares the time of a policy-gradient step: ours over the prefix tree, and transformers with torch
autograd.

    python -m experiments.bench_train --out=results.json
    python -m experiments.bench_train --cases=adapters --repeats=5

The workload is that of bench_rollout, 60 rollouts of 64 tokens under 3 system prompts and 4 problems, but
with random tokens and random advantages. A step computes the importance-sampling loss times 1/(N M B) and its
gradient, clips by the norm, and applies Adam, either to LoRA adapters of rank 16 on all linear layers except
the head, or to all weights. The peer processes every rollout as a row with its full prompt. The first step,
which compiles, is reported separately. Ours in float32 runs first; all other variants must reproduce its loss
and gradient norm, within 0.1% if they compute in float32 and within 3% if anything is bfloat16.

The best settings of each side are found by coordinate descent, with one timed step per trial: the best value
of a setting is kept while the next setting is tried. The peer's microbatch size is tuned for each of its
variants by timing forward and backward with 1 to 60 rows. The best settings of both sides are then measured
again in direct succession, because a machine's speed drifts; compare those figures. Which settings are best
depends on the CPU, mainly on whether it has bfloat16 matmul instructions.

Every variant runs in a separate process, in the environments of bench_rollout. Takes about two hours on two
idle cores.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments.bench.variants import arguments, call, install, instructions, write_results, write_workload

Settings = dict[str, Any]

CASES = ("adapters", "weights")
PROBED = (1, 2, 4, 6, 12, 30, 60)

FIRST: dict[str, Settings] = {
    "ours": {
        "dtype": "float32",
        "param_dtype": "float32",
        "matmul_precision": "default",
        "scan_layers": True,
        "remat": "full",
        "microbatch_rows": 0,
    },
    "transformers": {"dtype": "float32", "checkpointing": False},
}
BFLOAT16 = {"matmul_precision": "bfloat16"}
CHANGES: dict[str, tuple[tuple[Settings, ...], ...]] = {
    "ours": (
        (BFLOAT16, BFLOAT16 | {"param_dtype": "bfloat16"}),
        ({"scan_layers": False},),
        ({"remat": "products"}, {"remat": "attention"}, {"remat": "none"}),
        ({"microbatch_rows": 20}, {"microbatch_rows": 5}),
    ),
    "transformers": (({"dtype": "bfloat16"}, {"dtype": "autocast"}), ({"checkpointing": True},)),
}
"""Changes to try, starting from `FIRST`; the settings of one group are alternatives."""


def changes(case: str, peer: str) -> list[list[Settings]]:
    """Returns `CHANGES` without those that have no effect: trained weights are always float32."""
    return [
        [change for change in group if case == "adapters" or "param_dtype" not in change]
        for group in CHANGES[peer]
    ]


def descend(
    first: Settings, changes: Sequence[Sequence[Settings]], run: Callable[[Settings], dict[str, Any]]
) -> dict[str, Any]:
    """Tries groups of changes one after another, and returns the fastest measured row.

    Args:
      first: the initial settings.
      changes: groups of changes; each is tried on top of the best settings so far.
      run: measures settings and returns a row.
    """
    chosen, best = first, run(first)
    for group in changes:
        begun = chosen
        for change in group:
            row = run(begun | change)
            if least_seconds(row) < least_seconds(best):
                chosen, best = begun | change, row
    return best


def least_seconds(row: dict[str, Any]) -> float:
    """Returns the fewest seconds of a row's steps after the first one; infinity if the row failed."""
    return math.inf if "error" in row else min(row["seconds"])


def tolerance(settings: Settings) -> float:
    """Returns the relative tolerance of loss and gradient norm, compared with ours in float32."""
    return 0.03 if {"bfloat16", "autocast"} & set(map(str, settings.values())) else 1e-3


def check(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares the loss and gradient norm of a measured row with the expected ones.

    Raises:
      RuntimeError: if they differ by more than the tolerance.
    """
    for name in ("loss", "grad_norm"):
        if not math.isclose(row[name], expected[name], rel_tol=tolerance(row["settings"])):
            raise RuntimeError(f"its {name} is {row[name]:.6g}, expected {expected[name]:.6g}")


def measure(peer: str, settings: Settings, repeats: int, timeout: float) -> dict[str, Any]:
    """Runs a variant in its process; returns its report and its settings; see bench/measure.py.

    Raises:
      RuntimeError: if the process fails, or would take longer than `timeout` seconds.
    """
    if peer == "ours":
        return {"settings": settings} | call("run_ours_train.py", peer, repeats, settings, timeout)
    script = "run_transformers_train.py"
    if "rows" not in settings:
        seconds = call(script, peer, 0, settings | {"probe": PROBED}, timeout)
        rows = min(seconds, key=seconds.get)
        if (expected := (1 + repeats) * max(PROBED) * seconds[rows]) > timeout:
            raise RuntimeError(f"{1 + repeats} steps would take {expected:.0f} s")
        settings = settings | {"rows": int(rows)}
    return {"settings": settings} | call(script, peer, repeats, settings, timeout)


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the results as a Markdown table.

    Args:
      rows: each with `case`, `peer`, `settings`, and either the report of bench/measure.py or an `error`,
        whose last line is shown.
    """
    least: dict[str, float] = {}
    for row in rows:
        if "error" not in row and row["peer"] == "transformers":
            least[row["case"]] = min(least.get(row["case"], math.inf), least_seconds(row))
    lines = [
        "| trained | step | settings | seconds, best | median | times as fast as transformers' best "
        "| first call, s | peak memory, GiB | loss | gradient norm | versions |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        said = ", ".join(f"{name}={value}" for name, value in row["settings"].items() if name != "trained")
        if "error" in row:
            cells = ["failed: " + row["error"].splitlines()[-1].replace("|", "/"), *"-------"]
        else:
            fastest = least_seconds(row)
            cells = [
                f"{fastest:.1f}",
                f"{statistics.median(row['seconds']):.1f}",
                f"{least[row['case']] / fastest:.2f}" if row["case"] in least else "-",
                f"{row['first_call']:.1f}",
                f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['loss']:.4f}",
                f"{row['grad_norm']:.4f}",
                ", ".join(f"{name} {version}" for name, version in row["versions"].items()),
            ]
        lines.append(f"| {' | '.join([row['case'], row['peer'], said, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything; exits with code 1 if the final measurement of a side failed."""
    args = arguments(__doc__, tuple(FIRST), repeats=3, timeout=1800, cases=CASES)
    write_workload("--training")
    rows: list[dict[str, Any]] = []
    found: dict[str, dict[str, Any]] = {}

    def run(case: str, peer: str, repeats: int, settings: Settings) -> dict[str, Any]:
        """Measures one row, or records its failure. The first row of a case is the reference."""
        row = {"case": case, "peer": peer, "settings": settings}
        try:
            row |= measure(peer, settings | {"trained": case}, repeats, args.timeout)
            check(row, found.setdefault(case, row))
            seconds = ", ".join(f"{second:.1f}" for second in row["seconds"])
            said = f"{row['first_call']:.1f} s, then {seconds} s"
        except RuntimeError as error:
            row["error"] = str(error)
            said = f"failed:\n{error}"
        print(f"{case}, {peer}, {row['settings']}: {said}", flush=True)
        rows.append(row)
        write_results(args.out, rows)
        return row

    compared = []
    for case in args.cases:
        best: dict[str, Settings] = {}
        for peer in args.peers:
            install(peer, args.torch)
            trial = functools.partial(run, case, peer, 1)
            best[peer] = descend(FIRST[peer], changes(case, peer), trial)["settings"]
        compared += [run(case, peer, args.repeats, best[peer]) for peer in args.peers]
    print(f"\n{os.cpu_count()} cores with {', '.join(instructions()) or 'unknown instructions'}\n")
    print(f"{table(rows)}\n\nThe best settings of each side, measured again:\n\n{table(compared)}")
    sys.exit(any("error" in row for row in compared))


if __name__ == "__main__":
    main()
