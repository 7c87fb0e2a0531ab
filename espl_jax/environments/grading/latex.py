r"""One way to write what LaTeX can write in many: spaces, sizes, fonts, fractions, decimals, characters."""

from __future__ import annotations

import re

_CHARACTERS = {
    **dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}\N{NON-BREAKING HYPHEN}", "-"),
    **dict.fromkeys("\N{ZERO WIDTH SPACE}\N{WORD JOINER}\N{ZERO WIDTH NO-BREAK SPACE}", ""),
    **dict.fromkeys("\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}\t\n\r", " "),
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{DIVISION SIGN}": "/",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{GREEK SMALL LETTER THETA}": r"\theta ",
    "\N{INFINITY}": r"\infty ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\neq ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{UNION}": r"\cup ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{DOUBLE-STRUCK CAPITAL R}": r"\mathbb{R}",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{SUPERSCRIPT TWO}": "^{2}",
    "\N{SUPERSCRIPT THREE}": "^{3}",
    "\N{VULGAR FRACTION ONE HALF}": r"\frac{1}{2}",
    "\N{VULGAR FRACTION ONE QUARTER}": r"\frac{1}{4}",
    "\N{VULGAR FRACTION THREE QUARTERS}": r"\frac{3}{4}",
    "\N{VULGAR FRACTION ONE THIRD}": r"\frac{1}{3}",
    "\N{VULGAR FRACTION TWO THIRDS}": r"\frac{2}{3}",
    "\N{EURO SIGN}": r"\euro ",
    "\N{POUND SIGN}": r"\pounds ",
    "\N{CENT SIGN}": r"\text{ cents}",
}
_TRANSLATION = str.maketrans(_CHARACTERS)

OPEN, CLOSE = "\N{LEFT WHITE CURLY BRACKET}", "\N{RIGHT WHITE CURLY BRACKET}"
"""The braces of a set, which LaTeX writes with a backslash; plain ones group."""

_FONT = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname\*?)(?![a-zA-Z])"
_DELIMITER = r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])"
_REWRITINGS = [
    # Emphasis as Markdown writes it, where no operand is before it: **73** and `73`, but not 2**3.
    (r"(^|[=:,;(\[{$])(\s*)(\*{1,3}|`|__)(?=[^\s*`])([^*`]*[^\s*`])\3(?![\w*`])", r"\1\2\4"),
    # Marks before and after an answer.
    (r"^\s*(?:\\(?:therefore|implies|(?:Longr|R|longr|r)ightarrow)(?![a-zA-Z])|[=:])", ""),
    (r"\\(?:checkmark|blacksquare|square|Box|qed)(?![a-zA-Z])\s*$", ""),
    # Switches of font and size.
    (r"\\(?:bf|bfseries|it|rm|sf|tt|[hH]uge|LARGE|[lL]arge|small|normalsize)(?![a-zA-Z])", ""),
    (r"\\(?:boldsymbol|bm|pmb|ensuremath|mathord)(?![a-zA-Z])", ""),
    # A root's sign before digits or parentheses covers all of them.
    (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    # Thousands: 1{,}234 and 1,\!234 and 1\,234.
    (r"(?<=\d)\s*(?:\{,\}|,\s*\\!|\\,)\s*(?=\d{3}(?!\d))", ","),
    # Mathematics within the sentence: $, \( and \[.
    (r"(?<!\\)(?:\$|\\[\[\]()])", ""),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits)(?![a-zA-Z])", ""),
    (rf"{_DELIMITER}\s*\.", ""),
    (_DELIMITER, ""),
    (r"\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|(?<!\\)\\[,;:> ]|~", " "),
    (r"\\!", ""),
    (r"\\(?:\{|lbrace(?![a-zA-Z]))", OPEN),
    (r"\\(?:\}|rbrace(?![a-zA-Z]))", CLOSE),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\mathrm\s*\{([ei])\}", r"\1"),
    (_FONT, r"\\text"),
    (r"\\text\s*\{\s*\}", ""),
    (r"\\(?:leqslant|leq|le)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:geqslant|geq|ge)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset"),
    (r"\\degree(?![a-zA-Z])", r"^\\circ "),
    (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
    (r"\\(?:R|Reals|reals)(?![a-zA-Z])|\\mathbb\s*R(?![a-zA-Z])", r"\\mathbb{R}"),
    (r"(?<!\\)(?:\binfinity\b|\binfty\b|\boo\b)", r"\\infty "),
    (r"\*\*", "^"),
    (r"\\log_\s*(?:e|\{e\})(?![a-zA-Z])", r"\\ln"),
    (r"(?<![a-zA-Z\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\d.])", r"\1 \\cdot 10^{\2}"),
    (r"\\(?:dots|cdots|dotsc)(?![a-zA-Z])", r"\\ldots"),
    (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
    (r"\\underline\s*\{([^{}]*)\}", r"\1"),
    (r"\(?\\p?mod\s*\{?(\w+)\}?\)?|\(\s*\\text\s*\{\s*mod\s*\}\s*(\w+)\s*\)", r"\\pmod{\1\2}"),
    (r"(?<![a-zA-Z\\])(?:sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
]
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITINGS]

_ARGUMENTS = re.compile(r"\\(frac|binom|sqrt)(?![a-zA-Z])")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))(?!\d)")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")
_MIXED = re.compile(r"(?<![\d^_.}])(\d+)\s*(?:\\frac\{(\d+)\}\{(\d+)\}|(?<=\s)(\d+)/(\d+)(?!\d))")


