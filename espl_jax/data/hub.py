"""Data sets of the Hugging Face hub, through the `datasets` package and its cache.

`datasets` takes seconds to import, so it is imported where it is needed.
"""

from __future__ import annotations

import dataclasses
import functools
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
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
        datasets.disable_progress_bars()
    source = f"hub:{repository}"
    where = f"{datasets.config.HF_ENDPOINT}/datasets/{repository}"
    # With this prefix a folder here that is called like the data set is not taken for it.
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
    except DatasetNotFoundError as error:
        said = str(error)
        if "gated" in said:
            raise PermissionError(
                f"{source} is gated: accept its terms at {where}, then log in with `hf auth login` or set "
                "HF_TOKEN"
            ) from error
        if said.startswith("Revision"):
            raise FileNotFoundError(
                f"{source} has no revision {revision!r}: give a branch, tag or commit listed at {where}"
            ) from error
        raise FileNotFoundError(
            f"there is no data set {repository} at {where}, or it is private: correct the name, or log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) in (401, 403):
            raise PermissionError(
                f"{where} refuses the access token ({_line(error)}): log in with `hf auth login`, or correct "
                "HF_TOKEN"
            ) from error
        raise _unreachable(source, where, datasets.config.HF_DATASETS_CACHE, error) from error
    except (ConnectionError, LocalEntryNotFoundError, HTTPError) as error:
        raise _unreachable(source, where, datasets.config.HF_DATASETS_CACHE, error) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source} has no data that can be read ({_line(error)}): choose another data set, or give a "
            "local .jsonl or .parquet file"
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(
            f"{source}: its data cannot be read ({_line(error.__cause__ or error)}); choose another data "
            "set, or another version by the option revision=NAME"
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"{source} is made by a program of its own, which is not run ({_line(error)}); try the option "
            "revision=refs/convert/parquet"
        ) from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"{source}: the split {split!r} is empty; choose another one by the option split=NAME"
            ) from error
        raise ValueError(
            f"{source}: {_line(error)}; choose by the options split=NAME and config=NAME"
        ) from error


def _unreachable(source: str, where: str, cache: Any, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{source} is not in the cache {cache}, and {where} cannot be reached ({_line(error)}): connect, "
        "unset HF_HUB_OFFLINE if it is set, or give a local .jsonl or .parquet file"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
