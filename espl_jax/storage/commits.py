"""The markers of finished checkpoints. Reads them without jax, so that other commands can look at a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Collection
from typing import Any

from espl_jax.storage import folders


def folder_of(iteration: int) -> str:
    """Returns the folder of a checkpoint, relative to the work directory."""
    return f"checkpoints/{iteration:08d}"


def iterations(folder: folders.Folder) -> list[int]:
    """Returns the iterations of all checkpoints, finished or not."""
    return [int(name) for name in folder.names("checkpoints") if re.fullmatch(r"\d{8}", name)]


def committed(folder: folders.Folder) -> dict[int, dict[str, Any]]:
    """Returns the contents of COMMIT by iteration. A marker truncated by a kill is ignored.

    Raises:
      ValueError: if a marker is complete but damaged, or was written by another version of the package.
    """
    committed = {}
    for iteration in iterations(folder):
        text = folder.read(f"{folder_of(iteration)}/COMMIT") or b""
        with contextlib.suppress(json.JSONDecodeError):
            committed[iteration] = json.loads(text.decode("ascii", errors="replace"))
    for iteration, commit in committed.items():
        if "sha256" not in commit:
            raise ValueError(
                f"{folder.path / folder_of(iteration)} was written by another version of espl_jax, without "
                "hashes; read it with that version"
            )
        if commit["sha256"] != hash_of(commit):
            raise ValueError(damaged(folder, iteration, "COMMIT", committed))
    return committed


def hash_of(commit: dict[str, Any]) -> str:
    """Returns the hash of all fields of COMMIT except the hash itself."""
    said = {name: value for name, value in commit.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def damaged(folder: folders.Folder, iteration: int, file: str, committed: Collection[int]) -> str:
    """Returns the error message for a file of a checkpoint whose hash does not match COMMIT."""
    other = max(set(committed) - {iteration}, default=None)
    rest = "start from the beginning" if other is None else f"resume from iteration {other}"
    return (
        f"{folder.path / folder_of(iteration) / file} is damaged: its hash does not match COMMIT. Remove "
        f"{folder.path / folder_of(iteration)} to {rest}."
    )
