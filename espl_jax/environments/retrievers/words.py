"""Which words of a text are searched: folded, without the most common ones, and stemmed."""

from __future__ import annotations

import re
import unicodedata

import Stemmer

VERSION = 1
"""Part of the name of every cached index: raise it when words are cut, left out or stemmed otherwise."""

_LEFT_OUT = (
    "a an and are as at be but by for from has have he her his in is it its no not of on or s she so such "
    "that the their then there these they this to was were which will with"
)
"""Words that are in nearly every English text; `s` is what is left of a genitive."""

_WORD = re.compile(r"[^\W_]+")


class Stems(dict):
    """Folded word -> its English stem (Porter's second algorithm, by PyStemmer), or "" for one left out.

    It fills itself while it is used, from one thread; make one for each batch of texts.
    """

    def __init__(self):
        super().__init__({word: "" for word in _LEFT_OUT.split()})
        self._stem = Stemmer.Stemmer("english").stemWord

    def __missing__(self, word: str) -> str:
        self[word] = stem = self._stem(word)
        return stem


def stems_of(text: str, stems: Stems) -> list[str]:
    """The searched words of a text in order, repeated ones again.

    A word is a run of letters and digits. Case and accents are folded, so that `Zoë` is found by `zoe`. Text
    without spaces between words, as in Chinese, is one long word, which BM25 cannot serve.
    """
    return [stem for word in _WORD.findall(_fold(text)) if (stem := stems[word])]


def _fold(text: str) -> str:
    if text.isascii():
        return text.lower()
    parts = unicodedata.normalize("NFKD", text).casefold()
    return "".join(part for part in parts if not unicodedata.combining(part))
