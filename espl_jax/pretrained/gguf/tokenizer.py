"""Builds a transformers tokenizer from the metadata of a GGUF file."""

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
"""Values of `tokenizer.ggml.pre` for which add_bos_token defaults to True (as for SentencePiece)."""

END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
"""Tokens that end a turn, even if the file names only another token as `eos`."""

_BEGINS_TURN = ("<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<start_of_turn>")


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Returns whether a GGUF file has a vocabulary."""
    return metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of a GGUF file.

    Args:
      metadata: fields of the file by GGUF name (`GGUFFile.metadata`).

    Returns:
      A tokenizer with the file's special tokens, `bos`, `eos`, `unk`, `pad` and chat template. It adds `bos`
      and `eos` to texts if the file says so, unless called with `add_special_tokens=False`, as for text
      rendered by a chat template.

    Raises:
      ValueError: for an unsupported tokenizer, or a missing field.
    """
    model = _field(metadata, "model")
    if model not in MODELS:
        raise ValueError(f"tokenizer.ggml.model={model!r} is not supported; supported: {', '.join(MODELS)}")
    if model == "gpt2":
        tokens, tokenizer, normalized = _byte_level(metadata)
    else:
        tokens, tokenizer, normalized = _sentencepiece(metadata)
    # Matched before any merges.
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
    """Returns the distinct tokens that end a reply: `eos`, then the ends of a turn or message.

    These are the tokens that the file names (`eos_token_id`, `eot_token_id`, `eom_token_id`), and
    `END_OF_TURN`, whatever their type in the file. They correspond to `eos_token_id` of a generation config.
    """
    ids = {token: i for i, token in enumerate(_field(metadata, "tokens"))}
    known = [ids[token] for token in END_OF_TURN if token in ids]
    return tuple(dict.fromkeys(_named_ends(metadata) + known))


def _named_ends(metadata: Mapping[str, Any]) -> list[int]:
    """Returns the ids that the file names as ends.

    Raises:
      ValueError: if one is not a valid token id.
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
    """Returns the file's `token_type`, with turn markers and named ends changed to control tokens: some
    converters write them as normal or user-defined tokens."""
    kinds = list(_field(metadata, "token_type"))
    marks = {*END_OF_TURN, *_BEGINS_TURN}
    controls = [i for i, token in enumerate(_field(metadata, "tokens")) if token in marks]
    for i in controls + _named_ends(metadata):
        if kinds[i] in (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED):
            kinds[i] = TokenType.CONTROL
    return kinds


def _chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Returns the file's chat template, or several by name, with the unnamed one as `default`."""
    default, prefix = metadata.get("tokenizer.chat_template"), "tokenizer.chat_template."
    named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if not named:
        return default
    return named if default is None else {"default": default, **named}


def _field(metadata: Mapping[str, Any], name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise ValueError(
            f"the field {key} is missing: the file has no usable tokenizer; convert the model again"
        )
    return metadata[key]


def _byte_level(metadata: Mapping[str, Any]) -> tuple[list[str], Tokenizer, bool]:
    tokens = _field(metadata, "tokens")
    return tokens, byte_level_bpe(tokens, _field(metadata, "merges"), _field(metadata, "pre")), False


def _sentencepiece(metadata: Mapping[str, Any]) -> tuple[list[str], Tokenizer, bool]:
    """Returns (normalized tokens, tokenizer, whether user-defined tokens match in normalized text).

    In SentencePiece they do, although files write them with plain spaces. But with a space prefix,
    normalization would also prepend a space to the token.
    """
    kinds = _token_types(metadata)
    space_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokens = [
        token.replace(" ", SPACE) if kind == TokenType.USER_DEFINED and not space_prefix else token
        for token, kind in zip(_field(metadata, "tokens"), kinds, strict=True)
    ]
    tokenizer = sentencepiece_bpe(tokens, _field(metadata, "scores"), kinds, space_prefix)
    return tokens, tokenizer, not space_prefix
