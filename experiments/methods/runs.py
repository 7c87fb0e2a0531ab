"""One run of a comparison: its command, whether it has ended, and what it left."""

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
        """What the run printed."""
        return self.out / f"{self.method}-{self.seed}.log"

    @property
    def ended(self) -> bool:
        """Whether the run has tested its deployed prompt."""
        return (self.workdir / "results.json").is_file()

    def command(self) -> list[str]:
        """Returns the command that starts or resumes the run."""
        return [
            *(sys.executable, "-m", "espl_jax.main", f"--config={self.config}", f"--workdir={self.workdir}"),
            *(f"--config.mode={self.method}", f"--config.seed={self.seed}", *self.arguments),
        ]

    def finish(self) -> None:
        """Runs it to its end.

        Raises:
          RuntimeError: with the end of the log, if the process failed.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            code = subprocess.run(self.command(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{self.method}, seed {self.seed} ended with exit code {code}:\n{tail}")

    def iterations(self) -> list[dict[str, Any]]:
        """Returns a row of the tidy table for each iteration."""
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
                "seconds": round(sum(each["time"].values()), 1),
            }
            for each in _lines(self.workdir / "metrics.jsonl")
        ]

    def test(self) -> dict[tuple[str, str], np.ndarray]:
        """Returns success rates on the test problems, float [B]: (weights, `root` or `deployed`) -> rates.

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
            key: np.array([np.mean(cell[problem]) for problem in sorted(cell)])
            for key, cell in graded.items()
        }
        root = next((prompt for _, prompt in rates if prompt != deployed), deployed)
        return {
            (weights, name): rates.get((weights, prompt), rates["initial", prompt])
            for weights in ("initial", "trained")
            for name, prompt in (("root", root), ("deployed", deployed))
        }

    def deployed(self) -> str:
        """Returns the deployed prompt as the model reads it."""
        return SystemPrompt(**self._json("results.json")["deployed"]).render()

    def _json(self, name: str) -> Any:
        return json.loads((self.workdir / name).read_text(encoding="utf-8"))


def _lines(path: Path) -> Sequence[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
