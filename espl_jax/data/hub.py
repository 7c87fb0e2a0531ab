"""Data sets from the Hugging Face Hub, via the `datasets` package and its cache.

`datasets` takes seconds to import, so it is imported only where it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping
from typing import Any

from espl_jax.data.problems import ProblemSet
from espl_jax.data.tables import columns, read_table


def read_hub(
    repository: str,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    fields: Mapping[str, str] | None = None,
    repeats: str = "merge",
    prefix: str = "",
) -> ProblemSet:
    """Reads a split of a data set, one problem per row.

    Cached data sets need no network. HF_ENDPOINT sets the address of the Hub; the default is huggingface.co.

    Args:
      repository: `org/name`.
      split: the split; slices in the syntax of `datasets` also work (`train[:100]`).
      config: the configuration, if the data set has several (GSM8K's `main`).
      revision: branch, tag or commit; the main branch by default.
      fields, repeats: as for `read_problems`.
      prefix: prefix of numeric ids; the name of the data set by default.

    Raises:
      FileNotFoundError: if the Hub has no such data set or revision, or the data set has no data.
      PermissionError: if the data set is gated, or the access token is rejected.
      ConnectionError: if the data set is not cached and the Hub cannot be reached.
      ValueError: for an unknown split or configuration, unreadable data, and as in `read_table`.
    """
    source = f"hub:{repository}"
    data = _load(repository, split, config, revision)
    table = data.select_columns(columns(data.column_names, source, fields)).with_format("arrow")[:]
    read = read_table(table, source, fields, repeats, prefix or repository.partition("/")[2])
    return dataclasses.replace(read, name=f"{source} ({split})")


def _load(repository: str, split: str, config: str | None, revision: str | None) -> Any:
    import datasets
    import datasets.config
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
        datasets.disable_progress_bars()
    # This prefix keeps `datasets` from loading a local folder of the same name.
    load = functools.partial(
        datasets.load_dataset, f"hf://datasets/{repository}", config, split=split, revision=revision
    )
    try:
        try:
            return load()
        except DatasetGenerationError as error:
            # For a parquet file without rows, `datasets` uses the number of rows, 0, as the batch size.
            if "BatchSize must be greater than 0" not in str(error.__cause__):
                raise
            return load(batch_size=1000)
    except Exception as error:
        case = next((case for case in _cases() if case.fits(error)), None)
        if case is None:
            raise
        said = {
            "source": f"hub:{repository}",
            "repository": repository,
            "where": f"{datasets.config.HF_ENDPOINT}/datasets/{repository}",
            "cache": datasets.config.HF_DATASETS_CACHE,
            "split": split,
            "revision": revision,
            "error": _line(error),
            "cause": _line(error.__cause__ or error),
        }
        raise case.raised(case.message.format(**said)) from error


@dataclasses.dataclass(frozen=True)
class _Case:
    """An error of the libraries, and the error raised in its place.

    Attributes:
      errors: types of the library's error.
      pattern: regular expression found in its message.
      raised: type of the error to raise.
      message: message of that error; `_load` fills in the names.
      statuses: HTTP statuses that the error's response may have; empty for any.
    """

    errors: tuple[type[Exception], ...]
    pattern: str
    raised: type[Exception]
    message: str
    statuses: tuple[int, ...] = ()

    def fits(self, error: Exception) -> bool:
        """Returns whether this case applies to an error."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        return (
            isinstance(error, self.errors)
            and re.search(self.pattern, str(error)) is not None
            and (not self.statuses or status in self.statuses)
        )


def _cases() -> tuple[_Case, ...]:
    """Returns the known errors; the first case that fits applies."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        LocalEntryNotFoundError,
    )

    return (
        _Case(
            (DatasetNotFoundError,),
            "gated",
            PermissionError,
            "{source} is gated; accept its terms at {where}, then log in with `hf auth login` or set "
            "HF_TOKEN",
        ),
        _Case(
            (DatasetNotFoundError,),
            "^Revision",
            FileNotFoundError,
            "{source} has no revision {revision!r}; give a branch, tag or commit listed at {where}",
        ),
        _Case(
            (DatasetNotFoundError,),
            "",
            FileNotFoundError,
            "{source} does not exist at {where}, or it is private; correct the name, or log in "
            "with `hf auth login` or set HF_TOKEN",
        ),
        _Case(
            (HfHubHTTPError,),
            "",
            PermissionError,
            "{where} rejects the access token ({error}); log in with `hf auth login`, or correct HF_TOKEN",
            statuses=(401, 403),
        ),
        _Case(
            (HfHubHTTPError, ConnectionError, LocalEntryNotFoundError, HTTPError),
            "",
            ConnectionError,
            "{source} is not in the cache {cache}, and {where} cannot be reached ({error}); connect, unset "
            "HF_HUB_OFFLINE if it is set, or give a local .jsonl or .parquet file",
        ),
        _Case(
            (FileNotFoundError,),
            "",
            FileNotFoundError,
            "{source} has no readable data ({error}); choose another data set, or give a local "
            ".jsonl or .parquet file",
        ),
        _Case(
            (DatasetGenerationError,),
            "",
            ValueError,
            "{source}: the data cannot be read ({cause}); choose another data set, or another revision with "
            "the option revision=NAME",
        ),
        _Case(
            (RuntimeError,),
            "scripts are no longer supported",
            ValueError,
            "{source} needs a loading script, which is never run ({error}); try the option "
            "revision=refs/convert/parquet",
        ),
        _Case(
            (ValueError,),
            "corresponds to no data",
            ValueError,
            "{source}: the split {split!r} is empty; choose another split with the option split=NAME",
        ),
        _Case(
            (ValueError,),
            "",
            ValueError,
            "{source}: {error}; set the options split=NAME and config=NAME",
        ),
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
