"""What all commands of the package do alike."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags, logging


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the flags; a field that the configuration does not have is refused by its full name.

    `--config.data=encyclopedia` takes all three splits from a set that has them all.
    """
    # In place, since ml_collections looks for the fields of a configuration in sys.argv itself.
    argv[:] = [part for arg in argv for part in _every_split(arg)]
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError) as error:  # what ml_collections raises for unknown fields
        unknown = str(error).strip("\"'")
        given = [arg.split("=")[0].lstrip("-") for arg in argv if arg.lstrip("-").startswith("config.")]
        named = [field for field in given if unknown in field.split(".")] or given
        sys.exit(f"{' or '.join(named)}: there is no such field; configs/common.py lists all of them")
    except OSError as error:
        sys.exit(str(error))


def _every_split(arg: str) -> list[str]:
    """`--config.data=x` for each split; every other argument as it stands."""
    given = re.fullmatch(r"--?config\.data=(.*)", arg, re.DOTALL)
    splits = ("train", "validation", "test")
    return [f"--config.data.{split}={given[1]}" for split in splits] if given else [arg]


def enough_threads() -> None:
    """Gives several virtual CPU devices a thread each and more, before jax is imported.

    A collective holds a thread of each device until all have come to it. XLA would have no more threads than
    the machine has cores, which two collectives at a time can take all of and then wait for ever.
    """
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if forced:
        os.environ.setdefault("NPROC", str(4 * int(forced[1])))


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in a folder between processes; an empty name keeps none."""
    import jax  # late, so that a wrong flag costs no start-up

    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


@contextlib.contextmanager
def without_traceback() -> Iterator[None]:
    """Ends the command with the message of an error that says what to mend, and logs warnings only.

    Such errors are data that does not fit, a missing file, a folder in use, a full disk, a NaN. The same
    command repeats whatever happened, so `--verbosity=1` gives the traceback if it is wanted after all.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"{type(error).__name__}: {error}\n(for the traceback add --verbosity=1)")
