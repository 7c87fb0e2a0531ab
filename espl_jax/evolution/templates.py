"""Prompt templates of reflection: text files with a system turn, a user turn and an opening of the reply."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import re
import string

from espl_jax.types import Conversation

_HEADER = re.compile(r"^=== (\w+) ===\n", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """One stage of reflection.

    Instructions and the worked example are in the system turn and the data in the user turn, so that all
    conversations of a stage share their prefix. Placeholders are written `$name`; what replaces them is
    never read again, so dollars and braces in the data are safe.

    Attributes:
      system: instructions; its placeholders are limits, the same for all conversations of a stage.
      user: the data.
      opening: how the reply begins, written for models that would not begin so by themselves.
    """

    system: str
    user: str
    opening: str

    def conversation(self, *, opening: bool, **values: object) -> Conversation:
        """The filled conversation; with `opening` its last message begins the model's reply.

        Raises KeyError if a placeholder has no value.
        """
        messages = [
            {"role": "system", "content": string.Template(self.system).substitute(values)},
            {"role": "user", "content": string.Template(self.user).substitute(values)},
        ]
        if opening:
            messages.append({"role": "assistant", "content": self.opening})
        return messages


_FOLDER = importlib.resources.files("espl_jax.evolution") / "templates"


def template_names() -> list[str]:
    """Names of all templates."""
    return sorted(file.name.removesuffix(".txt") for file in _FOLDER.iterdir() if file.name.endswith(".txt"))


@functools.cache
def load_template(name: str) -> PromptTemplate:
    """The template `templates/<name>.txt`; its sections begin `=== system ===`, `=== user ===` and so on."""
    text = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    _, *parts = _HEADER.split(text)
    sections = {title: body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True)}
    return PromptTemplate(**sections)
