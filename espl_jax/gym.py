"""Tasks of the package reasoning-gym: their options, and their entries by id.

The package is imported by the first call, since it imports many others. An id such as
`reasoning_gym:leg_counting:min_animals=2,seed=1#17` holds all that is needed to generate the entry again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import functools
import importlib
import io
import math
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

PREFIX = "reasoning_gym"
"""What ids and data specs begin with."""

SIZES = (1_000, 20_000, 1_000_000)
"""Sizes of the package's datasets. An entry is taken from the smallest one that holds its index, because the
entries of a few tasks depend on the size."""

HASH_SEEDED = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
"""Tasks whose entries depend on the order of sets, and so on PYTHONHASHSEED."""

_ID = re.compile(rf"{PREFIX}:(?P<name>\w+):(?P<options>.*,)?seed=(?P<seed>\d+)#(?P<index>\d+)", re.DOTALL)
_LEFT_OUT = ("composite",)  # a mixture of other tasks; a data spec joins them with ` + `
_OWN = ("seed", "size")
_TRUTHS = {"true": True, "false": False}

Entry = dict[str, Any]
"""A problem of the package: `question`, `answer` (text or None) and `metadata`."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its options.

    Attributes:
      name: its name in the package, such as `leg_counting`.
      options: pairs of a field of the task's configuration and its value as text, sorted.
      seed: seed of the package's dataset.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()
    seed: int = 0

    def id(self, index: int) -> str:
        """Returns the id of an entry."""
        options = ",".join(f"{name}={value}" for name, value in (*self.options, ("seed", self.seed)))
        return f"{PREFIX}:{self.name}:{options}#{index}"


def parse_id(problem_id: str) -> tuple[Task, int]:
    """Returns the task of an entry, and the entry's index.

    Raises:
      ValueError: if the id is not one of `Task.id`.
    """
    found = _ID.fullmatch(problem_id)
    if not found:
        raise ValueError(
            f"problem {problem_id!r}: the id names no entry of {PREFIX}; use a data spec such as "
            f"{PREFIX}:leg_counting:count=200"
        )
    pairs = (pair.partition("=") for pair in (found["options"] or "").split(",") if pair)
    options = tuple((name, value) for name, _, value in pairs)
    return Task(found["name"], options, int(found["seed"])), int(found["index"])


@functools.lru_cache(maxsize=64)
def dataset(task: Task, size: int = SIZES[0]) -> Any:
    """Returns the package's dataset of a task.

    Raises:
      ValueError: for an unknown task or option, or a value that the task does not accept.
    """
    kinds = fields(task.name)
    given = {name: _value(kinds, task.name, name, value) for name, value in task.options}
    if task.name in HASH_SEEDED and sys.flags.hash_randomization:
        raise ValueError(
            f"the entries of {task.name} depend on Python's hash seed, so a run could not be resumed; start "
            "it with PYTHONHASHSEED=0 in the environment"
        )
    config = package().factory.DATASETS[task.name][1]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return package().create_dataset(task.name, **given, seed=task.seed, size=size)
    except Exception as error:  # assertions, and whatever a nonsensical value runs into
        raise ValueError(f"{config.__name__}: {str(error) or repr(error)}; correct the options") from error


@functools.lru_cache(maxsize=4096)
def entry(task: Task, index: int) -> Entry:
    """Returns an entry of a task.

    Raises:
      ValueError: as `dataset`; also if no entry can be generated with these options.
    """
    source = _source(task, index)
    try:
        # The entries of bf print.
        with contextlib.redirect_stdout(io.StringIO()):
            return source[index]
    except Exception as error:
        raise ValueError(
            f"{task.id(index)}: no entry can be generated with these options: {error!r}; change them"
        ) from error


def compares_text(task: Task) -> bool:
    """Returns whether a task compares answers as text, which is fast and safe.

    The scorers of the other tasks may raise any exception, take any time, and call `eval`.
    """
    return type(dataset(task)).score_answer is package().dataset.ProceduralDataset.score_answer


