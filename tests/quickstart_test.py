"""Which model `make quickstart` runs; nothing is installed, fetched or trained."""

import os
import subprocess

import pytest

from espl_jax.console.command_line import read_config_file
from tests.conftest import ROOT

PYTHON = """#!/bin/sh
echo "$@"
case "$*" in *pretrained.fetch*) exit {code} ;; esac
"""


@pytest.fixture
def quickstart(tmp_path):
    """Runs `make quickstart` with a Python that prints its arguments, and whose fetch exits with `code`."""

    def run(*arguments, code=0):
        python = tmp_path / "bin" / "python"
        python.parent.mkdir(exist_ok=True)
        python.write_text(PYTHON.format(code=code))
        python.chmod(0o755)
        for done in (".created", ".installed", ".model"):
            (tmp_path / done).touch()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(
            ["make", "quickstart", f"VENV={tmp_path}", "WORKDIR=w", "ARGS=--x", *arguments],
            cwd=ROOT,
            env=environment | {"MODEL": "another program's"},
            capture_output=True,
            text=True,
        )

    return run


def ran(model):
    return f"-m espl_jax.main --config=configs/quickstart.py:{model} --workdir=w --x\n"


def test_qwen_where_it_can_be_had(quickstart):
    assert quickstart().stdout == ran("qwen2.5-coder-0.5b")


def test_smollm2_where_it_cannot_and_qwen_once_it_can(quickstart):
    said, command = quickstart(code=1).stdout.splitlines(keepends=True)
    assert said == (
        "qwen2.5-coder-0.5b cannot be had: running SmolLM2-135M instead, which follows hardly any "
        "instruction (told to box its answers it does so in 3% of replies)\n"
    )
    assert command == ran("smollm2")
    assert quickstart().stdout == ran("qwen2.5-coder-0.5b")


def test_smollm2_by_name_is_not_fetched(quickstart):
    assert quickstart("MODEL=smollm2", code=1).stdout == ran("smollm2")


def test_what_was_interrupted_does_not_go_on(quickstart):
    done = quickstart(code=130)
    assert done.returncode and not done.stdout


def test_other_models_are_refused(quickstart):
    done = quickstart("MODEL=qwen")
    assert done.returncode and "MODEL=qwen: choose one of qwen2.5-coder-0.5b smollm2" in done.stderr


@pytest.mark.parametrize("preset", ["", ":smollm2", ":qwen2.5-coder-0.5b"])
def test_the_configuration_takes_the_model(preset):
    config = read_config_file(f"{ROOT}/configs/quickstart.py{preset}")
    assert config.model.source == (preset.removeprefix(":") or "smollm2")


def test_the_configuration_refuses_other_models():
    with pytest.raises(ValueError, match="model='x': choose one of smollm2, qwen2"):
        read_config_file(f"{ROOT}/configs/quickstart.py:x")
