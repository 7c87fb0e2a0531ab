"""Constrained decoding: masks of allowed tokens for a grammar or JSON schema, with llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import llguidance
import numpy as np
from llguidance.hf import from_tokenizer
from llguidance.numpy import fill_next_token_bitmask_par
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from espl_jax.types import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf"\\',  # no \u0041, which takes six bytes per character
}
"""Options of llguidance that match the output of `json.dumps(..., ensure_ascii=False)`."""


class GrammarRows:
    """Constrains each row to a grammar; implements `sampling.constraint.Constraint`.

    Only `accept` changes the state of a row; `allowed` does not. Stop tokens are allowed once the reply of
    a row is complete, and not before.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        grammars: Sequence[Grammar],
        *,
        stop_ids: Sequence[int],
        vocab_size: int,
        after_answer: bool = False,
    ):
        """Creates a matcher for each row.

        Args:
          tokenizer: tokenizer of the model; byte-level, or with byte fallback.
          grammars: the grammar of each row: a JSON schema, or text in llguidance's Lark.
          stop_ids: tokens that end a reply; at least one must be in the model's vocabulary.
          vocab_size: V, the size of the model's logits. The tokenizer may have fewer or more tokens; tokens
            that it lacks are never allowed.
          after_answer: whether rows are free until tokens are appended to them.

        Raises:
          ValueError: if llguidance cannot read the tokenizer or a grammar, or there is no stop token.
        """
        self._words = -(-vocab_size // 32)
        self._all_words = -(-max(vocab_size, len(tokenizer)) // 32)
        known = tuple(sorted(token for token in {*stop_ids} if token < min(vocab_size, len(tokenizer))))
        if not known:
            raise ValueError(
                f"stop_ids={tuple(stop_ids)}: none is in the vocabulary; give a token that ends replies"
            )
        self._tokens = _tokens_of(tokenizer, max(vocab_size, len(tokenizer)), known)
        begun = {}
        for grammar in grammars:
            if (written := json.dumps(grammar)) not in begun:
                begun[written] = self._begin(grammar)
        self._rows = [begun[json.dumps(grammar)].deep_copy() for grammar in grammars]
        self._active = np.full(len(grammars), not after_answer)

    def _begin(self, grammar: Grammar) -> llguidance.LLMatcher:
        if isinstance(grammar, str):
            read = llguidance.LLMatcher.grammar_from_lark(grammar)
        else:
            read = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(grammar), overrides=JSON_OPTIONS)
        row = llguidance.LLMatcher(self._tokens, read)
        if row.is_error():
            raise ValueError(f"llguidance rejects the grammar {grammar}: {row.get_error()}")
        return row

    def active(self, rows: np.ndarray) -> np.ndarray:
        """Whether these rows have begun. int [R] -> bool [R]."""
        return self._active[rows]

    def answered(self, rows: np.ndarray) -> None:
        """Lets these rows begin. int [R]."""
        self._active[rows] = True

    def allowed(self, rows: np.ndarray) -> np.ndarray:
        """Returns bit masks of the allowed next tokens.

        Args:
          rows: int [R], indices of rows.

        Returns:
          uint32 [R, ceil(V / 32)]; token v is bit v % 32 of word v // 32.

        Raises:
          RuntimeError: if llguidance fails on a row.
        """
        masks = np.zeros((len(rows), self._all_words), np.int32)
        numbered = [(self._rows[row], i) for i, row in enumerate(rows)]
        fill_next_token_bitmask_par(_executor(), numbered, masks)
        for row in rows:
            if self._rows[row].is_error():
                # Its mask looks like that of a finished row.
                raise RuntimeError(f"the reply of row {row} cannot continue: {self._rows[row].get_error()}")
        return masks.view(np.uint32)[:, : self._words]

    def accept(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Advances rows by the tokens that were sampled.

        Args:
          rows: int [R], indices of rows.
          tokens: int [R], the sampled tokens.

        Raises:
          RuntimeError: if a token was not allowed.
        """
        pairs = [(self._rows[row], int(token)) for row, token in zip(rows, tokens, strict=True)]
        for row, token, good in zip(rows, tokens, _executor().consume_token_par(pairs), strict=True):
            if not good:
                raise RuntimeError(f"row {row} sampled token {token}, which was not allowed")


@functools.lru_cache(maxsize=4)
def _tokens_of(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, stop_ids: tuple[int, ...]
) -> llguidance.LLTokenizer:
    """Returns the llguidance tokenizer; cached, since building it takes about a second."""
    try:
        return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(stop_ids))
    except ValueError as error:
        raise ValueError(
            f"llguidance cannot read this tokenizer ({error}); set reflection.constrained=False"
        ) from error


@functools.cache
def _executor() -> llguidance.LLExecutor:
    return llguidance.LLExecutor()
