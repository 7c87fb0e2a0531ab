"""Data sets of the Hugging Face hub, through the `datasets` package and its cache.

`datasets` takes seconds to import, so it is imported where it is needed.
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
    """Reads a split of a data set, one problem a row.

    What is in the cache needs no network. The address of the hub is HF_ENDPOINT's, or huggingface.co.

    Args:
      repository: `org/name`.
      split: its split; the slices of `datasets` serve too (`train[:100]`).
      config: its configuration, where it has several (GSM8K's `main`).
      revision: branch, tag or commit; the main branch by default.
      fields, repeats: as for `read_problems`.
      prefix: put before ids that are numbers; the name of the data set by default.

    Raises:
      FileNotFoundError: if the hub has no such data set or revision, or no data in it.
      PermissionError: if it is gated.
      ConnectionError: if it is not in the cache and the hub cannot be reached.
      ValueError: for an unknown split or configuration, data that cannot be read, and as `read_table` does.
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
    # With this prefix, a local folder with the name of the data set is not taken for it.
    load = functools.partial(
        datasets.load_dataset, f"hf://datasets/{repository}", config, split=split, revision=revision
    )
    try:
        try:
            return load()
        except DatasetGenerationError as error:
            # Of a parquet file without rows, their number, 0, is taken for the size of batches.
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
    """An error of the libraries, and what is raised in its place.

    Attributes:
      errors: types of the error.
      pattern: regular expression of its text.
      raised: type of what is raised.
      message: its text, with the names that `_load` fills in.
      statuses: HTTP statuses of the error's response, if it must have one of them.
    """

    errors: tuple[type[Exception], ...]
    pattern: str
    raised: type[Exception]
    message: str
    statuses: tuple[int, ...] = ()

    def fits(self, error: Exception) -> bool:
        """Returns whether an error is of this case."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        return (
            isinstance(error, self.errors)
            and re.search(self.pattern, str(error)) is not None
            and (not self.statuses or status in self.statuses)
        )


def _cases() -> tuple[_Case, ...]:
    """Returns the errors that are explained; the first that fits counts."""
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
            "{source} is gated: accept its terms at {where}, then log in with `hf auth login` or set "
            "HF_TOKEN",
        ),
        _Case(
            (DatasetNotFoundError,),
            "^Revision",
            FileNotFoundError,
            "{source} has no revision {revision!r}: give a branch, tag or commit listed at {where}",
        ),
        _Case(
            (DatasetNotFoundError,),
            "",
            FileNotFoundError,
            "there is no data set {repository} at {where}, or it is private: correct the name, or log in "
            "with `hf auth login` or set HF_TOKEN",
        ),
        _Case(
            (HfHubHTTPError,),
            "",
            PermissionError,
            "{where} refuses the access token ({error}): log in with `hf auth login`, or correct HF_TOKEN",
            statuses=(401, 403),
        ),
        _Case(
            (HfHubHTTPError, ConnectionError, LocalEntryNotFoundError, HTTPError),
            "",
            ConnectionError,
            "{source} is not in the cache {cache}, and {where} cannot be reached ({error}): connect, unset "
            "HF_HUB_OFFLINE if it is set, or give a local .jsonl or .parquet file",
        ),
        _Case(
            (FileNotFoundError,),
            "",
            FileNotFoundError,
            "{source} has no data that can be read ({error}): choose another data set, or give a local "
            ".jsonl or .parquet file",
        ),
        _Case(
            (DatasetGenerationError,),
            "",
            ValueError,
            "{source}: its data cannot be read ({cause}); choose another data set, or another version with "
            "the option revision=NAME",
        ),
        _Case(
            (RuntimeError,),
            "scripts are no longer supported",
            ValueError,
            "{source} is generated by a script, which is not run ({error}); try the option "
            "revision=refs/convert/parquet",
        ),
        _Case(
            (ValueError,),
            "corresponds to no data",
            ValueError,
            "{source}: the split {split!r} is empty; choose another one with the option split=NAME",
        ),
        _Case(
            (ValueError,),
            "",
            ValueError,
            "{source}: {error}; choose with the options split=NAME and config=NAME",
        ),
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
