"""The command line: `python -m espl_jax.main --config=configs/hmmt.py --workdir=runs/hmmt`."""

from __future__ import annotations

import sys

from absl import app, flags
from ml_collections import config_flags

from espl_jax import command_line
from espl_jax.check_config import check_config

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of the run's configuration.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command resumes it.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show one problem, one answer, shapes and memory, and stop.")
flags.mark_flags_as_required(["config"])


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the flags; a field that the configuration does not have is refused by its full name."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError) as error:  # what ml_collections raises for unknown fields
        unknown = str(error).strip("\"'")
        given = [arg.split("=")[0].lstrip("-") for arg in argv if arg.lstrip("-").startswith("config.")]
        named = [field for field in given if unknown in field.split(".")] or given
        sys.exit(f"{' or '.join(named)}: there is no such field; configs/common.py lists all of them")
    except OSError as error:
        sys.exit(str(error))


def main(argv: list[str]) -> None:
    """Checks the configuration, and runs."""
    if len(argv) > 1:
        sys.exit(f"not understood: {' '.join(argv[1:])}; fields are set as --config.name=value")
    config = _CONFIG.value
    try:
        check_config(config)
    except (ValueError, OSError) as error:  # OSError: there is no such configuration file
        sys.exit(str(error))
    if not _WORKDIR.value and not _DRY_RUN.value:
        sys.exit("--workdir is missing: name a folder for checkpoints, logs and results")

    # jax is imported from here on, so that a wrong field costs no start-up.
    command_line.use_compilation_cache(config.compilation_cache)
    with command_line.without_traceback():
        if _DRY_RUN.value:
            from espl_jax.dry_run import dry_run

            dry_run(config)
        else:
            from espl_jax.train import train

            train(config, _WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
