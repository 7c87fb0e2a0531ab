"""Byte-level BPE from GGUF metadata (`tokenizer.ggml.model` = gpt2).

The file has the merges, but only the name of the pre-tokenization; its patterns are below, as in the original
tokenizers of the models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORD}|\p{{N}}{{1,3}}|{_SIGNS_AND_SPACE}"
_QWEN2 = rf"{_WORD}|\p{{N}}|{_SIGNS_AND_SPACE}"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Used by llama.cpp for files without a name; Falcon's.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "gpt-2": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "starcoder": (_DIGIT, _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "tekken": (_TEKKEN,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
}
"""`tokenizer.ggml.pre` -> patterns, applied in order; each isolates its matches."""

WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "tekken"}
"""Splits for which a word in the vocabulary is one token, even if no merges produce it."""

COMPOSED = {"qwen2", "deepseek-r1-qwen"}
"""Splits for which text is first normalized to NFC."""


def byte_level_bpe(tokens: Sequence[str], merges: Sequence[str], split: str) -> Tokenizer:
    """Returns the tokenizer, without special tokens.

    Args:
      tokens: the vocabulary in order, in GPT-2's printable byte encoding.
      merges: pairs of tokens separated by a space, highest priority first.
      split: a key of `SPLITS`.

    Raises:
      ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre={split!r} is not supported; supported: {', '.join(SPLITS)}")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=cast("list[tuple[str, str]]", [tuple(merge.split(" ")) for merge in merges]),
            ignore_merges=split in WHOLE_WORDS_FIRST,
        )
    )
    if split in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[split]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
