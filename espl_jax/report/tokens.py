"""Texts of single tokens, for replies that are shown token by token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Decode = Callable[[int], str]
"""Token id -> its text."""


def decoder_of(tokenizer: Any) -> Decode:
    """Returns the function that decodes single tokens. Each id is decoded once.

    A token is decoded after another one, because some tokenizers drop the space at the start of a text. A
    token that ends inside a character has the text U+FFFD.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = tokenizer.decode(anchor)

    @functools.cache
    def decode(token: int) -> str:
        text = tokenizer.decode([*anchor, token])
        return text[len(before) :] if text.startswith(before) else tokenizer.decode([token])

    return decode


def find_decoder(source: str) -> Decode | None:
    """Returns the decoder of a model's tokenizer without loading weights; None if it is not on this machine.

    Args:
      source: `model.source` of a run.
    """
    from espl_jax.pretrained.load import load_tokenizer  # late: it imports transformers, which takes seconds

    try:
        return decoder_of(load_tokenizer(source))
    except (OSError, ValueError, ImportError):
        return None
