"""Edits read from replies good and bad, and applied to lists of principles."""

import dataclasses
import json
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.edit_text import says_nothing
from espl_jax.evolution.edits import (
    Add,
    Merge,
    Modify,
    Remove,
    Replace,
    apply_edits,
    drop_conflicts,
    drop_unknown,
    edit_from_json,
    edit_to_json,
    numbered,
    replay_edits,
    why_not_replaced,
)
from espl_jax.types import SystemPrompt

REPAIRED = {
    "plain": ('[{"op": "add", "principle": "Check."}]', [Add("Check.")]),
    "fenced": ('Thus:\n```json\n[{"op": "add", "principle": "Check."}]\n```\nDone.', [Add("Check.")]),
    "fence never closed": ('```json\n[{"op": "add", "principle": "Check."}]', [Add("Check.")]),
    "trailing commas": ('[{"op": "add", "principle": "Check.",},]', [Add("Check.")]),
    "missing comma": ('[{"op": "add" "principle": "Check."}]', [Add("Check.")]),
    "comment after an edit": (
        '[{"op": "add", "principle": "A b"}, // one\n# two\n {"op": "remove", "id": "G0"}]',
        [Add("A b"), Remove("G0")],
    ),
    "comment inside an edit": ('[{"op": "add", "principle": "A b" // so\n}]', [Add("A b")]),
    "slashes in a string": (
        '[{"op": "add", "principle": "See http://x.y // there",}]',
        [Add("See http://x.y // there")],
    ),
    "one dict": ('{"op": "add", "principle": "Check."}', [Add("Check.")]),
    "wrapped": ('{"edits": [{"op": "add", "principle": "A b"}]}', [Add("A b")]),
    "wrapped and broken": ('{"edits": [{"op": "add", "principle": "A b",},]}', [Add("A b")]),
    "wrapped and cut off": ('{"edits": [{"op": "add", "principle": "A b"}, {"op": "ad', [Add("A b")]),
    "one dict a line": (
        '{"op": "add", "principle": "A b"}\n{"op": "add", "principle": "C d"}',
        [Add("A b"), Add("C d")],
    ),
    "single quotes": ("[{'op': 'add', 'principle': 'Check it.'}]", [Add("Check it.")]),
    "smart quotes": ("[{“op”: “add”, “principle”: “Check it.”}]", [Add("Check it.")]),
    "smart quotes in a good string": ('[{"op": "add", "principle": "Say “no”."}]', [Add("Say “no”.")]),
    "quotes in a string": ('[{"op": "add", "principle": "Say "no" at once"}]', [Add('Say "no" at once')]),
    "names without quotes": ("[{op: add, principle: Check it}]", [Add("Check it")]),
    "line break in a string": ('[{"op": "add", "principle": "A\nb"}]', [Add("A b")]),
    "no closing brace": ('[{"op": "add", "principle": "A b"]', [Add("A b")]),
    "cut off in the list": (
        '[{"op": "add", "principle": "A b"}, {"op": "add", "principle": "C',
        [Add("A b")],
    ),
    "cut off in the evidence": (
        '[{"op": "add", "principle": "A b", "evidence": "because the',
        [Add("A b")],
    ),
    "brackets in the prose": ('On [0, 1) and {x} we see: [{"op": "add", "principle": "A b"}]', [Add("A b")]),
    "prose with quotes after": ('[{"op": "add", "principle": "A b",}] Hope "it helps', [Add("A b")]),
    "ids written otherwise": (
        '[{"op": "modify", "id": 0, "principle": "A b"}, {"op": "remove", "id": "[g2]"},'
        ' {"op": "merge", "ids": "G3, C1", "principle": "C d"}]',
        [Modify("G0", "A b"), Remove("G2"), Merge(("G3", "C1"), "C d")],
    ),
    "other field names": (
        '[{"operation": "ADD", "text": "A b", "reason": "r"}]',
        [Add("A b", "r")],
    ),
    "operation left out": (
        '[{"principle": "A b"}, {"id": "G1", "principle": "C d"}]',
        [Add("A b"), Modify("G1", "C d")],
    ),
    "number repeated": ('[{"op": "modify", "id": "G1", "principle": "G1. A b"}]', [Modify("G1", "A b")]),
    "empty ids": ('[{"op": "add", "principle": "A b", "ids": []}]', [Add("A b")]),
    "draft before the answer": (
        'First [{"op": "add", "principle": "Draft x"}]. Better:\n[{"op": "add", "principle": "Final x"}]',
        [Add("Final x")],
    ),
    "chatter after the answer": (
        '```json\n[{"op": "add", "principle": "Answer x"}]\n```\nOr [{"op": "add", "principle": "Other x"}]',
        [Add("Answer x")],
    ),
    "a block of prose": ('{"edits": [{"search": "A b.", "replace": "C\\nd"}]}', [Replace("A b.", "C\nd")]),
    "a block that appends": ('[{"op": "replace", "search": "", "replace": "C d"}]', [Replace("", "C d")]),
    "a block with empty evidence": (
        '[{"search": "a", "replace": "b c", "evidence": []}]',
        [Replace("a", "b c")],
    ),
    "a block that deletes": ('[{"search": "A b.", "replace": ""}]', [Replace("A b.", "")]),
    "marked blocks": (
        "Two:\n<<<<<<< SEARCH\nA  b\n=======\nC\nd\n>>>>>>> REPLACE\nand\n<<<<<<< SEARCH\n=======\nE\n"
        ">>>>>>> REPLACE\n<<<<<<< SEARCH\nnever closed",
        [Replace("A  b", "C\nd"), Replace("", "E")],
    ),
    "control characters": ('[{"op": "add", "principle": "A\\u0000\\ud800\\u0007b"}]', [Add("A b")]),
    "emoji": ('[{"op": "add", "principle": "Be \\ud83d\\ude00 glad"}]', [Add("Be 😀 glad")]),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_repaired(name):
    text, expected = REPAIRED[name]
    assert list(parse_edits(text)[0]) == expected


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"Write \frac{1}{2}", r"Write \frac{1}{2}"),
        (r"Write \\frac{1}{2}", r"Write \frac{1}{2}"),
        (r"a \times b \neq c", r"a \times b \neq c"),
        (r"\beta \binom{n}{k} \forall", r"\beta \binom{n}{k} \forall"),
        (r"\theta \to \rho \right) \nu", r"\theta \to \rho \right) \nu"),
        (r"\sqrt{2}, \pi, \(x\), 5\%", r"\sqrt{2}, \pi, \(x\), 5\%"),
        (r"\underline{x} \u00e9", r"\underline{x} é"),
        (r"One.\nThen \"two\"", 'One. Then "two"'),
        (r"tab\there, \nThen", "tab here, Then"),
        (r"it\'s", "it's"),
        (r"\{1, 2\}", r"\{1, 2\}"),
    ],
)
def test_latex_and_escapes(written, meant):
    text = '[{"op": "add", "principle": "X ' + written + '"}]'
    assert parse_edits(text) == ((Add("X " + meant),), ())
    assert parse_edits(text.replace("}]", ",}]"))[0] == (Add("X " + meant),)  # through the repair too


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("", ["no_edit"]),
        ("I would change nothing.", ["no_edit"]),
        ("[]", []),
        ('{"edits": []}', []),
        ('[{"op": "add"}]', ["no_principle"]),
        ('[{"op": "add", "principle": "..."}]', ["no_principle"]),
        ('[{"op": "add", "principle": "(none)"}]', ["no_principle"]),
        ('[{"op": "add", "principle": {"a": 1}}]', ["no_principle"]),
        ('[{"op": "paint", "principle": "x"}]', ["not_an_edit"]),
        ('[{"op": "modify", "principle": "x"}]', ["wrong_ids"]),
        ('[{"op": "modify", "ids": ["G0", "G1"], "principle": "x"}]', ["wrong_ids"]),
        ('[{"op": "merge", "ids": ["G0", "G0"], "principle": "x"}]', ["wrong_ids"]),
        ('[{"op": "remove"}]', ["wrong_ids"]),
        ('[{"search": ["x"], "replace": "y"}]', ["not_an_edit"]),
        # What was cut off must not become a deletion.
        ('[{"search": "A b."}]', ["not_an_edit"]),
        ('[{"search": "A b.", "replace": null}]', ["not_an_edit"]),
        ('{"edits": [{"search": "A b.", "replace": "C and comp', ["truncated"]),
        ("<<<<<<< SEARCH\nA b.\n=======\nC and comp", ["truncated"]),
        ('{"op":"add","principle":' + "[" * 9 + "]" * 9 + "}", ["broken_json"]),
        ('[{"search": "", "replace": "..."}]', ["no_principle"]),
        ('[{"op": "add", "principle": "cut off mid sen', ["truncated"]),
        (r'[{"op": "add", "principle": "use \frac{1}{2} and', ["truncated"]),
        ('{"op": ' + "[" * 50 + "}", ["broken_json"]),
    ],
)
def test_dropped_with_a_reason(text, reasons):
    edits, drops = parse_edits(text)
    assert edits == ()
    assert [reason for reason, _ in drops] == reasons


