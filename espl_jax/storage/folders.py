"""Where a work directory can be: a folder of this machine, or one of a bucket (`gs://`).

Both kinds have the same few functions, by which `run_state` and the journal of replies do all that is not
arrays: `LocalFolder` and `LocalLog` in `local`, `ObjectFolder` and `ObjectLog` in `objects`.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from etils import epath

from espl_jax.storage.local import LocalFolder, LocalLog
from espl_jax.storage.objects import ObjectFolder, ObjectLog

AnyPath = Path | epath.Path
Folder = LocalFolder | ObjectFolder
Log = LocalLog | ObjectLog


def parse(path: str | os.PathLike[str]) -> AnyPath:
    """The path as an object that knows `/` and `read_text`: absolute, or with its `gs://`.

    Raises:
      ValueError: another kind of address. ImportError: for a bucket, without gcsfs installed.
    """
    text = os.fspath(path)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Path(path).expanduser().absolute()  # orbax refuses relative paths
    if scheme != "gs":
        raise ValueError(f"{text}: only folders and gs:// are known; name one of them")
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"{text} needs the package gcsfs: pip install 'espl_jax[gcs]'")
    return epath.Path(text)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether the path is of a bucket."""
    return os.fspath(path).startswith("gs://")


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """A folder, which need not be there yet: nothing is read or written. Raises as `parse`."""
    parsed = parse(path)
    return LocalFolder(parsed) if isinstance(parsed, Path) else ObjectFolder(parsed)


def open_log(path: str | os.PathLike[str]) -> Log:
    """A log by itself, of no folder that is held. Raises as `parse`."""
    parsed = parse(path)
    return LocalLog(parsed) if isinstance(parsed, Path) else ObjectLog(parsed)
