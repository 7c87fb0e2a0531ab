"""Principles come out of broken replies as they were written, or not at all."""

import contextlib
import json

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from espl_jax.evolution.edit_replies import clean, parse_edits
from espl_jax.evolution.edits import Add, Remove, Replace

PIECES = [*"\"'{}[]():,.\\/`#“”’ éx🍸", '", "', "', '", '"}', '"]', '"}]', '{"a": ', '": ', "//", "don't"]
PIECES += ["\\n", '\\"', "\\u00e9", "\\frac{1}{2}", "word ", "yes", "[1]", "op", "text"]
principles = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join).map(clean)


def in_quotes(text):
    return json.dumps(text, ensure_ascii=False)


def escaped(text):
    return json.dumps(text)


def quotes_left(text):
    """Quotes inside have no backslash."""
    return '"' + json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"') + '"'


def single(text):
    return "'" + json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"') + "'"


def python(text):
    return repr(text)


def smart(text):
    return "“" + json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"') + "”"


def bare(text):
    return json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')


WRITTEN = [in_quotes, escaped, quotes_left, single, python, smart, bare]
FORMS = {
    "whole": '[{"op": "add", "principle": %s}]',
    "trailing comma": '[{"op": "add", "principle": %s,},]',
    "missing comma": '[{"op": "add" "principle": %s}]',
    "missing brace": '[{"op": "add", "principle": %s]',
    "missing bracket": '[{"op": "add", "principle": %s}',
    "evidence": '[{"op": "add", "principle": %s, "evidence": "It is "so"."}]',
    "evidence first": "[{'op': 'add', 'evidence': 'It's so.', 'principle': %s}]",
    "comment": '[{"op": "add", // new\n "principle": %s // said\n}]',
    "fenced": 'Thus:\n```json\n{"edits": [\n  {"op": "add", "principle": %s}\n]}\n```\nNow "all" {is} said.',
    "prose": 'Add this: {"op": "add", "principle": %s} as "it" helps.',
    "two": '[{"op": "add", "principle": %s}, {"op": "remove", "id": "G7"}]',
    "names without quotes": "{op: add, principle: %s}",
}


def texts_of(edit):
    return {edit.principle} if isinstance(edit, Add) else set()


@given(principles, st.sampled_from(WRITTEN), st.sampled_from(sorted(FORMS)))
@example('Answer "yes", "no", or "unknown": nothing else.', quotes_left, "whole")
@example('Do not end with "}", end with a number.', quotes_left, "whole")
@example("Don't guess, check.", single, "whole")
@example("Have a 🍸.", escaped, "trailing comma")
@example('x"}]', quotes_left, "whole")
@example('Say “no” to "no".', in_quotes, "trailing comma")
def test_no_principle_is_altered_silently(principle, write, form):
    assume(any(character.isalpha() for character in principle))
    if write is bare:  # what the same text may say without a fault is no error of the reader
        assume(principle[0].isalpha() and "," not in principle and "missing" not in form)
    text = FORMS[form] % write(principle)
    with contextlib.suppress(ValueError):
        assume(json.loads(text, strict=False)[0]["principle"] == principle)  # JSON says what it says
    edits, drops = parse_edits(text)
    for edit in edits:
        assert edit == Remove("G7") or texts_of(edit) == {principle}, (text, edit)
    assert any(texts_of(edit) for edit in edits) or drops


@given(principles, st.sampled_from([in_quotes, escaped, python]), st.integers(0, 200))
def test_a_reply_that_is_cut_anywhere_has_whole_principles_alone(principle, write, end):
    assume(any(character.isalpha() for character in principle))
    text = FORMS["two"] % write(principle)
    for edit in parse_edits(text[:end])[0]:
        assert edit == Remove("G7") or texts_of(edit) == {principle}, text[:end]


@given(principles, principles, st.sampled_from([quotes_left, single, smart]))
def test_neighbours_keep_their_texts(one, two, write):
    assume(all(any(character.isalpha() for character in text) for text in (one, two)))
    text = f'[{{"op": "add", "principle": {write(one)}}}, {{"op": "add", "principle": {write(two)},}}]'
    with contextlib.suppress(ValueError):
        json.loads(text, strict=False)
        assume(False)
    edits, drops = parse_edits(text)
    assert {edit.principle for edit in edits} <= {one, two}
    assert len(edits) + len(drops) >= 2