def test_edits_beyond_what_is_read_are_dropped_with_a_reason():
    one = '{"op": "add", "principle": "A b"}'
    edits, drops = parse_edits(f"[{', '.join([one] * 129)}]")
    assert len(edits) == 100 and [reason for reason, _ in drops] == ["too_many"]
    block = "<<<<<<< SEARCH\nA\n=======\nB c\n>>>>>>> REPLACE\n"
    edits, drops = parse_edits(block * 102 + "<<<<<<< SEARCH\nnever closed")
    assert len(edits) == 100 and [reason for reason, _ in drops] == ["truncated", "too_many", "too_many"]


@pytest.mark.parametrize("opening", ['{"op":"add","principle":', '{"a":', '{"op":"add","x":[{"a":'])
def test_no_depth_exhausts_the_stack(opening):
    unit = opening[-1] if opening.endswith("[") else '{"a":' if "a" in opening[-4:] else "["
    closing = {"[": "]", '{"a":': "}"}[unit]
    for depth in (5, 100, *range(900, 1010)):
        parse_edits(
            opening + unit * depth + "1" + closing * depth + "}]}"[: 1 if opening.count("{") == 1 else 3]
        )


def test_good_edits_survive_beside_bad_ones():
    text = '[{"op": "add"}, {"op": "add", "principle": "Keep me"}, {"op": "x"}, {"op": "remove", "id": "G1"}]'
    edits, drops = parse_edits(text)
    assert edits == (Add("Keep me"), Remove("G1"))
    assert [reason for reason, _ in drops] == ["no_principle", "not_an_edit"]


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "[",
            "{",
            '"',
            "\\",
            " ",
            "]",
            '",',
            '" ',
            "//",
            '{"a":',
            '[{"',
            '{"op":[',
            '{"a": "',
            '{"a":[1,',
            "{'op':'",
        ),
        *('{"op":"add","principle":"x', '{ "op" :"//', '{"op": "add", "principle": "x",} '),
    ],
)
def test_long_and_deep_replies_end_soon(unit):
    for text in (unit * 60_000, '[{"op": "add", "principle": "' + unit * 20_000):
        start = time.perf_counter()
        parse_edits(text)
        assert time.perf_counter() - start < 5


