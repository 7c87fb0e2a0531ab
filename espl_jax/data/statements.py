r"""Statements and answers as data sets write them, and what they amount to."""

from __future__ import annotations

import re
import unicodedata

GSM8K_MARK = "####"
"""GSM8K writes the worked solution, with <<sums>> for a calculator, then this mark and the number."""

_DAPO_BEFORE = re.compile(
    r"\s*Solve the following math problem step by step\.\s.{0,120}?"
    r"where \$Answer is the answer to the problem\.\s*",
    re.DOTALL | re.IGNORECASE,
)
_DAPO_AFTER = re.compile(
    r"\s*Remember to put your answer on its own line after [\"“']?Answer:[\"”']?[^\n]{0,80}\s*\Z",
    re.IGNORECASE,
)

_NOTHING = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\?\$|\\[()\[\]]|\{,\}|[\"“”]")
_SPACE = re.compile(r"\\(?:[,;:!> ]|q?quad(?![a-zA-Z]))|[~,;:?]|\.(?!\d)")
_FRACTION = re.compile(r"\\[dt](?=frac(?![a-zA-Z]))")
_LOOSE_SPACE = re.compile(r"(?<!\w) | (?!\w)")


def without_instruction(text: str) -> str:
    """A statement without the instruction that DAPO-Math-17k puts before and after each of them.

    The set (Yu et al. 2025, https://arxiv.org/abs/2503.14476) asks for a last line `Answer: ...`, in words
    that come from OpenAI's simple-evals; an environment has an instruction of its own. The two parts are
    looked for separately, and a text without them is returned as it is, but for white space at its ends.
    """
    before = _DAPO_BEFORE.match(text)
    return _DAPO_AFTER.sub("", text[before.end() :] if before else text).strip()


def final_answer(answer: str) -> str:
    """The number after GSM8K's mark (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168), or the answer.

    Empty where nothing follows the mark.
    """
    return answer.rpartition(GSM8K_MARK)[2].strip()


def comparable(text: str) -> str:
    r"""A form in which copies of a statement are equal though they are set in type differently.

    Letter case, white space, punctuation between words, quotation marks, and LaTeX's dollar signs, `\left`,
    `\right`, spacing and sizes of fractions do not count. Decimal points, `!` and `'`, which mean something
    in mathematics, do.
    """
    plain = _FRACTION.sub(r"\\", _NOTHING.sub("", unicodedata.normalize("NFKC", text)))
    words = " ".join(_SPACE.sub(" ", plain).casefold().split())
    return _LOOSE_SPACE.sub("", words) or text
