"""Reads system prompts given on a command line: text, a text file, or a member of a population."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from espl_jax.evolution import population as populations
from espl_jax.evolution.deployment import best_rated
from espl_jax.storage import folders, json_values
from espl_jax.types import SystemPrompt

DEFAULT = "(the template's default)"


def read_prompt(given: str) -> SystemPrompt:
    """Returns the system prompt given on the command line.

    Args:
      given: the path of a `.txt` file; the path of a `population.json` followed by `#` and the id of a
        member; otherwise the text of the prompt. A blank text means no system turn, so the default of the
        chat template applies.

    Returns:
      The prompt. Its id is a hash of its text: random keys are derived from the id, so the same text gets the
      same rollouts however it was given.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not a population, or has no member with that id.
    """
    path, _, member = given.rpartition("#")
    if path.endswith(".json") and _may_be_path(path):
        prompt = _member(path, member)
    elif given.endswith(".json") and _may_be_path(given):
        prompt = _member(given, "")
    elif given.endswith(".txt") and _may_be_path(given):
        # Text editors add a final newline.
        prompt = SystemPrompt(_read(given).removesuffix("\n"))
    else:
        prompt = SystemPrompt(given)
    text = prompt.render() if prompt.render().strip() else ""
    return SystemPrompt(text, id=hashlib.sha256(text.encode()).hexdigest()[:12])


def label(given: str) -> str:
    """Returns the display name of a prompt: the path, or the beginning of the text."""
    line = " ".join(given.split())
    return (line if len(line) <= 40 else f"{line[:37]}...") or DEFAULT


def _may_be_path(text: str) -> bool:
    # The limits of Linux, in bytes, for a path and for a file name.
    path = os.fsencode(text)
    return "\n" not in text and len(path) < 4096 and max(map(len, path.split(b"/"))) <= 255


def _read(path: str) -> str:
    file = folders.parse(path) if folders.is_remote(path) else Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; correct the path, or end a prompt in another way than a file name"
        )
    return file.read_text(encoding="utf-8")


def _member(path: str, member: str) -> SystemPrompt:
    try:
        population = populations.from_json(json_values.parse(_read(path)))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"not the population.json of a run ({error}); give the population.json of a run"
        ) from error
    for prompt in population.members:
        if prompt.id == member:
            return prompt
    ids = ", ".join(prompt.id for prompt in population.members)
    raise ValueError(
        f"{f'no member {member!r}' if member else 'no member given'}; write {path}#ID with one of {ids} "
        f"(the best by rating is {best_rated(population).prompt.id})"
    )
