"""Reads the logs of a run from its work directory, one iteration at a time where they are long."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espl_jax.evolution.lineage import members_of
from espl_jax.evolution.population import prompt_from_json
from espl_jax.report.tokens import Decode
from espl_jax.storage import folders
from espl_jax.types import SystemPrompt

Record = Mapping[str, Any]
"""A line of a log."""


@dataclasses.dataclass(frozen=True)
class RunLogs:
    """A run as its work directory records it; what an older or unfinished run lacks is empty.

    Attributes:
      path: the work directory.
      name: the last part of its path.
      config: the configuration, as nested dicts.
      metrics: one record per iteration.
      births: lineage records of members that entered, oldest first.
      members: every member, as it is now or was when it left, oldest first.
      living: ids of the living members.
      results: contents of results.json; empty if the run has not ended, also if it has been extended since.
      machine: contents of machine.json; empty for older runs.
      problems: id -> statement and answer of the problems trained on; empty for older runs.
      decode: token id -> text; None without a tokenizer.
    """

    path: folders.AnyPath
    name: str
    config: Record
    metrics: tuple[Record, ...]
    births: tuple[Record, ...]
    members: tuple[SystemPrompt, ...]
    living: frozenset[str]
    results: Record
    machine: Record
    problems: Mapping[str, Record]
    decode: Decode | None = None

    @property
    def root(self) -> str:
        """The id of the oldest initial prompt; empty for a run without a lineage."""
        return self.members[0].id if self.members else ""

    @property
    def deployed(self) -> str:
        """The id of the deployed prompt, or before the end of the run of the best one; may be empty."""
        if self.results:
            return self.results["deployed"]["id"]
        return self.metrics[-1]["best_prompt"]["id"] if self.metrics else self.root

    def by_iteration(self, log: str) -> Iterator[tuple[int, list[Record]]]:
        """Yields (iteration, its records) of a log."""
        lines = _lines(self.path, log)
        for iteration, records in itertools.groupby(lines, key=lambda each: each["iteration"]):
            yield iteration, list(records)

    def evaluations(self) -> Iterator[Record]:
        """Yields the rollouts of evaluations."""
        yield from _lines(self.path, "evaluations")


def read_run(workdir: str | os.PathLike[str], decode: Decode | None = None) -> RunLogs:
    """Reads a run, which may still be running. Locks and writes nothing.

    Args:
      workdir: the work directory.
      decode: texts of the tokens of the run's model, if known.

    Raises:
      FileNotFoundError: if there is no run.
      ValueError: if a file is damaged.
    """
    folder = folders.open_folder(workdir)
    path = folder.path
    config = _read_json(folder, "config.json")
    if not isinstance(config, dict) or "mode" not in config:
        raise FileNotFoundError(f"{path} has no config.json of a run; give the --workdir of a run")
    lineage = [dict(each) for each in _lines(path, "lineage")]
    members = members_of(lineage, _living(folder))
    gone = {each["id"] for each in lineage if each["event"] == "left"}
    return RunLogs(
        path=path,
        name=path.name,
        config=config,
        metrics=tuple(_lines(path, "metrics")),
        births=tuple(each for each in lineage if each["event"] != "left"),
        members=tuple(members),
        living=frozenset(each.id for each in members if each.id not in gone),
        results=_results(folder, config),
        machine=_read_json(folder, "machine.json") or {},
        problems={each["id"]: each for each in _lines(path, "problems")},
        decode=decode,
    )


def names_of(runs: Sequence[RunLogs]) -> list[str]:
    """Returns a name for each run: the shortest end of its path that is unique among the runs."""
    parts = [run.path.parts for run in runs]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number})" for number, run in enumerate(runs, start=1)]


def _living(folder: folders.Folder) -> list[SystemPrompt]:
    """Returns the members in population.json; empty before the first checkpoint."""
    population = _read_json(folder, "population.json")
    members = population.get("members", []) if isinstance(population, dict) else population or []
    return [prompt_from_json(dict(each), f"member {each.get('id')}") for each in members]


def _results(folder: folders.Folder, config: Record) -> Record:
    """Returns results.json, unless it is of an earlier end, before num_iterations was raised."""
    results = _read_json(folder, "results.json") or {}
    return results if results.get("iteration") == config.get("num_iterations") else {}


def _read_json(folder: folders.Folder, name: str) -> Any:
    text = folder.read(name)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{folder.path / name} is not JSON ({error}); restore the file") from error


def _lines(path: folders.AnyPath, log: str) -> Iterator[Record]:
    """Yields the records of a log; leaves out a last line that is still being written."""
    file = path / f"{log}.jsonl"
    for number, line in enumerate(folders.open_log(file).lines(), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON ({error}); restore the line") from error
