"""The scripts of experiments/tpu with a `gcloud` that records its arguments and plays states."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "experiments" / "tpu"

# Answers by the beginning of the command, each time with the next of a list, the last one again and again.
GCLOUD = """#!{python}
import json, pathlib, sys
folder = pathlib.Path(__file__).resolve().parent
said = sys.argv[1:]
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(said) + "\\n")
answers = json.loads((folder / "answers").read_text())
for beginning, rest in answers.items():
    if " ".join(said).startswith("compute tpus " + beginning):
        answer = rest.pop(0) if len(rest) > 1 else rest[0]
        (folder / "answers").write_text(json.dumps(answers))
        if answer.startswith("ERROR"):
            sys.exit(answer)
        print(answer)
        break
"""

MISSING = "ERROR: (gcloud) NOT_FOUND: Resource was not found"
SETTINGS = {
    "PROJECT": "physics",
    "ZONE": "europe-west4-b",
    "NAME": "hmmt",
    "TYPE": "v5litepod-16",
    "RUNTIME": "v2-alpha-tpuv5-lite",
    "WORKDIR": "gs://bucket/hmmt",
    "RUN": "--config=configs/hmmt.py --config.seed=1",
    "POLL": "0",
}
QUEUE, NODE, SSH = "queued-resources describe", "tpu-vm describe", "tpu-vm ssh hmmt --worker=0"


class Cloud:
    """A folder with the fake `gcloud`, first on PATH."""

    def __init__(self, folder):
        self.folder = folder
        program = folder / "gcloud"
        program.write_text(GCLOUD.format(python=sys.executable), encoding="utf-8")
        program.chmod(0o755)
        self.answer({})

    def answer(self, answers):
        (self.folder / "answers").write_text(json.dumps(answers), encoding="utf-8")

    def run(self, script, *arguments, **changed):
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.folder)} | SETTINGS | changed
        return subprocess.run(
            [str(SCRIPTS / script), *arguments], capture_output=True, text=True, env=environment, timeout=60
        )

    @property
    def calls(self):
        path = self.folder / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def changes(self):
        """What was asked for, but for looks at states: `queued-resources create`, `tpu-vm scp all`, ..."""
        short = []
        for call in self.calls:
            workers = [word.partition("=")[2] for word in call if word.startswith("--worker")]
            if call[:2] == ["compute", "tpus"] and call[3] != "describe" and workers != ["0"]:
                short.append(" ".join([*call[2:4], *workers]))
        return short


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


CREATE, DELETE = "queued-resources create", "queued-resources delete"
INSTALL = ["tpu-vm scp all", "tpu-vm ssh all"]
START = ["tpu-vm scp all", "tpu-vm ssh all"]
ALL = ["create.sh", "start.sh", "watch.sh", "keep.sh", "fetch.sh", "delete.sh"]


@pytest.mark.parametrize("script", ALL)
def test_missing_variables_are_named(cloud, script):
    done = cloud.run(script, ZONE="", RUN="")
    assert done.returncode == 2
    assert "missing: ZONE RUN;" in done.stderr
    assert cloud.calls == []


@pytest.mark.parametrize("script", ALL)
def test_a_dry_run_prints_commands_and_calls_nothing(cloud, script):
    done = cloud.run(script, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "gcloud " in done.stdout
    assert cloud.calls == []


def test_a_slice_from_the_queue_is_waited_for_and_then_installed_on(cloud):
    cloud.answer(
        {QUEUE: [MISSING, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], NODE: ["CREATING", "READY"]}
    )
    done = cloud.run("create.sh", FILES="train.jsonl env.sh")
    assert done.returncode == 0, done.stderr
    assert cloud.changes == [CREATE, *INSTALL, "tpu-vm scp all"]
    (create,) = [call for call in cloud.calls if call[3] == "create"]
    assert create[4:] == [
        "hmmt",
        "--node-id=hmmt",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
        "--project=physics",
        "--zone=europe-west4-b",
        "--quiet",
    ]
    assert cloud.calls[-1][4:8] == ["--recurse", "train.jsonl", "env.sh", "hmmt:espl_jax/"]


def test_a_slice_wanted_at_once_is_no_queued_resource(cloud):
    cloud.answer({NODE: [MISSING, "READY"]})
    done = cloud.run("create.sh", QUEUED="0", SPOT="0")
    assert done.returncode == 0, done.stderr
    assert cloud.changes == ["tpu-vm create", *INSTALL]
    (create,) = [call for call in cloud.calls if call[3] == "create"]
    assert "--version=v2-alpha-tpuv5-lite" in create
    assert "--spot" not in create


def test_all_workers_get_one_command_with_the_work_directory(cloud):
    done = cloud.run("start.sh", "--dry-run")
    command = "-m espl_jax.main --config=configs/hmmt.py --config.seed=1 --workdir=gs://bucket/hmmt >>run.log"
    assert command in done.stdout


def test_a_preempted_slice_is_made_anew_and_the_run_started_again(cloud):
    cloud.answer(
        {
            # Made, preempted while it runs, seen to be gone, made again.
            QUEUE: [MISSING, MISSING, "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", MISSING, "ACTIVE"],
            NODE: ["READY"],
            SSH: ["running", "running", "0"],
        }
    )
    done = cloud.run("keep.sh")
    assert done.returncode == 0, done.stderr
    assert cloud.changes == [CREATE, *INSTALL, *START, DELETE, CREATE, *INSTALL, *START]
    assert "SUSPENDED: making it anew" in done.stdout


@pytest.mark.parametrize("dead", ["PREEMPTED", MISSING])
def test_a_preempted_node_counts_although_its_request_is_active(cloud, dead):
    cloud.answer({QUEUE: ["ACTIVE", MISSING, "ACTIVE"], NODE: [dead, "READY"], SSH: ["0"]})
    done = cloud.run("keep.sh")
    assert done.returncode == 0, done.stderr
    assert cloud.changes == [DELETE, CREATE, *INSTALL, *START]


def test_a_slice_that_fails_while_it_is_made_is_made_anew(cloud):
    cloud.answer(
        {QUEUE: ["FAILED", MISSING, "FAILED", "FAILED", MISSING, "ACTIVE"], NODE: ["READY"], SSH: ["0"]}
    )
    done = cloud.run("keep.sh")
    assert done.returncode == 0, done.stderr
    assert cloud.changes == [DELETE, CREATE, DELETE, CREATE, *INSTALL, *START]


def test_what_gcloud_refuses_is_an_error_and_not_tried_again(cloud):
    cloud.answer({QUEUE: [MISSING], "queued-resources create": ["ERROR: no such accelerator type"]})
    done = cloud.run("keep.sh")
    assert done.returncode == 1
    assert "no such accelerator type" in done.stderr
    assert cloud.changes == [CREATE]


def test_a_failure_to_look_changes_nothing(cloud):
    cloud.answer({QUEUE: ["ERROR: no network", "ACTIVE"], NODE: ["READY"], SSH: ["ERROR: no route", "0"]})
    done = cloud.run("keep.sh")
    assert done.returncode == 0
    assert "no network" in done.stderr
    assert cloud.changes == []


def test_a_run_that_fails_is_not_started_again(cloud):
    cloud.answer({QUEUE: ["ACTIVE"], NODE: ["READY"], SSH: ["running", "5"]})
    done = cloud.run("keep.sh")
    assert done.returncode == 5
    assert cloud.changes == []


def test_a_run_that_dies_with_its_slice_is_resumed(cloud):
    cloud.answer(
        {
            QUEUE: ["ACTIVE", "SUSPENDED", MISSING, "ACTIVE"],
            NODE: ["READY"],
            SSH: ["143", "running", "0"],
        }
    )
    done = cloud.run("keep.sh")
    assert done.returncode == 0, done.stderr
    assert cloud.changes == [DELETE, CREATE, *INSTALL, *START]


def test_a_run_without_a_bucket_is_not_kept(cloud):
    done = cloud.run("keep.sh", WORKDIR="runs/hmmt")
    assert done.returncode == 2
    assert "WORKDIR=runs/hmmt: name a bucket" in done.stderr
    assert cloud.calls == []


def test_results_come_from_the_bucket_or_from_worker_0(cloud, tmp_path):
    cloud.run("fetch.sh", str(tmp_path / "here"))
    rsync, _ = cloud.calls
    assert rsync == ["storage", "rsync", "--recursive", "gs://bucket/hmmt", str(tmp_path / "here")]
    cloud.run("fetch.sh", str(tmp_path / "here"), WORKDIR="runs/hmmt")
    assert cloud.calls[2][4:8] == [
        "--recurse",
        "hmmt:espl_jax/runs/hmmt/*",
        str(tmp_path / "here"),
        "--worker=0",
    ]


def test_deleting_takes_the_slice_out_of_the_queue_too(cloud):
    cloud.run("delete.sh")
    assert cloud.calls[0][2:6] == ["queued-resources", "delete", "hmmt", "--force"]
    cloud.run("delete.sh", QUEUED="0")
    assert cloud.calls[1][2:5] == ["tpu-vm", "delete", "hmmt"]
