"""Splits of text into words, and whole tokenizers, against transformers' own of the same families."""

import json
import unicodedata

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from espl_jax.pretrained.gguf.bpe import SPLITS, byte_level_bpe
from espl_jax.pretrained.gguf.tokenizer import tokenizer_from_metadata
from tests.conftest import ROOT

# Unassigned characters may be letters to one version of Unicode and not to another.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn", "Co"), max_codepoint=0x2FFFF))
CONTRACTIONS = ("I'LL", "we've", "'s", "ſ", "K")
NUMERALS_AND_SPACE = ("12345", "٣٤", "²½", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000")
CASES_AND_SIGNS = (
    "HTTPServer",
    "camelCase",
    "Ǆ",
    "ǅ",
    "漢字",
    "かな",
    "e\u0301",
    "…",
    "--",
    "://",
    "/\n",
    "a",
    "$",
    "^~|",
)
TRICKY = st.lists(st.sampled_from([*CONTRACTIONS, *NUMERALS_AND_SPACE, *CASES_AND_SIGNS]), max_size=12).map(
    "".join
)


def words(split, text):
    """The stretches of text in which `split` lets merges happen."""
    pieces = byte_level_bpe([], [], split).pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize("split", sorted(set(SPLITS) & set(GGUF_PRE_TOKENIZER_SPLITS)))
@settings(max_examples=200)
@example(text="I'LL say 12345678 things,\r\n\r\n  to   HTTPServer//\n")
@given(text=ANY_TEXT | TRICKY)
def test_words_are_those_of_transformers_pattern(split, text):
    """In another engine; the one that tokenizers use has older tables of Unicode, hence no new characters."""
    assert words(split, text) == regex.findall(GGUF_PRE_TOKENIZER_SPLITS[split], text)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("gpt-2", ["Hello", " 12345", " won", "'t", " --", " ", " x", "\n"]),
        ("smollm", ["Hello", " ", "1", "2", "3", "4", "5", " won", "'t", " --", " ", " x", "\n"]),
        ("default", ["Hello", " ", "123", "45", " won", "'", "t", " ", "--", " ", " x", "\n"]),
        ("llama-bpe", ["Hello", " ", "123", "45", " won", "'t", " --", " ", " x", "\n"]),
        ("tekken", ["Hello", " ", "1", "2", "3", "4", "5", " won", "'t", " --", " ", " x", "\n"]),
    ],
)
def test_words(split, expected):
    assert words(split, "Hello 12345 won't --  x\n") == expected


@pytest.fixture(scope="module")
def trained():
    """A small vocabulary with merges, as (tokens, merges)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    readme = ROOT / "README.md"
    tokenizer.train([str(readme)], trainer)
    vocab = tokenizer.get_vocab()
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return sorted(vocab, key=vocab.get), merges


@pytest.mark.parametrize(
    ("split", "reference"), [("qwen2", Qwen2Tokenizer), ("gpt-2", GPT2Tokenizer)], ids=["qwen2", "gpt-2"]
)
def test_tokens_are_those_of_transformers(trained, split, reference):
    tokens, merges = trained
    ours = tokenizer_from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": split,
            "tokenizer.ggml.tokens": [*tokens, "<|endoftext|>", "<|im_start|>", "<tool_call>"],
            "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 4],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.eos_token_id": len(tokens),
        }
    )
    vocab = {token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}
    theirs = reference(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges])

    @settings(max_examples=200)
    @given(ANY_TEXT | TRICKY)
    def same(text):
        tokens = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == tokens
        composed = unicodedata.normalize("NFC", text) if split == "qwen2" else text
        assert ours.decode(tokens) == composed

    same()
    assert ours.encode("<|im_start|><tool_call>a") == [len(tokens) + 1, len(tokens) + 2, vocab["a"]]
    assert ours.decode([len(tokens) + 1, len(tokens) + 2], skip_special_tokens=True) == "<tool_call>"


def test_llama3_takes_words_whole_and_begins_with_bos():
    tokens = ["<|begin_of_text|>", "a", "b", "c", "ab", "abc"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    llama3 = tokenizer_from_metadata(metadata | {"tokenizer.ggml.pre": "llama-bpe"})
    assert llama3.encode("abc") == [0, 5]
    assert llama3.encode("abca", add_special_tokens=False) == [4, 3, 1]
    without = metadata | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}
    assert tokenizer_from_metadata(without).encode("abc") == [5]
    assert tokenizer_from_metadata(metadata | {"tokenizer.ggml.pre": "gpt-2"}).encode("abc") == [4, 3]
