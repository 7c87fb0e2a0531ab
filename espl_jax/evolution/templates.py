"""Prompt templates of reflection: text files with a system turn, a user turn and what asks for the reply."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import re
import string
from pathlib import Path

from espl_jax.types import Conversation

PLACEHOLDERS: dict[str, tuple[set[str], set[str]]] = {
    "summary": ({"problem", "attempt"}, {"answer", "taken", "verdict", "feedback"}),
    "critique": (
        {"principles", "case|attempts"},
        {"case", "problem", "attempts", "answer", "rejected", "format", "max_edits", "max_words"},
    ),
    "critique_prose": (
        {"instructions", "case|attempts"},
        {"case", "problem", "attempts", "answer", "rejected", "format", "max_edits"},
    ),
    "revision": ({"principles", "candidates", "suggestions"}, {"format", "max_words"}),
    "revision_prose": ({"instructions", "suggestions"}, {"format"}),
    "crossover": ({"sets"}, {"format", "max_words"}),
    "crossover_prose": ({"sets"}, {"format"}),
    "reflection": ({"principles", "problems"}, {"rejected", "format", "max_edits", "max_words"}),
    "reflection_prose": ({"instructions", "problems"}, {"rejected", "format", "max_edits"}),
    "rewrite": ({"principles", "problems"}, {"rejected", "max_principles", "max_words"}),
    "rewrite_prose": ({"instructions", "problems"}, {"rejected"}),
}
"""Template -> (placeholders that it must have, placeholders that it may have); `a|b` is one of the two."""

SECTIONS = ("system", "user", "reason", "request", "opening")

_HEADER = re.compile(r"^=== (\w+) ===\n", re.MULTILINE)
_PACKAGED = importlib.resources.files("espl_jax.evolution") / "templates"


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """One stage of reflection.

    Instructions are in the system turn and the data in the user turn, so that all conversations of a stage
    share their prefix. Placeholders are written `$name`; what replaces them is never read again, so dollars
    and braces in the data are safe.

    Attributes:
      name: of the template.
      system: instructions; its placeholders are limits, the same for all conversations of a stage.
      user: the data.
      reason: asks for brief reasoning, at the end of the user turn; empty where the template has none.
      request: asks for the reply: at the end of the user turn, or after brief reasoning in a turn of its own.
      opening: how a free reply begins; empty for the beginning of the format.
    """

    name: str
    system: str
    user: str
    reason: str = ""
    request: str = ""
    opening: str = ""

    def conversation(self, *, reason: bool = False, **values: object) -> Conversation:
        """Returns the filled conversation, which asks for brief reasoning or for the reply.

        Raises:
          KeyError: a placeholder has no value.
        """
        turn = "\n\n".join(filter(None, (self.user, self.reason if reason else self.request)))
        return [
            {"role": "system", "content": _filled(self.system, values)},
            {"role": "user", "content": _filled(turn, values)},
        ]

    def filled_request(self, **values: object) -> str:
        """Returns the turn that asks for the reply after brief reasoning."""
        return _filled(self.request, values)

    @property
    def words(self) -> str:
        """All the text that the reflector sees of the template, without placeholders."""
        return re.sub(r"\$\{?\w+\}?", " ", "\n".join((self.system, self.user, self.reason, self.request)))


@dataclasses.dataclass(frozen=True)
class Templates:
    """The templates of a run.

    Attributes:
      folder: files that replace built-in ones of the same name; empty for none.
    """

    folder: str = ""

    def load(self, name: str) -> PromptTemplate:
        """Returns a template of `PLACEHOLDERS`. Raises ValueError, naming the file, if it is not usable."""
        return _load(name, self.folder)

    def check(self, reasoning: str) -> None:
        """Checks all templates of the folder.

        Args:
          reasoning: as `Reflection.reasoning`.

        Raises:
          ValueError: naming the file and what is wrong with it.
        """
        field = f"reflection.templates={self.folder!r}"
        if not self.folder:
            return
        folder = Path(self.folder).expanduser()
        if not folder.is_dir():
            raise ValueError(f"{field}: there is no such folder; correct the path")
        files = sorted(file.stem for file in folder.glob("*.txt"))
        if unknown := [name for name in files if name not in PLACEHOLDERS]:
            raise ValueError(
                f"{field}: {unknown[0]}.txt is no template; rename it to one of {', '.join(PLACEHOLDERS)}"
            )
        if not files:
            raise ValueError(f"{field}: there is no .txt file in it; add one of {', '.join(PLACEHOLDERS)}")
        for name in files:
            template = self.load(name)
            if reasoning == "brief" and name != "summary" and not (template.reason and template.request):
                raise ValueError(
                    f"{folder / name}.txt: reflection.reasoning=brief needs the sections `=== reason ===` "
                    "and `=== request ===`; add them, or set reflection.reasoning=none"
                )


BUILT_IN = Templates()
"""The templates of the package."""


def template_names() -> list[str]:
    """Returns the names of all templates."""
    return sorted(PLACEHOLDERS)


@functools.cache
def _load(name: str, folder: str) -> PromptTemplate:
    own = Path(folder).expanduser() / f"{name}.txt" if folder else None
    if own is not None and own.is_file():
        try:
            return _read(name, own.read_text(encoding="utf-8"), str(own))
        except UnicodeDecodeError as error:
            raise ValueError(f"{own}: not UTF-8 ({error}); save it as UTF-8") from error
    return _read(name, (_PACKAGED / f"{name}.txt").read_text(encoding="utf-8"), f"{name}.txt")


def _read(name: str, text: str, where: str) -> PromptTemplate:
    _, *parts = _HEADER.split(text)
    titles = parts[::2]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"{where}: the section `=== {twice[0]} ===` is there twice; remove one")
    sections = {title: body.strip() for title, body in zip(titles, parts[1::2], strict=True)}
    if unknown := set(sections) - set(SECTIONS):
        raise ValueError(f"{where}: the section {sorted(unknown)[0]!r} is unknown; use {', '.join(SECTIONS)}")
    if missing := {"system", "user"} - set(sections):
        raise ValueError(f"{where}: the section `=== {sorted(missing)[0]} ===` is missing; add it")
    used: set[str] = set()
    for title, body in sections.items():
        template = string.Template(body)
        if not template.is_valid():
            raise ValueError(
                f"{where}, section {title}: a `$` begins no placeholder; write `$$` for a dollar"
            )
        used.update(template.get_identifiers())
    required, optional = PLACEHOLDERS[name]
    known = {each for entry in required | optional for each in entry.split("|")}
    if unknown := used - known:
        raise ValueError(
            f"{where}: the placeholder ${sorted(unknown)[0]} is unknown; use "
            f"{', '.join(f'${each}' for each in sorted(known))}"
        )
    if missing := [entry for entry in sorted(required) if used.isdisjoint(entry.split("|"))]:
        needed = missing[0].replace("|", " or $")
        raise ValueError(f"{where}: the placeholder ${needed} is missing; add it")
    return PromptTemplate(name, **sections)


def _filled(text: str, values: dict[str, object]) -> str:
    return string.Template(text).substitute(values)
