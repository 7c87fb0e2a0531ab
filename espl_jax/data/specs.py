"""How problem sets are named on a command line.

    problems.jsonl                            a file: .jsonl, or .parquet
    hub:org/name:split=test                   a data set of the Hugging Face hub
    addition:digits=2,count=200               a generated set
    a.jsonl + hub:org/name                    several as one

Options follow a colon, as name=value with commas between them.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

FILES = ("jsonl", "parquet")
GENERATED = ("addition", "encyclopedia")

_CHOICE = ("count", "skip", "shuffle", "repeats", "text", "answer", "id")
OPTIONS = {
    "jsonl": _CHOICE,
    "parquet": _CHOICE,
    "hub": ("split", "config", "revision", *_CHOICE),
}
"""Kind of source -> its options; those of a generated set are the parameters of its function."""
_NUMBERS = ("count", "skip", "shuffle")

_FILE = re.compile(r"(?P<place>.+\.(?P<kind>jsonl|parquet))(?::(?P<options>.*))?", re.DOTALL)
_HUB = re.compile(r"hub:(?P<place>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<options>.*))?", re.DOTALL)
_GENERATED = re.compile(rf"(?P<kind>{'|'.join(GENERATED)})(?::(?P<options>.*))?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of problems.

    Attributes:
      kind: `jsonl`, `parquet`, `hub`, or the name of a generated set.
      place: path of the file, `org/name` on the hub, or empty.
      options: what was given after the colon, as text.
      spec: as it was written.
    """

    kind: str
    place: str
    options: dict[str, str]
    spec: str

    @property
    def name(self) -> str:
        """A short name, which ids that are not distinct get before them."""
        if self.kind == "hub":
            # Other splits and configurations of the same data set may count from 1 too.
            parts = self.place.partition("/")[2], self.options.get("config"), self.options.get("split")
            return "-".join(filter(None, parts))
        return Path(self.place).stem or self.kind

    def number(self, option: str) -> int | None:
        """The value of an option that is a whole number, or None where it is not given."""
        return int(self.options[option]) if option in self.options else None


def parse(spec: str, name: str = "data") -> tuple[Source, ...]:
    """Reads a spec; the grammar is at the top of this module.

    A path ends with its last `.jsonl` or `.parquet`, so that its name may have colons and equal signs.

    Args:
      spec: one source, or several joined by ` + `.
      name: what a message calls the spec.

    Raises:
      ValueError: for a source of another form, or an option that is not one of its kind.
    """
    return tuple(_parse(part, name) for part in re.split(r"\s+\+\s+", spec.strip()))


def files(spec: str, name: str = "data") -> tuple[Path, ...]:
    """The files that a spec names; raises as `parse` does."""
    return tuple(Path(source.place).expanduser() for source in parse(spec, name) if source.kind in FILES)


def _parse(spec: str, name: str) -> Source:
    if match := _HUB.fullmatch(spec):
        kind, place = "hub", match["place"]
    elif match := _GENERATED.fullmatch(spec):
        kind, place = match["kind"], ""
    elif match := (None if spec.startswith("hub:") else _FILE.fullmatch(spec)):
        kind, place = match["kind"], match["place"]
    else:
        raise ValueError(
            f"{name}={spec!r} is not known; give the path of a .jsonl or .parquet file, hub:org/name, "
            "or a generated set such as addition:digits=2,count=100"
        )
    options: dict[str, str] = {}
    for option in (match["options"] or "").split(",") if match["options"] is not None else ():
        key, equals, value = (part.strip() for part in option.partition("="))
        understood = bool(key and equals)
        if kind in OPTIONS:
            understood &= key in OPTIONS[kind] and (key not in _NUMBERS or value.isdecimal())
        if not understood or key in options:
            known = f"; options: {', '.join(OPTIONS[kind])}" if kind in OPTIONS else ""
            raise ValueError(
                f"{name}={spec!r}: the option {option!r} is not understood, or there twice{known}, "
                "each as name=value, numbers whole"
            )
        options[key] = value
    return Source(kind, place, options, spec)
