"""What is logged of a record, and what is kept out."""

import pytest

from espl_jax.trackers.points import iteration_point, results_point, scalars_of
from espl_jax.trackers.secrets import hyperparameters, redacted
from tests.support import tracked


def test_every_number_has_a_group():
    record = {
        "iteration": 3,
        "reward": 0.5,
        "grad_norm": 2,
        "population": 4,
        "held_out": None,
        "flag": True,
        "environment": {"search calls": 1.5, "odd:name": 2.0, "deep": {"er": 1}},
        "children": ["p1"],
        "no_child": {"mutation": "no_edits"},
        "tournament": {"values": [0.5]},
    }
    assert scalars_of(record) == {
        "rollouts/reward": 0.5,
        "update/grad_norm": 2.0,
        "evolution/population": 4.0,
        "update/flag": 1.0,
        "environment/search calls": 1.5,
        "environment/odd_name": 2.0,
        "environment/deep/er": 1.0,
    }


def test_an_iteration_without_rollouts_or_known_prompts():
    point = iteration_point(tracked.metrics(2), [], {})
    assert point.histograms == {} and point.texts == {}


def test_characters_that_trackers_cannot_hold_are_replaced():
    prompts = {"p2": tracked.member(2)}
    text = iteration_point(tracked.metrics(2), [], prompts).texts["prompts/entered"]
    assert (
        text.splitlines()[1] == "[bold red]never mind[/] <script>alert(1)</script> \ufffd[31m ``` \ufffd end"
    )
    text.encode()


def test_results():
    point = results_point(tracked.results(2))
    assert point.kind == "results" and point.step == 2
    assert point.scalars["test/trained/deployed/accuracy"] == 0.5 and len(point.scalars) == 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:secret@host/x and gs://bucket/y", "https://***@host/x and gs://bucket/y"),
        ("401 for abcdefgh12345", "401 for ***"),
        (
            '{"api_key": "k", "max_tokens": 5, "Token":"t"}',
            '{"api_key": "***", "max_tokens": 5, "Token":"***"}',
        ),
        ("mail me@host", "mail me@host"),
        ("short", "short"),
    ],
)
def test_redacted(text, expected, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdefgh12345")
    monkeypatch.setenv("HF_TOKEN", "short")
    assert redacted(text) == expected


def test_hyperparameters():
    config = {"a": {"b": 1, "c": None, "d": ("x", 2)}, "e": True, "f": "http://u:p@h"}
    assert hyperparameters(config) == {
        "a.b": 1,
        "a.c": "None",
        "a.d": "['x', 2]",
        "e": True,
        "f": "http://***@h",
    }
