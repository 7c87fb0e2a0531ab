"""Records the machine, the versions and the peak memory of a run in `machine.json`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
from typing import Any

import jax

from espl_jax.storage.workdir import WorkDir

FILE = "machine.json"

PACKAGES = ("espl_jax", "jax", "jaxlib", "numpy", "optax", "transformers", "tokenizers", "llguidance")
"""Packages whose versions are recorded."""


def write(workdir: WorkDir) -> None:
    """Replaces `machine.json`. Peaks are those of all processes that worked on the run so far."""
    now = _measured()
    try:
        before = json.loads((workdir.path / FILE).read_text(encoding="utf-8"))["peak_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    peaks = {name: max(size, before.get(name, 0)) for name, size in now["peak_bytes"].items()}
    workdir.write_json(FILE, now | {"peak_bytes": peaks})


def _measured() -> dict[str, Any]:
    devices = jax.local_devices()
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    on_device = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices]
    if any(on_device):
        peaks["device"] = max(on_device)
    return {
        "versions": {"python": platform.python_version()} | versions(),
        "devices": {"kind": devices[0].device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
        "peak_bytes": peaks,
    }


def versions() -> dict[str, str]:
    """Returns the installed versions of `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
