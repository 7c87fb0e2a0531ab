"""Edits in lines: what the grammar allows is read whole, and what models write around it does no harm."""

import random
import time

import pytest

from espl_jax.evolution import formats
from espl_jax.evolution.edits import REASONS, Add, Merge, Modify, Remove, describe
from espl_jax.evolution.line_edits import lines_grammar, parse_items, parse_lines
from tests.evolution.fuzz_test import PIECES, REAL


@pytest.mark.parametrize(
    ("text", "edits"),
    [
        (r"ADD: Write the answer as \boxed{answer}.", [Add(r"Write the answer as \boxed{answer}.")]),
        ("CHANGE G2: Check it.", [Modify("G2", "Check it.")]),
        ("MERGE C0 C1: Do both.", [Merge(("C0", "C1"), "Do both.")]),
        ("REMOVE G1: It is wrong.", [Remove("G1", "It is wrong.")]),
        ("REMOVE G1", [Remove("G1")]),
        ("ADD: a\nBECAUSE: b\nADD: c", [Add("a", "b"), Add("c")]),
        ("1. **ADD:** Box it.\n- `CHANGE [G1]: So.`", [Add("Box it."), Modify("G1", "So.")]),
        ('Add: "Box it."\nmodify g0 to: Do it', [Add("Box it."), Modify("G0", "Do it")]),
        ("Merge C0, C1 and G2: All", [Merge(("C0", "C1", "G2"), "All")]),
        ("Here are my edits.\n\nADD: Box it: always.\n\nThis helps.", [Add("Box it: always.")]),
        ("ADD Box it.", [Add("Box it.")]),
        ("DELETE S3: It repeats S1.", [Remove("S3", "It repeats S1.")]),
        ("ADD: G0. Box it.", [Add("Box it.")]),
        ("NONE", []),
        ("None.", []),
    ],
)
def test_read(text, edits):
    assert parse_lines(text) == (tuple(edits), ())


@pytest.mark.parametrize(
    "text", ["", "Nothing.", "Add the two numbers: 3", "Change the order: first this", "We merge them: so"]
)
def test_prose_is_no_edit(text):
    assert parse_lines(text) is None
    assert formats.read("lines", text)[1][0][0] == "no_edit"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ADD: 12", "no_principle"),
        ("ADD: (none)", "no_principle"),
        ("CHANGE: x", "wrong_ids"),
        ("CHANGE G0 G1: x", "wrong_ids"),
        ("MERGE G0: x", "wrong_ids"),
        ("REMOVE: x", "wrong_ids"),
    ],
)
def test_dropped_with_a_reason(text, reason):
    assert [drop for drop, _ in parse_lines(text)[1]] == [reason]


def test_either_format_is_read_where_the_other_is_asked_for():
    in_json, in_lines = '{"edits": [{"op": "add", "principle": "x"}]}', "ADD: x"
    for name in ("lines", "json"):
        assert formats.read(name, in_json) == formats.read(name, in_lines) == ((Add("x"),), ())
        assert formats.read(name, "NONE") == formats.read(name, '{"edits": []}') == ((), ())
    both = f"ADD: y\n{in_json}"
    assert formats.read("lines", both)[0] == (Add("y"),) and formats.read("json", both)[0] == (Add("x"),)


def test_what_is_described_is_read_again():
    for edit in (Add("a b"), Modify("G1", "c"), Merge(("G0", "C1"), "d"), Remove("G2")):
        assert parse_lines(describe(edit)) == ((edit,), ())


def test_a_whole_list():
    assert parse_items('Sure:\n- One thing.\n2. **Two** things\n* 3\nG1. "Four."\nfive') == (
        "One thing.",
        "**Two** things",
        "Four.",
    )


def test_grammars_offer_what_ids_allow():
    alone = lines_grammar(("add", "modify", "merge"), (), max_edits=1, min_edits=1)
    assert "modify" not in alone and "merge" not in alone and "NONE" not in alone
    assert "merge" not in lines_grammar(("add", "modify", "merge"), ("G0",), max_edits=2)
    with pytest.raises(ValueError, match="none is possible with ids"):
        lines_grammar(("modify",), (), max_edits=1)


def test_instructions_name_the_operations_that_are_possible():
    said = formats.instructions("lines", ("add", "modify", "merge"), ("G0",), nothing=True, evidence=True)
    assert "CHANGE G0" in said and "MERGE" not in said and "NONE" in said and "BECAUSE" in said
    said = formats.instructions("json", ("modify", "merge"), ("G0", "C0"))
    assert '["G0", "C0"]' in said and '"add"' not in said and "evidence" not in said


def test_hostile_replies_in_lines():
    """Twenty thousand here; all hundred thousand are in the slow suite, as for JSON."""
    _read_hostile(20_000, seconds=60)


@pytest.mark.slow
def test_a_hundred_thousand_hostile_replies_in_lines():
    _read_hostile(100_000, seconds=60)


def _read_hostile(count, seconds):
    rng = random.Random(7)
    keywords = [
        "ADD",
        "CHANGE",
        "MERGE",
        "REMOVE",
        "BECAUSE",
        "NONE",
        "add",
        "Change",
        ":",
        "：",
        "G0",
        "S1",
        "C0",
        "G999999",
    ]
    pieces = [
        *PIECES,
        *keywords,
        "\n",
        "\n",
        " ",
        "**",
        "- ",
        "1. ",
        "ADD: ",
        "CHANGE G0: ",
        "x" * 500,
        "\u2028",
    ]
    start = time.monotonic()
    read = 0
    for i in range(count):
        if i % 4:
            text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 30)))
        else:
            text = rng.choice(REAL)[: rng.randint(0, 200)] + "".join(rng.choices(pieces, k=5))
        edits, drops = formats.read("lines", text)
        assert (
            edits
            or drops
            or "NONE" in text.upper()
            or "[" in text
            or "because" in text.lower()
            or "evidence" in text.lower()
        ), text
        assert {reason for reason, _ in drops} <= REASONS.keys()
        for edit in edits:
            describe(edit).encode()
        read += bool(edits)
    assert read > count / 20
    assert time.monotonic() - start < seconds
