"""Opens work directories: local folders, or folders of a bucket (`gs://`).

Both kinds have the same interface, which `workdir` and the journal of replies use for everything but arrays:
`LocalFolder` and `LocalLog` in `local`, `ObjectFolder` and `ObjectLog` in `objects`.
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
    """Returns the path as an absolute Path, or an epath.Path for `gs://`.

    Raises:
      ValueError: for another scheme. ImportError: for a bucket, if gcsfs is not installed.
    """
    text = os.fspath(path)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Path(path).expanduser().absolute()  # orbax refuses relative paths
    if scheme != "gs":
        raise ValueError(f"{text}: unsupported scheme; give a local folder or a gs:// address")
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"{text}: buckets need the package gcsfs; pip install 'espl_jax[gcs]'")
    return epath.Path(text)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether the path is in a bucket."""
    return os.fspath(path).startswith("gs://")


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Returns a folder, which need not exist: nothing is read or written yet. Raises like `parse`."""
    parsed = parse(path)
    return LocalFolder(parsed) if isinstance(parsed, Path) else ObjectFolder(parsed)


def open_log(path: str | os.PathLike[str]) -> Log:
    """Returns a log on its own, without holding its folder. Raises like `parse`."""
    parsed = parse(path)
    return LocalLog(parsed) if isinstance(parsed, Path) else ObjectLog(parsed)
