"""The command line: what cannot run is refused in a sentence, before anything is loaded."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from espl_jax.console.command_line import read_config_file
from tests.conftest import ROOT, run_module
from tests.support.devices import xla_flags

QUICKSTART = "--config=configs/quickstart.py"


def run(*args, **environment):
    return run_module("espl_jax.main", QUICKSTART, *args, **environment)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.learning_rate=1"], "config.learning_rate: unknown field"),
        (["--config.optimizer.lr=1"], "config.optimizer.lr: unknown field"),
        (["--config.optimiser.learning_rate=1"], "config.optimiser.learning_rate: unknown field"),
        (["--config.mode.rl=1"], "config.mode.rl: unknown field"),
        (["--config.batch_size=many"], "flag --config.batch_size=many: invalid literal"),
        (["--config.batch_size=0"], "batch_size=0: must be at least 1"),
        (["--config.mode=both"], "mode='both': choose one of espl, rl, evolution, reflection"),
        (["--config.sampling.top_p=1.9"], "sampling.top_p=1.9: must be above 0"),
        (["--config.data.train=none.jsonl"], "data.train='none.jsonl': none.jsonl does not exist"),
        (["--config.data=none.jsonl"], "data.train='none.jsonl': none.jsonl does not exist"),
        (["quickly"], "unexpected argument quickly"),
        (["--wrokdir=x"], "Unknown command line flag 'wrokdir'"),
        ([], "--workdir is missing"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refused_before_anything_is_loaded(args, message, without_jax, tmp_path):
    workdir = tmp_path / "run"
    given = [*args, f"--workdir={workdir}"] if args else []
    done = without_jax("espl_jax.main", QUICKSTART, *given)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 3
    assert not workdir.exists()


CONFIGS = "configs/ has aime.py, dapo.py, gsm8k.py, hmmt.py, quickstart.py, search.py, showcase.py"


@pytest.mark.parametrize("command", ["main", "plan"])
def test_a_config_file_that_is_not_there(command, without_jax):
    """Said in one sentence by every command, whatever else is given."""
    run = without_jax if command == "main" else run_module
    config = "--config=configs/none.py"
    done = run(f"espl_jax.{command}", config, "--config.batch_size=4")
    assert done.returncode == 1
    assert done.stderr == f"{config}: file not found; {CONFIGS}\n"


class TestConfigFiles:
    @pytest.fixture(autouse=True)
    def from_the_root(self, monkeypatch):
        monkeypatch.chdir(ROOT)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("configs/hmm.py", f"file not found; {CONFIGS}"),
            ("confgis/hmmt.py", f"file not found; {CONFIGS}"),
            ("configs", f"is a folder; {CONFIGS}"),
            ("", f"file not found; {CONFIGS}"),
            (
                "configs/gsm8k.py:small",
                "get_config cannot be called (too many positional arguments); leave out :small",
            ),
            ("LICENSE", "LICENSE, line 2: IndentationError: unexpected indent; correct the file"),
        ],
    )
    def test_that_cannot_be_used(self, config, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            read_config_file(config)

    @pytest.mark.parametrize(
        ("code", "preset", "message"),
        [
            ("def get_config(:", "", "own.py, line 2: SyntaxError: invalid syntax; correct the file"),
            ("import nowhere", "", "line 2: ModuleNotFoundError: No module named 'nowhere'"),
            ("def get_config(name):\n    return {'a': 1}[name]", ":b", "line 3: KeyError: 'b'"),
            ("def get_config(name): ...", "", "'name'); name a preset, --config="),
            ("def get_config(): ...", "", "get_config returns None; return a ConfigDict"),
            ("get_confg = 1", "", "the file does not define get_config; define one"),
            (
                "def get_config():\n    c = common.get_config()\n    c.optimizer.lr = 1",
                "",
                'line 4: AttributeError: \'Key "lr" does not exist',
            ),
        ],
    )
    def test_of_ones_own(self, code, preset, message, tmp_path):
        path = tmp_path / "own.py"
        path.write_text(f"from configs import common\n{code}\n")
        with pytest.raises(ValueError, match=re.escape(message)):
            read_config_file(f"{path}{preset}")

    def test_a_preset(self, tmp_path):
        path = tmp_path / "own.py"
        path.write_text(
            "from ml_collections import ConfigDict\nget_config = lambda n='1': ConfigDict({'n': n})"
        )
        assert read_config_file(str(path)).n == "1"
        assert read_config_file(f"{path}:a:b").n == "a:b"


def test_configurations_of_an_installed_package(tmp_path):
    """A wheel has them as espl_jax.configs; a file of the user's imports configs.common all the same."""
    package, elsewhere = tmp_path / "site" / "espl_jax", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for source, target in ((ROOT / "espl_jax", package), (ROOT / "configs", package / "configs")):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    own = "from configs import common\n\n\ndef get_config():\n    return common.get_config()\n"
    (elsewhere / "own.py").write_text(own)
    code = (
        "from espl_jax.console.command_line import read_config_file as read\n"
        "print(read('configs/gsm8k.py').data.train, read('own.py').mode)\n"
        "try: read('configs/none.py')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("hub:") and first.endswith(" espl"), done.stderr
    assert second.startswith("file not found; ") and "hmmt.py" in second


@pytest.mark.parametrize("verbosity", [[], pytest.param(["--verbosity=1"], marks=pytest.mark.slow)])
def test_what_only_loading_finds_out_is_said_without_a_traceback(verbosity, tmp_path):
    args = [
        "--config.batch_size=9",
        "--config.data.train=addition:digits=1,count=8",
        f"--workdir={tmp_path / 'run'}",
    ]
    args += ["--config.model.source=smollm2", "--config.mesh.fsdp=1", "--config.mesh.data=-1", *verbosity]
    done = run(*args)
    assert done.returncode == 1 and "batch_size=9: data.train has only 8 problems" in done.stderr
    assert ("Traceback" in done.stderr) == bool(verbosity)
    assert ("--verbosity=1" in done.stderr) != bool(verbosity)


def test_all_splits_come_from_a_set_that_has_them(without_jax):
    done = without_jax("espl_jax.main", "--config=configs/search.py", "--config.data=encyclopedia")
    assert "--workdir is missing" in done.stderr, "the configuration is as it should be"


@pytest.mark.slow
def test_dry_run_of_the_quickstart(tmp_path):
    done = run("--dry_run", "--config.mesh.data=-1", "--config.mesh.fsdp=1", XLA_FLAGS=xla_flags(1))
    assert done.returncode == 0, done.stderr
    assert "<|im_start|>user\nWhat is" in done.stdout and "--- problem level: " in done.stdout
    assert "| policy-gradient step " in done.stdout


def test_fields_without_a_default_can_be_set(without_jax):
    """None on the command line's side is a placeholder with a type; the wrong type is refused."""
    fields = {
        "selection.temperature": "0.5",
        "evolution.max_principles": "3",
        "environment.instruction": "Add.",
    }
    args = [f"--config.{field}={value}" for field, value in fields.items()]
    done = without_jax("espl_jax.main", QUICKSTART, *args)
    assert done.stderr.startswith("--workdir is missing"), done.stderr
    wrong = without_jax("espl_jax.main", QUICKSTART, "--config.evolution.max_principles=few")
    assert "flag --config.evolution.max_principles=few" in wrong.stderr


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    code = (
        "from espl_jax import main, train\n"
        "def stop(*given): raise KeyboardInterrupt\n"
        "train.train = stop\n"
        "main.run()"
    )
    command = [sys.executable, "-c", code, QUICKSTART, f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130
    assert done.stderr == "Stopped. The same command resumes from the last checkpoint.\n"
