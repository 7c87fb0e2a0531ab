"""Breaks down the time of a training iteration, inside and outside of compiled programs.

    python -m experiments.bench_iteration --iterations=5
    python -m experiments.bench_iteration --iterations=5 --reflector=none

Runs the training loop on the standard workload of the rollout benchmark: SmolLM2-135M, 3 system prompts of
about 200 tokens, 4 problems of about 40, groups of 5, 64 new tokens, LoRA rank 16, on CPU, with the model
itself as reflector (or in mode `rl` without one). Rewards are pseudo-random hashes of the replies, so that
groups have mixed rewards. The sampler, the policy-gradient step, the reflector's sampling and every other
part of the loop are timed. The first two iterations, which compile, are left out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from rich.console import Console

from configs import quickstart
from espl_jax import train
from espl_jax.console.progress import Progress
from espl_jax.console.tables import table
from espl_jax.environments.arithmetic import Arithmetic
from espl_jax.reflectors import local
from espl_jax.rollouts import collect
from espl_jax.rollouts.keys import stable_hash
from espl_jax.run import update
from espl_jax.storage import workdir
from espl_jax.types import Grade

sys.path.append(str(Path(__file__).parent / "bench"))  # its scripts import each other as neighbours
import workload

PROGRAMS = ("rollouts", "policy-gradient step", "reflector")


class Clock:
    """Accumulates seconds by name. Time in a nested section counts for that section only."""

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self._open: list[str] = []
        self._last = time.perf_counter()

    def _advance(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1] if self._open else "the rest of the loop"] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Counts the time spent in the `with` block under this name."""
        self._advance()
        self._open.append(name)
        try:
            yield
        finally:
            self._advance()
            self._open.pop()

    def around(self, name: str, function: Callable[..., Any], wait: bool = False) -> Callable[..., Any]:
        """Wraps a function to count its time; with `wait`, until its results are computed on the devices."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.named(name):
                result = function(*args, **kwargs)
                return jax.block_until_ready(result) if wait else result

        return counted


def config_of(args: argparse.Namespace, folder: Path) -> Any:
    """Returns the quickstart's config, changed to the standard workload."""
    c = quickstart.get_config()
    c.num_iterations = args.iterations
    c.mode = "rl" if args.reflector == "none" else "espl"
    prompts, problems = folder / "prompts.jsonl", folder / "problems.jsonl"
    texts = [workload.system_prompt(i) for i in range(len(workload.OPENINGS))]
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    rows = [{"problem": text, "answer": "1"} for text in workload.PROBLEMS]
    rows += [{"problem": f"{text} Answer in one word.", "answer": "1"} for text in workload.PROBLEMS[:1]]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    c.population.text, c.population.start_from = "", str(prompts)
    c.data.train, c.data.validation, c.data.validation_count, c.data.test = str(problems), "", 1, ""
    c.num_prompts, c.batch_size, c.group_size = 3, 4, workload.GROUP_SIZE
    c.sampling.max_new_tokens = workload.MAX_NEW_TOKENS
    c.evaluation.every = 0
    return c


def mixed(self: Arithmetic, problems: Any, replies: list[str]) -> list[Grade]:
    """Grades by a hash of the reply: about half of all replies count as right."""
    grades = [bool(stable_hash(f"{i} {reply}") % 2) for i, reply in enumerate(replies)]
    return [Grade(float(good), good, "1") for good in grades]


def main() -> None:
    """Prints the breakdown of a mean iteration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=5, help="the first two are not counted")
    parser.add_argument("--reflector", choices=["local", "none"], default="local")
    args = parser.parse_args()
    clock, marks = Clock(), []

    def iterate(*given: Any, original: Callable[..., Any] = train.iterate) -> Any:
        marks.append(collections.Counter(clock.seconds))
        return original(*given)

    patches = [
        mock.patch.object(train, "iterate", iterate),
        mock.patch.object(collect, "sample_tree", clock.around("rollouts", collect.sample_tree)),
        mock.patch.object(local, "sample_tree", clock.around("reflector", local.sample_tree)),
        mock.patch.object(
            update,
            "policy_gradient_step",
            clock.around("policy-gradient step", update.policy_gradient_step, wait=True),
        ),
        mock.patch.object(Arithmetic, "grade", clock.around("grading", mixed)),
        mock.patch.object(update, "_batches", clock.around("batch", update._batches)),
        mock.patch.object(train, "evolve", clock.around("evolution of prompts", train.evolve)),
        mock.patch.object(train, "rate", clock.around("ratings", train.rate)),
        mock.patch.object(train, "save", clock.around("checkpoint", train.save)),
        mock.patch.object(Progress, "report", clock.around("report", Progress.report)),
        mock.patch.object(workdir.WorkDir, "append", clock.around("logs", workdir.WorkDir.append)),
        mock.patch.object(train, "collect_rollouts", clock.around("text and tokens", train.collect_rollouts)),
        mock.patch.object(train, "finish", lambda *_: {}),
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        train.train(config_of(args, Path(folder)), Path(folder) / "run", Console())
        marks.append(collections.Counter(clock.seconds))
    spent = marks[-1] - marks[2]
    count, total = len(marks) - 3, sum(spent.values())
    rest = total - sum(spent[name] for name in PROGRAMS)
    rows = [["what", "seconds per iteration", "share"]]
    for name, seconds in sorted(spent.items(), key=lambda item: (item[0] not in PROGRAMS, -item[1])):
        rows.append([name, f"{seconds / count:.3f}", f"{100 * seconds / total:.2f}%"])
    rows.append(["an iteration", f"{total / count:.3f}", "100%"])
    print(table(rows))
    print(
        f"\nNot explained by a compiled program or the reflector: {100 * rest / total:.2f}% of an iteration"
    )


if __name__ == "__main__":
    main()