def simplify(text: str) -> str:
    r"""The same mathematics in fewer ways of writing. What it does not know it leaves alone.

    Decimals become fractions, because they are exact: 0.5 is 1/2, and 0.33 is not 1/3. A whole number right
    before a proper fraction of digits is a mixed number: `2\frac{1}{2}` is 5/2.
    """
    text = text.translate(_TRANSLATION)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = _MIXED.sub(_mixed, _brace_arguments(text))
    return re.sub(r"\s+", " ", text).strip()


def exact_decimals(text: str) -> str:
    r"""Decimals as fractions, `0.1\overline{6}` included."""
    return _DECIMAL.sub(_decimal, _REPEATING.sub(_repeating, text))


def closing(text: str, start: int) -> int:
    """Index of the `}` that closes the `{` at start, or -1."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return i
    return -1


def _brace_arguments(text: str) -> str:
    r"""Braces around arguments that have none: `\frac12` becomes `\frac{1}{2}`, as TeX reads it."""
    for command in reversed(list(_ARGUMENTS.finditer(text))):
        rest = text[command.end() :].lstrip()
        written = command.group()
        if command.group(1) == "sqrt" and rest.startswith("[") and "]" in rest:
            index, _, rest = rest.partition("]")
            written, rest = f"{written}{index}]", rest.lstrip()
        for _ in range(1 if command.group(1) == "sqrt" else 2):
            argument, rest = _argument(rest)
            written, rest = written + argument, rest.lstrip() if argument else rest
        text = text[: command.start()] + written + (" " if rest[:1].isalnum() else "") + rest
    return text


def _argument(text: str) -> tuple[str, str]:
    """The next argument in braces, and what follows it."""
    if text.startswith("{"):
        end = closing(text, 0)
        return (text[: end + 1], text[end + 1 :]) if end > 0 else ("", text)
    if command := re.match(r"\\[a-zA-Z]+", text):
        end = command.end()
        while text[end : end + 1] == "{" and closing(text, end) > 0:
            end = closing(text, end) + 1
        return f"{{{text[:end]}}}", text[end:]
    return (f"{{{text[0]}}}", text[1:]) if text[:1].isalnum() else ("", text)


def _mixed(number: re.Match) -> str:
    whole, numerator, denominator, top, bottom = number.groups()
    numerator, denominator = numerator or top, denominator or bottom
    if len(number.group()) > 60 or int(numerator) >= int(denominator):
        return number.group()
    return rf"({whole}+\frac{{{numerator}}}{{{denominator}}})"


def _decimal(number: re.Match) -> str:
    whole, decimals = number.groups()
    return rf"(\frac{{{(whole + decimals).lstrip('0') or '0'}}}{{1{'0' * len(decimals)}}})"


def _repeating(number: re.Match) -> str:
    whole, fixed, repeated = number.group(1), number.group(2), number.group(3) or number.group(4)
    numerator = int(f"0{whole}{fixed}{repeated}") - int(f"0{whole}{fixed}")
    return rf"(\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}})"
