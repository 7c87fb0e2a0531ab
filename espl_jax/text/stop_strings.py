"""Strings that end a reply, found in its tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""What a decoder writes for the bytes of a character that is not complete."""

_STEP = 32

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
"""How SentencePiece spells a byte that belongs to no piece."""


def stop_finder(
    tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]
) -> Callable[[list[int] | np.ndarray, int], int | None]:
    """A function that says after how many tokens a text first contains one of several strings.

    Text is what `tokenizer.decode(..., skip_special_tokens=True)` makes of a row's completion alone: special
    tokens are no part of it, and a string may span them. Where a string ends in the middle of a token, that
    token belongs to the answer.

    Args:
      tokenizer: whose tokens they are.
      strings: at least one, none of them empty.

    Returns:
      `find(tokens, checked)`: the least n such that the text of `tokens[:n]` contains a string, or None.
      `tokens` is all of the completion so far, any sequence of integers; the first `checked` of them have
      been looked at before and contain none.

      It decodes the tokens after `checked` once, 32 at a time, together with as many before them as the
      longest string has bytes, whatever the length of the row: about 20 microseconds for a chunk of 32. Only
      a step in which something is found is decoded token by token.

    Raises:
      ValueError: for a string that is empty or contains U+FFFD, which stands for every unfinished character.
    """
    _check(strings)
    vocabulary = tokenizer.get_vocab()
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    written = frozenset(vocabulary.values()) - special
    # A run of byte pieces is decoded as one, and cut inside of a character it would be illegible to its end.
    bytes_ = frozenset(token for piece, token in vocabulary.items() if _BYTE_PIECE.fullmatch(piece))
    # Each token that is written adds a byte or more, so a string that ends in a new token began fewer tokens
    # ago than it has bytes. One more stands before it: some decoders drop the space that a text begins with.
    reach = max(len(string.encode()) for string in strings)

    def window(tokens: list[int] | np.ndarray, end: int) -> int:
        """Where to begin to decode, so as to see every string that ends after token `end`."""
        first, missing = end, reach
        while first and (missing > 0 or tokens[first] in bytes_ or tokens[first] not in written):
            first -= 1
            missing -= tokens[first] in written
        return first

    def decoded(tokens: list[int] | np.ndarray) -> str:
        return cast(str, tokenizer.decode(tokens, skip_special_tokens=True))

    def found(text: str) -> bool:
        return any(string in text for string in strings)

    def find(tokens: list[int] | np.ndarray, checked: int) -> int | None:
        for begin in range(checked, len(tokens), _STEP):
            first, end = window(tokens, begin), min(begin + _STEP, len(tokens))
            text = decoded(tokens[first:end])
            # An unfinished character makes a whole run of byte pieces illegible, a string in it too.
            if found(text) or (bytes_ and UNFINISHED in text):
                for count in range(begin + 1, end + 1):
                    if found(decoded(tokens[first:count])):
                        return count
        return None

    return find


def trim(text: str, strings: Sequence[str]) -> str:
    """The text before the stop string that ends first, or all of it where there is none.

    Of strings that end at the same character the longest is left out. The result is thus the same whether
    the text was stopped there or went on to the end of a token.

    Raises:
      ValueError: for a string that is empty or contains U+FFFD.
    """
    _check(strings)
    ends = [(text.index(string) + len(string), -len(string)) for string in strings if string in text]
    return text[: sum(min(ends))] if ends else text


def _check(strings: Sequence[str]) -> None:
    if isinstance(strings, str) or not strings:
        raise ValueError(f"stop strings={strings!r}: give a list of at least one string")
    for i, string in enumerate(strings):
        if not string:
            raise ValueError(
                f"stop string {i} of {list(strings)!r} is empty, which every text contains; remove it"
            )
        if UNFINISHED in string:
            raise ValueError(
                f"stop string {i} of {list(strings)!r} contains U+FFFD, which stands for every unfinished "
                "character; remove it"
            )
