"""SentencePiece BPE from GGUF metadata (`tokenizer.ggml.model` = llama): Llama 2, Mistral, Gemma.

SentencePiece merges the neighbours whose union is the piece with the highest score; `tokenizers` merges the
pair with the lowest rank. So every split of a piece into two pieces becomes a merge, ranked by score.
"""

from __future__ import annotations

from collections.abc import Sequence

from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "▁"
"""The space character in pieces, U+2581."""


def sentencepiece_bpe(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], space_prefix: bool
) -> Tokenizer:
    """Returns the tokenizer, without special tokens.

    Args:
      tokens: the vocabulary in order.
      scores: score of each token; higher scores are merged first.
      kinds: `gguf.TokenType` of each token.
      space_prefix: whether to prepend a space to the text, and to text after a special token.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    # Control and user-defined tokens are matched beforehand; byte tokens are for characters without a piece.
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind == TokenType.NORMAL
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_from_scores(pieces),
            byte_fallback=TokenType.BYTE in kinds,
            fuse_unk=True,
            unk_token=tokens[kinds.index(TokenType.UNKNOWN)] if TokenType.UNKNOWN in kinds else None,
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = replace
        tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def merges_from_scores(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """Returns all pairs of pieces whose union is a piece, highest score first.

    Pairs of the same piece tie; those with a longer left half come first, as in conversions on the Hub.
    """
    merges = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append((-score, -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges, key=lambda merge: merge[:2])]
