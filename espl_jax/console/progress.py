"""Progress of a run: one JSON record per iteration, and a live display."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

from espl_jax.console.tables import duration


class Progress:
    """Records iterations and shows progress: a live bar on a terminal, plain lines elsewhere.

    Use it as a context manager around the loop:

        with Progress(num_iterations, append=workdir.append) as progress:
            for iteration in range(1, num_iterations + 1):
                with progress.phase("rollouts"):
                    ...
                best = {"id": "p3", "mu": 27.1, "sigma": 2.0}
                progress.report(iteration, {"reward": 0.4, "best_prompt": best})

    Args:
      num_iterations: iterations of the whole run.
      append: called as `append("metrics", record)`.
      done: iterations done by earlier processes.
      console: console to print to; standard output by default.
      listen: called with the current phases and the iterations done whenever one of them changes.
      clock: returns seconds; replaced in tests.
    """

    def __init__(
        self,
        num_iterations: int,
        append: Callable[[str, dict[str, Any]], None],
        *,
        done: int = 0,
        console: rich.console.Console | None = None,
        listen: Callable[[Sequence[str], int], None] = lambda phases, done: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = num_iterations
        self._append = append
        self._done = done
        self._console = console or rich.console.Console()
        self._listen = listen
        self._clock = clock
        self._phases: list[str] = []
        self._seconds: dict[str, float] = {}
        self._durations: list[float] = []
        self._last = ""
        self._start = clock()
        self._bar = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=num_iterations, completed=done)

    def __enter__(self) -> Progress:
        self._start = self._clock()
        self._bar.start()
        self._listen((), self._done)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line of text, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows the current phase of the iteration, and adds its seconds to `time` of the record.

        Phases of the same name add up; a nested phase counts in both.
        """
        self._phases.append(name)
        self._show_phase()
        if not self._console.is_terminal:
            where = f"iteration {self._done + 1}/{self._total}: " if self._done < self._total else ""
            self.say(f"  {where}{name}")
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start
            self._phases.pop()
            self._show_phase()

    def report(self, iteration: int, record: dict[str, Any]) -> None:
        """Ends an iteration: appends its record to the log `metrics` and prints a line.

        Args:
          iteration: counted from 1.
          record: plain values. The line shows `reward` (mean over the iteration) and, if present, `held_out`
            (accuracy) and `best_prompt` (`{"id", "mu", "sigma"}`). The key `time` is added, with seconds by
            phase and `total`; it is the only key that differs between repeated runs.
        """
        seconds = self._clock() - self._start
        clocked = {**record.get("time", {}), **self._seconds, "total": seconds}
        self._append("metrics", {**record, "iteration": iteration, "time": clocked})
        self._durations.append(seconds)
        self._done = iteration
        self._start, self._seconds = self._clock(), {}
        seconds_left = self.seconds_left()
        assert seconds_left is not None
        left = [f"{duration(seconds_left)} left"] if iteration < self._total else []
        shown = _highlights(record)
        self._last = "  ".join([*shown, *left])
        self.say("  ".join([f"iteration {iteration}/{self._total}", *shown, duration(seconds), *left]))
        self._bar.update(self._task, completed=iteration)
        self._show_phase()

    def seconds_left(self) -> float | None:
        """Returns the median duration of recent iterations times the iterations left; None before the first.

        A median, because compilation and evaluations make some iterations longer.
        """
        if not self._durations:
            return None
        return statistics.median(self._durations[-9:]) * (self._total - self._done)

    def _show_phase(self) -> None:
        self._listen(tuple(self._phases), self._done)
        phases = " > ".join(self._phases)
        self._bar.update(self._task, description="  ".join(filter(None, [phases, self._last])))


def _highlights(record: dict[str, Any]) -> list[str]:
    parts = [f"reward {record['reward']:.3f}"]
    if record.get("held_out") is not None:
        parts.append(f"held out {record['held_out']:.3f}")
    if best := record.get("best_prompt"):
        parts.append(f"best prompt {best['id']} ({best['mu']:.2f} ± {best['sigma']:.2f})")
    return parts