def score(task: Task, index: int, answer: str) -> float:
    """Returns the package's score of an answer to an entry, between 0 and 1.

    Raises:
      Exception: any, from the task's scorer.
    """
    given = float(_source(task, index).score_answer(answer, entry(task, index)))
    return given if math.isfinite(given) else 0.0


def _source(task: Task, index: int) -> Any:
    """Returns the dataset that holds an entry."""
    return dataset(task, next((size for size in SIZES if index < size), SIZES[-1]))


def fields(name: str) -> Mapping[str, dataclasses.Field]:
    """Returns the fields of a task's configuration, without `seed` and `size`.

    Raises:
      ValueError: for an unknown task; the message has similar names.
    """
    names = task_names()
    if name not in names:
        alike = [each for each in names if name in each or each in name]
        alike = difflib.get_close_matches(name, names, 5) or alike
        known = f"did you mean {', '.join(alike)}?" if alike else f"choose one of {', '.join(names)}"
        raise ValueError(f"unknown task {name!r}; {known}")
    config = package().factory.DATASETS[name][1]
    return {field.name: field for field in dataclasses.fields(config) if field.name not in _OWN}


def task_names() -> tuple[str, ...]:
    """Returns the names of all tasks."""
    return tuple(sorted(set(package().factory.DATASETS) - {*_LEFT_OUT}))


@functools.cache
def package() -> Any:
    """Returns the module reasoning_gym.

    Raises:
      ValueError: if it is not installed.
    """
    try:
        for module in ("dataset", "factory"):
            importlib.import_module(f"{PREFIX}.{module}")
        return importlib.import_module(PREFIX)
    except ImportError as error:
        raise ValueError(
            f"the package reasoning-gym cannot be imported ({error}); pip install 'espl_jax[gym]'"
        ) from error


def _value(kinds: Mapping[str, dataclasses.Field], task: str, name: str, text: str) -> Any:
    """Returns the value of an option, converted to the type of its field."""
    if name not in kinds:
        alike = difflib.get_close_matches(name, kinds, 3)
        meant = f"did you mean {' or '.join(alike)}; " if alike else ""
        listed = ", ".join(("count", "seed", "split", *kinds))
        raise ValueError(f"unknown option {name!r}; {meant}the options of {task} are {listed}")
    field = kinds[name]
    config = package().factory.DATASETS[task][1]
    try:
        return _converted(text, typing.get_type_hints(config)[name], _default(field))
    except TypeError:
        raise ValueError(f"the option {name!r} cannot be set in a data spec; leave it out") from None
    except (ValueError, KeyError) as error:
        raise ValueError(f"invalid option {f'{name}={text}'!r}: {error}") from None


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _converted(text: str, kind: Any, default: Any = None) -> Any:
    """Converts the text of an option.

    Args:
      text: the text; items of lists and tuples are separated by `|`.
      kind: the annotation of the field.
      default: its default, which tells the type of items that the annotation leaves open.

    Raises:
      ValueError: if the text is no value of this type.
      TypeError: for types other than numbers, text, truth values, enums, and lists of these.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in arguments:  # Optional
        (kind,) = (each for each in arguments if each is not type(None))
        return _converted(text, kind, default)
    if origin is Literal:
        if text not in arguments:
            raise ValueError(f"choose one of {', '.join(map(str, arguments))}")
        return text
    if kind is bool:
        if text.lower() not in _TRUTHS:
            raise ValueError("give true or false")
        return _TRUTHS[text.lower()]
    if kind is float or (kind is int and isinstance(default, float)):
        return float(text)
    if kind is int:
        return int(text)
    if kind is str:
        return text
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(text)
    container = origin or kind
    if container in (list, tuple, Sequence):
        item = arguments[0] if arguments else type(default[0]) if default else str
        items = [_converted(each, item) for each in text.split("|")]
        return tuple(items) if container is tuple else items
    raise TypeError(f"no text stands for a value of {kind}")
