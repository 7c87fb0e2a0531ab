"""Every command that README.md and docs/ show is executed, on a tiny model.

The arguments stay as the document shows them; flags appended to them keep the run small. Commands of other
projects are not executed: the test checks that what they are given exists.
"""

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from absl import app
from transformers import AutoTokenizer

from espl_jax.choices import TRACKERS
from espl_jax.console import command_line
from espl_jax.environments.retrievers.load import Bm25, SearchServer
from espl_jax.environments.retrievers.serve import make_server
from espl_jax.parallel import processes, sharding
from espl_jax.plan import tpu_compiler
from espl_jax.pretrained.load import load_pretrained
from espl_jax.pretrained.named import MODELS
from espl_jax.pretrained.save import save_pretrained
from espl_jax.run.check_config import check_config
from espl_jax.types import Passage
from experiments.methods.runs import Run
from tests.conftest import ROOT
from tests.reflectors import faulty_server
from tests.support import documents, fakes, tiny
from tests.support.flags import fresh_flags, run_app
from tests.support.two_processes import run_pair

SHOWN = documents.shown_commands()

FIELDS = {
    "compilation_cache": "",
    "num_iterations": 1,
    "num_prompts": 2,
    "batch_size": 2,
    "group_size": 2,
    "lora.rank": 2,
    "data.validation_count": 2,
    "population.start_from": "roots.jsonl",
    "population.text": "",
    "selection.window": 2,  # never the root, so that the test has two prompts as well
    "sampling.max_new_tokens": 8,
    "loss.microbatch_rows": 1,
    "evaluation.every": 0,
    "evaluation.test_samples": 2,
    "evaluation.temperature": 1.0,
}
"""Fields that keep every run small, and its test of the same shapes as its iteration."""

QUICKSTART = {
    "data.train": "addition:digits=1,count=6",
    "data.validation": "addition:digits=1,count=2",
    "data.test": "addition:digits=1,count=2",
    "environment.reward": "letters:count",
    "reflection.temperature": 0.1,  # few replies end early and leave narrower batches
}
FILES = {"data.train": "problems.jsonl", "data.test": "test.jsonl"}
FIELDS_OF = {"configs/quickstart.py": QUICKSTART} | {
    f"configs/{name}.py": FILES for name in ("gsm8k", "hmmt", "search")
}
"""Further fields by configuration, except those of a group (`data`, `environment`) that the command sets."""

PLAN = ("--system_tokens=64", "--problem_tokens=32", "--config.data.test=")
EVALUATE = ("--limit=2", "--samples=2", "--max_new_tokens=8", "--compilation_cache=")

EDITS = '[{"op": "add", "principle": "Count twice."}]'
"""What the server that reflects always replies."""

NO_PROGRAM = "HloModule empty\n\nENTRY %main () -> () {\n  ROOT %nothing = () tuple()\n}\n"


def _problems(start, count):
    text = "What is the sum of the two numbers {} and 2, which are both small?"
    return [{"problem": text.format(i), "answer": str(i + 2)} for i in range(start, start + count)]


JSONL = {
    "problems.jsonl": _problems(0, 6),
    "test.jsonl": _problems(6, 2),
    "numbers.jsonl": _problems(1000, 6),  # numbers that noise does not hit
    "passages.jsonl": [{"title": "Oak", "text": "A tall tree."}, {"title": "Elm", "text": "A tree."}],
    "roots.jsonl": [{"text": f"Add, way {i}."} for i in range(7)],  # p0 to p6
}
"""The files that the commands read."""

LETTERS = """
def count(problem, reply, grade):
    "Rewards that differ between any two replies, so that every group has a gradient."
    return sum(map(ord, str(reply))) % 97 / 96
"""


