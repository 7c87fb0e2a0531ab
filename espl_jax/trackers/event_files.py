"""Event files of TensorBoard: records with checksums, of which one holds a whole point."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# The package is optional, and its protocol buffers have no types.

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb

from espl_jax.trackers.base import Hyperparameter, Point

RESULTS_TAG = "prompts/deployed"
"""A tag that the record of results has, and no other record."""


def version_record() -> bytes:
    """Returns the first record of every event file."""
    return _record(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))


def config_record(run_id: str, config: Mapping[str, Hyperparameter]) -> bytes:
    """Returns the record of the hyperparameters, for the dashboard HPARAMS."""
    summary = hparams_pb(dict(config), trial_id=run_id)
    return _record(event_pb2.Event(wall_time=time.time(), summary=summary))


def point_record(point: Point) -> bytes:
    """Returns a point as one record, so that a kill leaves all of the point or nothing."""
    values = [scalar_pb(tag, value) for tag, value in point.scalars.items()]
    values += [histogram_pb(tag, data) for tag, data in point.histograms.items()]
    values += [text_pb(tag, _as_code(text)) for tag, text in point.texts.items()]
    summary = summary_pb2.Summary(value=[value for each in values for value in each.value])
    return _record(event_pb2.Event(wall_time=time.time(), step=point.step, summary=summary))


def records(content: bytes) -> Iterator[tuple[event_pb2.Event, int]]:
    """Yields the complete records of an event file, each with the offset of its end."""
    begin = 0
    while begin + 12 <= len(content):
        header = content[begin : begin + 8]
        (length,) = struct.unpack("<Q", header)
        end = begin + 16 + length
        if end > len(content) or content[begin + 8 : begin + 12] != _checksum(header):
            return
        data = content[begin + 12 : end - 4]
        if content[end - 4 : end] != _checksum(data):
            return
        yield event_pb2.Event.FromString(data), end
        begin = end


def is_results(event: event_pb2.Event) -> bool:
    """Returns whether a record holds the results of a run."""
    return any(value.tag == RESULTS_TAG for value in event.summary.value)


def _as_code(text: str) -> str:
    """Returns text as an indented code block of Markdown, which the text itself cannot end."""
    return "\n".join("    " + line for line in text.splitlines())


def _record(event: event_pb2.Event) -> bytes:
    data = event.SerializeToString()
    header = struct.pack("<Q", len(data))
    return header + _checksum(header) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
