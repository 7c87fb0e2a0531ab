"""What `import espl_jax` offers, and what it costs."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import espl_jax

HOST_NAMES = ["SystemPrompt", "Problem", "Rollouts", "TrainBatch", "Population", "select", "rate"]
HOST_NAMES += ["parse_edits", "apply_edits", "mutate", "crossover"]


def test_host_names_do_not_import_jax():
    uses = "; ".join(f"espl_jax.{name}" for name in HOST_NAMES)
    code = f"import sys, espl_jax; {uses}; assert 'jax' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", sorted(set(espl_jax.__all__) - {"__version__"}))
def test_every_name_is_there(name):
    value = getattr(espl_jax, name)
    assert value.__name__ == name and value.__doc__
    assert getattr(espl_jax, name) is value


def test_public_names_do_not_hide_modules():
    # `espl_jax.x` would mean the function or the module, depending on what was imported first.
    for name in espl_jax.__all__:
        assert importlib.util.find_spec(f"espl_jax.{name}") is None, name


def test_all_and_dir_agree():
    assert set(espl_jax.__all__) <= set(dir(espl_jax))


def test_editors_see_the_same_names():
    tree = ast.parse(Path(espl_jax.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.asname: part.module for part in block.body for alias in part.names}
    assert shown == espl_jax._HOME


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"no attribute 'rollout'.*collect_rollouts"):
        _ = espl_jax.rollout
