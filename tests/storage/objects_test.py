"""Work directories in a bucket, over the real protocol: killed between any two writes, taken over, read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from espl_jax.evaluate.prompts import read_prompt
from espl_jax.export.export import export
from espl_jax.reflectors.journal import Journal
from espl_jax.run import parts as run_parts
from espl_jax.run import weights
from espl_jax.run.saved import check_run, is_run, read_run
from espl_jax.storage import folders
from espl_jax.storage.workdir import WorkDir, read_checkpoint, read_log
from tests.storage import workdir_processes_test as processes_test
from tests.storage.workdir_test import ABSTRACT, CONFIG, advance
from tests.support import fakes
from tests.support.object_store import ObjectStore
from tests.support.two_processes import run_pair

LOGS = ("metrics", "rollouts", "reflections", "lineage", "evaluations")


@pytest.fixture(scope="module")
def store():
    """One server for all tests, since gcsfs and tensorstore remember the first; each test has a bucket."""
    with ObjectStore().serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(store, request):
    yield request.node.name.replace("[", "-").rstrip("]")
    store.fails = lambda method, name, content: False


def run(path, last=3):
    """A pretended run, or the rest of it."""
    with WorkDir(path, CONFIG, keep=1) as workdir:
        restored = workdir.restore(ABSTRACT)
        done = restored[0] if restored else 0
        if restored:
            np.testing.assert_array_equal(
                restored[1]["params"], jnp.arange(4, dtype=jnp.float32) * done / 3, strict=True
            )
            workdir.write_json("population.json", {"created": done})
        for iteration in range(done + 1, last + 1):
            advance(workdir, iteration)


def contents(path):
    """All that a finished run leaves for its user, wherever it is; other names are an error."""
    folder = folders.open_folder(path)
    names = set(folder.names("")) - {"checkpoints", "config.json", "population.json", ".lock"}
    assert names <= {f"{log}.jsonl" for log in LOGS}
    return {
        **{name: folder.read(name) for name in ("config.json", "population.json")},
        **{log: read_log(path, log) for log in LOGS},
        "checkpoints": folder.names("checkpoints"),
        "state": read_checkpoint(path, None)[::2],
    }


def test_a_run_leaves_what_it_leaves_on_a_disk(bucket, tmp_path):
    run(tmp_path)
    run(f"gs://{bucket}/runs/a", last=1)
    run(f"gs://{bucket}/runs/a", last=2)
    run(f"gs://{bucket}/runs/a")
    assert contents(f"gs://{bucket}/runs/a") == contents(tmp_path)
    parts = folders.open_folder(f"gs://{bucket}/runs/a").names("rollouts.jsonl")
    assert len(parts) == 3 and parts[0] == "0" * 12


def assert_killed_after_any_change_ends_the_same(store, bucket, every):
    run(f"gs://{bucket}/whole")
    changes = [name for name, _ in store.history if name.startswith(f"{bucket}/")]
    assert sum(name.endswith("COMMIT") for name in changes) == 3 + 2  # written, and the older ones removed
    whole = contents(f"gs://{bucket}/whole")
    for steps in range(0, len(changes), every):
        store.copy_history(bucket, steps, to=f"{bucket}-{steps}")
        run(f"gs://{bucket}-{steps}/whole")
        assert contents(f"gs://{bucket}-{steps}/whole") == whole, (steps, changes[steps - 1])


@pytest.mark.slow
def test_killed_after_some_changes(store, bucket):
    assert_killed_after_any_change_ends_the_same(store, bucket, every=20)


@pytest.mark.slow
def test_killed_after_every_change(store, bucket):
    assert_killed_after_any_change_ends_the_same(store, bucket, every=1)


def test_lines_are_seen_with_the_next_checkpoint_and_at_the_end(bucket):
    path = f"gs://{bucket}/run"
    with WorkDir(path, CONFIG) as workdir:
        advance(workdir, 1)
        workdir.append("metrics", {"iteration": 2})
        assert len(workdir.read("metrics")) == 2 and len(read_log(path, "metrics")) == 1
        advance(workdir, 2)
        assert workdir.read("metrics") == list(map(json.loads, read_log(path, "metrics")))
        workdir.append("evaluations", {"answer": "\u2028 \r ü"})
    assert list(map(json.loads, read_log(path, "evaluations"))) == [{"answer": "\u2028 \r ü"}]
    with WorkDir(path, CONFIG) as workdir:  # after the last checkpoint, as on a disk
        assert workdir.read("evaluations") == []
    assert read_log(path, "evaluations") == []


def test_lines_are_seen_by_what_is_made_from_them(bucket):
    """As the report is, which reads the work directory like any other reader."""
    path = f"gs://{bucket}/run"
    with WorkDir(path, CONFIG) as workdir:
        workdir.append("evaluations", {"answer": "4"})
        workdir.write_made("report.html", lambda: b"".join(read_log(path, "evaluations")).decode())
    assert folders.open_folder(path).read("report.html") == b'{"answer":"4"}\n'


def test_a_write_that_fails_costs_one_save(store, bucket):
    path = f"gs://{bucket}/run"
    with WorkDir(path, CONFIG) as workdir:
        advance(workdir, 1)
        store.fails = lambda method, name, content: method == "POST" and name.endswith("COMMIT")
        with pytest.raises(OSError, match=r"COMMIT: .*\. Check that the bucket exists"):
            advance(workdir, 2)
        store.fails = lambda method, name, content: method == "POST" and "rollouts" in name
        with pytest.raises(OSError, match=r"rollouts\.jsonl/"):
            advance(workdir, 3)
        store.fails = lambda method, name, content: False
        assert workdir.restore(ABSTRACT)[0] == 1
        workdir.append("rollouts", {"iteration": 4})
        workdir.save(4, {}, {})
        rollouts = workdir.read("rollouts")
    assert [each["iteration"] for each in rollouts] == [1, 2, 3, 4]
    assert list(map(json.loads, read_log(path, "rollouts"))) == rollouts
    with WorkDir(path, CONFIG) as workdir:
        assert workdir.read("rollouts") == rollouts and workdir.restore({})[0] == 4


def test_who_comes_later_takes_over(store, bucket):
    path = f"gs://{bucket}/run"
    first = WorkDir(path, CONFIG)
    advance(first, 1)
    first.append("metrics", {"iteration": 2, "reward": 0.5})
    with WorkDir(path, CONFIG) as second:
        assert second.restore(ABSTRACT)[0] == 1
        for refused in (
            lambda: first.save(2, {}, {}),
            lambda: first.write_json("population.json", {}),
            first.close,
        ):
            before = len(store.history)
            with pytest.raises(
                RuntimeError,
                match=rf"taken over from this process, .*, by process {os.getpid()} on .*--workdir",
            ):
                refused()
            assert len(store.history) == before
        advance(second, 2)
    assert [json.loads(line)["reward"] for line in read_log(path, "metrics")] == [1 / 7, 2 / 7]
    assert not folders.open_folder(path).read(".holder")


def test_taken_over_while_arrays_are_written(store, bucket, monkeypatch):
    path = f"gs://{bucket}/run"
    first = WorkDir(path, CONFIG)
    advance(first, 1)
    seconds = []

    def takes_over(method, name, content):
        if name.endswith("commit_success.txt") and not seconds:
            seconds.append(None)
            seconds[0] = WorkDir(path, CONFIG)
        return False

    store.fails = takes_over
    with pytest.raises(RuntimeError, match="taken over"):
        advance(first, 2)
    assert seconds[0].restore(ABSTRACT)[0] == 1
    advance(seconds[0], 2)
    assert seconds[0].restore(ABSTRACT)[0] == 2
    seconds[0].close()


def test_other_configuration_is_refused_and_costs_nothing(bucket):
    path = f"gs://{bucket}/run"
    run(path)
    before = contents(path)
    with WorkDir(path, CONFIG, keep=1) as workdir:
        with pytest.raises(
            ValueError, match=rf"gs://{bucket}/run holds a run with a different configuration"
        ):
            WorkDir(path, {**CONFIG, "seed": 1})
        workdir.write_json("population.json", {"created": 3})  # it has not been taken over
    assert contents(path) == before


def test_a_log_with_a_part_missing_is_refused(store, bucket):
    path = f"gs://{bucket}/run"
    run(path)
    part = folders.open_folder(path).names("metrics.jsonl")[1]
    store.change(f"{bucket}/run/metrics.jsonl/{part}", None)
    with pytest.raises(ValueError, match=r"metrics.jsonl has \d+ bytes, but \d+ at its checkpoint"):
        WorkDir(path, CONFIG)


def test_sharded_arrays_come_back_bit_for_bit(bucket):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    across = NamedSharding(mesh, PartitionSpec("data", "model"))
    bits = np.random.default_rng(0).integers(0, 2**16, (8, 6), dtype=np.uint16)
    arrays = {"a": jax.device_put(jnp.asarray(bits).view(jnp.bfloat16), across), "b": jnp.float32(0.1)}
    with WorkDir(f"gs://{bucket}/run", CONFIG) as workdir:
        workdir.save(3, arrays, {})
    _, restored, _ = read_checkpoint(f"gs://{bucket}/run", arrays)
    assert restored["a"].sharding == across
    for name, array in arrays.items():
        assert np.asarray(restored[name]).tobytes() == np.asarray(array).tobytes()


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(bucket):
    path = f"gs://{bucket}/run"
    run_pair("from tests.storage import workdir_processes_test as t\nt.both_save(sys.argv[1])", path)
    of_one = processes_test.abstract(processes_test.mesh())
    iteration, restored, _ = read_checkpoint(path, of_one)
    assert iteration == 2
    processes_test.assert_equal_bits(restored, 2)


def test_a_journal_has_an_object_for_each_reply(store, bucket):
    path = f"gs://{bucket}/run/replies.jsonl"
    with Journal(path) as journal:
        journal.add("a", {"reply": "ü"})
        journal.add("b", {"reply": "x" * 100})
        before = store.names(f"{bucket}/")
        store.fails = lambda method, name, content: method == "POST"
        with pytest.raises(OSError, match="Check that the bucket exists"):
            journal.add("c", {"reply": "lost"})
        store.fails = lambda method, name, content: False
        assert store.names(f"{bucket}/") == before and len(before) == 2
        assert journal.find("c") is None
        journal.add("d", {"reply": None})
        found = {key: journal.find(key) for key in "abcd"}
    assert found["b"] == {"key": "b", "reply": "x" * 100} and found["d"] == {"key": "d", "reply": None}
    with Journal(path) as journal:
        assert {key: journal.find(key) for key in "abcd"} == found
    assert [json.loads(line)["key"] for line in read_log(f"gs://{bucket}/run", "replies")] == ["a", "b", "d"]
    store.change(f"{bucket}/run/replies.jsonl/{0:012d}", b"{}\n")
    with pytest.raises(ValueError, match=r"line 1 is damaged .* move gs://"):
        Journal(path)


def test_a_log_may_be_cut_inside_a_part(bucket):
    log = folders.open_log(f"gs://{bucket}/log")
    for content in (b"one\n", b"two\n", b"three\n"):
        log.append(content)
        log.sync()
    log.append(b"four\n")
    assert log.read(2, 8) == b"e\ntwo\nth" and log.read(13, 9) == b"\nfour\n" and log.length() == 19
    log.cut_back(6)
    assert list(log.lines()) == [b"one\n", b"tw"] and log.length() == 6
    log.append(b"o\n")
    log.close()
    assert list(folders.open_log(f"gs://{bucket}/log").lines()) == [b"one\n", b"two\n"]


def test_a_part_that_is_sent_in_pieces(bucket):
    log = folders.open_log(f"gs://{bucket}/log")
    lines = [b"%d\n" % i * 1_000 for i in range(3_000)]
    log.append(b"".join(lines))
    log.close()
    assert b"".join(folders.open_log(f"gs://{bucket}/log").lines()) == b"".join(lines)
    assert log.length() > 10_000_000


def test_a_run_is_read_and_exported_out_of_a_bucket(store, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load_pretrained", fakes.load_pretrained)
    monkeypatch.setattr(run_parts.sharding, "make_mesh", lambda sizes: None)
    path = fakes.workdir(f"gs://{bucket}/run", num_iterations=2)
    results = {"iteration": 2, "deployed": {"id": "p2"}, "reason": "so", "test": {}}
    folders.open_folder(path).write("results.json", json.dumps(results).encode())
    before = store.names(f"{bucket}/")
    assert is_run(path) and check_run(path).num_iterations == 2 and not is_run(f"gs://{bucket}/other")
    read, copy = read_run(path), read_run(fakes.workdir(tmp_path / "run", num_iterations=2))
    assert (read.iteration, read.population, read.root) == (copy.iteration, copy.population, copy.root)
    assert jax.tree.all(jax.tree.map(np.array_equal, read.model.params, copy.model.params))
    assert read.prompt().id == "p2" and copy.prompt().id == "p1"
    assert read_prompt(f"{path}/population.json#p1").text == "Reply with the sum."
    export(path, tmp_path / "out", say=lambda line: None)
    assert "prompt p2" in (card := (tmp_path / "out" / "README.md").read_text()) and "0.5" in card
    assert store.names(f"{bucket}/") == before
    with pytest.raises(FileNotFoundError, match=r"gs://nobody/run has no config\.json"):
        check_run("gs://nobody/run")
    store.fails = lambda method, name, content: method == "GET"
    with pytest.raises(OSError, match="Check that the bucket exists"):
        is_run(path)


def test_paths():
    assert folders.parse("a/b") == Path.cwd() / "a" / "b"
    assert folders.parse("gs://bucket/run/") == epath.Path("gs://bucket/run")
    assert str(folders.parse("gs://bucket/run") / "x") == "gs://bucket/run/x"
    with pytest.raises(
        ValueError, match=r"s3://b/run: unsupported scheme; give a local folder or a gs:// address"
    ):
        WorkDir("s3://b/run", CONFIG)


def test_without_gcsfs(tmp_path):
    code = "import sys; sys.modules['gcsfs'] = None\nfrom espl_jax.storage import folders; folders.parse('gs://b/x')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: gs://b/x: buckets need the package gcsfs; pip install 'espl_jax[gcs]'" in said.stderr
