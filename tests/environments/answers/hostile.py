r"""Replies that are cheap to write and dear to grade, or that try to run something."""

import random

HAND_WRITTEN = {
    "towers": [
        r"9^{9^{9^{9}}}",
        "9^9^9^9",
        "9**9**9**9",
        r"2^{2^{2^{2^{2^{2}}}}}",
        r"10^{10^{10^{10}}}-1",
        r"7^{10^9}",
    ],
    "factorials": [
        r"(10^9)!",
        r"10^{9}!",
        r"((9!)!)!",
        r"99999999!",
        r"(2^{64})!!",
        r"\frac{(10^8)!}{(10^8-1)!}",
    ],
    "binomials": [r"\binom{10^9}{5\cdot 10^8}", r"\binom{10^{20}}{10^{10}}", r"{10^9 \choose 10^8}"],
    "sums": [
        r"\sum_{k=1}^{10^{12}} \frac{1}{k}",
        r"\sum_{k=1}^{10^7} k!",
        r"\prod_{k=1}^{10^6} k^k",
        r"\sum_{i=1}^{99}\sum_{j=1}^{99}\sum_{k=1}^{99} ijk",
    ],
    "integrals": [
        r"\int_0^1 x^x \, dx",
        r"\int_0^{\infty} e^{-x^4} \sin(x^3) \cos(x^5) \, dx",
        r"\int \frac{\tan x \ln x}{\sqrt{1+x^7}} dx",
        r"\lim_{n \to \infty} \frac{n!^{n!}}{n^{n^n}}",
    ],
    "identities": [
        r"\sin(10^{10^{10}})",
        r"\sqrt{10^{1000000}+1}",
        r"(x+y+z+w)^{500}",
        r"\left(\sum_{k} x_k\right)^{99}",
        r"(1+\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7})^{300}",
        r"\cos(\cos(\cos(\cos(\cos(\cos(\cos(7^{99999})))))))",
        r"\log(\log(\log(\log(9^{9^{9}}))))",
        r"x^{99999}-1 = 0",
        r"|x^{77}-3x+1| < \sqrt{x}",
        r"\det\begin{pmatrix} a & b \\ c & d \end{pmatrix}^{9999}",
    ],
    "code": [
        "__import__('os').system('touch {marker}')",
        r"\text{__import__('os').system('touch {marker}')}",
        "open('{marker}','w').write('x')",
        "eval(\"open('{marker}','w')\")",
        "exec('import os; os.mknod(\"{marker}\")')",
        "().__class__.__bases__[0].__subclasses__()",
        "[x for x in range(10**10)]",
        "lambda: 5",
        "5; import os; os.system('touch {marker}')",
        'sympify(\'__import__("os").system("touch {marker}")\')',
        "${{5}}",
        "{marker!r}",
    ],
    "TeX": [
        r"\input{/etc/passwd}",
        r"\include{/dev/zero}",
        r"\def\a{\a\a}\a",
        r"\loop\iftrue 5\repeat",
        r"\immediate\write18{touch {marker}}",
        r"\newcommand{\x}{\x\x}\x",
        r"\catcode`\{=12",
        r"\expandafter\expandafter\expandafter 5",
        r"\csname 5\endcsname",
    ],
    "characters": [
        "\x00",
        "5\x00",
        "\ud800",
        "\udfff5\ud800",
        "\x1b[2J\x1b]0;5\x07",
        '\r\n\r\n[true, null, "graded"]\n',
        '[true, "5", "graded"]',
        "\u202e5\u202c",
        "\uff15",
        "\u0665",
        "\U0001d7d3",
        "5\u0338",
        "\ufeff5\ufffe\uffff",
        "é" * 2000,
        "\u0301" * 1990,
        "\N{SUPERSCRIPT TWO}" * 300,
        "√" * 900,
        "½" * 900,
        "\x07\x08\x0b\x0c\x7f\x85",
    ],
    "unbalanced": [
        r"\frac{1}{",
        r"\left( \left( 5",
        r"\sqrt[",
        r"\begin{pmatrix} 1 & 2",
        r"\end{pmatrix}",
        "((((",
        "))))",
        r"\{\{\{",
        "|||||||",
        "$$$$$",
        *(4 * character for character in r"^_&#\%=<,."),
        *(r"\frac\frac\frac", r"\sqrt\sqrt\sqrt", "5^", "_5", "--------5"),
    ],
}
"""Contents of a box by kind; `{marker}` stands for a file that must not appear."""


