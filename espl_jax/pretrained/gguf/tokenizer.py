"""The tokenizer that a GGUF file's metadata describes, as transformers would run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from espl_jax.pretrained.gguf.bpe import byte_level_bpe
from espl_jax.pretrained.gguf.sentencepiece import SPACE, sentencepiece_bpe

MODELS = ("gpt2", "llama")
"""Values of `tokenizer.ggml.model`: byte-level BPE, and SentencePiece BPE."""

BEGINS_WITH_BOS = {"llama-bpe", "llama3", "llama-v3", "tekken"}
"""Values of `tokenizer.ggml.pre` that mean add_bos_token where the file does not say (SentencePiece too)."""

END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
"""Tokens that end a turn, although many files name only another one as `eos`."""

_BEGINS_TURN = ("<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<start_of_turn>")


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether a GGUF file was converted with its vocabulary."""
    return metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of a GGUF file.

    Args:
      metadata: the file's fields by their GGUF names (`GGUFFile.metadata`).

    Returns:
      A tokenizer with the file's special tokens, `bos`, `eos`, `unk`, `pad` and chat template. It begins and
      ends texts with `bos` and `eos` where the file says so, unless called with `add_special_tokens=False`,
      as for what a chat template rendered.

    Raises:
      ValueError: for another kind of tokenizer, or a missing field.
    """
    model = _field(metadata, "model")
    if model not in MODELS:
        raise ValueError(f"tokenizer.ggml.model={model!r} is not supported; supported: {', '.join(MODELS)}")
    if model == "gpt2":
        tokens, tokenizer, normalized = _byte_level(metadata)
    else:
        tokens, tokenizer, normalized = _sentencepiece(metadata)
    # Matched whole, before any merging.
    kinds = _token_types(metadata)
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                special=kind == TokenType.CONTROL,
                normalized=normalized and kind == TokenType.USER_DEFINED,
            )
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    special = {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    begins = model == "llama" or metadata.get("tokenizer.ggml.pre") in BEGINS_WITH_BOS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_templates(metadata),
        clean_up_tokenization_spaces=False,
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", begins),
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        **special,
    )


def stop_ids_from_metadata(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer: `eos`, then the ends of a turn or message, each once.

    Those that the file names (`eos_token_id`, `eot_token_id`, `eom_token_id`), and `END_OF_TURN`, whatever
    type the file gives them. What `eos_token_id` of a generation config lists.
    """
    ids = {token: i for i, token in enumerate(_field(metadata, "tokens"))}
    known = [ids[token] for token in END_OF_TURN if token in ids]
    return tuple(dict.fromkeys(_named_ends(metadata) + known))


def _named_ends(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that the file itself names as ends.

    Raises:
      ValueError: one is not an id of the file's tokens.
    """
    count = len(_field(metadata, "tokens"))
    fields = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ends = {field: metadata[field] for field in fields if field in metadata}
    for field, end in ends.items():
        if not 0 <= end < count:
            raise ValueError(
                f"{field}={end}: the file has {count} tokens; correct the field, or convert the file again"
            )
    return list(ends.values())


def _token_types(metadata: Mapping[str, Any]) -> list[int]:
    """The file's `token_type`, but marks and named ends of turns are control tokens: converters write them as
    ordinary or user-defined tokens, too."""
    kinds = list(_field(metadata, "token_type"))
    marks = {*END_OF_TURN, *_BEGINS_TURN}
    controls = [i for i, token in enumerate(_field(metadata, "tokens")) if token in marks]
    for i in controls + _named_ends(metadata):
        if kinds[i] in (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED):
            kinds[i] = TokenType.CONTROL
    return kinds


def _chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The file's chat template, or several by their names, the unnamed one as `default`."""
    default, prefix = metadata.get("tokenizer.chat_template"), "tokenizer.chat_template."
    named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if not named:
        return default
    return named if default is None else {"default": default, **named}


def _field(metadata: Mapping[str, Any], name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise ValueError(f"the field {key} is missing: the file has no usable tokenizer; convert it anew")
    return metadata[key]


def _byte_level(metadata: Mapping[str, Any]) -> tuple[list[str], Tokenizer, bool]:
    tokens = _field(metadata, "tokens")
    return tokens, byte_level_bpe(tokens, _field(metadata, "merges"), _field(metadata, "pre")), False


def _sentencepiece(metadata: Mapping[str, Any]) -> tuple[list[str], Tokenizer, bool]:
    """(tokens as they are to be spelled, tokenizer, whether user-defined ones match in normalized text).

    They do in SentencePiece; files spell them with plain spaces all the same. But where every stretch of
    text gets a space in front, normalizing would put one into the token too.
    """
    kinds = _token_types(metadata)
    space_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokens = [
        token.replace(" ", SPACE) if kind == TokenType.USER_DEFINED and not space_prefix else token
        for token, kind in zip(_field(metadata, "tokens"), kinds, strict=True)
    ]
    tokenizer = sentencepiece_bpe(tokens, _field(metadata, "scores"), kinds, space_prefix)
    return tokens, tokenizer, not space_prefix
