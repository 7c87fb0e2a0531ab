"""Fingerprints the input files of a run, so that a resumed run detects a replaced file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

from espl_jax.data.problems import ProblemSet
from espl_jax.run.config import Config

Fingerprints = dict[str, dict[str, str]]
"""Configuration field -> name of the input -> SHA-256."""

WHOLE = 16 * 2**20
"""Size in bytes up to which a file is hashed in full."""

BLOCKS, BLOCK = 64, 2**16
"""Number and size in bytes of the blocks that are hashed of a larger file, with its first and last block."""


def fingerprints(
    config: Config,
    splits: Mapping[str, ProblemSet],
    model_files: Mapping[str, Path],
    reflector_files: Mapping[str, Path] | None = None,
) -> Fingerprints:
    """Fingerprints all inputs that the configuration refers to by name.

    Problems are hashed as loaded, files as in `file_digest`. For a user-defined environment or reward, the
    source of its module or package is hashed, but not the modules that it imports.

    Args:
      config: the run's configuration.
      splits: all problem sets, by split.
      model_files: the files that the model was loaded from, by name.
      reflector_files: the same for the model of `reflection.source`.
    """
    found: Fingerprints = {}
    for split, problems in splits.items():
        source = "train" if split == "validation" and not config.data.validation else split
        found.setdefault(f"data.{source}", {})[f"problems of {split}"] = _problems_digest(problems)
    found["model.source"] = fingerprint_files(model_files)
    if reflector_files:
        found["reflection.source"] = fingerprint_files(reflector_files)
    if config.reflection.templates:
        folder = Path(config.reflection.templates).expanduser()
        found["reflection.templates"] = fingerprint_files({file.name: file for file in folder.glob("*.txt")})
    for field, spec in {"name": config.environment.name, "reward": config.environment.reward}.items():
        if ":" in spec:
            found[f"environment.{field}"] = fingerprint_files(_sources(spec.partition(":")[0]))
    files = {
        "population.start_from": config.population.start_from,
        "reflection.replay": config.reflection.replay,
    }
    if config.environment.name == "search" and config.environment.search.retriever.endswith(".jsonl"):
        files["environment.search.retriever"] = config.environment.search.retriever
    for field, file in files.items():
        path = Path(file).expanduser()
        if file and path.is_file():
            found[field] = fingerprint_files({path.name: path})
    return found


def fingerprint_files(files: Mapping[str, Path]) -> dict[str, str]:
    """Returns the digest of each file, by name."""
    return {name: file_digest(path) for name, path in files.items()}


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, or above `WHOLE` bytes of its size and `BLOCKS` of its blocks.

    The blocks are evenly spaced, which is fast and tells apart different weights of the same shapes. A change
    of a few bytes between two blocks of a large file goes undetected.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def changes(before: Fingerprints, now: Fingerprints) -> dict[str, list[str]]:
    """Returns the names of changed inputs by field, for the fields in both fingerprints."""
    both = sorted(before.keys() & now.keys())
    items = {field: before[field].items() ^ now[field].items() for field in both}
    return {field: sorted({name for name, _ in differing}) for field, differing in items.items() if differing}


def _problems_digest(problems: ProblemSet) -> str:
    digest = hashlib.sha256()
    for problem in problems.problems:
        digest.update(json.dumps(dataclasses.astuple(problem)).encode() + b"\n")
    return digest.hexdigest()


def _sources(module: str) -> dict[str, Path]:
    """Returns the source file of a module, or all source files of a package, by name."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return {}
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*.py"))]
    packaged = {f"{folder.name}/{file.relative_to(folder)}": file for folder, file in files}
    return packaged or {Path(spec.origin).name: Path(spec.origin)}
