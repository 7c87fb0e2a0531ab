"""Token masks by llguidance: what they let through, for every kind of tokenizer."""

import json
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.edits import Add, Merge, Modify, Remove
from espl_jax.evolution.line_edits import KEYWORDS, items_grammar, lines_grammar, parse_items, parse_lines
from espl_jax.evolution.schemas import OPERATIONS, blocks_schema, edits_schema
from espl_jax.text.constrained import GrammarRows
from tests.support.fakes import tokenizer

STOPS = (257, 258)  # two of the byte tokenizer's three special tokens
ADD = edits_schema(("add",), (), max_edits=2)
LINES = lines_grammar(("add", "modify"), ("G0", "G1"), max_edits=2, evidence=True)
TYPES = {"ADD": Add, "CHANGE": Modify, "MERGE": Merge, "REMOVE": Remove}


def rows_of(*grammars, tokens=None, stop_ids=STOPS, vocab_size=259, **settings):
    return GrammarRows(tokens or tokenizer(), grammars, stop_ids=stop_ids, vocab_size=vocab_size, **settings)


def allowed(rows, row=0):
    mask = rows.allowed(np.array([row]))[0]
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def accept(rows, text, row=0):
    for token in tokenizer().encode(text, add_special_tokens=False):
        assert token in allowed(rows, row), (text, tokenizer().decode([token]))
        rows.accept(np.array([row]), np.array([token]))


