"""SentencePiece BPE out of GGUF metadata (`tokenizer.ggml.model` = llama): Llama 2, Mistral, Gemma.

SentencePiece joins the two neighbours whose union is the piece of the highest score; `tokenizers` joins the
pair of the lowest rank. Every way to cut a piece in two is therefore a merge, ranked by the piece's score.
"""

from __future__ import annotations

from collections.abc import Sequence

from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "▁"
"""How pieces spell a space, U+2581."""


def sentencepiece_bpe(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], space_prefix: bool
) -> Tokenizer:
    """The tokenizer without its special tokens.

    Args:
      tokens: the vocabulary in order.
      scores: of each token; higher ones are merged first.
      kinds: `gguf.TokenType` of each token.
      space_prefix: whether text gets a space in front, also what follows a special token.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    # Control and user-defined tokens are matched whole before; byte tokens stand for what no piece spells.
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
    """All pairs of pieces that make up a third one, the highest score first.

    The ways to cut one piece tie; longer left halves go first then, as in the conversions on the hub.
    """
    merges = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append((-score, -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges, key=lambda merge: merge[:2])]
