import functools
import random

import numpy as np
import pytest
from gguf import TokenType
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from espl_jax.pretrained.gguf.sentencepiece import SPACE, sentencepiece_bpe
from espl_jax.text.stop_strings import stop_finder, trim
from tests.support import fakes


@functools.cache
def sentencepiece_tokenizer(space_prefix=True):
    """Letters, a few longer pieces, and bytes for all else; its decoder drops a text's first space."""
    pieces = [SPACE, *"abn\tE", "ab", "ba", SPACE + "a", SPACE + "ab", SPACE * 2]
    specials = ["<unk>", "</s>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * len(pieces)]
    inner = sentencepiece_bpe(tokens, [0.0] * len(tokens), kinds, space_prefix)
    inner.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", clean_up_tokenization_spaces=False
    )


def first_count(tokenizer, strings, tokens):
    """Every prefix decoded whole."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        if any(string in text for string in strings):
            return count
    return None


def fed(find, tokens, sizes):
    """What is found first by a row that grows by chunks, the last one until its end."""
    checked = 0
    for size in [*sizes, len(tokens)]:
        end = min(checked + size, len(tokens))
        count = find(tokens[:end], checked)
        if count is not None:
            return count
        checked = end
    return None


STRINGS = st.lists(
    st.text("ab é漢\n", min_size=1, max_size=4) | st.sampled_from(["</answer>", "\n\n", " a", "🙂"]),
    min_size=1,
    max_size=3,
)
SIZES = st.lists(st.integers(1, 40), max_size=12)
NOISE = st.text("ab é漢🙂\n", max_size=60)


def check(tokenizer, strings, tokens, sizes):
    expected = first_count(tokenizer, strings, tokens)
    find = stop_finder(tokenizer, strings)
    assert find(tokens, 0) == expected
    assert fed(find, tokens, sizes) == expected
    if expected is not None:
        text = tokenizer.decode(tokens[:expected], skip_special_tokens=True)
        assert not any(string in trim(text, strings) for string in strings)
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        if "\ufffd" not in whole:
            assert trim(text, strings) == trim(whole, strings)


def encoded(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@given(text=NOISE, strings=STRINGS, sizes=SIZES, places=st.lists(st.integers(0, 60), max_size=4))
@example(text="say stop", strings=["stop"], sizes=[1] * 9, places=[5, 6, 7])
def test_bytes_and_special_tokens(text, strings, sizes, places):
    tokenizer = fakes.tokenizer()
    tokens = encoded(tokenizer, text)
    for place in places:
        tokens.insert(min(place, len(tokens)), tokenizer.eos_token_id)
    check(tokenizer, strings, tokens, sizes)


@settings(max_examples=30)
@given(text=NOISE, strings=STRINGS, sizes=SIZES)
@example(text="The end.</answer> So", strings=["answer"], sizes=[3])
def test_smollm2(smollm2_tokenizer, text, strings, sizes):
    check(smollm2_tokenizer, strings, encoded(smollm2_tokenizer, text), sizes)


@settings(max_examples=30)
@given(tokens=st.lists(st.integers(0, 49_300), max_size=80), sizes=SIZES, data=st.data())
def test_smollm2_writes_noise(smollm2_tokenizer, tokens, sizes, data):
    """Any tokens, half characters and numbers beyond the vocabulary among them; strings out of their text."""
    text = smollm2_tokenizer.decode(tokens, skip_special_tokens=True)
    begin = data.draw(st.integers(0, max(0, len(text) - 1)))
    string = text[begin : begin + data.draw(st.integers(1, 12))].replace("\ufffd", "")
    check(smollm2_tokenizer, [string or "none"], tokens, sizes)


@pytest.mark.parametrize("space_prefix", [True, False])
@settings(max_examples=60)
@given(tokens=st.data(), strings=STRINGS, sizes=SIZES)
def test_sentencepiece(space_prefix, tokens, strings, sizes):
    tokenizer = sentencepiece_tokenizer(space_prefix)
    runs = NOISE.map(lambda text: encoded(tokenizer, text))
    noise = st.lists(st.integers(0, len(tokenizer) - 1), max_size=6)
    parts = tokens.draw(st.lists(runs | noise, max_size=4))
    check(tokenizer, strings, [token for part in parts for token in part], sizes)


def fed_at_every_cut(tokenizer, string, tokens):
    find, expected = stop_finder(tokenizer, [string]), first_count(tokenizer, [string], tokens)
    assert expected is not None
    assert [fed(find, tokens, [cut]) for cut in range(1, len(tokens))] == [expected] * (len(tokens) - 1)


@pytest.mark.parametrize("string", ["stop", "漢字", "🙂", "top 漢"])
def test_a_string_may_begin_long_before_a_chunk(string):
    """Every byte a token, and special tokens and numbers beyond the vocabulary between any two of them."""
    tokenizer = fakes.tokenizer()
    silent = [tokenizer.eos_token_id, 5000, tokenizer.pad_token_id]
    tokens = [t for token in encoded(tokenizer, "é stop 漢字 🙂 so") for t in (token, *silent)]
    fed_at_every_cut(tokenizer, string, tokens)


@pytest.mark.parametrize("between", [[], [1]], ids=["", "special tokens between"])
@pytest.mark.parametrize(
    ("text", "string"),
    [
        ("🙂🙂\n", "\n"),
        ("漢漢漢漢漢漢\nab", "\n"),
        ("ab\n漢", "\n"),
        ("ab a\n漢", " a\n"),
        ("b ab", " ab"),
        ("b b", " b"),
        ("ab b", " "),
    ],
)
def test_a_run_of_byte_pieces_is_decoded_from_its_beginning(text, string, between):
    """Decoded from the middle of a character, such a run is illegible, the line's end in it too."""
    tokenizer = sentencepiece_tokenizer()
    tokens = [t for token in encoded(tokenizer, text) for t in (token, *between)]
    fed_at_every_cut(tokenizer, string, tokens)


