"""Against sentencepiece itself: models trained here, handed over as llama.cpp's converter does."""

import io

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from espl_jax.pretrained.gguf.sentencepiece import merges_from_scores
from espl_jax.pretrained.gguf.tokenizer import stop_ids_from_metadata, tokenizer_from_metadata
from tests.conftest import ROOT

CORPUS = (ROOT / "README.md").read_text(encoding="utf-8").splitlines() + [
    "naïve café, Ünïcödé, Привет, мир; 漢字かな交じり文",
    "def f(x):    return x + 1        # a comment",
] * 20

GEMMA_LIKE = ["\n", "\n\n", "\n\n\n", "\t", "▁▁", "▁▁▁", "▁▁▁▁", "<table>", "</table>"]
"""User-defined symbols, runs of white space among them."""


def trained(space_prefix, user_defined=()):
    """(the processor, metadata of the same model as llama.cpp's converter writes it)."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=file,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=space_prefix,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=list(user_defined),
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    tokens, scores, kinds = [], [], []
    for i in range(sp.get_piece_size()):
        piece, kind = sp.id_to_piece(i), 1
        if sp.is_unknown(i):
            kind = 2
        elif sp.is_control(i):
            kind = 3
        elif sp.is_byte(i):
            kind = 6
        elif piece in user_defined:
            kind, piece = 4, piece.replace("▁", " ")
        tokens.append(piece)
        scores.append(sp.get_score(i))
        kinds.append(kind)
    return sp, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }


@pytest.fixture(scope="module")
def llama_like():
    sp, metadata = trained(space_prefix=True)
    return sp, tokenizer_from_metadata(metadata), metadata


@pytest.fixture(scope="module")
def gemma_like():
    sp, metadata = trained(space_prefix=False, user_defined=GEMMA_LIKE)
    return sp, tokenizer_from_metadata(metadata), metadata


# sentencepiece cannot be given lone surrogates, and reads the end of a string at a zero byte.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
CORPUS_TEXT = st.lists(
    st.sampled_from([*" \n\t.,", *" ".join(CORPUS).split(), *GEMMA_LIKE, "  ", "     "]), max_size=30
).map("".join)


@pytest.mark.parametrize("like", ["llama_like", "gemma_like"])
class TestParity:
    @settings(max_examples=300)
    @example("")
    @example(" ")
    @example("  two  spaces   and ▁ more ")
    @example("🙂👩‍👩‍👧‍👦 漢字 \x01\x7f")
    @example("\n\n\n\n\n\t\t<table></table")
    @given(text=ANY_TEXT | CORPUS_TEXT)
    def test_encoding(self, request, like, text):
        sp, tokenizer, _ = request.getfixturevalue(like)
        assert tokenizer.encode(text, add_special_tokens=False) == sp.encode(text)

    @settings(max_examples=300)
    @given(text=ANY_TEXT | CORPUS_TEXT)
    def test_decoding(self, request, like, text):
        sp, tokenizer, _ = request.getfixturevalue(like)
        tokens = sp.encode(text)
        assert tokenizer.decode(tokens) == sp.decode(tokens) == text.replace("▁", " ")

    def test_special_tokens(self, request, like):
        sp, tokenizer, metadata = request.getfixturevalue(like)
        start, end = (sp.piece_to_id(f"<{edge}_of_turn>") for edge in ("start", "end"))
        tokens = tokenizer.encode("<start_of_turn>user\nHi<end_of_turn> there")
        assert tokens == [sp.bos_id(), start, *sp.encode("user\nHi"), end, *sp.encode(" there")]
        assert tokenizer.decode(tokens, skip_special_tokens=True).split() == ["user", "Hi", "there"]
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
        assert tokenizer.all_special_tokens == ["<s>", "</s>", "<unk>"]
        assert stop_ids_from_metadata(metadata) == (sp.eos_id(), end)
        assert len(tokenizer) == sp.get_piece_size()
        for flag in (False, True):
            changed = metadata | {"tokenizer.ggml.add_bos_token": flag, "tokenizer.ggml.add_eos_token": True}
            expected = [sp.bos_id()] * flag + sp.encode("Hi") + [sp.eos_id()]
            assert tokenizer_from_metadata(changed).encode("Hi") == expected

    def test_saved_and_loaded(self, request, like, tmp_path):
        _, tokenizer, _ = request.getfixturevalue(like)
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        for text in [*CORPUS, "  a\n\n\n b <table>  漢 🙂"]:
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_without_bytes_what_is_not_in_the_vocabulary_is_unknown():
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "▁a"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -2.0, -3.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = tokenizer_from_metadata(metadata)
    assert tokenizer.encode("a aaxya") == [1, 5, 5, 4, 0, 4]
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.scores is missing"):
        tokenizer_from_metadata({k: v for k, v in metadata.items() if not k.endswith("scores")})


def test_merges_by_score():
    pieces = {"a": -9.0, "b": -9.0, "ab": -2.0, "abb": -1.0, "bb": -3.0, "xab": 0.0}
    assert merges_from_scores(pieces) == [("ab", "b"), ("a", "bb"), ("a", "b"), ("b", "b")]


@pytest.mark.parametrize("kind", [1, 4], ids=["normal", "user-defined"])
def test_ends_of_turns_are_control_tokens_whatever_their_type(gemma_like, kind):
    _, tokenizer, metadata = gemma_like
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    kinds = list(metadata["tokenizer.ggml.token_type"])
    kinds[end] = kind
    changed = metadata | {"tokenizer.ggml.token_type": kinds}
    assert end in stop_ids_from_metadata(changed)
    text = "a b<end_of_turn>\n c"
    built = tokenizer_from_metadata(changed)
    assert built.encode(text) == tokenizer.encode(text)
    assert "<end_of_turn>" not in built.decode(built.encode(text), skip_special_tokens=True)
