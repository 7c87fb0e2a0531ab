r"""Methods side by side: the same task, the same budget of rollouts, the same seeds.

    python -m experiments.compare_methods --task=showcase --out=runs/showcase
    python -m experiments.compare_methods --task=convention --methods=rl,evolution,espl,rl_from_evolved \
        --seeds=0,1,2 --out=runs/convention
    python -m experiments.compare_methods --config=configs/quickstart.py:qwen2.5-coder-0.5b --out=runs/mine \
        --methods="espl;espl:selection.strategy=ucb,num_prompts=1"

`--task` names tasks of `experiments/methods/tasks.py`, or a preset of them such as `cpu`; with several, each
has the folder `OUT/TASK`. `--methods` are of `experiments/methods/methods.py`: modes of the configuration,
and controls, perhaps with changed fields. Runs `python -m espl_jax.main` for each method and seed, one run
after another, with the work directory `OUT/METHOD-SEED`. A run that has ended leaves the record
`OUT/METHOD-SEED.json`, which is all that the tables need; the same command resumes an interrupted comparison
and adds further seeds or methods to it. `--tables` starts no run. After each run, the tables of all records
in OUT are written: `iterations.csv`, with a row for each method, seed and iteration, and `results.md`:
accuracy of {initial, trained weights} x {root, deployed prompt} on the test problems and on harder ones, KL
divergence of the trained weights, differences between methods, and the deployed prompts; with matplotlib
also `curves.png`. Arguments after `--` go to `espl_jax.main`, with `{method}` and `{seed}` replaced: after
exporting the runs of one task, a second one can go on from their weights with `--
--config.model.source=exported/{method}-{seed}`.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
import time
from pathlib import Path

from espl_jax.console.tables import duration
from experiments.methods.methods import METHODS, variants
from experiments.methods.runs import Run, read
from experiments.methods.summary import results, with_test
from experiments.methods.tasks import PRESETS, TASKS, Task, named

KNOWN = [*TASKS, *PRESETS]


def write(out: Path, runs: list[Run]) -> str:
    """Writes the tables of all records in the folder, those of `runs` first; returns `results.md`."""
    paths = [run.path for run in runs if run.has_ended()]
    records = [read(path) for path in [*paths, *others(out, runs)]]
    if not records:
        return "No run has ended.\n"
    rows = [row for record in records for row in with_test(record)]
    out.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(column for row in rows for column in row)
    with (out / "iterations.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = results(records)
    (out / "results.md").write_text(text, encoding="utf-8")
    if importlib.util.find_spec("matplotlib"):
        from experiments.methods import curves  # late: an optional package

        curves.draw(records, out / "curves.png")
    return text


def others(out: Path, runs: list[Run]) -> list[Path]:
    """Returns the records in the folder that are not of `runs`, by method and seed."""
    found = []
    for path in {*out.glob("*-*.json")} - {run.path for run in runs}:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"method", "seed"} <= record.keys():
            runs[0].check(path)
            found.append((record["method"], record["seed"], path))
    return [path for _, _, path in sorted(found)]


def finish(run: Run) -> None:
    """Finishes a run that has not ended, after the runs that it needs, and says how long it took."""
    if run.has_ended():
        return
    for needed in run.before():
        finish(needed)
    print(f"{run}: {run.log}", flush=True)
    start = time.monotonic()
    run.finish()
    print(f"    {duration(time.monotonic() - start)}", flush=True)


def main() -> None:
    """Runs what has not ended yet, seed by seed, and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="", help=f"such as convention,sometimes; of {', '.join(KNOWN)}")
    parser.add_argument("--config", default="", help="instead of a task, as for espl_jax.main")
    parser.add_argument("--methods", default="rl,evolution,espl", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--out", required=True, help="folder of the comparison")
    parser.add_argument("--tables", action="store_true", help="start no run")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS", help="for espl_jax.main")
    given = parser.parse_args()
    if bool(given.task) == bool(given.config):
        parser.error("give either --task or --config")
    try:
        tasks = named(given.task) if given.task else {"": Task(given.config)}
        methods, seeds = variants(given.methods), [int(seed) for seed in given.seeds.split(",")]
    except ValueError as error:
        parser.error(str(error))
    try:
        for name, task in tasks.items():
            out = Path(given.out).absolute() / (name if len(tasks) > 1 else "")
            runs = [Run(method, seed, task, out, (*given.arguments,)) for seed in seeds for method in methods]
            for run in () if given.tables else runs:
                finish(run)
                write(out, runs)
            print((f"# {name}\n\n" if len(tasks) > 1 else "") + write(out, runs), end="")
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
