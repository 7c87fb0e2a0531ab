"""Other ways to write an answer: each function gives one, or None where it does not apply."""

import re

_TERM = r"(?:\d+|\d*\\sqrt\{\d+\}|\d+ \\sqrt\{\d+\}|\\frac\{[^{}]*\}\{[^{}]*\})"


def displayed(answer):
    return rf"\displaystyle {answer}"


def parenthesized(answer):
    return None if "," in answer else rf"\left( {answer} \right)"


def named(answer):
    return None if "," in answer else f"x = {answer}"


def braced(answer):
    return None if "," in answer else f"{{{answer}}}"


def large_fractions(answer):
    return _changed(answer, answer.replace(r"\frac", r"\dfrac"))


def spaced(answer):
    """Spaces of TeX around signs, and before radicals."""
    return _changed(
        answer, re.sub(r"(?<=\d) ?\\sqrt", r"\\,\\sqrt", re.sub(r"(?<=[^{^ ])([+-])", r"\\; \1 \\, ", answer))
    )


def unspaced(answer):
    return _changed(answer, re.sub(r" (?![a-zA-Z\d])|(?<=,) ", "", answer))


def slashed(answer):
    return _substituted(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", answer)


def expanded(answer):
    """A fraction of whole numbers, not in lowest terms."""
    match = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", answer)
    return match and rf"\frac{{{6 * int(match[1])}}}{{{6 * int(match[2])}}}"


def negated_twice(answer):
    return _substituted(r"\\frac\{(\d+)\}\{(\d+)\}", r"-\\frac{-\1}{\2}", answer)


def mixed(answer):
    match = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", answer)
    whole, rest = divmod(int(match[1]), int(match[2])) if match else (0, 0)
    return rf"{whole}\frac{{{rest}}}{{{match[2]}}}" if whole else None


def inverted(answer):
    r"""a/b as a times b to the power of -1."""
    return _substituted(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1 \\cdot \2^{-1}", answer)


def as_fraction(answer):
    return rf"\frac{{{3 * int(answer)}}}{{3}}" if _integer(answer) else None


def as_decimal(answer):
    return f"{answer}.0" if _integer(answer) else None


def as_sum(answer):
    return rf"{int(answer) - 7} + 7" if _integer(answer) else None


def separated_thousands(answer):
    return f"{int(answer):,}".replace(",", "{,}") if _integer(answer) and abs(int(answer)) >= 1000 else None


def swapped_terms(answer):
    match = re.fullmatch(rf"({_TERM})([+-])({_TERM})", answer)
    if not match:
        return None
    first, sign, second = match.groups()
    return f"{second}+{first}" if sign == "+" else f"-{second}+{first}"


def swapped_factors(answer):
    match = re.fullmatch(r"(\S+) \\cdot (\S+)", answer) or re.fullmatch(r"(\d+) ?(\\sqrt\{\d+\})", answer)
    return match and rf"{match[2]} \cdot {match[1]}"


def half_powers(answer):
    r"""\sqrt as a power."""
    changed = re.sub(r"(\d) ?\\sqrt\{(\d+)\}", r"\1 \\cdot \2^{1/2}", answer)
    changed = re.sub(r"\\sqrt\{(\d+)\}", r"\1^{1/2}", changed)
    return _changed(
        answer, re.sub(r"^\\sqrt\{(\\frac\{\d+\}\{\d+\})\}$", r"\\left(\1\\right)^{\\frac12}", changed)
    )


def under_the_root(answer):
    r"""a \sqrt{b} as \sqrt{a^2 b}."""
    return _changed(
        answer,
        re.sub(r"(\d+) ?\\sqrt\{(\d+)\}", lambda m: rf"\sqrt{{{int(m[1]) ** 2 * int(m[2])}}}", answer),
    )


def root_of_larger(answer):
    r"""\sqrt{b} as \sqrt{4b}/2."""
    product = re.sub(r"(\d) ?\\sqrt", r"\1 \\cdot \\sqrt", answer)
    return _changed(
        product, re.sub(r"\\sqrt\{(\d+)\}", lambda m: rf"\frac{{\sqrt{{{4 * int(m[1])}}}}}{{2}}", product)
    )


def divided_roots(answer):
    return _substituted(r"^\\sqrt\{\\frac\{(\d+)\}\{(\d+)\}\}$", r"\\frac{\\sqrt{\1}}{\\sqrt{\2}}", answer)


def rationalized(answer):
    """a over the root of b, where the answer has the root above."""
    match = re.fullmatch(r"\\frac\{(\d+) \\sqrt\{(\d+)\}\}\{\2\}", answer)
    return match and rf"\frac{{{match[1]}}}{{\sqrt{{{match[2]}}}}}"


def reversed_values(answer):
    return ", ".join(reversed(answer.split(", "))) if ", " in answer else None


def as_set(answer):
    return rf"\{{{answer}\}}" if ", " in answer else None


def listed_with_or(answer):
    return " \\text{ or } ".join(f"x = {value}" for value in answer.split(", ")) if ", " in answer else None


def with_pm(answer):
    first, _, second = answer.partition(", ")
    return first.replace("+", r" \pm ") if second and second == first.replace("+", "-") else None


# fmt: off
REWRITINGS = [
    large_fractions, spaced, unspaced, slashed, expanded, negated_twice, mixed, inverted, as_fraction,
    as_decimal, as_sum, separated_thousands, swapped_terms, swapped_factors, half_powers, under_the_root,
    root_of_larger, divided_roots, rationalized, reversed_values, as_set, listed_with_or, with_pm,
    displayed, parenthesized, named, braced,
]
# fmt: on


def rewritings(answer):
    """All that apply, by name, each different from the answer and from the others."""
    found = {}
    for rewrite in REWRITINGS:
        text = rewrite(answer)
        if text and text != answer and text not in found.values():
            found[rewrite.__name__] = text
    return found


def _integer(answer):
    return re.fullmatch(r"-?\d+", answer)


def _changed(answer, text):
    return text if text != answer else None


def _substituted(pattern, replacement, answer):
    return _changed(answer, re.sub(pattern, replacement, answer))
