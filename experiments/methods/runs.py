"""One run of a comparison: its command, and its record."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from espl_jax.console.command_line import read_config_file
from espl_jax.run.config import Config
from espl_jax.types import SystemPrompt
from experiments.methods.methods import Given, Variant
from experiments.methods.tasks import Task

ROOT = Path(__file__).resolve().parents[2]
Cell = tuple[str, str]
"""Weights and prompt."""

CELLS: tuple[Cell, ...] = tuple(
    (weights, prompt) for weights in ("initial", "trained") for prompt in ("root", "deployed")
)
"""The cells of a test."""

Rates = dict[str, float]
"""Test problem -> success rate."""

TESTS = ("test", "hard")
"""The test problems of the configuration, and harder ones."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A method with a seed, on a task.

    Attributes:
      variant: the method, perhaps with changed fields.
      seed: of the run.
      task: the task.
      out: folder of the comparison.
      arguments: further ones for `espl_jax.main`; `{method}` and `{seed}` in them are replaced.
    """

    variant: Variant
    seed: int
    task: Task
    out: Path
    arguments: tuple[str, ...] = ()

    @property
    def workdir(self) -> Path:
        """The work directory of the run."""
        return self.out / f"{self.variant.file}-{self.seed}"

    @property
    def path(self) -> Path:
        """The file with the record, which is there once the run has ended."""
        return self._beside("json")

    @property
    def log(self) -> Path:
        """The file with what the run printed."""
        return self._beside("log")

    def _beside(self, ending: str) -> Path:
        return self.out / f"{self.workdir.name}.{ending}"

    def __str__(self) -> str:
        return f"{self.variant.spec}, seed {self.seed}"

    def other(self, method: str) -> Run:
        """Returns the run of another method on the same task with the same seed."""
        return dataclasses.replace(self, variant=Variant(method))

    def before(self) -> tuple[Run, ...]:
        """Returns the runs that have to end before this one starts."""
        method = self.variant.method
        return tuple(self.other(name) for name in (method.after, method.weights) if name)

    def has_ended(self) -> bool:
        """Returns whether there is a record.

        Raises:
          ValueError: if the record was made with another configuration or other arguments.
        """
        if not self.path.is_file():
            return False
        self.check(self.path)
        return True

    def check(self, record: Path) -> None:
        """Refuses a record that was made with another configuration or other arguments.

        Raises:
          ValueError: naming the difference.
        """
        kept = json.loads(record.read_text(encoding="utf-8"))
        for name, value in self._settings().items():
            if kept.get(name) != value:
                raise ValueError(
                    f"{record}: made with {name}={kept.get(name)}, not {value}; name another --out"
                )

    def _settings(self) -> dict[str, Any]:
        return {
            "config": self.task.config,
            "fields": dict(self.task.fields),
            "arguments": list(self.arguments),
        } | ({"hard problems": self.task.hard} if self.task.hard else {})

    def root(self) -> SystemPrompt | None:
        """Returns the root prompt; None for that of the task."""
        method = self.variant.method
        if not method.root:
            return None
        config = self._config()
        of_task = SystemPrompt(config.population.text, tuple(config.population.principles))
        deployed = read(self.other(method.after).path).deployed if method.after else None
        return method.root(Given(of_task, self.task.feedback, deployed, self.seed))

    def _config(self) -> Config:
        """The configuration of the task."""
        config = read_config_file(self.task.config)
        config.update_from_flattened_dict(dict(self.task.fields))
        return config

    def command(self) -> list[str]:
        """Returns the command that starts or resumes the run."""
        method, config = self.variant.method, self._config()
        # All checkpoints are kept, for the KL divergence after each iteration.
        fields = {"checkpoint_keep": max(config.checkpoint_keep, config.num_iterations)}
        fields |= self.task.fields
        if method.more_rollouts:
            fields["group_size"] = config.group_size * config.num_prompts
        fields |= {"mode": method.mode, "seed": self.seed} | self.variant.changes
        if root := self.root():
            file = self._beside("root.jsonl")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"text": root.text, "principles": root.principles}) + "\n")
            fields |= {"population.text": "", "population.principles": "()", "population.start_from": file}
        return [
            *(sys.executable, "-m", "espl_jax.main"),
            *(f"--config={self.task.config}", f"--workdir={self.workdir}"),
            *(f"--config.{name}={value}" for name, value in fields.items()),
            *(self._filled(each) for each in self.arguments),
        ]

    def _filled(self, argument: str) -> str:
        return argument.replace("{method}", self.variant.file).replace("{seed}", str(self.seed))

    def finish(self) -> None:
        """Starts or resumes the run, and writes its record: iterations, test, KL, deployed prompt.

        Raises:
          RuntimeError: with the end of the log, if a process failed.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        record = self._crossed() if self.variant.method.weights else self._ran()
        record = {"method": self.variant.spec, "seed": self.seed, **self._settings(), **record}
        self.path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _ran(self) -> dict[str, Any]:
        """Starts or resumes the run; returns its record."""
        self._process(self.command())
        deployed, iterations = self._json("results.json")["deployed"], self._iterations()
        kl = [0.0] * len(iterations)
        if any(row["trained_tokens"] for row in iterations):
            kl = json.loads(self._ended("kl", self.workdir))
        test = self._test()
        record = {
            "iterations": [row | {"kl": after} for row, after in zip(iterations, kl, strict=True)],
            "kl": kl[-1],
            "deployed": {name: deployed[name] for name in ("text", "principles")},
            "test": {", ".join(cell): rates for cell, (_, rates) in test.items()},
        }
        if self.task.hard:
            cells = [*dict.fromkeys(cell for cell, _ in test.values())]
            asked = [{"weights": w, "prompt": prompt, "data": self.task.hard} for w, prompt in cells]
            rates = dict(zip(cells, self._tested(self.workdir, asked), strict=True))
            record["hard"] = {", ".join(cell): rates[source] for cell, (source, _) in test.items()}
        return record

    def _crossed(self) -> dict[str, Any]:
        """The record of weights and a prompt from two runs: the fourth cell is new."""
        prompts, weights = (
            json.loads(self.other(name).path.read_text(encoding="utf-8"))
            for name in (self.variant.method.after, self.variant.method.weights)
        )
        tests = [name for name in TESTS if name in weights]
        cell = {"weights": "trained", "prompt": prompts["deployed"]}
        asked = [cell | {"data": self.task.hard if name == "hard" else ""} for name in tests]
        workdir = self.other(self.variant.method.weights).workdir
        record = {"iterations": [], "kl": weights["kl"], "deployed": prompts["deployed"]}
        for name, rates in zip(tests, self._tested(workdir, asked), strict=True):
            record[name] = {
                "initial, root": weights[name]["initial, root"],
                "initial, deployed": prompts[name]["initial, deployed"],
                "trained, root": weights[name]["trained, root"],
                "trained, deployed": rates,
            }
        return record

    def _tested(self, workdir: Path, cells: list[dict[str, Any]]) -> list[Rates]:
        """Success rates on further cells, as `ended.test_cells` describes them."""
        asked = self._beside("cells.json")
        asked.write_text(json.dumps(cells), encoding="utf-8")
        return json.loads(self._ended("test", workdir, asked))

    def _ended(self, *arguments: str | Path) -> str:
        """The last line that `experiments.methods.ended` prints."""
        return self._process([sys.executable, "-m", "experiments.methods.ended", *map(str, arguments)])

    def _process(self, command: Sequence[str]) -> str:
        """Runs a process whose output is appended to the log; returns its last line."""
        with self.log.open("ab") as log:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        if code:
            raise RuntimeError(f"{self} ended with exit code {code}:\n" + "\n".join(lines[-20:]))
        return lines[-1] if lines else ""

    def _iterations(self) -> list[dict[str, Any]]:
        """Rows of the tidy table, one for each iteration."""
        config = self._json("config.json")
        rollouts = config["num_prompts"] * config["batch_size"] * config["group_size"]
        rows = []
        for each in _lines(self.workdir / "metrics.jsonl"):
            reflector = each["reflector"]
            rows.append(
                {
                    "method": self.variant.spec,
                    "seed": self.seed,
                    "iteration": each["iteration"],
                    "reward": each["reward"],
                    "success": each["success"],
                    "validation": each.get("held_out"),
                    "rollouts": rollouts,
                    "drawn_tokens": round(each["new_tokens"] * rollouts),
                    "trained_tokens": each.get("trained_tokens", 0),
                    "reflector_prompt_tokens": reflector.get("prompt_tokens", 0),
                    "reflector_tokens": reflector.get("completion_tokens", 0),
                    "population": each["population"],
                    "seconds": round(each["time"]["total"], 1),
                }
            )
        return rows

    def _test(self) -> dict[Cell, tuple[Cell, Rates]]:
        """Cell of the test -> (cell with the same weights and prompt that the run has, its success rates).

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
        found = {}
        for weights, name in CELLS:
            had = weights if (weights, prompts[name]) in rates else "initial"
            source = (had, "root" if prompts["root"] == deployed else name)
            found[weights, name] = (source, rates[had, prompts[name]])
        return found

    def _json(self, name: str) -> Any:
        return json.loads((self.workdir / name).read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run left.

    Attributes:
      method: the spec of its variant.
      seed: of the run.
      iterations: rows of the tidy table.
      tests: name of the problems, of `TESTS`, -> cell -> float [B], success rates in the order of their ids.
      kl: of the trained weights to the initial ones, in nats per token; 0 without training.
      deployed: the deployed prompt.
    """

    method: str
    seed: int
    iterations: Sequence[dict[str, Any]]
    tests: dict[str, dict[Cell, np.ndarray]]
    kl: float
    deployed: SystemPrompt


def read(path: Path) -> Record:
    """Reads the record of a run."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    tests = {
        name: {cell: _in_order(kept[name][", ".join(cell)]) for cell in CELLS}
        for name in TESTS
        if name in kept
    }
    prompt = kept["deployed"]
    deployed = SystemPrompt(prompt["text"], tuple(prompt["principles"]))
    return Record(kept["method"], kept["seed"], kept["iterations"], tests, kept["kl"], deployed)


def _in_order(rates: Rates) -> np.ndarray:
    return np.array([rates[problem] for problem in sorted(rates)])


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
