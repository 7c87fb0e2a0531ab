"""The commands that README.md and docs/ show."""

import itertools
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

PROGRAMS = ("make", "python", "python3", "pip", "gcloud", "transformers", "vllm", "sh", "bash", "curl", "git")
_INLINE = re.compile(rf"(?:{'|'.join(PROGRAMS)})\s")
_VARIABLE = re.compile(r"[A-Z_]+=")
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LOOP = re.compile(r"for (\w+) in ([^;\n]*); do\n(.*?)\ndone; wait", re.DOTALL)


def texts() -> list[str]:
    """Returns the contents of all documents."""
    return [document.read_text(encoding="utf-8") for document in DOCUMENTS]


def blocks(text: str) -> list[tuple[str, str]]:
    """Returns the fenced blocks of a document: (language, content)."""
    return _FENCE.findall(text)


def code_spans(text: str) -> list[str]:
    """Returns the texts between backticks outside fenced blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _FENCE.sub("", text))]


def split_script(script: str) -> list[tuple[str, ...]]:
    """Splits a shell script into commands.

    Args:
      script: may have comments, continued lines, `&`, `;`, `&&`, and loops `for ...; do ... done; wait`.

    Returns:
      The words of each command, without the environment variables that it sets and without `...`, which
      stands for words left out. A loop becomes its iterations.
    """

    def unrolled(loop: re.Match) -> str:
        name, values, body = loop.groups()
        return "\n".join(re.sub(rf"\${name}\b", value, body) for value in values.split())

    script = _LOOP.sub(unrolled, re.sub(r"\\\n *", "", script))
    commands = []
    for line in script.splitlines():
        lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", line), posix=True, punctuation_chars="&;")
        lexer.whitespace_split, lexer.commenters = True, ""
        for ends, words in itertools.groupby(lexer, key=lambda word: set(word) <= {"&", ";"}):
            if not ends:
                commands.append(_without_variables([word for word in words if word != "..."]))
    return commands


def _without_variables(words: list[str]) -> tuple[str, ...]:
    variables = itertools.takewhile(_VARIABLE.match, words[:-1])
    return tuple(words[len(list(variables)) :])


def inline_commands(text: str) -> list[tuple[str, ...]]:
    """Returns the commands between backticks; `ARGS=...` alone completes the last `make TARGET` before it."""
    commands, target = [], ""
    for span in code_spans(text):
        if _INLINE.match(span):
            (words,) = split_script(span)
            target = words[1] if words[0] == "make" else target
            commands.append(words)
        elif span.startswith("ARGS="):
            (words,) = split_script(span)
            commands.append(("make", target, *words))
    return commands


def shown_commands() -> list[tuple[str, ...]]:
    """Returns every command of the documents once, in their order."""
    found = []
    for text in texts():
        for language, content in blocks(text):
            found += split_script(content) if language == "sh" else []
        found += inline_commands(text)
    return list(dict.fromkeys(found))
