"""Data specs, which name problem sets in the configuration and on the command line.

    problems.jsonl                            a .jsonl or .parquet file
    hub:org/name:split=test                   a data set on the Hugging Face Hub
    addition:digits=2,count=200               a generated set
    reasoning_gym:leg_counting:count=200      problems of a task of the package reasoning-gym
    a.jsonl + hub:org/name                    a concatenation

Options follow a colon, as comma-separated name=value pairs.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from espl_jax.gym import PREFIX as GYM

FILES = ("jsonl", "parquet")
GENERATED = ("addition", "encyclopedia")

_CHOICE = ("count", "skip", "shuffle", "repeats", "text", "answer", "id")
OPTIONS = {
    "jsonl": _CHOICE,
    "parquet": _CHOICE,
    "hub": ("split", "config", "revision", *_CHOICE),
}
"""Kind of source -> its options; the options of a generated set are the parameters of its function."""
_NUMBERS = ("count", "skip", "shuffle")

_FILE = re.compile(r"(?P<place>.+\.(?P<kind>jsonl|parquet))(?::(?P<options>.*))?", re.DOTALL)
_HUB = re.compile(r"hub:(?P<place>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<options>.*))?", re.DOTALL)
_GYM = re.compile(rf"{GYM}:(?P<place>\w+)(?::(?P<options>.*))?", re.DOTALL)
_GENERATED = re.compile(rf"(?P<kind>{'|'.join(GENERATED)})(?::(?P<options>.*))?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of problems.

    Attributes:
      kind: `jsonl`, `parquet`, `hub`, `reasoning_gym`, or the name of a generated set.
      place: path of the file, `org/name` on the Hub, the task of reasoning-gym, or empty.
      options: the options, as text.
      spec: the spec as written.
    """

    kind: str
    place: str
    options: dict[str, str]
    spec: str

    @property
    def name(self) -> str:
        """Short name, used as a prefix of ids that are not unique."""
        if self.kind == "hub":
            # Ids of other splits and configurations of the same data set may also count from 1.
            parts = self.place.partition("/")[2], self.options.get("config"), self.options.get("split")
            return "-".join(filter(None, parts))
        return Path(self.place).stem or self.kind

    def number(self, option: str) -> int | None:
        """Returns the value of an integer option, or None if it is not given."""
        return int(self.options[option]) if option in self.options else None


def parse(spec: str, name: str = "data") -> tuple[Source, ...]:
    """Parses a spec; the grammar is at the top of this module.

    A path ends at the last `.jsonl` or `.parquet`, so it may contain colons and equal signs.

    Args:
      spec: one source, or several joined by ` + `.
      name: name of the spec in error messages.

    Raises:
      ValueError: for an invalid source, or an unknown option.
    """
    return tuple(_parse(part, name) for part in re.split(r"\s+\+\s+", spec.strip()))


def files(spec: str, name: str = "data") -> tuple[Path, ...]:
    """Returns the files that a spec names. Raises like `parse`."""
    return tuple(Path(source.place).expanduser() for source in parse(spec, name) if source.kind in FILES)


def _parse(spec: str, name: str) -> Source:
    if match := _HUB.fullmatch(spec):
        kind, place = "hub", match["place"]
    elif match := _GYM.fullmatch(spec):
        kind, place = GYM, match["place"]
    elif match := _GENERATED.fullmatch(spec):
        kind, place = match["kind"], ""
    elif match := (None if spec.startswith("hub:") else _FILE.fullmatch(spec)):
        kind, place = match["kind"], match["place"]
    else:
        raise ValueError(
            f"{name}={spec!r}: not a data spec; give the path of a .jsonl or .parquet file, hub:org/name, "
            f"or a generated set such as addition:digits=2,count=100 or {GYM}:leg_counting:count=100"
        )
    options: dict[str, str] = {}
    for option in (match["options"] or "").split(",") if match["options"] is not None else ():
        key, equals, value = (part.strip() for part in option.partition("="))
        understood = bool(key and equals)
        if kind in OPTIONS:
            understood &= key in OPTIONS[kind] and (key not in _NUMBERS or value.isdecimal())
        if not understood or key in options:
            known = f"; options are {', '.join(OPTIONS[kind])}" if kind in OPTIONS else ""
            raise ValueError(
                f"{name}={spec!r}: invalid or repeated option {option!r}{known}, as name=value with integer "
                "numbers"
            )
        options[key] = value
    return Source(kind, place, options, spec)
