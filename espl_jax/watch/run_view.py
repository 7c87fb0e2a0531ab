"""What a work directory says about its run, read again and again without reading logs twice."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espl_jax.choices import TRACKERS
from espl_jax.evolution.lineage import lineage_text
from espl_jax.evolution.population import prompt_from_json
from espl_jax.storage import commits, folders, status
from espl_jax.types import SystemPrompt
from espl_jax.watch.tail import Tail

CURVES = {
    "reward": "reward",
    "success": "success",
    "held_out": "held out",
    "new_tokens": "tokens per rollout",
    "truncated": "truncated",
    "mixed": "mixed groups",
    "entropy": "entropy",
    "kl": "KL",
    "grad_norm": "gradient norm",
    "loss": "loss",
}
"""Metric -> its title; `mixed` is mixed_groups / groups."""

_MOST_POINTS = 10_000
_RECENT = 9
_FEW = 3


@dataclasses.dataclass(frozen=True)
class RunView:
    """A run at a moment.

    Attributes:
      title: the work directory, mode and model.
      state: `running`, `finished`, `stopped`, `lost` (the process has gone) or `unknown` (no status).
      phase: the current phase, and the seconds since it began; None if not running.
      iteration, num_iterations: iterations done, and of the whole run.
      seconds_per_iteration: median of the recent ones; None before the first.
      seconds_left: estimate; None before the first iteration of this run.
      tokens_per_second: new tokens of the last rollouts; None if unknown.
      checkpoint: iteration of the newest checkpoint; None if there is none.
      curves: title -> values.
      best: the prompts with the highest mu - 2 sigma.
      edits: the newest prompts first: (heading, its edits).
      warnings: what the user should look at.
      results: lines about the test; empty before it.
    """

    title: str
    state: str
    phase: tuple[str, float] | None
    iteration: int
    num_iterations: int
    seconds_per_iteration: float | None
    seconds_left: float | None
    tokens_per_second: float | None
    checkpoint: int | None
    curves: Mapping[str, Sequence[float]]
    best: Sequence[SystemPrompt]
    edits: Sequence[tuple[str, Sequence[str]]]
    warnings: Sequence[str]
    results: Sequence[str]


class Watcher:
    """Looks at a run; read-only.

    Args:
      workdir: the work directory, local or in a bucket.
      clock: returns seconds since the epoch; replaced in tests.

    Raises:
      ValueError: if there is no run.
    """

    def __init__(self, workdir: str | os.PathLike[str], clock: Callable[[], float] = time.time):
        self._workdir, self._clock = workdir, clock
        self._folder = folders.open_folder(workdir)
        self._config()
        self._metrics, self._lineage = Tail(workdir, "metrics"), Tail(workdir, "lineage")
        self._curves: dict[str, collections.deque[float]] = {}
        self._recent: collections.deque[dict[str, Any]] = collections.deque(maxlen=_RECENT)
        self._born: collections.deque[SystemPrompt] = collections.deque(maxlen=_FEW)

    def look(self) -> RunView:
        """Returns the run as it is now.

        Raises:
          OSError: if the work directory cannot be read. The next call goes on from there.
        """
        config, now, found = self._config(), self._clock(), status.read(self._workdir)
        self._read_logs()
        last = self._recent[-1] if self._recent else {}
        done = last.get("iteration", 0)
        results = self._json("results.json")
        total = config["num_iterations"]
        checkpoint = max(commits.committed(self._folder), default=None)
        state = self._state(found, results, total, now)
        median = None
        if self._recent:
            median = statistics.median(record["time"]["total"] for record in self._recent)
        left = None
        if median is not None and state == "running":
            elapsed = now - found.begun if found and found.iteration == done else 0.0
            left = max(0.0, median * (total - done) - min(elapsed, median))
        phase = None
        if found and state == "running":
            phase = " > ".join(found.phases) or "between phases", max(0.0, now - found.since)
        return RunView(
            title=f"{self._folder.path}  {config['mode']}, {config['model']['source']}",
            state=state,
            phase=phase,
            iteration=done,
            num_iterations=total,
            seconds_per_iteration=median,
            seconds_left=left,
            tokens_per_second=_tokens_per_second(last, config),
            checkpoint=checkpoint,
            curves={CURVES[name]: list(self._curves[name]) for name in CURVES if name in self._curves},
            best=self._best(),
            edits=[_edit(member) for member in reversed(self._born)],
            warnings=self._warnings(state, found, now),
            results=_results(results) if results.get("iteration") == total == done else [],
        )

    def _config(self) -> dict[str, Any]:
        config = self._json("config.json")
        if not {"mode", "num_iterations", "model"} <= config.keys():
            raise ValueError(
                f"--workdir={self._workdir}: there is no run; give the work directory of a run, which has a "
                "config.json"
            )
        return config

    def _json(self, name: str) -> dict[str, Any]:
        """Returns the content of a file; empty if there is none or it is not an object."""
        try:
            found = json.loads(self._folder.read(name) or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _read_logs(self) -> None:
        records, again = self._metrics.read()
        if again:
            self._curves.clear()
            self._recent.clear()
        for record in records:
            self._recent.append(record)
            mixed = record["mixed_groups"] / record["groups"] if record.get("groups") else None
            for name in CURVES:
                value = mixed if name == "mixed" else record.get(name)
                if isinstance(value, int | float):
                    points = self._curves.setdefault(name, collections.deque(maxlen=_MOST_POINTS))
                    points.append(float(value))
        entries, again = self._lineage.read()
        if again:
            self._born.clear()
        self._born.extend(_member(entry) for entry in entries if entry["event"] == "born")

    def _state(self, found: status.Status | None, results: dict[str, Any], total: int, now: float) -> str:
        if found and found.lost(now):
            return "lost"
        if found and found.state == "running":
            return "running"
        if results.get("iteration") == total:
            return "finished"
        return found.state if found else "unknown"

    def _best(self) -> list[SystemPrompt]:
        members = [prompt_from_json(each) for each in self._json("population.json").get("members", ())]
        return sorted(members, key=lambda member: member.mu - 2 * member.sigma, reverse=True)[:_FEW]

    def _warnings(self, state: str, found: status.Status | None, now: float) -> list[str]:
        said = []
        if state == "lost" and found:
            said.append(
                f"Process {found.pid} on {found.host} is gone, and the run is not complete. The same command "
                "resumes it."
            )
        if state == "stopped":
            said.append("The run was stopped by an error or a signal. The same command resumes it.")
        if state == "unknown":
            said.append("There is no status.json: the run has not started, or is of an earlier version.")
        recent = list(self._recent)[-_FEW:]
        last = recent[-1] if recent else {}
        if count := last.get("not_finite_in_row"):
            said.append(f"Consecutive updates skipped: {count}; loss or gradient not finite.")
        if last.get("skipped_updates"):
            said.append(f"Updates skipped: {last['skipped_updates']}; all rewards of every group were equal.")
        if recent and all(record.get("truncated", 0) >= 0.5 for record in recent):
            said.append(
                f"{last['truncated']:.0%} of rollouts are truncated; if replies need more tokens, raise "
                "sampling.max_new_tokens."
            )
        if len(recent) == _FEW and all("children" in each and not each["children"] for each in recent):
            reasons = {reason for each in recent for reason in each.get("no_child", {}).values()}
            why = f" ({', '.join(sorted(reasons))})" if reasons else ""
            said.append(f"No new prompt in the last {_FEW} iterations{why}.")
        for name in TRACKERS:
            note = self._json(f"trackers/{name}.json")
            if note.get("failures"):
                now_said = f"; now: {note['error']}" if note.get("error") else ", and has recovered"
                said.append(f"Tracker {name} failed {note['failures']} times{now_said}.")
        return said


def _member(entry: Mapping[str, Any]) -> SystemPrompt:
    return prompt_from_json({name: value for name, value in entry.items() if name not in ("event", "at")})


def _edit(member: SystemPrompt) -> tuple[str, list[str]]:
    parents = ", ".join(member.parents)
    lines = lineage_text([member]).splitlines()[1:]
    return f"{member.id}  {member.operator} of {parents}, iteration {member.iteration}", [
        line.strip() for line in lines
    ]


def _tokens_per_second(record: Mapping[str, Any], config: Mapping[str, Any]) -> float | None:
    seconds = record.get("time", {}).get("rollouts")
    if not seconds or "new_tokens" not in record:
        return None
    rollouts = config["num_prompts"] * config["batch_size"] * config["group_size"]
    return record["new_tokens"] * rollouts / seconds


def _results(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for weights, cells in results.get("test", {}).items():
        for prompt, cell in cells.items():
            accuracy, low, high = (100 * cell[name] for name in ("accuracy", "low", "high"))
            lines.append(f"{weights} weights, {prompt} prompt: {accuracy:.1f}% [{low:.1f}, {high:.1f}]")
    best = results["deployed"]
    lines.append(f"deployed: {best['id']} ({results['reason']})")
    return lines