@functools.cache
def recipe(words):
    """Returns the command that `make` runs once everything is installed; other commands unchanged."""
    if words[0] != "make":
        return words
    targets = re.findall(r"^\$\(VENV\)/(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    installed = [f"--assume-old=.venv/{target}" for target in targets]
    # Under `make test`, these would override the variables of the command.
    inherited = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "ARGS", "WORKDIR")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    done = subprocess.run(
        ["make", "-n", *installed, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
    ((program, *args),) = documents.split_script(done.stdout)
    return Path(program).name, *args


def value_of(args, name):
    """Returns `value` of the first argument `name=value`, or None."""
    return next((arg.partition("=")[2] for arg in args if arg.startswith(f"{name}=")), None)


def gym_of(args):
    """Returns the data spec if it names a task of reasoning-gym, else None."""
    spec = value_of(args, "--config.data")
    return spec if spec and spec.startswith("reasoning_gym:") else None


def extras():
    """Returns the requirements of each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"]


def one_device(make_mesh):
    """Returns `make_mesh` for one CPU device; meshes of given devices, those of a TPU, stay."""
    return lambda sizes=None, devices=None: make_mesh(sizes, devices) if devices else None


class Shell:
    """Runs commands in this process, each once, and first the command that makes what they read."""

    def __init__(self, folder, chat, retrieve):
        """Saves the tiny model.

        Args:
          folder: for everything that is written.
          chat, retrieve: addresses of servers that replace those at localhost:8000.
        """
        self.folder, self.model = folder, folder / "tiny"
        self.local = {"http://localhost:8000/v1": chat, "http://localhost:8000/retrieve": retrieve}
        self.server = {
            "reflection.reflector": "openai",
            "reflection.base_url": chat,
            "reflection.model": "any",
            "reflection.opening": False,
        }
        self._folders = {}
        save_pretrained(self.model, tiny.params(fakes.CONFIG), fakes.CONFIG, fakes.tokenizer())

    def run(self, words):
        """Runs a command unless it has run.

        Returns:
          The folder in which it ran.
        """
        if words not in self._folders:
            program = recipe(words)
            if words == ("make", "quickstart", "MODEL=smollm2"):  # another configuration of the same run
                check_config(command_line.read_config_file(value_of(program, "--config")))
                return ROOT
            self._folders[words] = self._run(*program)
        return self._folders[words]

    def _run(self, *words):
        match words:
            case ["python", "-m", "espl_jax.main", *args]:
                return self._main(args)
            case ["python", "-m", "espl_jax.plan", *args]:
                return self._plan(args)
            case ["python", "-m", "espl_jax.evaluate", *args]:
                return self._evaluate(args)
            case ["python", "-m", "experiments.compare_methods", *args]:
                return self._compare(args)
            case ["python", "-m", "espl_jax.export", *args]:
                folder = self._made("espl_jax.main", "--workdir", value_of(args, "--workdir"))
                self.module("espl_jax.export", args, folder)
                return folder
            case ["python", "-m", "espl_jax.watch", *args]:
                folder = self._made("espl_jax.main", "--workdir", value_of(args, "--workdir"))
                said = self.module("espl_jax.watch", args, folder)
                assert ("finished  1 of 1" if "--once" in args else "1 of 1 iterations") in said
                return folder
            case ["python", "-m", "espl_jax.report", *args]:
                folder = self._made("espl_jax.main", "--workdir", value_of(args, "--workdir"))
                self._report(args, folder)
                return folder
            case ["python", "-m", "espl_jax.pretrained.fetch", name]:
                return self._fetch(name)
            case ["python", "-m", "espl_jax.environments.retrievers.serve", *args]:
                return self._serve(args)
            case ["pytest", *args]:
                return self._collect(args)
            case ["pip", "install", "-e", what]:
                assert what == "." or re.fullmatch(r"\.\[(.*)\]", what)[1] in extras()
                return ROOT
            case ["pip", "install", "--no-deps", package]:
                assert f":= {package}\n" in (ROOT / "Makefile").read_text()
                return ROOT
            case ["pip", "install", "libtpu"]:
                assert extras()["plan"][0].startswith("libtpu;")
                return ROOT
            case ["transformers", "serve", exported]:  # needs torch; the slow tests start it
                folder = self._made("espl_jax.export", "--out", exported)
                assert load_pretrained(folder / exported).config.num_layers == fakes.CONFIG.num_layers
                prompt = (folder / exported / "system_prompt.txt").read_text()
                template = AutoTokenizer.from_pretrained(folder / exported).chat_template
                assert prompt.splitlines()[0] in template
                return folder
            case ["tensorboard", *args]:  # serves until it is stopped
                logdir = value_of(args, "--logdir")
                folder = self._made("espl_jax.main", "--workdir", logdir)
                assert list((folder / logdir / "tensorboard").glob("events.out.tfevents.*"))
                return folder
            case ["gcloud", "storage", "cat", address]:  # needs Google's cloud; logs have the same names
                log = Path(address.removeprefix("gs://bucket/").removesuffix("/*"))
                folder = self._made("espl_jax.main", "--workdir", str(log.parent))
                assert (folder / log).is_file()
                return folder
        return pytest.fail(f"{shlex.join(words)}: Shell does not know this command; add a case to Shell._run")

    def _made(self, module, option, value):
        """Runs the first command that makes something, such as `--workdir=runs/hmmt` of `espl_jax.main`.

        Returns:
          The folder in which it ran.
        """
        for words in SHOWN:
            program = recipe(words)
            makes = program[:3] == ("python", "-m", module) and f"{option}={value}" in program
            if makes and "--dry_run" not in program:
                return self.run(words)
        return pytest.fail(f"{option}={value}: no document shows the command that makes it; show it")

    def new_folder(self):
        """Returns a new folder with everything that commands read."""
        folder = self.folder / str(len(list(self.folder.iterdir())))
        folder.mkdir()
        (folder / "configs").symlink_to(ROOT / "configs")
        (folder / "letters.py").write_text(LETTERS)
        (folder / "examples").symlink_to(ROOT / "examples")
        for name, rows in JSONL.items():
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def module(self, module, args, folder):
        """Runs `python -m module args` in a folder, on one device.

        Returns:
          What it printed.
        """
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, fresh_flags(), contextlib.redirect_stdout(said):
            patch.setattr(sharding, "make_mesh", one_device(sharding.make_mesh))
            patch.setattr(app, "run", run_app)
            patch.setattr(sys, "argv", [module, *args])
            patch.setenv("NO_PROXY", "localhost,127.0.0.1")
            patch.syspath_prepend(folder)
            patch.chdir(folder)
            code = None
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code
            finally:
                for name in ("letters", "examples", "examples.guess"):  # of this folder
                    sys.modules.pop(name, None)
        assert not code, f"python -m {module} {shlex.join(args)}: ended with {code}\n{said.getvalue()}"
        return said.getvalue()

    def overrides(self, args):
        """Returns the flags that keep a run small."""
        given = {arg.split(".")[1].partition("=")[0] for arg in args if arg.startswith("--config.")}
        own = FIELDS_OF[value_of(args, "--config").partition(":")[0]]
        fields = {"model.source": self.model} | FIELDS
        fields |= {name: x for name, x in own.items() if name.partition(".")[0] not in given}
        if tuple(args) != recipe(("make", "quickstart"))[3:]:  # the one run that reflects on the device
            fields |= self.server
        if "--config.data=encyclopedia" in args:
            fields["data"] = "encyclopedia:count=2"
        if gym_of(args):
            fields["data"] = "reasoning_gym:path_star:count=2"
        for flag, _, value in (arg.partition("=") for arg in args):
            if value in self.local:
                fields[flag.removeprefix("--config.")] = self.local[value]
        return [f"--config.{name}={value}" for name, value in fields.items()]

    def _main(self, args):
        if gym_of(args):
            pytest.importorskip("reasoning_gym")
        for name in TRACKERS:
            if name in (value_of(args, "--config.trackers") or ""):
                pytest.importorskip(name)
        folder = self.new_folder()
        if value_of(args, "--coordinator_address"):
            self._one_of_several(args, folder)
            return folder
        said = self.module("espl_jax.main", [*args, *self.overrides(args)], folder)
        if "--dry_run" in args:
            assert "| policy-gradient step " in said
        else:
            assert json.loads((folder / value_of(args, "--workdir") / "results.json").read_text())
        return folder

    def _one_of_several(self, args, folder):
        """Runs one of several processes until it would join the others."""
        joined = []

        def start(*process):
            joined.append(process)
            sys.exit()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "start", start)
            self.module("espl_jax.main", [*args, *self.overrides(args)], folder)
        ((address, count, index),) = joined
        assert re.fullmatch(r"[\w.]+:\d+", address) and 0 <= index < count

    def _plan(self, args):
        """Lowers every program for the slice. The compiler's part takes minutes; the slow tests do it."""

        def lowered(lower, count, *_):
            for number in range(count):
                lower(number)
                yield tpu_compiler.Compiled(text=NO_PROGRAM)

        folder = self.new_folder()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tpu_compiler, "compile_each", lowered)
            said = self.module("espl_jax.plan", [*args, *self.overrides(args), *PLAN], folder)
        assert "| policy-gradient step " in said and "It fits:" in said
        return folder

    def _evaluate(self, args):
        folder = self._made("espl_jax.main", "--workdir", "runs/quickstart")
        args = [f"--model={self.model}" if arg == "--model=smollm2" else arg for arg in args]
        said = self.module("espl_jax.evaluate", [*args, *EVALUATE], folder)
        prompts, models = (sum(arg.startswith(name) for arg in args) for name in ("--prompt=", "--model="))
        assert said.count("\n| ") >= prompts * models
        return folder

    def _report(self, args, folder):
        """Writes a page; runs that another command makes are copies of the first one."""
        first, *others = [arg.partition("=")[2] for arg in args if arg.startswith("--workdir=")]
        for other in others:
            if not (folder / other).exists():
                shutil.copytree(folder / first, folder / other)
        written = self.module("espl_jax.report", args, folder).removeprefix("Written: ").strip()
        assert "</html>" in (folder / written).read_text()

    def _compare(self, args):
        """Compares methods whose runs leave what the quickstart left; their configurations are checked."""
        made = self._made("espl_jax.main", "--workdir", "runs/quickstart") / "runs" / "quickstart"
        folder = self.new_folder()

        def process(run, command):
            """Stands for a run, whose configuration is checked, or for what is measured after it."""
            if command[2] == "espl_jax.main":
                fields = dict(each.removeprefix("--config.").split("=", 1) for each in command[5:])
                config = command_line.read_config_file(run.task.config)
                config.mode = fields["mode"]
                check_config(config)
                shutil.copytree(made, run.workdir)
                return ""
            if command[3] == "kl":
                return json.dumps([0.5] * len((made / "metrics.jsonl").read_text().splitlines()))
            return json.dumps([{"a": 0.5}] * len(json.loads(Path(command[5]).read_text())))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "_process", process)
            said = self.module("experiments.compare_methods", args, folder)
        assert "| espl " in said and "| espl - rl " in said
        assert (folder / value_of(args, "--out") / "iterations.csv").is_file()
        return folder

    def _fetch(self, name):
        """Finds a file of the right size where the model belongs, so that nothing is fetched."""
        folder = self.new_folder()
        file = folder / "cache" / "models" / MODELS[name].file
        file.parent.mkdir(parents=True)
        with file.open("wb") as empty:
            empty.truncate(MODELS[name].size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ESPL_JAX_CACHE", str(folder / "cache"))
            assert self.module("espl_jax.pretrained.fetch", [name], folder) == f"{file}\n"
        return folder

    def _serve(self, args):
        """Asks the server once, and stops it."""
        folder, found, serve_forever = self.new_folder(), [], ThreadingHTTPServer.serve_forever

        def serve_once(server):
            thread = threading.Thread(target=serve_forever, args=[server, 0.02])
            thread.start()
            try:
                address = f"http://127.0.0.1:{server.server_port}/retrieve"
                found.extend(SearchServer(address, 10.0).search(["tall"], 1))
            finally:
                server.shutdown()
                thread.join()
                server.server_close()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ThreadingHTTPServer, "serve_forever", serve_once)
            self.module("espl_jax.environments.retrievers.serve", [*args, "--port=0"], folder)
        assert [passage.title for passage in found[0]] == ["Oak"]
        return folder

    def _collect(self, args):
        """Collects the tests of one small file."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            *args,
            "-n0",
            "--collect-only",
            "tests/experiments/tpu_test.py",
        ]
        environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        # 5: every test of the file is deselected, as by `-m slow`.
        assert done.returncode in (0, 5) and "collected 26 items" in done.stdout, done.stdout + done.stderr
        return ROOT


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    retriever = make_server(Bm25([Passage("Oak", "A tall tree.")]))
    threading.Thread(target=retriever.serve_forever, args=[0.02], daemon=True).start()
    with faulty_server.serve(lambda request, number: faulty_server.answer(EDITS)) as chat:
        address = f"http://127.0.0.1:{retriever.server_port}/retrieve"
        yield Shell(tmp_path_factory.mktemp("shell"), chat.address, address)
    retriever.shutdown()
    retriever.server_close()


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # true of this process alone
@pytest.mark.parametrize("words", SHOWN, ids=shlex.join)
def test_runs(words, shell):
    shell.run(words)


def test_a_command_that_no_test_runs_fails(shell):
    with pytest.raises(pytest.fail.Exception, match="Shell does not know this command; add a case"):
        shell.run(("python", "-m", "espl_jax.new_command"))
    with pytest.raises(pytest.fail.Exception, match="--workdir=runs/x: no document shows the command"):
        shell.run(("python", "-m", "espl_jax.export", "--workdir=runs/x", "--out=y"))


def test_scripts_are_split_as_a_shell_does():
    script = """# first
