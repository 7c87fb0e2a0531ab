"""Atomic creation of folders."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from espl_jax.storage import durable


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary folder, which is fsynced and renamed to `path` at the end.

    After an error neither of them exists.

    Raises:
      FileExistsError: as `check_free`.
      OSError: if the disk is full; the message has the fix.
    """
    path = Path(path).expanduser().resolve()
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    unfinished = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.unfinished")
    try:
        with durable.disk_full_explained(path):
            unfinished.mkdir()
            yield unfinished
            for path_inside in unfinished.rglob("*"):
                if path_inside.is_dir():
                    durable.sync_folder(path_inside)
                    continue
                with open(path_inside, "rb") as written:
                    os.fsync(written.fileno())
            durable.sync_folder(unfinished)
            os.rename(unfinished, path)
            durable.sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def check_free(path: str | os.PathLike[str]) -> None:
    """Raises FileExistsError if `path` exists and is not an empty folder."""
    path = Path(path).expanduser().resolve()
    if path.is_mount():
        raise FileExistsError(f"{path} is a mount point, which cannot be replaced; give a folder inside it")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not overwritten; remove it, or give another folder")


def _remove_leftovers(path: Path) -> None:
    """Removes unfinished folders of dead processes on this machine."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(platform.node())}.*.unfinished"):
        try:
            os.kill(int(folder.name.split(".")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue  # the process may be alive
