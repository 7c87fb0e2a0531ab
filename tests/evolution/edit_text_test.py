"""Which principles say nothing."""

import pytest

from espl_jax.evolution.edit_text import says_nothing


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "C G0",
        "[G1], C12.",
        "C(C1)",
        "G",
        "C.",
        "(none)",
        "N/A.",
        "[the new principle]",
        "\u2149[the new principle]",
        "1. a) [the new principle]",
        "(Write the new principle here).",
        "<insert instruction>",
        "(the principle is missing)",
    ],
)
def test_blanks(text):
    assert says_nothing(text)


@pytest.mark.parametrize(
    "text",
    [
        "(a) Name the principle of each step. (b) Apply it.",
        "State the principle (of Archimedes)",
        "[x] is an index.",
        r"\boxed{...}",
        "Apply [the principle].",
        "Call it C.",
        "G0 is wrong.",
        "None of the units may be left out.",
    ],
)
def test_principles(text):
    assert not says_nothing(text)
