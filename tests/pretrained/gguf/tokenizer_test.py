import functools
import itertools

import pytest
import regex
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.pretrained import smollm2
from espl_jax.pretrained.gguf.file import open_gguf
from espl_jax.pretrained.gguf.tokenizer import stop_ids_from_metadata, tokenizer_from_metadata

STRINGS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    " \n \n",
    "Hello, world!",
    "What is 27 + 58?",
    "1234567890",
    "x1y22z333",
    "3.14159",
    "1,000,000",
    "I'll we've don't CAN'T it's",
    "  leading",
    "trailing  ",
    "a  b   c",
    "naïve café",
    "Ünïcödé",
    "漢字かな交じり文",
    "Привет, мир",
    "مرحبا بالعالم",
    "שלום",
    "🙂👩‍👩‍👧‍👦",
    "\\boxed{\\frac{1}{2}}",
    "$x^2 + y^2 = z^2$",
    "def f(x):\n    return x + 1\n",
    '{"edits": [{"op": "add"}]}',
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_end|><|im_end|>",
    "<|endoftext|>",
    "<|im_start",
    "a<file_sep>b",
    "http://example.org/a?b=c&d",
    "--- *** ___ ...",
    "α + β ≠ γ",
    "½ ² ³",
    "x\u00a0y",
    "\u200bz",
    "e\u0301",
    "ｆｕｌｌ",
    "tab\tseparated\tvalues",
    "\r\n",
    "MiXeD CaSe",
    "supercalifragilisticexpialidocious",
    "G0. Check the carry.",
]
# Two at a time they make more than a hundred, and test what happens where they meet.
MANY = list(
    dict.fromkeys(
        STRINGS
        + [a + b for a, b in itertools.pairwise(STRINGS)]
        + [b + a for a, b in itertools.pairwise(STRINGS)]
    )
)


@pytest.fixture(scope="module")
def metadata():
    return open_gguf(smollm2.find_gguf()).metadata


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return tokenizer_from_metadata(metadata)


def printable_bytes():
    """GPT-2's table: bytes that print stand for themselves, the others for characters from 256 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printing}
    return table | {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in table)}


@pytest.fixture(scope="module")
def by_the_book(metadata):
    """Byte-level BPE as published: split, spell in bytes, join the pair of lowest rank until none is left."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    special = [t for t, kind in zip(ids, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    table = printable_bytes()
    word = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    @functools.cache
    def merged(piece):
        parts = [table[byte] for byte in piece.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(pair, 1e9), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == 1e9:
                break
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        return [ids[part] for part in parts if part in ids]

    def encode(text):
        tokens = []
        for chunk in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
            if chunk in special:
                tokens.append(ids[chunk])
                continue
            for part in regex.split(r"(\p{N})", chunk):
                for piece in regex.findall(word, part):
                    tokens += merged(piece)
        return tokens

    return encode


def test_known_tokens(tokenizer):
    messages = [{"role": "user", "content": "1 + 1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text) == [
        *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712),
        *(8182, 2, 198, 1, 4093, 198, 33, 1232, 216, 33, 2, 198, 1, 520, 9531, 198),
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token == "<|endoftext|>"
    assert len(tokenizer) == 49152


def test_parity_with_the_published_algorithm(tokenizer, by_the_book):
    assert len(MANY) > 100
    for text in MANY:
        assert tokenizer.encode(text) == by_the_book(text), repr(text)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co"))))
def test_parity_on_any_text(tokenizer, by_the_book, text):
    assert tokenizer.encode(text) == by_the_book(text)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc"), max_codepoint=0xFFFF)))
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_parity_with_transformers(tokenizer):
    from transformers import AutoTokenizer

    path = smollm2.find_gguf()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers leaves out the step that splits digits singly. It shows only where a space precedes a
    # numeral that the merges would join to it, as in " ²".
    strings = [text for text in MANY if "½ ²" not in text]
    assert len(strings) > 100
    assert [t for t in strings if tokenizer.encode(t) != reference.encode(t, add_special_tokens=False)] == []
    assert tokenizer.chat_template == reference.chat_template
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (
        reference.eos_token_id,
        reference.bos_token_id,
    )


def test_tiny(write_gguf):
    tokenizer = tokenizer_from_metadata(open_gguf(write_gguf({})).metadata)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abcab12<|end|>a<|user|>")) == [
        *("abc", "ab", "1", "2", "<|end|>", "a", "<|user|>")
    ]
    assert tokenizer.decode(tokenizer.encode("<|end|>a<|user|>"), skip_special_tokens=True) == "a<|user|>"
    assert tokenizer.bos_token is None
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_several_chat_templates(metadata):
    named = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ tools }}"}
    default = metadata["tokenizer.chat_template"]
    both = {"default": default, "tool_use": "{{ tools }}"}
    assert tokenizer_from_metadata({**metadata, **named}).chat_template == both
    del both["default"]
    without = {name: value for name, value in metadata.items() if name != "tokenizer.chat_template"}
    assert tokenizer_from_metadata({**without, **named}).chat_template == both


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer.ggml.model": "t5"},
            "tokenizer.ggml.model='t5' is not supported; supported: gpt2, llama",
        ),
        ({"tokenizer.ggml.pre": "bloom"}, "tokenizer.ggml.pre='bloom' is not supported; supported: default"),
    ],
)
def test_other_tokenizers_are_refused(metadata, change, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_metadata({**metadata, **change})
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.merges is missing"):
        tokenizer_from_metadata({k: v for k, v in metadata.items() if k != "tokenizer.ggml.merges"})


def test_ends_of_turns_are_stop_ids():
    metadata = {
        "tokenizer.ggml.tokens": ["<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</turn>", "a"],
        "tokenizer.ggml.token_type": [3, 3, 1, 3, 1],
        "tokenizer.ggml.eos_token_id": 0,
    }
    assert stop_ids_from_metadata(metadata) == (0, 1, 2)
    assert stop_ids_from_metadata(metadata | {"tokenizer.ggml.eot_token_id": 3}) == (0, 3, 1, 2)
    with pytest.raises(ValueError, match=r"eom_token_id=5: the file has 5 tokens; correct the field"):
        stop_ids_from_metadata(metadata | {"tokenizer.ggml.eom_token_id": 5})
    assert stop_ids_from_metadata(metadata | {"tokenizer.ggml.eos_token_id": 1}) == (1, 2)


@pytest.mark.parametrize("kind", [TokenType.NORMAL, TokenType.USER_DEFINED])
@pytest.mark.parametrize("names", [["<|im_end|>"], ["<|im_start|>", "<|im_end|>", "<file_sep>"]])
def test_marks_of_turns_are_control_tokens_whatever_their_type(metadata, tokenizer, kind, names):
    """Another end of turn (here `<file_sep>`) is one because the file names it."""
    ids = tokenizer.convert_tokens_to_ids(names)
    kinds = list(metadata["tokenizer.ggml.token_type"])
    for i in ids:
        kinds[i] = kind
    changed = metadata | {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eos_token_id": 0}
    if "<file_sep>" in names:
        changed["tokenizer.ggml.eot_token_id"] = ids[-1]
    assert set(stop_ids_from_metadata(changed)) == {0, *ids} - {1}
    text = "".join(f"a{name}b" for name in names)
    built = tokenizer_from_metadata(changed)
    assert built.encode(text) == tokenizer.encode(text)
    assert built.decode(built.encode(text), skip_special_tokens=True) == "ab" * len(names)


def test_smollm2_stops_at_the_end_of_a_message(metadata):
    assert stop_ids_from_metadata(metadata) == (2,)
