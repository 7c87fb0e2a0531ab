"""Reads the transaction logs of Weights & Biases (`run-<id>.wandb`), all that there is of an offline run.

The format is that of LevelDB's logs: a file header of 7 bytes, then blocks of 32 KiB with fragments of
records. A fragment has a header of 7 bytes (checksum, length, type); type 1 is a whole record, 2, 3 and 4 are
the first, middle and last fragment of one. Records are protocol buffers.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# The package is optional, and its protocol buffers have no types.

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32_768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def rows(folder: Path, run_id: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (step, values) of each row that a run logged, from all its files below a folder.

    A file that a kill cut short ends at its last complete row. Nested values have dots in their names.
    """
    for path in sorted(folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")):
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                yield int(row["_step"]), row


def _records(content: bytes) -> Iterator[bytes]:
    position, parts = _HEADER, b""
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:  # too small for a fragment: padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        data = content[position + _HEADER : position + _HEADER + length]
        if len(data) < length or not _WHOLE <= kind <= _LAST:
            return
        position += _HEADER + length
        parts = data if kind in (_WHOLE, _FIRST) else parts + data
        if kind in (_WHOLE, _LAST):
            yield parts