def test_the_token_that_completes_a_string_is_counted(smollm2_tokenizer):
    tokens = encoded(smollm2_tokenizer, "Hello there, friend")
    pieces = [smollm2_tokenizer.decode([token]) for token in tokens]
    assert pieces == ["Hello", " there", ",", " friend"]
    find = stop_finder(smollm2_tokenizer, ["o th", "frie"])
    assert find(tokens, 0) == 2
    assert find(tokens[:1], 0) is None
    assert stop_finder(smollm2_tokenizer, ["frie"])(np.array(tokens, np.int32), 2) == 4


def test_a_check_decodes_a_window_only():
    """Of 15,000 tokens, the 32 new ones and what the string may span."""
    tokenizer, decoded = fakes.tokenizer(), []

    class Counting:
        get_vocab, added_tokens_decoder = tokenizer.get_vocab, tokenizer.added_tokens_decoder

        def decode(self, tokens, **options):
            decoded.append(len(tokens))
            return tokenizer.decode(tokens, **options)

    row = random.Random(0).choices(encoded(tokenizer, "abcdefg"), k=15_000)
    assert stop_finder(Counting(), ["</answer>", "stop"])(row, len(row) - 32) is None
    assert decoded == [32 + len("</answer>")]


@pytest.mark.parametrize(
    ("strings", "complaint"),
    [
        (["a", ""], r"stop string 1 of \['a', ''\] is empty"),
        (["\ufffd"], "stop string 0 of .* contains U\\+FFFD"),
        ([], "must be a non-empty list of strings"),
        ("stop", "strings='stop': must be a non-empty list"),
    ],
)
def test_refused(strings, complaint):
    with pytest.raises(ValueError, match=complaint):
        stop_finder(fakes.tokenizer(), strings)
    with pytest.raises(ValueError, match=complaint):
        trim("text", strings)


@pytest.mark.parametrize(
    ("text", "strings", "expected"),
    [
        ("It is 4.\n\nQuestion: 5", ["\n\nQuestion:"], "It is 4."),
        ("no end", ["stop"], "no end"),
        ("stop", ["stop"], ""),
        ("abc", ["abc", "b"], "a"),  # as if it had come letter by letter
        ("xabc", ["bc", "abc"], "x"),
        ("a stop, b stop", ["stop"], "a "),
    ],
)
def test_trim(text, strings, expected):
    assert trim(text, strings) == expected
