r"""Normalizes the statements and answers of public data sets."""

from __future__ import annotations

import re
import unicodedata

GSM8K_MARK = "####"
"""GSM8K answers have a worked solution with <<calculator annotations>>, then this mark and the number."""

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
    """Removes the instruction that DAPO-Math-17k puts before and after each statement.

    The instruction (Yu et al. 2025, https://arxiv.org/abs/2503.14476; wording from OpenAI's simple-evals)
    asks for a last line `Answer: ...`, while an environment adds its own instruction. The two parts are
    removed independently. A text without them is only stripped of surrounding whitespace.
    """
    before = _DAPO_BEFORE.match(text)
    return _DAPO_AFTER.sub("", text[before.end() :] if before else text).strip()


def final_answer(answer: str) -> str:
    """Returns the number after GSM8K's mark, or the whole answer if it has no mark.

    The mark is from Cobbe et al. 2021, https://arxiv.org/abs/2110.14168. Returns an empty string if nothing
    follows the mark.
    """
    return answer.rpartition(GSM8K_MARK)[2].strip()


def comparable(text: str) -> str:
    r"""Normalizes a statement so that differently typeset copies become equal.

    Ignores letter case, whitespace, punctuation between words, quotation marks, and LaTeX's dollar signs,
    `\left`, `\right`, spacing and fraction sizes. Keeps decimal points, `!` and `'`, which are meaningful in
    mathematics.
    """
    plain = _FRACTION.sub(r"\\", _NOTHING.sub("", unicodedata.normalize("NFKC", text)))
    words = " ".join(_SPACE.sub(" ", plain).casefold().split())
    return _LOOSE_SPACE.sub("", words) or text
