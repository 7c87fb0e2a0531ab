"""Seconds of one policy-gradient step: ours over the prefix tree, beside transformers with torch's autograd.

    python -m experiments.bench_train --out=results.json
    python -m experiments.bench_train --cases=adapters --repeats=5

The workload is that of bench_rollout: 60 rollouts of 64 tokens under 3 system prompts and 4 problems, here of
random tokens with random advantages. A step is the importance-sampling loss over 1/(N M B), its gradient,
clipping by the norm, and Adam; for LoRA adapters of rank 16 on all linear layers but the head, and for all
weights. The peer has every rollout as a row with its whole prompt. The first step, which compiles, is
reported apart. Ours in float32 comes first, and everything after it has to find the same loss and the same
norm of the gradient: within 0.1% where it computes in float32, within 3% where anything is bfloat16.

Each side is brought to its best settings one by one, with one step after the first: the best value of a
setting is kept while the next one is tried. The peer's microbatch is chosen for each of its variants by
timing forward and backward in microbatches of 1 to 60 rows. Then the best of both are measured again, one
after the other, and these are the figures to compare, since a machine's speed drifts. What is best depends on
the processor: with instructions for bfloat16 products it is another variant than without.

Every variant runs in a process of its own, in the environments of bench_rollout. Allow two hours on two idle
cores.
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
"""What is tried from `FIRST` on: the settings of one group exclude each other."""


def changes(case: str, peer: str) -> list[list[Settings]]:
    """`CHANGES` without those that change nothing: weights that are trained are float32 in any case."""
    return [
        [change for change in group if case == "adapters" or "param_dtype" not in change]
        for group in CHANGES[peer]
    ]


def descend(
    first: Settings, changes: Sequence[Sequence[Settings]], run: Callable[[Settings], dict[str, Any]]
) -> dict[str, Any]:
    """The fastest of the rows that are measured when groups of changes are tried one after another.

    Args:
      first: where to begin.
      changes: groups; each is tried on the best settings of the groups before it.
      run: measures settings.
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
    """Of a row's steps after the first one; infinity if it failed."""
    return math.inf if "error" in row else min(row["seconds"])


def tolerance(settings: Settings) -> float:
    """By how much, relatively, loss and gradient norm may differ from those of ours in float32."""
    return 0.03 if {"bfloat16", "autocast"} & set(map(str, settings.values())) else 1e-3


def check(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares loss and gradient norm of a row that was measured with those expected.

    Raises:
      RuntimeError: if it does not compute the same.
    """
    for name in ("loss", "grad_norm"):
        if not math.isclose(row[name], expected[name], rel_tol=tolerance(row["settings"])):
            raise RuntimeError(f"its {name} is {row[name]:.6g} and not {expected[name]:.6g}")


def measure(peer: str, settings: Settings, repeats: int, timeout: float) -> dict[str, Any]:
    """What a variant's process reports, and the settings that it ran with; see bench/measure.py.

    Raises:
      RuntimeError: if it fails, or would take longer than `timeout` seconds.
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
    """The results in Markdown.

    Args:
      rows: each with `case`, `peer`, `settings`, and either what bench/measure.py reports or an `error`,
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
    """Runs everything; exits with 1 if the best of any side failed."""
    args = arguments(__doc__, tuple(FIRST), repeats=3, timeout=1800, cases=CASES)
    write_workload("--training")
    rows: list[dict[str, Any]] = []
    found: dict[str, dict[str, Any]] = {}

    def run(case: str, peer: str, repeats: int, settings: Settings) -> dict[str, Any]:
        """One row, also where it fails; the first one of a case is what the others are compared with."""
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
    print(f"{table(rows)}\n\nThe best settings of each once more, one after the other:\n\n{table(compared)}")
    sys.exit(any("error" in row for row in compared))


if __name__ == "__main__":
    main()
