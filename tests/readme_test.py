"""What the README shows is what happens."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs():
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    seen = {}
    exec(compile(source, "README.md", "exec"), seen)
    assert seen["prompts"][0].id != seen["prompts"][1].id
    assert seen["samples"].tokens.shape == (2, 2, 4, 8)
    assert seen["rewards"].any() and not seen["rewards"].all(), (
        "the example should have something to learn from"
    )
    assert float(seen["count"]) == 1.0
    # On policy the ratio is one up to rounding: 0.011 in the mean over many tokens, and here are eight.
    assert float(seen["metrics"]["log_ratio_abs"] / seen["metrics"]["tokens"]) < 0.05


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\b((?:configs|experiments|tests)/\w+\.py)", README)))
)
def test_files_that_it_names_are_there(path):
    assert (ROOT / path).is_file()


def test_every_module_has_its_place_in_the_tree():
    tree = README.partition("espl_jax/\n")[2].partition("```")[0]
    modules = {p.name for p in (ROOT / "espl_jax").iterdir() if p.name not in ("__init__.py", "__pycache__")}
    assert not {name for name in modules if name not in tree}
