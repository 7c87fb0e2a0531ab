r"""Methods side by side: the same task, the same budget of rollouts, the same seeds.

    python -m experiments.compare_methods --config=configs/showcase.py --out=runs/showcase
    python -m experiments.compare_methods --config=configs/quickstart.py:qwen2.5-coder-0.5b --seeds=0,1,2 \
        --out=runs/compare

Runs `python -m espl_jax.main` for each method and seed, one run after another, with the work directory
`OUT/METHOD-SEED`. A run that has ended leaves the record `OUT/METHOD-SEED.json`, which is all that the tables
need; the same command resumes an interrupted comparison and adds further seeds or methods to it. `--tables`
starts no run. After each run, OUT gets `iterations.csv`, with a row for each method, seed and iteration, and
`results.md`: accuracy of {initial, trained weights} x {root, deployed prompt} on the test problems,
differences between methods, and the deployed prompts. Arguments after `--` go to `espl_jax.main`.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

from espl_jax.choices import MODES
from espl_jax.console.tables import duration
from experiments.methods.runs import Run, read
from experiments.methods.summary import results


def write(out: Path, runs: list[Run]) -> str:
    """Writes the tables of the runs that have ended; returns the text of `results.md`."""
    records = [read(run.path) for run in runs if run.has_ended()]
    if not records:
        return "No run has ended.\n"
    rows = [row for record in records for row in record.iterations]
    with (out / "iterations.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = results(records)
    (out / "results.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Runs what has not ended yet, seed by seed, and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/showcase.py", help="as for espl_jax.main")
    parser.add_argument("--methods", default="rl,evolution,espl", help=f"of {', '.join(MODES)}")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--out", default="runs/showcase", help="folder of the comparison")
    parser.add_argument("--tables", action="store_true", help="start no run")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS", help="for espl_jax.main")
    given = parser.parse_args()
    methods, seeds = given.methods.split(","), [int(seed) for seed in given.seeds.split(",")]
    if unknown := [method for method in methods if method not in MODES]:
        parser.error(f"--methods={given.methods}: {unknown[0]!r} is none; choose from {', '.join(MODES)}")
    out = Path(given.out).absolute()
    runs = [Run(method, seed, given.config, out, (*given.arguments,)) for seed in seeds for method in methods]
    try:
        for run in runs:
            if not (run.has_ended() or given.tables):
                print(f"{run.method}, seed {run.seed}: {run.log}", flush=True)
                start = time.monotonic()
                run.finish()
                run.keep()
                print(f"    {duration(time.monotonic() - start)}", flush=True)
                write(out, runs)
        print(write(out, runs), end="")
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
