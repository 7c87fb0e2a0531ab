"""The architecture, enforced: a room imports rooms of lower layers only, without exception."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "espl_jax"

DEVICE = {"models", "sampling", "rl"}
HOST = {"evolution", "environments", "data", "text"}
LAYERS = [
    {"types", "choices", "gym", "parallel", "console"},
    {"storage"},
    {"models"} | HOST,
    {"sampling", "rl", "pretrained"},
    {"rollouts", "training"},
    {"reflectors"},
    {"trackers"},
    {"run"},
    {"report"},
    {"train", "plan", "evaluate", "export", "watch"},
    {"dry_run"},
    {"main"},
]
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}

ACCELERATOR = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
INPUT_OUTPUT = {"open", "print", "input", "read_text", "read_bytes", "write_text", "write_bytes"}


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported; `from a import b` gives `a.b`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def for_editors(tree: ast.Module) -> set[str]:
    """What a module imports under `if TYPE_CHECKING:`, which never runs."""
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    blocks = [block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING"]
    return {name for block in blocks for part in block.body for _, name in imports(part, "", True)}


def import_violation(part: str, name: str) -> str | None:
    """Why module `part` of espl_jax may not import `name`, or None."""
    top, _, rest = name.partition(".")
    if part in HOST | {"types", "choices", "gym", "trackers", "watch"} and top in ACCELERATOR:
        return f"{part} is host code and imports {top}"
    if name == "flax.nnx" or name.startswith("flax.nnx."):
        return "flax.nnx is not used"
    if top != "espl_jax":
        return None
    target = rest.partition(".")[0]
    if target not in LAYER:
        return f"imports {name}: import a module of espl_jax, not a name of its public face"
    if target == part or LAYER[target] < LAYER[part]:
        return None
    return f"{part} (layer {LAYER[part]}) imports {target} (layer {LAYER[target]})"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, the text of the module of that dotted name, does against the architecture."""
    part = module.split(".")[1] if "." in module else "__init__"
    tree = ast.parse(source)
    imported = list(imports(tree, module, is_package))
    if part == "__init__":
        allowed = {"importlib", "typing.TYPE_CHECKING"} | for_editors(tree)
        return [f"{module}:{line}: imports {name}" for line, name in imported if name not in allowed]
    if part not in LAYER:
        return [f"{module}: belongs to no layer; add {part!r} to LAYERS"]
    found = [(line, import_violation(part, name)) for line, name in imported]
    found += [(line, "pmap is not used") for line, name in imported if name.endswith(".pmap")]
    for node in ast.walk(tree):
        name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(node))
        name = name and getattr(node, name)
        if name == "pmap":
            found.append((node.lineno, "pmap is not used"))
        if name == "nnx":
            found.append((node.lineno, "flax.nnx is not used"))
        if part in DEVICE and name in INPUT_OUTPUT:
            found.append((node.lineno, f"{part} is device code and uses {name}"))
    return [f"{module}:{line}: {problem}" for line, problem in found if problem]


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_to_its_layer(path):
    names = ["espl_jax", *path.relative_to(PACKAGE).with_suffix("").parts]
    is_package = names[-1] == "__init__"
    module = ".".join(names[:-1] if is_package else names)
    assert violations(path.read_text(encoding="utf-8"), module, is_package) == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda path: path.name)
def test_folder_is_a_package(folder):
    assert (folder / "__init__.py").exists(), "without __init__.py the folder is not installed"


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("espl_jax.evolution.edits", "import jax", "host code and imports jax"),
        ("espl_jax.evolution.edits", "def f():\n    import jax.numpy as jnp", "host code and imports jax"),
        ("espl_jax.types", "import optax", "host code and imports optax"),
        ("espl_jax.models.moe", "from espl_jax.evolution import edits", "models (layer 2) imports evolution"),
        ("espl_jax.models.moe", "from ..text.chat import render", "models (layer 2) imports text"),
        ("espl_jax.models.moe", "from espl_jax.sampling import decode", "models (layer 2) imports sampling"),
        ("espl_jax.rl.losses", "from espl_jax import train", "rl (layer 3) imports train"),
        ("espl_jax.data.hub", "import espl_jax.text.chat", "data (layer 2) imports text"),
        (
            "espl_jax.parallel.memory",
            "from espl_jax import types",
            "parallel (layer 0) imports types (layer 0)",
        ),
        ("espl_jax.rollouts.collect", "from espl_jax import generate", "not a name of its public face"),
        ("espl_jax.rollouts.collect", "import espl_jax", "not a name of its public face"),
        ("espl_jax.rl.losses", "print('loss')", "device code and uses print"),
        ("espl_jax.rl.losses", "jax.debug.print('loss')", "device code and uses print"),
        ("espl_jax.models.moe", "Path('x').read_text()", "device code and uses read_text"),
        ("espl_jax.training.step", "from flax import nnx", "flax.nnx is not used"),
        ("espl_jax.training.step", "from flax.nnx import Module", "flax.nnx is not used"),
        ("espl_jax.training.step", "import flax\nflax.nnx.Module", "flax.nnx is not used"),
        ("espl_jax.training.step", "jax.pmap(f)", "pmap is not used"),
        ("espl_jax.training.step", "from jax import pmap", "pmap is not used"),
        ("espl_jax.helpers", "x = 1", "belongs to no layer"),
        ("espl_jax", "import jax", "imports jax"),
    ],
)
def test_checker_catches(module, source, complaint):
    assert any(complaint in found for found in violations(source, module)), violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("espl_jax.models.moe", "import jax\nfrom espl_jax.models import layers\nfrom . import config"),
        ("espl_jax.sampling.decode", "from espl_jax.models.transformer import forward"),
        ("espl_jax.rl.logprobs", "from espl_jax.models import transformer\nfrom espl_jax import types"),
        (
            "espl_jax.evolution.edits",
            "import json\nimport numpy as np\nfrom espl_jax.types import SystemPrompt",
        ),
        ("espl_jax.train", "from espl_jax.rollouts import collect\nfrom espl_jax.evolution import edits"),
        ("espl_jax.console.progress", "print('held out')"),
    ],
)
def test_checker_allows(module, source):
    assert violations(source, module) == []


def test_relative_import_inside_a_package_file():
    assert violations("from . import layers", "espl_jax.models", is_package=True) == []
    assert violations("from ..text import chat", "espl_jax.models", is_package=True) != []
