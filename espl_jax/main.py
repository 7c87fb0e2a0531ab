"""The command line: `python -m espl_jax.main --config=configs/hmmt.py --workdir=runs/hmmt`."""

from __future__ import annotations

import sys
from typing import cast

from absl import app, flags

from espl_jax.console import command_line
from espl_jax.run.check_config import check_config
from espl_jax.run.config import Config

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory; the same command resumes the run.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show one problem, one rollout, shapes and memory, then exit.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    "",
    "host:port of the first of several processes; not needed on TPU pods, Slurm and MPI.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", 0, "Number of processes; used with --coordinator_address."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Index of this process, from 0.")
flags.mark_flags_as_required(["config"])


def main(argv: list[str]) -> None:
    """Checks the configuration and runs the training, or the dry run."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {' '.join(argv[1:])}; set fields with --config.field=value")
    config, workdir = cast(Config, _CONFIG.value), _WORKDIR.value or ""
    try:
        check_config(config)
    except ValueError as error:
        sys.exit(str(error))
    if not workdir and not _DRY_RUN.value:
        sys.exit("--workdir is missing; name a folder for checkpoints, logs and results")

    # jax is imported only from here on, so that a wrong field is reported at once.
    command_line.enough_threads()
    command_line.use_compilation_cache(config.compilation_cache)
    with command_line.without_traceback():
        from espl_jax.parallel import processes

        processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        if _DRY_RUN.value:
            from espl_jax.dry_run import dry_run

            dry_run(config)
        else:
            from espl_jax.train import train

            try:
                train(config, workdir)
            except KeyboardInterrupt:
                print("Stopped. The same command resumes from the last checkpoint.", file=sys.stderr)
                sys.exit(130)


def run() -> None:
    """The console script `espl-train`."""
    app.run(main, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
    run()