@pytest.mark.parametrize(
    ("text", "edits", "reasons"),
    [
        # A text that may end at several places.
        ('[{"op": "add", "principle": "End with "x"}] or "y"}]', [], ["unclear_end"]),
        ('[{"op": "add", "principle": "Use "a" "text": "b" now"}]', [], ["unclear_end"]),
        ('[{"op": "add", "principle": "A b", "mood": "c",}]', [], ["unclear_end"]),
        ('[{"search": "A b.", "replace": "Say "x"}] or "y"}]', [], ["unclear_end"]),
        # JSON inside of a text is no edit.
        (
            '[{"op": "add", "principle": "No {"op": "remove", "id": "G0"} here"}]',
            [],
            ["truncated", "unclear_end"],
        ),
        # A text does not end in its own quotes or braces, even before what looks like a field.
        (
            '[{"op": "add", "principle": "Reply as {"answer": "5", "reason": "why it holds"}."}]',
            [],
            ["unclear_end"],
        ),
        ('[{"op": "add", "principle": "Give {"a": "5", "evidence": "l"}, no more."}]', [], ["unclear_end"]),
        ('[{"op": "add", "principle": "Reply with "yes", "text": "5"."}]', [], ["unclear_end"]),
        ('[{"op": "add", "principle": "Reply with "yes", "reason": "5"."}]', [], ["unclear_end"]),
        ("[{'op': 'add', 'principle': 'Don't say 'yes', 'reason': '5'.'}]", [], ["unclear_end"]),
        ("[{'op': 'add', 'rule': 'Don't guess', 'why': 'It's so'}]", [Add("Don't guess", "It's so")], []),
        # Nor does another edit begin in it.
        (
            '[{"op": "modify", "id": "G0", "evidence": "it had {"text": "x"}", "principle": "No "text"."}]',
            [],
            ["truncated", "unclear_end"],
        ),
        (
            '[{"op": "modify", "why": "had {"text": "x"}, {"op": "add", "rule": "y"}, so", "id": 5}]',
            [],
            ["truncated", "unclear_end", "unclear_end"],
        ),
        # It does behind the braces of what could not be read.
        (
            '[{"op": "add", "why": "x" "text": "{"rule": "y"} {"id": "G1"}"}, {"op": "remove", "id": "G2"}]',
            [Remove("G2")],
            ["unclear_end"] * 3,
        ),
        ('[{"op": "add", "why": "so,\n{"op": "add", "principle": "A b"}]', [Add("A b")], ["truncated"]),
        # Prose after the answer does not count.
        ('[{"op": "add", "principle": "A b"}]\nThus "{x}" and \\text{"y"}.', [Add("A b")], []),
        ('[{"op": "add", "principle": "A b"}], like {"a": "b"}.', [Add("A b")], []),
        # The id that is missing would make another edit of it.
        ('[{"principle": "A b", "id": "G', [], ["truncated"]),
        ('[{"op": "add", "principle": "A b", "why": "so', [Add("A b")], []),
        # Long texts are read whole.
        ('[{"op": "add", "principle": "' + "word " * 4000 + 'end",}]', [Add("word " * 4000 + "end")], []),
        ("[{'search': 'It\\'s.', 'replace': 'It isn't \"so\".'}]", [Replace("It's.", 'It isn\'t "so".')], []),
    ],
)
def test_kept_whole_or_dropped_for_a_reason(text, edits, reasons):
    read, drops = parse_edits(text)
    assert (list(read), [reason for reason, _ in drops]) == (edits, reasons)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_marked_blocks_keep_their_characters(line_end):
    block = ["<<<<<<< SEARCH", "a\u2028b", "=======", "d\u2029e", ">>>>>>> REPLACE"]
    assert parse_edits(line_end.join(block))[0] == (Replace("a\u2028b", "d\u2029e"),)