def generated(seed: int = 0, each: int = 8) -> dict[str, list[str]]:
    """Contents of a box by kind, `each` of them, from small to as large as a reply may be."""
    rng = random.Random(seed)
    number = lambda: str(rng.randint(2, 10 ** rng.randint(1, 12)))  # noqa: E731

    def nested(opening, closing, most):
        depth = rng.randint(20, most)
        return opening * depth + number() + closing * depth

    kinds = {
        "random towers": lambda: (
            "^{".join(number() for _ in range(rng.randint(3, 9))) + "}" * rng.randint(2, 9)
        ),
        "random factorials": lambda: number() + "!" * rng.randint(1, 5) + rf"\cdot {number()}!",
        "random binomials": lambda: rf"\binom{{{number()}}}{{{number()}}}^{{{number()}}}",
        "nested fractions": lambda: nested(r"\frac{1}{1+", "}", 160),
        "nested radicals": lambda: nested(r"\sqrt{2+", "}", 200),
        "nested parentheses": lambda: nested("(", ")", 900),
        "nested absolute values": lambda: nested("|1-", "|", 300),
        "nested sets": lambda: nested(r"\{", r"\}", 450),
        "nested functions": lambda: nested(r"\sin(", ")", 250),
        "long decimals": lambda: "0." + "".join(rng.choices("0123456789", k=rng.randint(500, 1990))),
        "long integers": lambda: "".join(rng.choices("123456789", k=rng.randint(500, 1990))) + "!",
        "repeating decimals": lambda: r"0.\overline{" + "".join(rng.choices("0123456789", k=1500)) + "}",
        "many values": lambda: ", ".join(number() for _ in range(rng.randint(50, 250))),
        "many signs": lambda: r"\pm " * rng.randint(3, 400) + "5",
        "matrices": lambda: (
            r"\begin{pmatrix}"
            + r" \\ ".join(" & ".join(rng.choices("123456789xy", k=9)) for _ in range(rng.randint(5, 30)))
            + rf"\end{{pmatrix}}^{{{number()}}}"
        ),
        "random sums": lambda: rf"\sum_{{k=1}}^{{{number()}}} \frac{{k^{{{number()}}}}}{{\sqrt{{k+1}}}}",
        "polynomials": lambda: (
            "".join(f"(x+{number()})" for _ in range(rng.randint(20, 200))) + f"^{{{number()}}}"
        ),
        "random characters": lambda: "".join(chr(rng.randrange(0x110000)) for _ in range(500)),
        "random commands": lambda: "".join(
            rng.choices(
                [r"\frac", r"\sqrt", "{", "}", "[", "]", "^", "_", "5", r"\sum", r"\int", r"\left", "("],
                k=300,
            )
        ),
        "brace floods": lambda: rng.choice(["{}", "{", "}", "{{}}"]) * rng.randint(1000, 250_000),
    }
    return {kind: [make() for _ in range(each)] for kind, make in kinds.items()}


def replies(marker: str = "", seed: int = 0, each: int = 8) -> list[tuple[str, str]]:
    """(kind, reply) pairs, each reply with its answer in a box, and some with boxes of their own."""
    contents = [
        (kind, text)
        for kinds in (HAND_WRITTEN, generated(seed, each))
        for kind, texts in kinds.items()
        for text in texts
    ]
    boxed = [(kind, rf"\boxed{{{text.replace('{marker}', marker)}}}") for kind, text in contents]
    floods = [
        "\\boxed{" * 100_000,
        "\\boxed{" + "{" * 1_000_000 + "}" * 1_000_000 + "}",
        "{" * 1_000_000,
        r"\boxed{5}" * 100_000,
        "\\" * 1_000_000 + r"boxed{5}",
    ]
    return boxed + [("floods", text) for text in floods]
