"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from espl_jax import durable


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives an empty folder beside `path`, which becomes `path` when everything in it is on the disk.

    After an error there is neither of them.

    Raises:
      FileExistsError: as `check_free`.
      OSError: with what to do, when the disk is full.
    """
    path = Path(path).expanduser().absolute()
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process that had our number
    try:
        with durable.disk_full_explained(path):
            unfinished.mkdir()
            yield unfinished
            for file in unfinished.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            durable.sync_folder(unfinished)
            os.rename(unfinished, path)
            durable.sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def check_free(path: str | os.PathLike[str]) -> None:
    """Raises FileExistsError if `path` is there and is anything but an empty folder."""
    path = Path(path).expanduser()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already: nothing is overwritten; remove it or name another")
