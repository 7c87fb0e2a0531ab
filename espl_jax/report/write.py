"""Writes the page of one or several runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from espl_jax.pretrained.load import Pretrained
from espl_jax.report.page import render
from espl_jax.report.read import read_run
from espl_jax.report.tokens import Decode, decoder_of, find_decoder
from espl_jax.storage import durable, folders
from espl_jax.storage.workdir import WorkDir

FILE = "report.html"
SEVERAL = "comparison.html"
"""Name of the page of several runs."""


def write_report(
    workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the page of one run, or of several side by side. The runs may still be running.

    Args:
      workdirs: work directories, local or in buckets; the others are compared with the first one.
      out: the page; by default report.html in the work directory, or here if that is in a bucket; for
        several runs comparison.html here.

    Returns:
      The path of the page.

    Raises:
      ValueError: if no work directory is given, one is given twice, or a file of one is damaged.
      FileNotFoundError: if a work directory has no run, or the folder of `out` does not exist.
    """
    if not workdirs:
        raise ValueError("workdir: give the work directory of at least one run")
    paths = [str(folders.parse(each)) for each in workdirs]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"workdir={twice[0]}: given twice; give each run once")
    decoders: dict[str, Decode | None] = {}
    runs = []
    for workdir in workdirs:
        run = read_run(workdir)
        source = run.config.get("model", {}).get("source", "")
        if source not in decoders:
            decoders[source] = find_decoder(source)
        runs.append(dataclasses.replace(run, decode=decoders[source]))
    if out is None:
        own = FILE if folders.is_remote(workdirs[0]) else Path(runs[0].path) / FILE
        out = own if len(runs) == 1 else SEVERAL
    target = Path(out).expanduser()
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"out={out}: the folder {target.parent} does not exist; make it first")
    durable.replace(target.absolute(), render(runs).encode(), shared=True)  # a run may write its own page
    return target


class RunReport:
    """Writes the page of a run in progress into its work directory.

    Args:
      workdir: the work directory, held by the run.
      model: its tokenizer is used; without one, replies are shown as text.
      say: prints a line.
    """

    def __init__(self, workdir: WorkDir, model: Pretrained, say: Callable[[str], None]):
        self._workdir = workdir
        self._model = model
        self._say = say
        self._failed = False

    def write(self) -> None:
        """Replaces report.html. A failure does not end the run: the first one is printed."""
        try:
            self._workdir.write_made(FILE, self._render)
        except Exception as error:
            if not self._failed:
                self._say(
                    f"{FILE} was not written ({type(error).__name__}: {error}); the run is not affected"
                )
            self._failed = True

    def _render(self) -> str:
        return render([read_run(self._workdir.path, _decoder(self._model))])


def _decoder(model: Pretrained) -> Decode | None:
    try:
        return decoder_of(model.tokenizer)
    except FileNotFoundError:
        return None
