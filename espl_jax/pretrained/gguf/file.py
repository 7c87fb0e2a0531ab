"""Reads GGUF files: metadata as plain values; tensors stay quantized and memory-mapped.

The format is specified in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf`
package creates several numpy arrays per token, which takes 15 seconds for a vocabulary of 262,144.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

_NUMBERS = {
    gguf.GGUFValueType.UINT8: "<B",
    gguf.GGUFValueType.INT8: "<b",
    gguf.GGUFValueType.UINT16: "<H",
    gguf.GGUFValueType.INT16: "<h",
    gguf.GGUFValueType.UINT32: "<I",
    gguf.GGUFValueType.INT32: "<i",
    gguf.GGUFValueType.FLOAT32: "<f",
    gguf.GGUFValueType.BOOL: "<?",
    gguf.GGUFValueType.UINT64: "<Q",
    gguf.GGUFValueType.INT64: "<q",
    gguf.GGUFValueType.FLOAT64: "<d",
}
"""Formats of numbers, valid for both `struct` and numpy."""


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor as stored in the file.

    Attributes:
      kind: its quantization.
      shape: its shape in row-major order, `[out, in]` for a linear layer (reversed in the file).
      data: uint8 `[*shape[:-1], bytes of a row]`, memory-mapped.
    """

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An opened GGUF file, with its weights still quantized on disk.

    Attributes:
      path: its path.
      metadata: its fields by GGUF name, as plain Python values.
      tensors: its tensors by name.
    """

    path: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def dequantize(self, name: str) -> np.ndarray:
        """Returns a tensor in float32; a float32 tensor is a view of the file.

        Raises:
          ValueError: for a quantization that the `gguf` package does not support.
        """
        tensor = self.tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: {name} is stored as {tensor.kind.name}, which gguf cannot dequantize; "
                "use another quantization of the model (F16 and Q8_0 always work)"
            ) from error
        return values.astype(np.float32, copy=False).reshape(tensor.shape)


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Opens a GGUF file and checks that it is complete.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not GGUF, truncated or damaged, or one part of a split file.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file; give the path of a .gguf file")
    try:
        metadata, tensors = _read(np.memmap(path, np.uint8, mode="r"))
    except (ValueError, struct.error, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes) cannot be read as GGUF: it is another kind of file, "
            f"truncated or damaged ({type(error).__name__}: {error}); download it again"
        ) from error
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model; join them with "
            "`llama-gguf-split --merge <first part> <new file>`"
        )
    return GGUFFile(path, metadata, tensors)


def _read(data: np.ndarray) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    cursor = _Cursor(data)
    if cursor.unpack("<I") != gguf.GGUF_MAGIC:
        raise ValueError("GGUF magic invalid")
    version = cursor.unpack("<I")
    if version not in (2, 3):
        raise ValueError(f"unsupported version {version} of the format; supported: 2 and 3, little-endian")
    num_tensors, num_fields = cursor.unpack("<Q"), cursor.unpack("<Q")
    metadata = {}
    for _ in range(num_fields):
        key = cursor.string()
        metadata[key] = cursor.value(gguf.GGUFValueType(cursor.unpack("<I")))
    headers = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(cursor.unpack("<Q") for _ in range(cursor.unpack("<I")))[::-1]
        headers.append((name, shape, gguf.GGMLQuantizationType(cursor.unpack("<I")), cursor.unpack("<Q")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    start = math.ceil(cursor.position / alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in headers:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(
                f"{name} of shape {list(shape)} is not a multiple of the {kind.name} block size {block}"
            )
        stored = (*shape[:-1], shape[-1] // block * block_bytes)
        first, size = start + offset, math.prod(stored)
        if first + size > len(data):
            raise ValueError(f"{name} ends at byte {first + size}")
        tensors[name] = GGUFTensor(kind, shape, data[first : first + size].reshape(stored))
    return metadata, tensors


class _Cursor:
    """Reads values in sequence; raises an error at the end of the data."""

    def __init__(self, data: np.ndarray):
        self.data = data.data
        self.position = 0

    def unpack(self, spec: str) -> Any:
        (value,) = struct.unpack_from(spec, self.data, self.position)
        self.position += struct.calcsize(spec)
        return value

    def string(self) -> str:
        size = self.unpack("<Q")
        taken = bytes(self.data[self.position : self.position + size])
        if len(taken) < size:
            raise ValueError(f"a string of {size} bytes begins at byte {self.position}")
        self.position += size
        return taken.decode()

    def value(self, kind: gguf.GGUFValueType) -> Any:
        if kind == gguf.GGUFValueType.STRING:
            return self.string()
        if kind != gguf.GGUFValueType.ARRAY:
            return self.unpack(_NUMBERS[kind])
        item, count = gguf.GGUFValueType(self.unpack("<I")), self.unpack("<Q")
        if item not in _NUMBERS:
            return [self.value(item) for _ in range(count)]
        values = np.frombuffer(self.data, _NUMBERS[item], count, self.position)
        self.position += values.nbytes
        return values.tolist()