class Walk:
    """Replies of row 0 from tokens drawn among those allowed, ended as soon as may be after some of them.

    Args:
      tokens: the tokenizer.
      seed: of the draws.
      taste: what is drawn where there is a choice: `any`; `long`, no end of a text before its time; or
        `strange`, no small letters and spaces besides.
    """

    def __init__(self, tokens, seed=0, taste="any"):
        self.tokens, self.taste = tokens, taste
        self.rng = np.random.default_rng(seed)
        self.stop_ids = STOPS if tokens is tokenizer() else (tokens.eos_token_id,)
        written = [tokens.decode([token]) for token in range(len(tokens))]
        self.plain = np.array([bool(re.fullmatch("[a-z ]+", text)) for text in written])
        stops = np.isin(np.arange(len(tokens)), self.stop_ids)
        self.ends = {
            str: stops | np.array(["\n" in text for text in written]),
            dict: stops | np.array(['"' in text for text in written]),
        }

    def reply(self, grammar, most=150):
        """The text of a complete reply, which begins to end after `most` tokens."""
        rows = rows_of(grammar, tokens=self.tokens, stop_ids=self.stop_ids, vocab_size=len(self.tokens))
        drawn = []
        while (
            token := self._token(allowed(rows), self.ends[type(grammar)], len(drawn) >= most)
        ) not in self.stop_ids:
            rows.accept(np.array([0]), np.array([token]))
            drawn.append(token)
            assert len(drawn) < most + 500, "every text may end"
        return self.tokens.decode(drawn, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _token(self, choices, ends, late):
        ending = choices[ends[choices]]
        if late and len(stops := np.intersect1d(ending, self.stop_ids)):
            return stops[0]
        if len(ending) and (late or (self.taste == "any" and self.rng.random() < 0.2)):
            return self.rng.choice(ending)
        if not late and self.taste != "any":
            choices = choices[~ends[choices]] if len(ending) < len(choices) else choices
        if not late and self.taste == "strange" and not self.plain[choices].all():
            choices = choices[~self.plain[choices]]
        return self.rng.choice(choices)


def check(text, schema):
    """A reply validates and parses: every edit of it is there, and none is dropped."""
    value = json.loads(text)
    jsonschema.validate(value, schema)
    edits, drops = parse_edits(text)
    assert not drops and len(edits) == len(value["edits"]), (text, drops)
    for edit in edits:
        assert not isinstance(edit, Merge) or len(set(edit.ids)) >= 2
    return edits


def check_lines(text, evidence=False):
    """A reply in lines is read as one edit a line, of the kind its first word says, and none is dropped."""
    edits, drops = parse_lines(text)
    lines = [] if text == "NONE" else text.split("\n")
    because = [line for line in lines if line.startswith("BECAUSE: ")]
    heads = [line for line in lines if not line.startswith("BECAUSE: ")]
    assert not drops and len(edits) == len(heads), (text, drops)
    assert [type(edit) for edit in edits] == [TYPES[re.match("[A-Z]+", line)[0]] for line in heads]
    for edit in edits:
        assert not isinstance(edit, Merge) or len(set(edit.ids)) >= 2
    told = [edit for edit in edits if not isinstance(edit, Remove)]
    assert len(because) == evidence * len(told)
    assert not evidence or all(edit.evidence for edit in told)
    return edits


SCHEMAS = st.builds(
    lambda operations, count, evidence, minimum: edits_schema(
        ["add", *operations],
        [f"G{i}" for i in range(count)],
        evidence=evidence,
        min_edits=minimum,
        max_edits=minimum + 2,
    ),
    st.sets(st.sampled_from(OPERATIONS)).map(sorted),
    st.integers(0, 12),
    st.booleans(),
    st.integers(0, 1),
) | st.builds(
    blocks_schema,
    st.lists(st.text(max_size=40) | st.sampled_from(['Say "none".', "Use \\frac.", "Zähle 步."]), max_size=6),
    evidence=st.booleans(),
    max_edits=st.integers(1, 3),
)
TASTES = st.sampled_from(["any", "long", "strange"])
SEEDS = st.integers(0, 2**32 - 1)


class TestReplies:
    @settings(max_examples=60)
    @given(SCHEMAS, SEEDS, TASTES, st.integers(0, 300))
    def test_random_walks_validate_and_parse(self, schema, seed, taste, most):
        check(Walk(tokenizer(), seed, taste).reply(schema, most), schema)

    def test_no_text_has_a_longest_length(self):
        for grammar, start, end in (
            (ADD, '{"edits": [{"op": "add", "principle": "', '"}]}'),
            (LINES, "ADD: ", "\nBECAUSE: So."),
        ):
            rows = rows_of(grammar)
            accept(rows, start + "Aa" + "步" * 300 + "x" * 900)
            assert set(tokenizer().encode("x 1步")[:4]) <= set(allowed(rows))
            accept(rows, end)
            assert set(STOPS) <= set(allowed(rows))

    @pytest.mark.parametrize(
        ("start", "never"),
        [
            ("", 'x ["\n'),
            ('{"edits": [', " \n"),
            ('{"edits": [{"op": "add", "principle": "', '" 1\\\n('),
            ('{"edits": [{"op": "add", "principle": "A', '"1'),
            ('{"edits": [{"op": "add", "principle": "A#', '"'),
            ('{"edits": [{"op": "add", "principle": "Ab', "\n\t\r\x00\x7f"),
            ('{"edits": [{"op": "add", "principle": "Ab\\', "unrtbf/'"),
        ],
    )
    def test_what_may_not_follow(self, start, never):
        rows = rows_of(ADD)
        accept(rows, start)
        choices = set(allowed(rows))
        assert choices and choices.isdisjoint({*tokenizer().encode(never), *STOPS})

    def test_quotes_backslashes_and_letters_of_others_may_stand_in_a_text(self):
        rows = rows_of(ADD)
        accept(rows, '{"edits": [{"op": "add", "principle": "Say \\"x\\" or $\\\\frac{1}{π}$."}]}')
        assert set(allowed(rows)) == set(STOPS)


class TestLines:
    @settings(max_examples=60)
    @given(
        st.sets(st.sampled_from(["modify", "remove"])).map(sorted),
        st.integers(0, 12),
        st.sampled_from("GCS"),
        st.booleans(),
        st.integers(0, 1),
        SEEDS,
        TASTES,
        st.integers(0, 300),
    )
    def test_random_walks_parse(self, operations, count, letter, evidence, minimum, seed, taste, most):
        ids = [f"{letter}{i}" for i in range(count)]
        limits = {"max_edits": minimum + 2, "min_edits": minimum}
        grammar = lines_grammar(["add", *operations], ids, evidence=evidence, **limits)
        edits = check_lines(Walk(tokenizer(), seed, taste).reply(grammar, most), evidence)
        assert minimum <= len(edits) <= minimum + 2
        for edit in edits:
            assert {*getattr(edit, "ids", ()), *([edit.id] if hasattr(edit, "id") else [])} <= {*ids}

    @settings(max_examples=20)
    @given(st.integers(2, 8), st.booleans(), SEEDS, TASTES, st.integers(0, 300))
    def test_random_walks_of_merges_parse(self, count, evidence, seed, taste, most):
        ids = [f"C{i}" for i in range(count)]
        grammar = lines_grammar(("merge",), ids, max_edits=3, min_edits=1, evidence=evidence)
        check_lines(Walk(tokenizer(), seed, taste).reply(grammar, most), evidence)

    @pytest.mark.parametrize("number", ["G0.", "C12: 3"])
    def test_a_number_is_no_text(self, number):
        rows = rows_of(LINES)
        for token in tokenizer().encode(f"ADD: {number}"):
            if token not in allowed(rows):
                return
            rows.accept(np.array([0]), np.array([token]))
        assert tokenizer().encode("\n")[0] not in allowed(rows)

    @settings(max_examples=20)
    @given(st.integers(1, 4), SEEDS, TASTES, st.integers(0, 200))
    def test_random_walks_of_whole_lists_parse(self, count, seed, taste, most):
        text = Walk(tokenizer(), seed, taste).reply(items_grammar(count), most)
        assert 1 <= len(parse_items(text)) == len(text.split("\n")) <= count, text

    @pytest.mark.parametrize(
        ("start", "never"),
        [
            ("", "x \n-"),
            ("N", "E"),
            ("ADD: ", " 1-\n\t*"),
            ("ADD: $", '1 \n"'),
            ("ADD: A", "\r\t\x00\x7f"),
            ("CHANGE G", "23 "),
            ("ADD: A 1", "\n"),
            ("ADD: So\n", "A\n"),
            ("ADD: So\nBECAUSE: Be\n", "BN\n"),
            ("ADD: So\nBECAUSE: Be\nADD: Do\nBECAUSE: It", "\n"),
        ],
    )
    def test_what_may_not_follow(self, start, never):
        rows = rows_of(LINES)
        accept(rows, start)
        choices = set(allowed(rows))
        assert choices and choices.isdisjoint(tokenizer().encode(never))
        assert bool(choices & {*STOPS}) == start.endswith("It")

    def test_nothing_is_escaped(self):
        rows = rows_of(LINES)
        text = (
            'ADD: Say "x" or $\\frac{1}{π}$ 🙂.\nBECAUSE: \\boxed{} won\nCHANGE G1: "A" or (b)\nBECAUSE: (so)'
        )
        accept(rows, text)
        assert set(STOPS) <= set(allowed(rows))
        assert check_lines(text, evidence=True)[0].principle == 'Say "x" or $\\frac{1}{π}$ 🙂.'


class TestRows:
    def test_rows_are_apart(self):
        remove = edits_schema(("remove",), ("G0",), max_edits=1, min_edits=1)
        rows = rows_of(ADD, remove, ADD)
        accept(rows, '{"edits": []', row=0)
        accept(rows, '{"edits": [{"op": "r', row=1)
        assert tokenizer().decode(allowed(rows, 2)) == "{" and tokenizer().decode(allowed(rows, 1)) == "e"
        together = rows.allowed(np.array([2, 0, 1]))
        for i, row in enumerate((2, 0, 1)):
            np.testing.assert_array_equal(together[i], rows.allowed(np.array([row]))[0])

    def test_lines_and_json_in_rows_beside_each_other(self):
        rows = rows_of(ADD, LINES, LINES)
        accept(rows, '{"edits"', row=0)
        accept(rows, "CHANGE G1: B", row=1)
        assert tokenizer().decode(allowed(rows, 0)) == ":" and tokenizer().decode(allowed(rows, 2)) == "ACN"
        text = "text as a grammar"
        quoted = rows_of({"enum": [text]}, f'start: "{text}"')
        accept(quoted, f'"{text}"', row=0)
        accept(quoted, text, row=1)

    def test_rows_begin_after_an_answer_where_that_is_asked_for(self):
        everyone = np.arange(3)
        assert rows_of(ADD, LINES, ADD).active(everyone).all()
        rows = rows_of(ADD, LINES, ADD, after_answer=True)
        assert not rows.active(everyone).any()
        rows.answered(np.array([1]))
        assert rows.active(everyone).tolist() == [False, True, False]
        assert rows.active(np.array([1, 1, 0])).tolist() == [True, True, False]
        accept(rows, "NONE", row=1)
        rows.answered(np.array([0, 2]))
        assert rows.active(everyone).all()
        accept(rows, '{"edits": []}', row=2)
        assert set(allowed(rows, 1)) == set(STOPS) == set(allowed(rows, 2))
        assert tokenizer().decode(allowed(rows, 0)) == "{"

    def test_a_stop_token_ends_a_reply_and_nothing_else(self):
        rows = rows_of(ADD)
        accept(rows, '{"edits": []')
        assert tokenizer().decode(allowed(rows)) == "}"
        accept(rows, "}")
        assert set(allowed(rows)) == set(STOPS)
        rows.accept(np.array([0]), np.array([STOPS[1]]))
        one = rows_of(ADD, stop_ids=(STOPS[0], 5000))
        accept(one, '{"edits": []}')
        assert allowed(one).tolist() == [STOPS[0]]

    @pytest.mark.parametrize("vocab_size", [258, 259, 288, 290, 1000])
    def test_the_model_has_other_tokens_than_the_tokenizer(self, vocab_size):
        rows = rows_of(ADD, stop_ids=(256,), vocab_size=vocab_size)
        assert rows.allowed(np.array([0])).shape == (1, -(-vocab_size // 32))
        seen = set()
        for token in tokenizer().encode('{"edits": [{"op": "add", "principle": "Long rule"}]}'):
            seen.update(allowed(rows).tolist())
            rows.accept(np.array([0]), np.array([token]))
        assert max(seen) < 256 and allowed(rows).tolist() == [256]

    def test_a_token_that_is_not_allowed_is_an_error(self):
        rows = rows_of(ADD, ADD)
        with pytest.raises(RuntimeError, match="row 1 sampled token 5, which was not allowed"):
            rows.accept(np.array([0, 1]), np.array([*tokenizer().encode("{"), 5]))
        with pytest.raises(RuntimeError, match="the reply of row 1 cannot continue"):
            rows.allowed(np.array([0, 1]))

    def test_what_cannot_be_kept_to_is_refused(self):
        with pytest.raises(ValueError, match=r'llguidance rejects the grammar .*"uniqueItems"'):
            rows_of({"type": "array", "items": {"type": "string"}, "uniqueItems": True})
        with pytest.raises(ValueError, match='llguidance rejects the grammar start: "A" NOWHERE'):
            rows_of('start: "A" NOWHERE')
        with pytest.raises(ValueError, match=r"stop_ids=\(5000,\): none is in the vocabulary"):
            rows_of(ADD, stop_ids=(5000,))
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        with pytest.raises(ValueError, match="llguidance cannot read this tokenizer"):
            rows_of(ADD, tokens=words, stop_ids=(0,), vocab_size=1)


def byte_fallback_tokenizer():
    """As Llama 2's: a space is written with another character, and what is in no piece byte by byte."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        '"',
        "{",
        "}",
        "▁[",
        "a",
        "▁a",
        "op",
        "AD",
        ":▁",
        "BE",
        "\n",
    ]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(name, special=True) for name in pieces[:2]])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["byte fallback", "smollm2"])
class TestOtherTokenizers:
    @pytest.fixture
    def tokens(self, kind, request):
        return (
            byte_fallback_tokenizer()
            if kind == "byte fallback"
            else request.getfixturevalue("smollm2_tokenizer")
        )

    def test_random_walks_validate_and_parse(self, tokens):
        schema = edits_schema(OPERATIONS, ("G0", "G1", "C0"), max_edits=2)
        walk = Walk(tokens)
        replies = [walk.reply(schema, most) for most in range(0, 100, 10)]
        for text in replies:
            check(text, schema)
        assert len({*map(len, replies)}) > 1

    @pytest.mark.parametrize("evidence", [False, True])
    @pytest.mark.parametrize(
        "operations",
        [
            ("add", "modify", "remove"),
            tuple(KEYWORDS),
        ],
    )
    def test_random_walks_of_lines_parse(self, tokens, operations, evidence):
        grammar = lines_grammar(operations, ("G0", "G1", "C0"), max_edits=3, evidence=evidence)
        walk = Walk(tokens, seed=evidence)
        replies = [walk.reply(grammar, most) for most in range(0, 100, 5)]
        counts = {len(check_lines(text, evidence)) for text in replies}
        assert counts >= {1, 2, 3}
