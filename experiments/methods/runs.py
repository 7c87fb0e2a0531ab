"""One run of a comparison: its command, and the record that is kept of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from espl_jax.types import SystemPrompt

ROOT = Path(__file__).resolve().parents[2]
CELLS = tuple((weights, prompt) for weights in ("initial", "trained") for prompt in ("root", "deployed"))
"""The cells of a test: (weights, prompt)."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A method with a seed.

    Attributes:
      method: a `mode` of the configuration.
      seed: of the run.
      config: file with the configuration, as `--config` takes it.
      out: folder of the comparison.
      arguments: further ones for `espl_jax.main`, the same for all runs.
    """

    method: str
    seed: int
    config: str
    out: Path
    arguments: tuple[str, ...] = ()

    @property
    def workdir(self) -> Path:
        """The work directory of the run."""
        return self.out / f"{self.method}-{self.seed}"

    @property
    def log(self) -> Path:
        """The file with what the run printed."""
        return self.workdir.with_suffix(".log")

    @property
    def path(self) -> Path:
        """The file with the record, which is there once the run has ended."""
        return self.workdir.with_suffix(".json")

    def has_ended(self) -> bool:
        """Returns whether there is a record.

        Raises:
          ValueError: if the record was made with another configuration or other arguments.
        """
        if not self.path.is_file():
            return False
        kept = json.loads(self.path.read_text(encoding="utf-8"))
        ours = {"config": self.config, "arguments": [*self.arguments]}
        for name, value in ours.items():
            if kept[name] != value:
                raise ValueError(
                    f"{self.path}: made with {name}={kept[name]}, not {value}; name another --out"
                )
        return True

    def command(self) -> list[str]:
        """Returns the command that starts or resumes the run."""
        return [
            *(sys.executable, "-m", "espl_jax.main", f"--config={self.config}", f"--workdir={self.workdir}"),
            *(f"--config.mode={self.method}", f"--config.seed={self.seed}", *self.arguments),
        ]

    def finish(self) -> None:
        """Starts or resumes the run.

        Raises:
          RuntimeError: with the end of the log, if the process failed.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            code = subprocess.run(self.command(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{self.method}, seed {self.seed} ended with exit code {code}:\n{tail}")

    def keep(self) -> None:
        """Writes the record of the run: its iterations, its test, and the deployed prompt."""
        record = {
            "method": self.method,
            "seed": self.seed,
            "config": self.config,
            "arguments": self.arguments,
            "iterations": self._iterations(),
            "test": {", ".join(cell): rates for cell, rates in self._test().items()},
            "deployed": SystemPrompt(**self._json("results.json")["deployed"]).render(),
        }
        self.path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _iterations(self) -> list[dict[str, Any]]:
        """Rows of the tidy table, one for each iteration."""
        config = self._json("config.json")
        rollouts = config["num_prompts"] * config["batch_size"] * config["group_size"]
        return [
            {
                "method": self.method,
                "seed": self.seed,
                "iteration": each["iteration"],
                "reward": each["reward"],
                "success": each["success"],
                "validation": each.get("held_out"),
                "rollouts": rollouts,
                "drawn_tokens": round(each["new_tokens"] * rollouts),
                "population": each["population"],
                "seconds": round(each["time"]["total"], 1),
            }
            for each in _lines(self.workdir / "metrics.jsonl")
        ]

    def _test(self) -> dict[tuple[str, str], dict[str, float]]:
        """Success rates on each test problem, by cell.

        Without training or without another prompt than the root, the trained weights are the initial ones,
        and the deployed prompt is the root.
        """
        deployed = self._json("results.json")["deployed"]["id"]
        graded: dict[tuple[str, str], dict[str, list[bool]]] = {}
        for each in _lines(self.workdir / "evaluations.jsonl"):
            if each["split"] == "test":
                cell = graded.setdefault((each["weights"], each["prompt"]), {})
                cell.setdefault(each["problem"], []).append(each["success"])
        rates = {
            key: {problem: float(np.mean(successes)) for problem, successes in sorted(cell.items())}
            for key, cell in graded.items()
        }
        prompts = {"deployed": deployed}
        prompts["root"] = next((prompt for _, prompt in rates if prompt != deployed), deployed)
        return {
            (weights, name): rates.get((weights, prompts[name]), rates["initial", prompts[name]])
            for weights, name in CELLS
        }

    def _json(self, name: str) -> Any:
        return json.loads((self.workdir / name).read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run left.

    Attributes:
      method, seed: of the run.
      iterations: rows of the tidy table.
      test: cell -> float [B], success rates on the test problems, in the order of their ids.
      deployed: the deployed prompt as the model reads it.
    """

    method: str
    seed: int
    iterations: Sequence[dict[str, Any]]
    test: dict[tuple[str, str], np.ndarray]
    deployed: str


def read(path: Path) -> Record:
    """Reads a record that `Run.keep` wrote."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    test = {cell: np.array(list(kept["test"][", ".join(cell)].values())) for cell in CELLS}
    return Record(kept["method"], kept["seed"], kept["iterations"], test, kept["deployed"])


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
