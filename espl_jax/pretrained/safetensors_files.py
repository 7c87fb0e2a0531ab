"""Reads safetensors checkpoints; tensors are memory-mapped views.

A file consists of the length of its header (8 bytes), the header (JSON of `{name: {dtype, shape,
data_offsets}}`) and the bytes of the tensors. An index joins several files to one checkpoint. No code in the
files is executed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32}
"""Supported dtypes of weights, by their names in the files."""

_READ = DTYPES | {"U8": np.uint8}
"""Those that can be read; bytes hold quantized weights."""


class Stored(Protocol):
    """A tensor in a file, or a part of one.

    Attributes:
      path: its file.
      dtype: name of its dtype, such as BF16.
      shape: its shape.
    """

    @property
    def path(self) -> Path: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def view(self) -> Any:
        """Returns its values as a view of the memory-mapped file: an array, or a quantized matrix."""
        ...


FP8 = "F8_E4M3"
"""Name of the dtype of matrices that `fp8` scales."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor.

    Attributes:
      path: its file.
      dtype: name of the dtype in the file, such as BF16.
      shape: its shape, row-major.
      offset: offset of its first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """Returns the tensor as a read-only memory map; its dtype must be in `DTYPES`, or U8."""
        return np.memmap(self.path, _READ[self.dtype], "r", self.offset, self.shape)


@dataclasses.dataclass(frozen=True)
class PartOf:
    """Base of a part of a tensor; with `shape` and `view`, a `Stored`.

    Attributes:
      whole: the tensor.
    """

    whole: StoredTensor

    @property
    def path(self) -> Path:
        """The file of the tensor."""
        return self.whole.path

    @property
    def dtype(self) -> str:
        """The dtype of the tensor."""
        return self.whole.dtype


def weight_files(folder: Path) -> list[str]:
    """Returns the names of a folder's weight files: those in its index, or the single file without an index.

    The files need not exist yet.

    Raises:
      ValueError: if the index cannot be read.
    """
    index = folder / INDEX
    if not index.is_file():
        return [SINGLE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or any(Path(name).name != name or Path(name).suffix != ".safetensors" for name in names):
            raise ValueError(f"weight_map has {sorted(names)[:5]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} does not say which .safetensors files beside it hold the weights "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    return sorted(names)


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a folder's safetensors files, by name. Reads only the headers.

    Raises:
      FileNotFoundError: if the folder has no safetensors, or a file of its index is missing.
      ValueError: if the index or a file is truncated or damaged.
    """
    names = weight_files(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and names == [SINGLE]:
        others = sorted(
            path.name
            for path in folder.glob("*")
            if path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".gguf")
        )
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE} nor {INDEX}, but {', '.join(others[:5]) or 'no weights at all'}; "
            "weights are only read from safetensors (pickled files can run any code): convert them with "
            "transformers' save_pretrained, or give the path of a .gguf file"
        )
    if missing:
        raise FileNotFoundError(
            f"{folder}: {INDEX} names {len(names)} files, of which {len(missing)} are missing, beginning "
            f"with {', '.join(missing[:5])}; download the model again"
        )
    return {name: tensor for file in names for name, tensor in read_header(folder / file).items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file, by name.

    Raises:
      ValueError: if the file is not safetensors, truncated or damaged.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 8 + length <= size else b""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(path, name, 8 + length, **entry) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} ({size} bytes) is not a valid safetensors file: it is truncated, damaged or of another "
            f"type ({type(error).__name__}: {error}); download it again"
        ) from error
    end = max((8 + length + entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end > size:
        raise ValueError(f"{path} is truncated: it has {size} of {end} bytes; download it again")
    return tensors


def _stored(
    path: Path, name: str, start: int, dtype: str, shape: list[int], data_offsets: Any
) -> StoredTensor:
    begin, end = data_offsets
    size = 1 if dtype == FP8 else np.dtype(_READ[dtype]).itemsize if dtype in _READ else None
    if size and (begin < 0 or end - begin != math.prod(shape) * size):
        raise ValueError(f"{name}: {dtype} {shape} does not fill the bytes from {begin} to {end}")
    return StoredTensor(path, dtype, tuple(shape), start + begin)
