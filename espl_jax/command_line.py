"""What all commands of the package do alike."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags, logging


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
