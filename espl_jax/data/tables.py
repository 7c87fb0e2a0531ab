"""Problem sets in pyarrow tables: parquet files and data sets loaded from the Hub.

pyarrow is imported only where it is used, since most runs do not need it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from espl_jax.data.problems import ProblemSet
from espl_jax.data.records import candidates, is_required, missing, read_problems


def read_parquet(
    path: str | Path, fields: Mapping[str, str] | None = None, repeats: str = "refuse"
) -> ProblemSet:
    """Reads one problem per row, and only the columns that are needed.

    Args:
      path: the file.
      fields, repeats: as for `read_problems`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not parquet, and as in `read_table`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} does not exist; correct the path")
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read(columns=columns(file.schema_arrow.names, str(path), fields))
    except (pa.ArrowException, OSError) as error:  # OSError: damaged pages, columns nested too deeply
        raise ValueError(f"{path}: cannot be read as parquet ({error}); write the file again") from error
    return dataclasses.replace(read_table(table, str(path), fields, repeats, path.stem), name=path.name)


def read_table(
    table: Any, source: str, fields: Mapping[str, str] | None, repeats: str, prefix: str
) -> ProblemSet:
    """Converts each row to a problem; arguments, result and errors as in `read_problems`.

    Unless `repeats` is "refuse", pyarrow first drops rows that repeat both statement and answer, for speed:
    DAPO-Math-17k contains each of its 17,000 problems 100 times.

    Args:
      table: a pyarrow.Table with at least the columns returned by `columns`.
    """
    rows = np.arange(len(table))
    if repeats != "refuse":
        names = candidates(fields)
        fields_there = (_first_there(table.column_names, names[name]) for name in ("text", "answer"))
        rows = _distinct(table, [field for field in fields_there if field is not None])
        table = table.filter(np.isin(np.arange(len(table)), rows))
    return read_problems(_records(table, rows, source), source, fields, repeats, prefix)


def columns(names: Sequence[str], source: str, fields: Mapping[str, str] | None) -> list[str]:
    """Returns the columns of a table that hold statement, answer and id.

    Raises:
      ValueError: if a required column is missing; the message lists the existing ones.
    """
    needed = []
    for name, options in candidates(fields).items():
        field = _first_there(names, options)
        if field is not None:
            needed.append(_column(names, field))
        elif is_required(name, options):
            raise missing(source, name, options, f"the fields are {sorted(names)}")
    return list(dict.fromkeys(needed))


def _column(names: Sequence[str], field: str) -> str:
    return field if field in names else field.partition(".")[0]


def _first_there(names: Sequence[str], options: Sequence[str]) -> str | None:
    return next((field for field in options if _column(names, field) in names), None)


def _records(table: Any, rows: np.ndarray, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    done = 0
    for batch in table.to_batches(max_chunksize=1000):
        try:
            records = batch.to_pylist()
        except ValueError:
            records = [_record(batch, i, f"{source}, row {rows[done + i] + 1}") for i in range(len(batch))]
        for record in records:
            yield f"row {rows[done] + 1}", record
            done += 1


def _record(batch: Any, row: int, where: str) -> dict[str, Any]:
    """Returns a row of a batch. Raises ValueError if a value cannot be converted, e.g. text not in UTF-8."""
    record = {}
    for name in batch.schema.names:
        try:
            record[name] = batch.column(name)[row].as_py()
        except ValueError as error:
            raise ValueError(
                f"{where}: the field {name!r} cannot be read ({error}); correct the data"
            ) from error
    return record


def _distinct(table: Any, fields: Sequence[str]) -> np.ndarray:
    """Returns the index of the first row with each combination of values; all rows if pyarrow cannot tell."""
    import pyarrow as pa

    everything = np.arange(len(table))
    try:
        values = {str(i): _values(table, field) for i, field in enumerate(fields)}
        keyed = pa.table({**values, "row": everything}).group_by(list(values), use_threads=False)
        return np.sort(keyed.aggregate([("row", "min")])["row_min"].to_numpy())
    except (pa.ArrowException, LookupError):
        # Lists of different lengths or mixed types; `read_problems` checks the rows one by one.
        return everything


def _values(table: Any, field: str) -> Any:
    from pyarrow import compute

    column = _column(table.column_names, field)
    steps = [] if field == column else field.split(".")[1:]

    def step(values: Any, name: str) -> Any:
        if name.isdecimal():
            return compute.list_element(values, int(name))  # pyright: ignore[reportAttributeAccessIssue]
        return compute.struct_field(values, name)  # pyright: ignore[reportAttributeAccessIssue]

    return functools.reduce(step, steps, table.column(column))
