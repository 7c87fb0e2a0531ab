"""The tokenizer that a GGUF file's metadata describes: byte-level BPE, as transformers would run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` for tokens that are matched whole, before any merging."""

PRE_TOKENIZERS = ("smollm",)


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of a GGUF file.

    Args:
      metadata: the file's fields by their GGUF names (`GGUFFile.metadata`).

    Returns:
      A tokenizer with the file's special tokens, `bos`, `eos`, `unk`, `pad` and chat template. It adds no
      special token by itself: the chat template writes those that a conversation needs.

    Raises:
      ValueError: for another kind of tokenizer, or a missing field.
    """

    def field(name: str) -> Any:
        key = f"tokenizer.ggml.{name}"
        if key not in metadata:
            raise ValueError(f"the field {key} is missing: the file has no usable tokenizer; convert it anew")
        return metadata[key]

    for name, supported in (("model", ("gpt2",)), ("pre", PRE_TOKENIZERS)):
        if (value := field(name)) not in supported:
            raise ValueError(
                f"tokenizer.ggml.{name}={value!r} is not supported; supported: {', '.join(supported)}"
            )
    tokens = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # "smollm": digits are split singly first, then words as in GPT-2, then bytes become printable characters.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, field("token_type"), strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    special = {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )
