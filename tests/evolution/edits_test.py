"""Edits read from replies good and bad, and applied to lists of principles."""

import json
import random
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from espl_jax.evolution.edit_limits import (
    drop_copies,
    drop_excess,
    drop_not_allowed,
    drop_repeats,
    shorten,
    shorten_edits,
)
from espl_jax.evolution.edits import (
    REASONS,
    Add,
    Merge,
    Modify,
    Remove,
    apply_edits,
    drop_conflicts,
    drop_unknown,
    edit_to_json,
    numbered,
    parse_edits,
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
        ("", ["no_json"]),
        ("I would change nothing.", ["no_json"]),
        ("[]", []),
        ('{"edits": []}', []),
        ('[{"op": "add"}]', ["no_principle"]),
        ('[{"op": "add", "principle": "..."}]', ["no_principle"]),
        ('[{"op": "add", "principle": {"a": 1}}]', ["no_principle"]),
        ('[{"op": "paint", "principle": "x"}]', ["not_an_edit"]),
        ('[{"op": "modify", "principle": "x"}]', ["wrong_ids"]),
        ('[{"op": "modify", "ids": ["G0", "G1"], "principle": "x"}]', ["wrong_ids"]),
        ('[{"op": "merge", "ids": ["G0", "G0"], "principle": "x"}]', ["wrong_ids"]),
        ('[{"op": "remove"}]', ["wrong_ids"]),
        ('[{"op": "add", "principle": "cut off mid sen', ["truncated"]),
        (r'[{"op": "add", "principle": "use \frac{1}{2} and', ["truncated"]),
        ('{"op": ' + "[" * 50 + "}", ["broken_json"]),
    ],
)
def test_dropped_with_a_reason(text, reasons):
    edits, drops = parse_edits(text)
    assert edits == ()
    assert [reason for reason, _ in drops] == reasons


def test_good_edits_survive_beside_bad_ones():
    text = '[{"op": "add"}, {"op": "add", "principle": "Keep me"}, {"op": "x"}, {"op": "remove", "id": "G1"}]'
    edits, drops = parse_edits(text)
    assert edits == (Add("Keep me"), Remove("G1"))
    assert [reason for reason, _ in drops] == ["no_principle", "not_an_edit"]


GARBAGE = [
    *(
        "[",
        "]",
        "{",
        "}",
        '"',
        "'",
        ",",
        ":",
        "\\",
        "/",
        "#",
        "-",
        "“",
        "”",
        "é",
        "😀",
        " ",
        "\n",
        "\x00",
        "\ud800",
    ),
    *("//", "/*", "```", "```json\n", "...", "<|im_end|>", "\\u", "\\ud8", "\\frac{"),
    *("op", "principle", "G1", "null", "true", "NaN", "1e999"),
    *('[{"op": "add", "principle": "', '"}', '"ids": ["G0"', '{"op":', '{"edits": [', '{"a":'),
]


def test_fuzz_never_raises_nor_hangs():
    rng = random.Random(0)
    good = '[{"op": "add", "principle": "A b"}, {"op": "merge", "ids": ["G0", "C1"], "principle": "c"}]'
    good = f"```json\n{good}\n```"
    slowest = 0.0
    for i in range(3000):
        if i % 3 == 0:
            text = "".join(rng.choices(GARBAGE, k=rng.randrange(60)))
        elif i % 3 == 1:
            text = rng.randbytes(rng.randrange(300)).decode(
                "utf-8", rng.choice(["replace", "surrogateescape"])
            )
        else:
            letters = list(good)
            for _ in range(rng.randrange(1, 8)):
                letters[rng.randrange(len(letters))] = rng.choice(GARBAGE)
            text = "".join(letters[: rng.randrange(1, len(letters))])
        start = time.perf_counter()
        edits, drops = parse_edits(text)
        slowest = max(slowest, time.perf_counter() - start)
        assert {reason for reason, _ in drops} <= set(REASONS)
        json.dumps([edit_to_json(edit) for edit in edits], ensure_ascii=False).encode("utf-8")
        json.dumps(drops, ensure_ascii=False).encode("utf-8")
        apply_edits(SystemPrompt(principles=("x", "y")), edits)
    assert slowest < 5


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
    words = [edit for edit in edits if any(c.isalpha() for c in getattr(edit, "principle", "a"))]
    hypothesis.assume(words == edits)
    read, drops = parse_edits(json.dumps([edit_to_json(edit) for edit in edits]))
    assert drops == ()
    assert [type(edit) for edit in read] == [type(edit) for edit in edits]
    assert [getattr(edit, "ids", getattr(edit, "id", None)) for edit in read] == [
        getattr(edit, "ids", getattr(edit, "id", None)) for edit in edits
    ]


def test_limits_of_a_stage():
    edits = (Add("a b"), Modify("G0", "c"), Remove("G0"))
    assert drop_not_allowed(edits, (Add, Modify))[0] == edits[:2]
    kept, drops = drop_excess(edits, 2)
    assert kept == edits[:2]
    assert [reason for reason, _ in drops] == ["too_many"]
    assert drop_unknown(edits, ["G1"])[0] == edits[:1]


def test_repeats_are_dropped():
    entries = {"G0": "Check the sum.", "C0": "Think."}
    edits = (
        Add("check the SUM"),
        Add("New one."),
        Add("New one"),
        Modify("G0", "Check the sum."),
        Merge(("G0", "C0"), "Think."),
        Remove("G0"),
    )
    kept, drops = drop_repeats(edits, entries)
    assert kept == (edits[1], edits[4], edits[5])
    assert [reason for reason, _ in drops] == ["repeat"] * 3


def test_quotations_of_problems_are_dropped():
    problems = [
        "What is 27 + 58?",
        "Let ABC be a triangle with sides a, b and c such that the sum is odd.",
        "Add.",
    ]
    edits = (
        Add("what is 27 + 58? It is 85."),
        Add("If ABC be a triangle with sides a, b and c, draw it."),
        Add("Add the ones, then 27."),
        Add("58 and then 27 make a sum."),
        Add("Let the sum be odd."),
        Remove("G0"),
    )
    kept, drops = drop_copies(edits, problems)
    assert kept == (edits[2], edits[4], edits[5])
    assert [reason for reason, _ in drops] == ["copies_problem"] * 3


def test_shorten():
    assert shorten("one two three", 3) == "one two three"
    assert shorten("One two three four. Five six seven eight", 6) == "One two three four."
    assert shorten("One two three, four", 3) == "One two three"
    assert shorten("1. Two three four five", 4) == "1. Two three four"
    edits, cut = shorten_edits((Add("a b c"), Remove("G0"), Modify("G0", "a")), 2)
    assert edits == (Add("a b"), Remove("G0"), Modify("G0", "a"))
    assert cut == 1


@hypothesis.given(st.text(), st.integers(1, 40))
def test_shorten_keeps_the_limit_and_a_beginning(principle, max_words):
    short = shorten(principle, max_words)
    assert len(short.split()) <= max_words
    assert " ".join(principle.split()).startswith(" ".join(short.split()))
