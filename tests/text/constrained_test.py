"""Token masks by llguidance: what they let through, for every kind of tokenizer."""

import json

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.edits import Merge
from espl_jax.evolution.schemas import OPERATIONS, blocks_schema, edits_schema, most_bytes
from espl_jax.text.constrained import SchemaRows
from tests.support.fakes import tokenizer

STOPS = (257, 258)  # two of the byte tokenizer's three special tokens
ADD = edits_schema(("add",), (), max_reply_tokens=400, max_edits=2, max_chars=100)


def rows_of(*schemas, tokens=None, stop_ids=STOPS, vocab_size=259):
    return SchemaRows(tokens or tokenizer(), schemas, stop_ids=stop_ids, vocab_size=vocab_size)


def allowed(rows, row=0):
    mask = rows.allowed(np.array([row]))[0]
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def accept(rows, text, row=0):
    for token in tokenizer().encode(text, add_special_tokens=False):
        assert token in allowed(rows, row), (text, tokenizer().decode([token]))
        rows.accept(np.array([row]), np.array([token]))


def walk(rows, choose, stop_ids, decode):
    """A reply of row 0, its tokens chosen among those allowed; the text and how many tokens it took."""
    tokens = []
    while not stop_ids.intersection(choices := allowed(rows).tolist()):
        tokens.append(choose(choices))
        rows.accept(np.array([0]), np.array(tokens[-1:]))
    assert set(choices) == stop_ids
    return decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False), len(tokens)


def check(text, schema):
    """A reply validates and parses: every edit of it is there, and none is dropped."""
    value = json.loads(text)
    jsonschema.validate(value, schema)
    edits, drops = parse_edits(text)
    assert not drops and len(edits) == len(value["edits"]), (text, drops)
    return edits


SCHEMAS = st.builds(
    lambda operations, count, evidence, minimum, **limits: edits_schema(
        ["add", *operations],
        [f"G{i}" for i in range(count)],
        evidence=evidence,
        min_edits=minimum,
        max_edits=minimum + 2,
        **limits,
    ),
    st.sets(st.sampled_from(OPERATIONS)).map(sorted),
    st.integers(0, 12),
    st.booleans(),
    st.integers(0, 1),
    max_reply_tokens=st.integers(200, 500),
    max_chars=st.integers(24, 120),
) | st.builds(
    blocks_schema,
    st.lists(st.text(max_size=40) | st.sampled_from(['Say "none".', "Use \\frac.", "Zähle 步."]), max_size=6),
    evidence=st.booleans(),
    max_edits=st.integers(1, 3),
    max_reply_tokens=st.integers(200, 500),
    max_chars=st.integers(24, 120),
)


class TestReplies:
    @settings(max_examples=60)
    @given(SCHEMAS, st.integers(0, 2**32 - 1), st.sampled_from(["any", "long", "strange"]))
    def test_random_walks_fit_validate_and_parse(self, schema, seed, taste):
        rng = np.random.default_rng(seed)
        (quote,) = tokenizer().encode('"')
        plain = set(tokenizer().encode("abcdefghijklmnopqrstuvwxyz "))

        def choose(choices):
            if taste != "any" and len(choices) > 1:
                choices = [token for token in choices if token != quote] or choices
            if taste == "strange":
                choices = [token for token in choices if token not in plain] or choices
            return int(rng.choice(choices))

        text, steps = walk(rows_of(schema), choose, set(STOPS), tokenizer().decode)
        assert steps == len(text.encode()) <= most_bytes(schema) <= 500
        for edit in check(text, schema):
            assert not isinstance(edit, Merge) or len(set(edit.ids)) >= 2

    def test_the_longest_reply_can_be_written(self):
        long = {"edits": [{"op": "add", "principle": "Aa" + "步" * 12 + "x" * 86}] * 2}
        text = json.dumps(long, ensure_ascii=False)
        rows = rows_of(ADD)
        accept(rows, text)
        assert set(allowed(rows)) == set(STOPS)
        assert len(text.encode()) == most_bytes(ADD)

    @pytest.mark.parametrize(
        ("start", "never"),
        [
            ("", 'x ["\n'),
            ('{"edits": [', " \n"),
            ('{"edits": [{"op": "add", "principle": "', '" 1\\\n('),
            ('{"edits": [{"op": "add", "principle": "A', '"1'),
            ('{"edits": [{"op": "add", "principle": "Ab', "\n\t\r\x00\x7f"),
            ('{"edits": [{"op": "add", "principle": "Ab\\', "unrtbf/'"),
            ('{"edits": [{"op": "add", "principle": "' + "x" * 100, "x"),
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


class TestRows:
    def test_rows_are_apart(self):
        remove = edits_schema(
            ("remove",), ("G0",), max_reply_tokens=400, max_edits=1, max_chars=50, min_edits=1
        )
        rows = rows_of(ADD, remove, ADD)
        accept(rows, '{"edits": []', row=0)
        accept(rows, '{"edits": [{"op": "r', row=1)
        assert tokenizer().decode(allowed(rows, 2)) == "{" and tokenizer().decode(allowed(rows, 1)) == "e"
        together = rows.allowed(np.array([2, 0, 1]))
        for i, row in enumerate((2, 0, 1)):
            np.testing.assert_array_equal(together[i], rows.allowed(np.array([row]))[0])

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
        with pytest.raises(ValueError, match=r'llguidance rejects the schema .*"uniqueItems"'):
            rows_of({"type": "array", "items": {"type": "string"}, "uniqueItems": True})
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
    ]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(name, special=True) for name in pieces[:2]])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["byte fallback", "smollm2"])
def test_other_tokenizers(kind, request):
    tokens = (
        byte_fallback_tokenizer() if kind == "byte fallback" else request.getfixturevalue("smollm2_tokenizer")
    )
    stop, size = tokens.eos_token_id, len(tokens)
    schema = edits_schema(OPERATIONS, ("G0", "G1", "C0"), max_reply_tokens=300, max_edits=2, max_chars=100)
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(10):
        rows = rows_of(schema, tokens=tokens, stop_ids=(stop,), vocab_size=size)
        text, steps = walk(rows, lambda choices: int(rng.choice(choices)), {stop}, tokens.decode)
        check(text, schema)
        assert steps <= len(text.encode()) <= most_bytes(schema)
        lengths.add(steps)
    assert len(lengths) > 1
