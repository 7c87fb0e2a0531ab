"""Watches a run: `python -m espl_jax.watch --workdir=runs/hmmt`.

On a terminal, the view is redrawn until the run ends or Ctrl-C. Elsewhere, a line is printed at each
iteration and phase. With --once, the whole view is printed once. The command only reads, and does not use
accelerators.
"""

from __future__ import annotations

import dataclasses
import sys
import time

from absl import app, flags
from rich.console import Console
from rich.live import Live

from espl_jax.console import command_line
from espl_jax.storage import folders
from espl_jax.watch.render import line, render
from espl_jax.watch.run_view import RunView, Watcher

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of the run, local or gs://; read-only.")
_ONCE = flags.DEFINE_bool("once", False, "Print the view once, then exit.")
_INTERVAL = flags.DEFINE_float(
    "interval", 0.0, "Seconds between two looks; 0: 1, or 15 in a bucket.", lower_bound=0
)
flags.mark_flags_as_required(["workdir"])

_BEFORE_END = ("running", "unknown", "lost")


def main(argv: list[str]) -> None:
    """Shows the run until it ends."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {' '.join(argv[1:])}; see --help")
    workdir = _WORKDIR.value
    assert workdir is not None
    interval = _INTERVAL.value or (15.0 if folders.is_remote(workdir) else 1.0)
    with command_line.without_traceback():
        try:
            watch(workdir, Console(), once=_ONCE.value, interval=interval)
        except KeyboardInterrupt:
            sys.exit(130)


def watch(workdir: str, console: Console, *, once: bool, interval: float) -> None:
    """Shows a run on a console until it ends.

    Args:
      workdir: the work directory.
      console: a terminal, or not.
      once: print the whole view once.
      interval: seconds between two looks.

    Raises:
      ValueError: if there is no run.
    """
    watcher = Watcher(workdir)
    view = watcher.look()
    if once or (console.is_terminal and view.state not in _BEFORE_END):
        console.print(render(view, console.width))
        return
    if console.is_terminal:
        with Live(render(view, console.width), console=console, auto_refresh=False) as live:
            while view.state in _BEFORE_END:
                time.sleep(interval)
                view = _look_again(watcher, view)
                live.update(render(view, console.width), refresh=True)
        return
    _lines(watcher, view, console, interval)


def _lines(watcher: Watcher, view: RunView, console: Console, interval: float) -> None:
    """Prints a line at each iteration, phase and change of state, and each warning once."""
    shown, warned = None, set[str]()
    while True:
        now = (view.state, view.iteration, view.phase[0] if view.phase else "")
        if now != shown:
            console.print(line(view), markup=False, highlight=False, soft_wrap=True)
        for warning in view.warnings:
            if warning not in warned:
                console.print(f"! {warning}", markup=False, highlight=False, soft_wrap=True)
        shown, warned = now, warned | set(view.warnings)
        console.file.flush()
        if view.state not in _BEFORE_END or view.state == "lost":
            return
        time.sleep(interval)
        view = _look_again(watcher, view)


def _look_again(watcher: Watcher, before: RunView) -> RunView:
    """Returns the run as it is now, or as it was with a warning: a bucket may fail for a moment."""
    try:
        return watcher.look()
    except OSError as error:
        return dataclasses.replace(before, warnings=[f"This is the last view that could be read: {error}"])


def run() -> None:
    """The console script `espl-watch`."""
    app.run(main)


if __name__ == "__main__":
    run()
