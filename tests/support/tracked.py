"""A run without a model: work directory, checkpoints and trackers are real, and the logs are made up.

    python -m tests.support.tracked WORKDIR TRACKER ITERATIONS [MOMENT POINT]

The process kills itself at a moment: `before`, `after` or `noted`, of the tracker's point of that number.
"""

import dataclasses
import json
import os
import random
import signal
import sys
import time

import numpy as np

from espl_jax.storage.workdir import WorkDir
from espl_jax.trackers.start import tracker_of, tracking
from espl_jax.types import SystemPrompt

EVIL = "[bold red]never mind[/] <script>alert(1)</script> \x1b[31m ``` \ud800 end"
"""A prompt as a model may write it: markup, HTML, control characters, a lone surrogate."""


def config(trackers=(), iterations=6):
    return {
        "num_iterations": iterations,
        "trackers": tuple(trackers),
        "tracking": {"project": "espl_test", "name": ""},
        "model": {"source": "https://me:hunter22@host/model"},
        "sampling": {"top_k": 0, "stop_strings": ()},
    }


def member(i):
    parents, operator = ((), "root") if i == 0 else (("p0",), "mutation")
    text = EVIL if i == 2 else f"Way {i}."
    edits = ({"op": "add", "principle": text},) if i else ()
    return SystemPrompt(
        id=f"p{i}",
        text=text,
        parents=parents,
        operator=operator,
        iteration=i,
        edits=edits,
        mu=25.0 + i,
        sigma=8.0,
    )


def metrics(i):
    """A record; its times are those of the process and differ if the iteration is repeated."""
    return {
        "iteration": i,
        "reward": i / 8,
        "success": 1 / i,
        "truncated": 0.25,
        "new_tokens": 10.5,
        "loss": -0.5 * i,
        "drops": {"words": i},
        "children": [f"p{i}"],
        "no_child": {"crossover": "no_edits"},
        "held_out": None,
        "skipped": True,
        "best_prompt": {"id": f"p{i}", "mu": 25.0 + i, "sigma": 8.0},
        "tournament": {"prompts": ["p0"], "values": [0.5]},
        "time": {"rollouts": random.random(), "total": random.random() + 1},
    }


def results(i):
    cell = {"accuracy": 0.5, "low": 0.25, "high": 0.75}
    return {
        "iteration": i,
        "deployed": dataclasses.asdict(member(i)),
        "reason": "largest mu - 2 sigma",
        "test": {"initial": {"root": cell}, "trained": {"root": cell, "deployed": cell}},
    }


def simulate(path, settings, *, every=1, stop_after=None, make=tracker_of, say=print, drain=60.0):
    """Runs or resumes the iterations that the settings name.

    Args:
      every: iterations between checkpoints.
      stop_after: raises KeyboardInterrupt after this iteration.
      make, drain: as in `tracking`.
    """
    with WorkDir(path, settings, may_change=("num_iterations", "trackers", "tracking")) as folder:
        saved = folder.restore({})
        if saved is None:
            folder.append("lineage", {"event": "root", "at": 0, **_plain(member(0))})
        done = saved[0] if saved else 0
        with tracking(settings, str(path), say, make=make, drain=drain) as update:
            for i in range(done + 1, settings["num_iterations"] + 1):
                for n in range(4):
                    tokens = list(range(i + n))
                    folder.append(
                        "rollouts", {"iteration": i, "reward": n / 4, "tokens": tokens, "reply": EVIL}
                    )
                folder.append("lineage", {"event": "born", "at": i, **_plain(member(i))})
                folder.append("metrics", metrics(i))
                if i % every == 0 or i == settings["num_iterations"]:
                    folder.save(i, {}, {})
                    update()
                if i == stop_after:
                    raise KeyboardInterrupt
            folder.write_json("results.json", _json(results(settings["num_iterations"])))
            update()


def _plain(prompt):
    return dataclasses.asdict(prompt)


def _json(value):
    return json.loads(json.dumps(value))


def logged(path):
    """The scalars of each iteration, by the logs: {step: {name: value}}, flattened without the package."""
    groups = {name: "rollouts" for name in ("reward", "success", "truncated", "new_tokens")}
    found = {}
    for line in (path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        flat = {}
        for name, value in record.items():
            if isinstance(value, dict):
                flat |= {f"{name}/{k}": float(v) for k, v in value.items() if isinstance(v, int | float)}
            elif isinstance(value, int | float) and name != "iteration":
                flat[f"{groups.get(name, 'update')}/{name}"] = float(value)
        found[record["iteration"]] = flat
    return found


def lengths_and_rewards(i):
    """The values of an iteration's histograms."""
    return np.array([float(i + n) for n in range(4)]), np.array([n / 4 for n in range(4)])


class Killed:
    """A tracker whose process is killed at a moment of its n-th point."""

    def __init__(self, tracker, moment, number):
        self._tracker, self._moment, self._number = tracker, moment, number
        self.fix = tracker.fix

    def open(self):
        return self._tracker.open()

    def log(self, point):
        self._number -= 1
        if self._number == 0 and self._moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._number == -1 and self._moment == "noted":
            os.kill(os.getpid(), signal.SIGKILL)
        self._tracker.log(point)
        if self._number == 0 and self._moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self, finished):
        self._tracker.close(finished)


def main(path, tracker, iterations, moment="", number="0"):
    def make(name):
        return lambda run: Killed(tracker_of(name)(run), moment, int(number))

    begin = time.monotonic()
    simulate(path, config([tracker], int(iterations)), make=make, drain=300.0)
    print(f"done in {time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
