"""Mutation and crossover with all their settings side by side, and as the first tests were written for them.

By default they reflect as the paper does: on mixed problems, with summaries of all attempts and JSON edits.
"""

import dataclasses
from pathlib import Path

from espl_jax.evolution import crossover as crossing
from espl_jax.evolution import mutation
from espl_jax.evolution.settings import Evolution, Reflection
from espl_jax.evolution.templates import Templates

FIRST_TEMPLATES = Templates(str(Path(__file__).parents[1] / "evolution" / "first_templates"))
AS_THE_PAPER = {
    "problems": "mixed",
    "show": ("task", "summary", "verdict", "gold"),
    "verbatim_chars": 0,
    "rejected_edits": 0,
    "format": "json",
    "opening": True,
    "templates": FIRST_TEMPLATES,
}


def settings_of(settings):
    """The `Evolution` of these settings; what is left of them stays."""
    named = {field.name for field in dataclasses.fields(Reflection)} & settings.keys()
    asked = AS_THE_PAPER | {name: settings.pop(name) for name in named}
    named = {field.name for field in dataclasses.fields(Evolution)} & settings.keys()
    return Evolution(reflection=Reflection(**asked), **{name: settings.pop(name) for name in named})


def mutate(parent, rollouts, reflect, **settings):
    """`evolution.mutation.mutate`."""
    return mutation.mutate(parent, rollouts, reflect, settings_of(settings), **settings)


def crossover(parents, rollouts, reflect, **settings):
    """`evolution.crossover.crossover`."""
    return crossing.crossover(parents, rollouts, reflect, settings_of(settings), **settings)
