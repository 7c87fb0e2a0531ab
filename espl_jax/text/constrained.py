"""Replies kept to a JSON schema while they are drawn: which tokens may come next, by llguidance."""

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

from espl_jax.types import Schema

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf"\\',  # no \u0041: six bytes for a character
}
"""How llguidance writes JSON, in its own terms: as `json.dumps(..., ensure_ascii=False)` does."""


class SchemaRows:
    """One reply a row, each kept to a JSON schema; a `sampling.constraint.Constraint`.

    A row may be asked about again and again; only what it accepts moves it on. When its JSON is complete, it
    ends with a stop token, which it could not draw before.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        schemas: Sequence[Schema],
        *,
        stop_ids: Sequence[int],
        vocab_size: int,
    ):
        """Begins all replies.

        Args:
          tokenizer: of the model; byte-level, or with byte fallback.
          schemas: of the rows, by their number.
          stop_ids: the tokens that end a reply, at least one that the model has.
          vocab_size: V, of the model's logits. The tokenizer may have fewer tokens or more; what it does not
            know is never allowed.

        Raises:
          ValueError: llguidance cannot read the tokenizer or a schema, or there is no stop token.
        """
        self._words = -(-vocab_size // 32)
        self._all_words = -(-max(vocab_size, len(tokenizer)) // 32)
        known = tuple(sorted(token for token in {*stop_ids} if token < min(vocab_size, len(tokenizer))))
        if not known:
            raise ValueError(f"stop_ids={tuple(stop_ids)}: give a token of the model that ends its replies")
        self._tokens = _tokens_of(tokenizer, max(vocab_size, len(tokenizer)), known)
        begun = {text: self._begin(text) for text in {json.dumps(schema) for schema in schemas}}
        self._rows = [begun[json.dumps(schema)].deep_copy() for schema in schemas]

    def _begin(self, schema: str) -> llguidance.LLMatcher:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
        row = llguidance.LLMatcher(self._tokens, grammar)
        if row.is_error():
            raise ValueError(f"llguidance refuses the schema {schema}: {row.get_error()}")
        return row

    def allowed(self, rows: np.ndarray) -> np.ndarray:
        """Tokens that may come next. int [R] -> uint32 [R, ceil(V / 32)], token v is bit v % 32 of its word.

        Raises:
          RuntimeError: llguidance has given a row up.
        """
        masks = np.zeros((len(rows), self._all_words), np.int32)
        numbered = [(self._rows[row], i) for i, row in enumerate(rows)]
        fill_next_token_bitmask_par(_executor(), numbered, masks)
        for row in rows:
            if self._rows[row].is_error():
                # The mask of such a row is that of a finished one.
                raise RuntimeError(f"the reply of row {row} cannot go on: {self._rows[row].get_error()}")
        return masks.view(np.uint32)[:, : self._words]

    def accept(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Takes note of what rows drew. int [R], int [R].

        Raises:
          RuntimeError: a token was not allowed.
        """
        pairs = [(self._rows[row], int(token)) for row, token in zip(rows, tokens, strict=True)]
        for row, token, good in zip(rows, tokens, _executor().consume_token_par(pairs), strict=True):
            if not good:
                raise RuntimeError(f"row {row} drew token {token}, which was not allowed")


@functools.lru_cache(maxsize=4)
def _tokens_of(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, stop_ids: tuple[int, ...]
) -> llguidance.LLTokenizer:
    """What llguidance knows of a tokenizer, which takes about a second to find out."""
    try:
        return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(stop_ids))
    except ValueError as error:
        raise ValueError(
            f"llguidance cannot read this tokenizer ({error}); set reflection.constrained=False"
        ) from error


@functools.cache
def _executor() -> llguidance.LLExecutor:
    return llguidance.LLExecutor()
