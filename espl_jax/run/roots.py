"""The initial population of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from espl_jax.evolution import population as populations
from espl_jax.run.config import Config
from espl_jax.storage import json_values
from espl_jax.types import SystemPrompt


def first_population(config: Config) -> populations.Population:
    """Returns a population of the root prompt, of the user's initial prompts, or of an earlier run.

    Raises:
      ValueError: if `population.start_from` is neither a saved population nor a file of prompts.
    """
    c = config.population
    if not c.start_from:
        return populations.start([SystemPrompt(text=c.text, principles=tuple(c.principles))], c.max_size)
    text = Path(c.start_from).expanduser().read_text(encoding="utf-8")
    try:
        population = _read_population(text, c)
        for member in population.members:
            json_values.check_characters(member.render(), f"the prompt {member.id}")
        return _no_principles_in_prose(population, config)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"population.start_from={c.start_from!r}: {error}; give the population.json of a run, or "
            'a .jsonl file with one prompt per line, {"text": ..., "principles": [...]}'
        ) from None


def _read_population(text: str, c: Any) -> populations.Population:
    if not c.start_from.endswith(".jsonl"):
        saved = populations.from_json(json_values.parse(text))
        return dataclasses.replace(saved, members=saved.members[-c.max_size :], max_size=c.max_size)
    # Not splitlines, which also splits at characters that are valid inside JSON strings.
    roots = [_root(line, i) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return populations.start(roots, c.max_size)


def _root(text: str, line: int) -> SystemPrompt:
    try:
        given = json_values.parse(text)
    except ValueError as error:
        raise ValueError(f"line {line} is not JSON ({error})") from error
    if unknown := given.keys() - {"text", "principles"}:
        raise ValueError(f"line {line} has unknown fields {sorted(unknown)}")
    text, principles = given.get("text", ""), given.get("principles", [])
    listed = isinstance(principles, list) and all(isinstance(each, str) for each in principles)
    if not (isinstance(text, str) and listed):
        raise ValueError(f"line {line}: text must be a string, and principles a list of strings")
    return SystemPrompt(text, tuple(principles))


def _no_principles_in_prose(population: populations.Population, config: Config) -> populations.Population:
    with_principles = [member.id for member in population.members if member.principles]
    if config.evolution.form == "prose" and with_principles:
        raise ValueError(
            f"evolution.form=prose edits only the text, but {', '.join(with_principles)} have principles"
        )
    return population
