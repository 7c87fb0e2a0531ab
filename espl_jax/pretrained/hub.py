"""Downloads models from the Hugging Face Hub, or takes them from its cache."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from espl_jax.parallel import processes
from espl_jax.pretrained.safetensors_files import INDEX, SINGLE, weight_files

REPOSITORY = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
"""A source on the Hub: `org/name` or `org/name@revision`."""

_DESCRIPTION = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    INDEX,
]


def cached(source: str) -> Path:
    """Returns the folder of `org/name` or `org/name@revision` in the Hub's cache, without its network.

    Raises:
      FileNotFoundError: if it is not there.
    """
    named = REPOSITORY.fullmatch(source)
    if named is None:
        raise FileNotFoundError(f"{source!r} is neither a local folder nor a repository name")
    try:
        return Path(snapshot_download(named["repository"], revision=named["revision"], local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{source} is not in the cache {constants.HF_HUB_CACHE}") from error


def download(
    repository: str, revision: str | None = None, endpoint: str | None = None, weights: bool = True
) -> Path:
    """Downloads a model and returns its folder in the Hub's cache: config, tokenizer and safetensors.

    Cached files are not downloaded again; a complete copy needs no network. All processes use the same
    version: the first process resolves the revision, and each downloads it to its own machine.

    Args:
      repository: `org/name`.
      revision: branch, tag or commit; the main branch by default.
      endpoint: address of the Hub; by default HF_ENDPOINT, or huggingface.co.
      weights: if False, only config.json is downloaded.

    Raises:
      FileNotFoundError: if the Hub has no such repository or revision, or it has no safetensors.
      PermissionError: if the repository is gated, or the access token is rejected.
      ConnectionError: if a file is not cached and the Hub cannot be reached.
    """
    where = f"{endpoint or constants.ENDPOINT}/{repository}"
    named = repository if revision is None else f"{repository}@{revision}"
    described = _DESCRIPTION if weights else ["config.json"]

    def fetch(revision: str | None, names: list[str]) -> Path:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=names, endpoint=endpoint))

    try:
        # The folder is named by its commit, so all files are of one version even after a push.
        folder = processes.decide(lambda: fetch(revision, described))
        if not processes.is_first():
            folder = fetch(folder.name, described)
        if not weights:
            return folder
        files = weight_files(folder)
        fetch(folder.name, files)
    except GatedRepoError as error:
        raise PermissionError(
            f"{named} is gated; accept its terms at {where}, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} does not exist at {where}, or it is private; correct the name, or log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} has no revision {revision!r}; give a branch, tag or commit listed at {where}"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{repository!r} is not a repository name: {error}") from error
    except (LocalEntryNotFoundError, HTTPError, ConnectionError) as error:
        cause = (isinstance(error, LocalEntryNotFoundError) and error.__cause__) or error
        said = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            raise PermissionError(
                f"{where} rejects the access token ({said}); log in with `hf auth login`, or correct HF_TOKEN"
            ) from error
        raise ConnectionError(
            f"{named} is not completely in the cache {constants.HF_HUB_CACHE}, and {where} cannot be reached "
            f"({said}); connect, unset HF_HUB_OFFLINE if it is set, or give a local folder"
        ) from error
    if files == [SINGLE] and not (folder / SINGLE).is_file():
        raise FileNotFoundError(
            f"{folder}, the copy of {where}, has neither {SINGLE} nor {INDEX}; weights are only read "
            "from safetensors (pickled files can run any code): choose a repository with safetensors, or "
            "download a .gguf file and give its path"
        )
    return folder
