r"""Writes a page about one or several runs: `python -m espl_jax.report --workdir=runs/hmmt`.

The page is one HTML file that needs no network. Several runs are shown side by side:

    python -m espl_jax.report --workdir=runs/rl --workdir=runs/espl --out=comparison.html
"""

from __future__ import annotations

import sys

from absl import app, flags

from espl_jax.console import command_line

_WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "Work directory of a run, finished or running; read-only. Repeat it to compare runs."
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "The page to write; default: report.html in the work directory, or in this folder if that is a bucket; "
    "comparison.html in this folder for several runs.",
)
flags.mark_flags_as_required(["workdir"])


def main(argv: list[str]) -> None:
    """Writes the page."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {' '.join(argv[1:])}; see --help")

    import jax

    # The run itself may be using the devices, and a report computes next to nothing.
    jax.config.update("jax_platforms", "cpu")
    from espl_jax.report.write import write_report

    with command_line.without_traceback():
        print(f"Written: {write_report(_WORKDIR.value or [], _OUT.value)}")


def run() -> None:
    """The console script `espl-report`."""
    app.run(main)


if __name__ == "__main__":
    run()
