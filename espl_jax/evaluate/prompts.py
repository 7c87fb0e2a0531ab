"""System prompts as a command line names them: the text itself, a text file, a member of a population."""

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
    """The system prompt that is meant.

    Args:
      given: the path of a `.txt` file; the path of a `population.json`, `#` and the id of a member; or else
        the prompt's own text. A blank one means no system turn: the chat template's default stands.

    Returns:
      The prompt; its id is made from its text, since random keys are, so that one text draws the same
      rollouts however it was named.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that is not a population, or an id that is not in it.
    """
    path, _, member = given.rpartition("#")
    if path.endswith(".json") and _may_be_path(path):
        prompt = _member(path, member)
    elif given.endswith(".json") and _may_be_path(given):
        prompt = _member(given, "")
    elif given.endswith(".txt") and _may_be_path(given):
        # Editors end a file with a newline.
        prompt = SystemPrompt(_read(given).removesuffix("\n"))
    else:
        prompt = SystemPrompt(given)
    text = prompt.render() if prompt.render().strip() else ""
    return SystemPrompt(text, id=hashlib.sha256(text.encode()).hexdigest()[:12])


def label(given: str) -> str:
    """What a table calls it: the path, or the beginning of the text."""
    line = " ".join(given.split())
    return (line if len(line) <= 40 else f"{line[:37]}...") or DEFAULT


def _may_be_path(text: str) -> bool:
    # The most bytes that Linux takes in a path, and in one name of it.
    path = os.fsencode(text)
    return "\n" not in text and len(path) < 4096 and max(map(len, path.split(b"/"))) <= 255


def _read(path: str) -> str:
    file = folders.parse(path) if folders.is_remote(path) else Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; correct the path, or, if this is the prompt itself, end it otherwise"
        )
    return file.read_text(encoding="utf-8")


def _member(path: str, member: str) -> SystemPrompt:
    try:
        population = populations.from_json(json_values.parse(_read(path)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"not the population.json of a run ({error}); give one") from error
    for prompt in population.members:
        if prompt.id == member:
            return prompt
    ids = ", ".join(prompt.id for prompt in population.members)
    raise ValueError(
        f"{f'there is no member {member!r}' if member else 'no member is named'}; write {path}#ID with one "
        f"of {ids}; the best by rating is {best_rated(population).prompt.id}"
    )
