import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from espl_jax.pretrained import hub
from espl_jax.pretrained.load import find_folder
from tests.pretrained.hub_server import COMMIT, serve

TEXTS = {"config.json": b"{}", "tokenizer.json": b"{}", "generation_config.json": b"{}"}
TEXTS |= {"chat_template.jinja": b"{{ 1 }}", "additional_chat_templates/tool_use.jinja": b"{{ 2 }}"}
NEVER = {
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"import os",
    "original/consolidated.00.pth": b"pickle",
    "original/tokenizer.model": b"twice",
    "onnx/config.json": b"{}",
    "README.md": b"words",
}
INDEX = json.dumps(
    {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
).encode()
SHARDS = {
    "model.safetensors.index.json": INDEX,
    "model-1-of-2.safetensors": b"one",
    "model-2-of-2.safetensors": b"two",
}
REPOSITORIES = {
    "org/single": TEXTS | NEVER | {"model.safetensors": b"weights"},
    "org/sharded": TEXTS | NEVER | SHARDS | {"consolidated.safetensors": b"all again"},
    "org/pickled": TEXTS | NEVER,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return tmp_path / "hub"


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("repository", "weights"),
    [("org/single", {"model.safetensors": b"weights"}), ("org/sharded", SHARDS)],
)
def test_only_the_files_needed_are_fetched(repository, weights):
    with serve(REPOSITORIES) as (address, asked):
        folder = hub.download(repository, endpoint=address)
    got = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert got == TEXTS | weights
    assert {path.rpartition(f"/resolve/{COMMIT}/")[2] for path in asked if "/resolve/" in path} == set(got)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_complete_copy_needs_no_network(revision, monkeypatch):
    with serve(REPOSITORIES) as (address, asked):
        folder = hub.download("org/sharded", revision, endpoint=address)
        fetched = len(asked)
        assert hub.download("org/sharded", revision, endpoint=address) == folder
        assert not any("/resolve/" in path for path in asked[fetched:])
    assert hub.download("org/sharded", revision, endpoint=closed_port()) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.download("org/sharded", revision) == folder


def test_nothing_cached_and_no_network(cache):
    address = closed_port()
    with pytest.raises(ConnectionError, match="org/single is not completely in the cache") as caught:
        hub.download("org/single", endpoint=address)
    for part in (
        str(cache),
        f"{address}/org/single cannot be reached",
        "ConnectError",
        "give a local folder",
    ):
        assert part in str(caught.value)


def test_an_interrupted_download_is_not_taken_for_whole(monkeypatch):
    with serve(REPOSITORIES) as (address, _):
        folder = hub.download("org/sharded", endpoint=address)
    (folder / "model-2-of-2.safetensors").unlink()
    with (
        monkeypatch.context() as offline,
        pytest.raises(ConnectionError, match="is not completely in the cache"),
    ):
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.download("org/sharded")
    with serve(REPOSITORIES) as (address, _):
        assert (hub.download("org/sharded", endpoint=address) / "model-2-of-2.safetensors").is_file()


@pytest.mark.parametrize(
    ("repository", "revision", "error", "message"),
    [
        ("org/none", None, FileNotFoundError, r"org/none does not exist at http.*/org/none.*private"),
        ("org/single", "v9", FileNotFoundError, "org/single has no revision 'v9'"),
        ("org/pickled", None, FileNotFoundError, "neither model.safetensors nor .*pickled files can run"),
        ("org/na..me", None, FileNotFoundError, r"'org/na\.\.me' is not a repository name"),
    ],
)
def test_what_the_hub_does_not_have(repository, revision, error, message):
    with serve(REPOSITORIES) as (address, _), pytest.raises(error, match=message):
        hub.download(repository, revision, endpoint=address)


def test_gated():
    message = r"org/single is gated; accept its terms at http.*/org/single.*`hf auth login` or set HF_TOKEN"
    hub_here = serve(REPOSITORIES, gated=["org/single"])
    with hub_here as (address, _), pytest.raises(PermissionError, match=message):
        hub.download("org/single", endpoint=address)


def test_a_wrong_token():
    message = "rejects the access token .*Invalid credentials.*; log in with"
    hub_here = serve(REPOSITORIES, refusing_tokens=True)
    with hub_here as (address, _), pytest.raises(PermissionError, match=message):
        hub.download("org/single", endpoint=address)


class TestFindFolder:
    @pytest.fixture(autouse=True)
    def no_download(self, monkeypatch):
        def download(repository, revision=None, weights=True):
            raise FileNotFoundError(f"asked the hub for {repository} at {revision}")

        monkeypatch.setattr(hub, "download", download)

    def test_a_folder_comes_before_a_repository_of_its_name(self, tmp_path, monkeypatch):
        (tmp_path / "org" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert find_folder("org/name") == Path("org/name")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert find_folder("~/org") == tmp_path / "org"

    @pytest.mark.parametrize(
        ("source", "asked"),
        [
            ("org/name", "org/name at None"),
            ("org/name@v1.0", "org/name at v1.0"),
            ("Qwen/Qwen3-0.6B@refs/pr/1", "Qwen/Qwen3-0.6B at refs/pr/1"),
            ("here/name@main", "here/name at main"),
        ],
    )
    def test_names_of_the_hub(self, source, asked, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            FileNotFoundError, match=f"'{source}': not a local folder, and on .*asked the hub for {asked}"
        ):
            find_folder(source)

    @pytest.mark.parametrize(
        "source",
        ["smollm", "", "/no/such", "./org/name", "../name", "~/org", "a/b/c", "org/name/", "org/na me"],
    )
    def test_paths_never_reach_the_hub(self, source):
        with pytest.raises(
            FileNotFoundError, match=r"neither a local folder nor a model name.*or org/name@revision"
        ):
            find_folder(source)

    def test_a_mistyped_path_never_reaches_the_hub(self, tmp_path, monkeypatch):
        (tmp_path / "runs").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"folder runs has no modle.*give runs/modle@main"):
            find_folder("runs/modle")

    def test_a_file_is_no_folder(self, tmp_path, monkeypatch):
        (tmp_path / "org").mkdir()
        (tmp_path / "org" / "name").write_text("")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="neither a local folder nor a model name"):
            find_folder("org/name")


@pytest.mark.slow
def test_environment_variables_of_the_hub_are_heeded(tmp_path):
    code = "import sys; from espl_jax.pretrained.load import hub; print(hub.download(sys.argv[1]))"

    def run(**environment):
        return subprocess.run(
            [sys.executable, "-c", code, "org/single"],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "other")} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    with serve(REPOSITORIES) as (address, _):
        first = run(HF_ENDPOINT=address)
    assert first.returncode == 0, first.stderr
    folder = first.stdout.split()[-1]
    assert folder.startswith(str(tmp_path / "other"))
    offline = run(HF_HUB_OFFLINE="1")
    assert offline.stdout.split()[-1:] == [folder], offline.stderr
    nothing = run(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "empty"))
    assert "ConnectionError: org/single is not completely in the cache" in nothing.stderr


def test_of_a_model_without_weights_the_configuration_alone_is_fetched():
    with serve(REPOSITORIES) as (address, _):
        folder = hub.download("org/single", endpoint=address, weights=False)
        assert [path.name for path in folder.iterdir()] == ["config.json"]
