"""The command line: `python -m espl_jax.main --config=configs/hmmt.py --workdir=runs/hmmt`."""

from __future__ import annotations

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from espl_jax.check_config import check_config

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of the run's configuration.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command resumes it.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show one problem, one answer, shapes and memory, and stop.")
flags.mark_flags_as_required(["config"])


def main(argv: list[str]) -> None:
    """Checks the configuration, and runs."""
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}; fields are set as --config.name=value")
    config = _CONFIG.value
    try:
        check_config(config)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    if not _WORKDIR.value and not _DRY_RUN.value:
        raise app.UsageError("--workdir is missing: name a folder for checkpoints, logs and results")

    import jax  # after the check, so that a wrong field costs no start-up

    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache).expanduser()))
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if _DRY_RUN.value:
        from espl_jax.dry_run import dry_run

        dry_run(config)
    else:
        from espl_jax.train import train

        train(config, _WORKDIR.value)


if __name__ == "__main__":
    app.run(main)