A=1 B_C=x python -m one --x="a b" \\
    --y=z#p6 ... --z  # comment
for i in 0 1; do
  two --n=$i \\
      --m &
done; wait
three && four
"""
    assert documents.split_script(script) == [
        ("python", "-m", "one", "--x=a b", "--y=z#p6", "--z"),
        ("two", "--n=0", "--m"),
        ("two", "--n=1", "--m"),
        ("three",),
        ("four",),
    ]


def test_commands_between_backticks_are_found():
    text = "`make x A=1`, `python` and `ARGS=--y`\n```sh\nmake `z`\n```\n`pip\ninstall w` (`--flag`)"
    expected = [("make", "x", "A=1"), ("make", "x", "ARGS=--y"), ("pip", "install", "w")]
    assert documents.inline_commands(text) == expected


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=lambda path: path.name)
def test_commands_stand_in_blocks_of_sh(document):
    """Blocks of other languages are not executed."""
    for language, content in documents.blocks(document.read_text(encoding="utf-8")):
        assert language in ("", "sh", "python", "json", "jsonl"), f"```{language}: write ```sh or no language"
        programs = "|".join(documents.PROGRAMS)
        assert language == "sh" or not re.search(rf"^\s*(?:\$ )?(?:{programs}) -?\w", content, re.MULTILINE)


FIELD = re.compile(r"--config\.[\w.]+=.*")
SPANS = {span for text in documents.texts() for span in documents.code_spans(text)}


@pytest.mark.parametrize("flag", sorted(filter(FIELD.match, SPANS)))
def test_fields_between_backticks_can_be_set(flag, monkeypatch):
    argv = ["main", f"--config={ROOT}/configs/common.py", flag]
    monkeypatch.setattr(sys, "argv", argv)
    with fresh_flags():
        command_line.define_config()
        assert command_line.parse_flags(argv) == ["main"]


@pytest.mark.slow(minutes=2)
def test_several_processes_run_as_shown(shell):
    """The processes that the documents start on one machine, with the coordinator at a free port."""
    first, second = (words for words in SHOWN if value_of(words, "--coordinator_address"))
    assert first[:3] == ("python", "-m", "espl_jax.main") and first[:-1] == second[:-1]
    assert [words[-1] for words in (first, second)] == ["--process_id=0", "--process_id=1"]
    folder = shell.new_folder()
    args = ["--process_id={index}", "--coordinator_address={address}"]
    files = {"population.start_from": folder / "roots.jsonl", "environment.reward": ""}
    said, _ = run_pair(
        "espl_jax.main",
        *first[3:-1],
        *shell.overrides(first[3:]),
        *args,
        *(f"--config.{name}={value}" for name, value in files.items()),
        f"--workdir={folder / 'pair'}",
        timeout=900,
    )
    assert "iteration 1/1" in said and json.loads((folder / "pair" / "results.json").read_text())
