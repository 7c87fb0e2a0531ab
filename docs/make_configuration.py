"""Writes configuration.md, the reference of all fields, from the comments of configs/common.py.

python docs/make_configuration.py
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "configs" / "common.py"
TARGET = ROOT / "docs" / "configuration.md"

HEAD = """# Configuration

A configuration is a Python file with a function `get_config()`. Those in `configs/` start from
`configs/common.py`, which holds every field with its default, and change some of them. The command line
overrides fields:

```sh
python -m espl_jax.main --config=configs/hmmt.py --workdir=runs/lora64 --config.lora.rank=64
```

Unknown fields and impossible values are refused before jax is imported. `docs/make_configuration.py` writes
this page from the comments of `configs/common.py`; a test checks that it is current.
"""


def fields() -> list[tuple[str, str, str]]:
    """Returns the name, the default as Python, and the comment of each field, in the order of the file."""
    source = SOURCE.read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        name, default = ast.unparse(node.targets[0]).removeprefix("c."), ast.unparse(node.value)
        if default == "ConfigDict()":
            continue
        lines = range(node.lineno, node.end_lineno + 1)
        said = " ".join(comments[line] for line in lines if line in comments)
        found.append((name, "None" if default.startswith("placeholder(") else default, said))
    return found


def page() -> str:
    """Returns the contents of configuration.md."""
    parts, group = [HEAD], None
    for name, default, said in fields():
        top = name.rpartition(".")[0]
        if top != group:
            title = f"`{top}`" if top else "The run"
            parts.append(f"\n## {title}\n\n| field | default | meaning |\n| --- | --- | --- |\n")
            group = top
        cells = (f"`{name}`", f"`{default}`", said)
        parts.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n")
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