def test_apply_each_operation():
    prompt = SystemPrompt(text="t", principles=("a", "b", "c", "d"), id="p0", mu=1.0)
    edits = [Merge(("G3", "G1"), "bd"), Remove("G2"), Modify("G0", "A"), Add("e")]
    assert apply_edits(prompt, edits) == SystemPrompt(text="t", principles=("A", "bd", "e"), id="p0", mu=1.0)


def test_ids_mean_the_list_before_any_edit():
    prompt = SystemPrompt(principles=("a", "b"))
    assert apply_edits(prompt, [Remove("G0"), Modify("G1", "B")]).principles == ("B",)


def test_the_later_of_two_edits_of_one_id_is_dropped():
    edits = (Modify("G0", "x"), Merge(("G0", "G1"), "y"), Remove("G1"))
    assert drop_conflicts(edits)[0] == (Modify("G0", "x"), Remove("G1"))
    assert drop_conflicts(edits)[1][0][0] == "conflict"
    assert apply_edits(SystemPrompt(principles=("a", "b")), edits).principles == ("x",)


principles = st.lists(st.text(min_size=1, max_size=8), max_size=6).map(tuple)
known_ids = st.integers(0, 5).map("G{}".format)
text = st.text(min_size=1, max_size=8)
any_edit = st.one_of(
    st.builds(Add, text),
    st.builds(Modify, known_ids, text),
    st.builds(Merge, st.lists(known_ids, min_size=2, max_size=4, unique=True).map(tuple), text),
    st.builds(Remove, known_ids),
)


