r"""Finds the smallest TPU slices on which configs/hmmt.py fits, by model and chip: a table of docs/tpus.md.

    python -m experiments.plan_table --out=plans.jsonl
    python -m experiments.plan_table --out=plans.jsonl --models=qwen3-8b --chips=v5e,v6e
    python -m experiments.plan_table --out=plans.jsonl --models=deepseek-v3.1 --chips=v5p --trained=LoRA

For each model, for LoRA and for full fine-tuning, slices are tried from the smallest up, each with `remat`
full, rounded and offload and with more and more devices on the mesh axis `tensor`, until every program
compiles and fits; see espl_jax/plan/__main__.py. In a mixture, the other devices are on the axis `expert`; in
a dense model, on `fsdp`. Settings whose weights and optimizer state alone do not fit
are skipped without compiling. Results are appended to the file as they come, and results already in the file
are not computed again. Takes a minute or two per result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import hmmt
from espl_jax.console.tables import table
from espl_jax.plan import costs
from espl_jax.plan.chips import CHIPS
from espl_jax.pretrained.load import read_config
from espl_jax.run.workloads import Lengths
from experiments.bench.tpu_shapes import MODELS

LENGTHS = Lengths(system=1024, problem=512, new=15_000)
"""Tokens of an evolved system prompt, of a long problem, and new tokens as in configs/hmmt.py."""

TABLE_MODELS = "qwen3-0.6b,qwen3-4b,qwen3-8b,qwen3-32b,llama-3.1-8b"


def candidates(model: Path, trained: str, chip: str) -> Iterator[tuple[Any, str]]:
    """Yields configs with the topology to run on, smallest slices first."""
    has_experts = read_config(model).experts is not None
    for shape in CHIPS[chip].slices:
        devices = math.prod(map(int, shape.split("x")))
        for remat, tensor in itertools.product(("full", "rounded", "offload"), (1, 2, 4, 8)):
            if devices % tensor == 0:
                c = hmmt.get_config()
                c.model.source, c.model.remat = str(model), remat
                c.lora.rank = 32 if trained == "LoRA" else 0
                c.mesh.tensor = tensor
                c.mesh.expert = devices // tensor if has_experts else 1
                yield c, f"{chip}:{shape}"


def smallest(model: Path, trained: str, chip: str) -> dict[str, Any] | None:
    """Returns the first candidate that fits, as a record of the file; None if none does."""
    for c, topology in candidates(model, trained, chip):
        if costs.least_memory(c, topology, LENGTHS) > 0.97 * CHIPS[chip].memory:
            continue
        axes = f"expert={c.mesh.expert}, tensor={c.mesh.tensor}"
        where = f"{model.name}, {trained}, {topology}, {axes}, remat={c.model.remat}"
        # The update first: it nearly always needs the most memory.
        update = costs.plan(c, topology, LENGTHS, phases=["update"], say=quiet)
        error = update.error or update.costs[-1].error
        print(f"{where}: {error or f'{update.largest / 2**30:.2f} GiB'}", flush=True)
        if not update.fits:
            continue
        rollouts = costs.plan(c, topology, LENGTHS, phases=["rollouts"], every_bucket=False, say=quiet)
        if not rollouts.fits:
            errors = [cost.error for cost in rollouts.costs if cost.error]
            print(f"{where}: rollouts need {rollouts.largest / 2**30:.2f} GiB, {errors}", flush=True)
            continue
        return {
            "topology": topology,
            "tensor": c.mesh.tensor,
            "expert": c.mesh.expert,
            "remat": c.model.remat,
            "largest": max(update.largest, rollouts.largest),
            "memory": CHIPS[chip].memory,
            "rollouts": rollouts.iteration,
            "update": update.iteration,
            "compiled": sum(cost.seconds for cost in (*update.costs, *rollouts.costs)),
        }
    return None


def quiet(_: str) -> None:
    """Discards a progress message."""


def lines(results: list[dict[str, Any]]) -> str:
    """Formats all results as a Markdown table."""
    rows = [
        ["model", "trained", *(f"{chip}, GiB of {CHIPS[chip].memory / 2**30:.1f}" for chip in CHIPS_SHOWN)]
    ]
    for model, trained in dict.fromkeys((x["model"], x["trained"]) for x in results):
        cells = []
        for chip in CHIPS_SHOWN:
            found = [x for x in results if (x["model"], x["trained"], x["chip"]) == (model, trained, chip)]
            fit = found[-1]["fit"] if found else None
            if fit is None:
                cells.append("none" if found else "-")
                continue
            shape = fit["topology"].split(":")[1]
            axes = [f"{axis}={fit[axis]}" for axis in ("expert", "tensor") if fit.get(axis, 1) > 1]
            remat = "" if fit["remat"] == "full" else f", {fit['remat']}"
            bounds = f"{fit['rollouts']:.0f} + {fit['update']:.0f} s"
            settings = ", ".join([shape, *axes])
            cells.append(f"{settings}{remat}: {fit['largest'] / 2**30:.1f}, {bounds}")
        rows.append([model, trained, *cells])
    return table(rows)


CHIPS_SHOWN = ("v5e", "v5p", "v6e")


def main() -> None:
    """Computes missing results and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file for results")
    parser.add_argument("--models", default=TABLE_MODELS, help="model names, comma-separated")
    parser.add_argument("--chips", default=",".join(CHIPS_SHOWN), help="chip names, comma-separated")
    parser.add_argument("--trained", default="LoRA,all", help="LoRA, all weights, or both")
    args = parser.parse_args()
    args.out.touch()
    results = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    done = {(x["model"], x["trained"], x["chip"]) for x in results}
    with tempfile.TemporaryDirectory() as folder:
        names, chips = args.models.split(","), args.chips.split(",")
        for chip, name, trained in itertools.product(chips, names, args.trained.split(",")):
            if (name, trained, chip) in done:
                continue
            model = Path(folder) / name
            model.mkdir(exist_ok=True)
            (model / "config.json").write_text(json.dumps(MODELS[name]), encoding="utf-8")
            fit = smallest(model, trained, chip)
            results.append({"model": name, "trained": trained, "chip": chip, "fit": fit})
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    print(lines(results))


if __name__ == "__main__":
    main()