@hypothesis.given(principles, st.lists(any_edit, max_size=6))
def test_applied_lists_add_up(before, edits):
    prompt = SystemPrompt(principles=before)
    after = apply_edits(prompt, edits)
    valid = drop_conflicts(drop_unknown(edits, numbered(before))[0])[0]
    gone = sum(isinstance(edit, Remove) for edit in valid)
    gone += sum(len(edit.ids) - 1 for edit in valid if isinstance(edit, Merge))
    assert len(after.principles) == len(before) - gone + sum(isinstance(edit, Add) for edit in valid)
    # Numbers on the page are contiguous from G0, whatever was removed.
    listed = list(numbered(after.principles))
    assert listed == [f"G{i}" for i in range(len(after.principles))]
    assert after == apply_edits(prompt, valid)


@hypothesis.given(principles, st.lists(any_edit, max_size=6))
def test_untouched_principles_keep_their_text_and_order(before, edits):
    touched = {name for edit in edits for name in getattr(edit, "ids", [getattr(edit, "id", None)])}
    kept = [principle for name, principle in numbered(before).items() if name not in touched]
    after = iter(apply_edits(SystemPrompt(principles=before), edits).principles)
    assert all(principle in after for principle in kept)  # a subsequence: the iterator moves on


@hypothesis.given(principles)
def test_invalid_edits_change_nothing(before):
    prompt = SystemPrompt(principles=before)
    edits = [Modify("G9", "x"), Merge(("G0", "G9"), "x"), Remove("C0"), Merge(("C0", "C1"), "x")]
    assert apply_edits(prompt, edits) == prompt


@hypothesis.given(st.lists(any_edit, min_size=1, max_size=4))
def test_what_is_written_is_read_again(edits):
    hypothesis.assume(not any(says_nothing(edit.principle) for edit in edits if hasattr(edit, "principle")))
    read, drops = parse_edits(json.dumps([edit_to_json(edit) for edit in edits]))
    assert drops == ()
    assert [type(edit) for edit in read] == [type(edit) for edit in edits]
    assert [getattr(edit, "ids", getattr(edit, "id", None)) for edit in read] == [
        getattr(edit, "ids", getattr(edit, "id", None)) for edit in edits
    ]


def test_blocks_are_applied_exactly_or_not_at_all():
    prompt = SystemPrompt(text="Be brief. Be kind.", principles=("a",))
    blocks = [Replace("Be brief.", "Think first."), Replace("", "Check it."), Replace("Be kind. ", "x")]
    after = apply_edits(prompt, blocks)
    assert after == dataclasses.replace(prompt, text="Think first. Be kind.\n\nCheck it.")
    assert why_not_replaced(prompt.text, Replace("be brief.", "x")) == "not_found"
    assert why_not_replaced(prompt.text, Replace("Be ", "x")) == "ambiguous"
    assert why_not_replaced(prompt.text, Replace("Be kind.", "Be kind.")) == "no_change"
    assert apply_edits(prompt, [Replace("Be ", "x"), Replace("nowhere", "x")]) == prompt
    assert apply_edits(SystemPrompt(), [Replace("", "New.")]).text == "New."
    assert apply_edits(prompt, [Replace(" Be kind.", "")]).text == "Be brief."


any_block = st.builds(Replace, st.sampled_from(["", "ab", "b", "a b", "zz"]), text)


@hypothesis.given(principles, st.lists(st.one_of(any_edit, any_block), max_size=8))
def test_what_was_applied_can_be_replayed_from_its_record(before, edits):
    prompt = SystemPrompt(text="a b ab", principles=before)
    record = json.loads(json.dumps([edit_to_json(edit) for edit in edits]))
    assert replay_edits(prompt, record) == apply_edits(prompt, edits)
    assert [edit_from_json(item) for item in record] == edits


def test_the_record_of_a_revision_names_its_candidates():
    record = [
        {"op": "add", "id": "C0", "principle": "c"},
        {"op": "add", "id": "C1", "principle": "d"},
        {"op": "merge", "ids": ["C0", "G1"], "principle": "bc"},
    ]
    assert replay_edits(SystemPrompt(principles=("a", "b")), record).principles == ("a", "bc", "d")
    with pytest.raises(ValueError, match="is no edit"):
        replay_edits(SystemPrompt(), [{"op": "paint"}])
    with pytest.raises(ValueError, match="is no edit"):
        replay_edits(SystemPrompt(), [{"op": "remove", "id": "G0", "colour": "red"}])
