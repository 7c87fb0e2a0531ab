"""Checkpoints and logs: exact round trips, and a kill between any two steps."""

import collections
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from espl_jax.storage.workdir import WorkDir, read_checkpoint

CONFIG = {"seed": 0, "optimizer": {"learning_rate": 1e-3, "clip": 1.0}, "num_iterations": 10}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def advance(workdir, iteration):
    """An iteration of a pretended run, whose every number follows from its own."""
    workdir.append("metrics", {"iteration": iteration, "reward": iteration / 7})
    workdir.append("rollouts", {"iteration": iteration, "text": "x" * iteration})
    arrays = {"params": jnp.arange(4, dtype=jnp.float32) * iteration / 3}
    workdir.save(iteration, arrays, {"position": iteration * 10})
    workdir.write_json("population.json", {"created": iteration})


ABSTRACT = {"params": jax.ShapeDtypeStruct((4,), jnp.float32)}


def contents(path):
    """All that a finished run leaves for its user, as bytes."""
    names = ["config.json", "metrics.jsonl", "rollouts.jsonl", "population.json"]
    found = {name: (path / name).read_bytes() for name in names}
    return found | {"checkpoints": sorted(folder.name for folder in (path / "checkpoints").iterdir())}


def test_new_directory_has_nothing_to_restore(tmp_path):
    with WorkDir(tmp_path / "a" / "run", CONFIG) as workdir:
        assert workdir.restore(ABSTRACT) is None
    assert json.loads((tmp_path / "a" / "run" / "config.json").read_text()) == CONFIG


def test_resume_continues_as_if_uninterrupted(tmp_path):
    with WorkDir(tmp_path / "whole", CONFIG) as workdir:
        for iteration in range(1, 6):
            advance(workdir, iteration)
    for iteration in range(1, 6):
        with WorkDir(tmp_path / "parts", CONFIG) as workdir:
            restored = workdir.restore(ABSTRACT)
            assert iteration == 1 if restored is None else restored[0] + 1
            advance(workdir, iteration)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert contents(tmp_path / "whole")["checkpoints"] == ["00000004", "00000005"]


def test_unsaved_work_is_undone(tmp_path):
    with WorkDir(tmp_path, CONFIG) as workdir:
        advance(workdir, 1)
        workdir.append("metrics", {"iteration": 2})
        workdir.append("reflections", {"iteration": 2})
    (tmp_path / "rollouts.jsonl").open("a").write('{"iteration": 2, "te')
    shutil.copytree(tmp_path / "checkpoints" / "00000001", tmp_path / "checkpoints" / "00000002")
    (tmp_path / "checkpoints" / "00000002" / "COMMIT").write_text('{"iteration": 2, "logs": {')
    (tmp_path / "checkpoints" / "00000003").mkdir()
    (tmp_path / "notes.jsonl").write_text("the user's own\n")
    with WorkDir(tmp_path, CONFIG) as workdir:
        iteration, arrays, state = workdir.restore(ABSTRACT)
    assert (iteration, state) == (1, {"position": 10})
    np.testing.assert_array_equal(arrays["params"], np.arange(4, dtype=np.float32) / np.float32(3))
    assert lines(tmp_path / "metrics.jsonl") == [{"iteration": 1, "reward": 1 / 7}]
    assert len(lines(tmp_path / "rollouts.jsonl")) == 1
    assert lines(tmp_path / "reflections.jsonl") == []
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
    assert (tmp_path / "notes.jsonl").read_text() == "the user's own\n"


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with WorkDir("runs/a", CONFIG) as workdir:
        advance(workdir, 1)
    with WorkDir(tmp_path / "runs" / "a", CONFIG) as workdir:
        assert workdir.restore(ABSTRACT)[0] == 1


def test_without_a_checkpoint_logs_start_again(tmp_path):
    with WorkDir(tmp_path, CONFIG) as workdir:
        workdir.append("metrics", {"iteration": 1})
    with WorkDir(tmp_path, CONFIG) as workdir:
        assert workdir.restore(ABSTRACT) is None
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


Point = collections.namedtuple("Point", ["x", "y"])


def test_arrays_come_back_bit_for_bit_on_their_shardings(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    across = NamedSharding(mesh, PartitionSpec("data", "model"))
    bits = np.random.default_rng(0).integers(0, 2**16, (8, 6), dtype=np.uint16)
    params = {
        "a.b['c']": jax.device_put(jnp.asarray(bits).view(jnp.bfloat16), across),  # NaNs among them
        "stack": Point(
            jax.device_put(jnp.ones((3,)), NamedSharding(mesh, PartitionSpec())), jnp.float32(0.1)
        ),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    arrays = (params, optimizer.init(params), jax.random.PRNGKey(7))
    with WorkDir(tmp_path, CONFIG) as workdir:
        workdir.save(3, arrays, {})
        _, restored, _ = workdir.restore(arrays)
    assert jax.tree.structure(restored) == jax.tree.structure(arrays)
    for before, after in zip(jax.tree.leaves(arrays), jax.tree.leaves(restored), strict=True):
        assert after.dtype == before.dtype and after.committed == before.committed
        assert after.sharding == before.sharding
        assert np.asarray(after).tobytes() == np.asarray(before).tobytes()
    # Restored scalars go with arrays on any mesh, as fresh ones do.
    jax.jit(lambda x, y: x * y)(restored[0]["a.b['c']"], restored[0]["stack"].y)


def test_restore_onto_another_mesh(tmp_path):
    value = np.arange(16, dtype=np.float32).reshape(8, 2)
    devices = np.array(jax.devices())
    eight = NamedSharding(jax.sharding.Mesh(devices, "x"), PartitionSpec("x"))
    two = NamedSharding(jax.sharding.Mesh(devices[:2], "x"), PartitionSpec("x"))
    with WorkDir(tmp_path, CONFIG) as workdir:
        workdir.save(1, [jax.device_put(value, eight)], {})
        _, [restored], _ = workdir.restore([jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=two)])
    assert restored.sharding == two
    np.testing.assert_array_equal(restored, value)


def test_no_arrays_at_all(tmp_path):
    with WorkDir(tmp_path, CONFIG) as workdir:
        workdir.save(1, {"frozen": None}, {"big": 2**100, "inexact": 0.1 + 0.2})
        assert workdir.restore({"frozen": None}) == (
            1,
            {"frozen": None},
            {"big": 2**100, "inexact": 0.1 + 0.2},
        )


@pytest.mark.parametrize(
    ("abstract", "complaint"),
    [
        ({"params": jax.ShapeDtypeStruct((5,), jnp.float32)}, r"float32\[4\] saved, float32\[5\] now"),
        ({"params": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}, r"float32\[4\] saved, bfloat16\[4\] now"),
        ({"weights": jax.ShapeDtypeStruct((4,), jnp.float32)}, r"\['weights'\]: \(absent\) saved"),
        ({}, r"\['params'\]: float32\[4\] saved, \(absent\) now"),
    ],
)
def test_other_arrays_are_refused(tmp_path, abstract, complaint):
    with WorkDir(tmp_path, CONFIG) as workdir:
        advance(workdir, 1)
        with pytest.raises(ValueError, match=complaint):
            workdir.restore(abstract)


def test_other_configuration_is_refused_and_costs_nothing(tmp_path):
    with WorkDir(tmp_path, CONFIG) as workdir:
        workdir.append("metrics", {"iteration": 1})
    other = {"seed": 1, "optimizer": {"learning_rate": 2e-3, "clip": 1.0}, "num_iterations": 20, "new": [1]}
    with pytest.raises(ValueError) as error:
        WorkDir(tmp_path, other, may_change=["num_iterations"])
    message = str(error.value)
    assert "optimizer.learning_rate: 0.001 saved, 0.002 now" in message and "seed: 0 saved, 1 now" in message
    assert "new: (absent) saved, [1] now" in message and "--workdir" in message
    assert "with the version of espl_jax that began it" in message
    assert "clip" not in message and "num_iterations" not in message
    assert lines(tmp_path / "metrics.jsonl") == [{"iteration": 1}]
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    with pytest.raises(ValueError, match=r"resume the run with its own configuration[.]$"):
        WorkDir(tmp_path, CONFIG | {"seed": 1})


def test_permitted_changes_are_written_down(tmp_path):
    WorkDir(tmp_path, CONFIG).close()
    changed = {"seed": 0, "optimizer": {"learning_rate": 5.0, "clip": 2.0}, "num_iterations": 20}
    WorkDir(tmp_path, changed, may_change=["num_iterations", "optimizer"]).close()
    assert json.loads((tmp_path / "config.json").read_text()) == changed


def test_tuples_and_lists_are_the_same_configuration(tmp_path):
    WorkDir(tmp_path, {"betas": (0.9, 0.95)}).close()
    WorkDir(tmp_path, {"betas": [0.9, 0.95]}).close()


def test_damaged_state_is_named_and_the_one_before_serves(tmp_path):
    with WorkDir(tmp_path, CONFIG) as workdir:
        advance(workdir, 1)
        advance(workdir, 2)
    state = tmp_path / "checkpoints" / "00000002" / "state.json"
    state.write_text(state.read_text().replace("2", "3"))
    with WorkDir(tmp_path, CONFIG) as workdir, pytest.raises(ValueError, match="resume from iteration 1"):
        workdir.restore(ABSTRACT)
    shutil.rmtree(state.parent)
    with WorkDir(tmp_path, CONFIG) as workdir:
        assert workdir.restore(ABSTRACT)[0] == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def flip(content):
    """One bit in the middle."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [flip, lambda content: content[: len(content) // 2], lambda content: None],
    ids=["bit", "cut", "gone"],
)
def test_every_damaged_file_of_arrays_is_named(tmp_path, damage):
    """Whichever file of a checkpoint it is: one sentence with that file and the checkpoint to resume from."""
    with WorkDir(tmp_path, CONFIG) as workdir:
        advance(workdir, 1)
        advance(workdir, 2)
    newest = tmp_path / "checkpoints" / "00000002"
    files = [
        path for path in sorted((newest / "arrays").rglob("*")) if path.is_file() and path.stat().st_size
    ]
    assert len(files) > 2
    for file in files:
        content = file.read_bytes()
        file.unlink()
        if (changed := damage(content)) is not None:
            file.write_bytes(changed)
        sentence = f"{file} is damaged: its hash does not match COMMIT. Remove {newest} to "
        sentence += "resume from iteration 1."
        with WorkDir(tmp_path, CONFIG) as workdir, pytest.raises(ValueError) as error:
            workdir.restore(ABSTRACT)
        assert str(error.value) == sentence
        with pytest.raises(ValueError) as error:
            read_checkpoint(tmp_path, ABSTRACT)
        assert str(error.value) == sentence
        file.write_bytes(content)
    assert read_checkpoint(tmp_path, ABSTRACT)[0] == 2


def test_an_earlier_checkpoint_can_be_read(tmp_path):
    with WorkDir(tmp_path, CONFIG) as workdir:
        for iteration in (1, 2, 3):
            advance(workdir, iteration)
    iteration, arrays, state = read_checkpoint(tmp_path, ABSTRACT, 2)
    assert (iteration, state) == (2, {"position": 20})
    np.testing.assert_array_equal(arrays["params"], np.arange(4, dtype=np.float32) * 2 / np.float32(3))
    with pytest.raises(ValueError, match=r"iteration=1: .* has no checkpoint of it; choose one of 2, 3 "):
        read_checkpoint(tmp_path, ABSTRACT, 1)
    (tmp_path / "checkpoints" / "00000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state.json is damaged: .* to resume from iteration 3\.$"):
        read_checkpoint(tmp_path, ABSTRACT, 2)


def test_a_damaged_marker_is_refused_before_logs_are_cut_back(tmp_path):
    with WorkDir(tmp_path, CONFIG) as workdir:
        advance(workdir, 1)
        advance(workdir, 2)
    marker = tmp_path / "checkpoints" / "00000002" / "COMMIT"
    length = json.loads(marker.read_text())["logs"]["metrics"]
    marker.write_text(marker.read_text().replace(f'"metrics": {length}', f'"metrics": {length - 1}'))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"COMMIT is damaged: .* to resume from iteration 1\.$"):
        WorkDir(tmp_path, CONFIG)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="COMMIT is damaged"):
        read_checkpoint(tmp_path, ABSTRACT)


def test_shortened_log_is_refused(tmp_path):
    with WorkDir(tmp_path, CONFIG) as workdir:
        advance(workdir, 1)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 0 bytes, but \d+ at its checkpoint"):
        WorkDir(tmp_path, CONFIG)


def test_iterations_only_grow(tmp_path):
    with WorkDir(tmp_path, CONFIG) as workdir:
        advance(workdir, 2)
        with pytest.raises(ValueError, match=r"iteration=2: .* already has a checkpoint of iteration 2"):
            workdir.save(2, {}, {})


def test_full_disk(tmp_path, monkeypatch):
    workdir = WorkDir(tmp_path, CONFIG)
    advance(workdir, 1)
    (tmp_path / "reflections.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="the disk is full; free some space") as error:
        workdir.append("reflections", {"text": "x" * 100_000})
    assert error.value.errno == errno.ENOSPC
    workdir._logs["reflections"].close()
    (tmp_path / "reflections.jsonl").unlink()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
        patch.setattr(os, "fsync", full)
        workdir.save(2, {}, {})
    assert workdir.restore(ABSTRACT)[0] == 1
    advance(workdir, 2)
    assert workdir.restore(ABSTRACT)[0] == 2
    workdir.close()


def test_one_process_at_a_time(tmp_path):
    code = (
        "import sys; from espl_jax.storage.workdir import WorkDir\n"
        f"w = WorkDir({str(tmp_path)!r}, {CONFIG!r}); print('open', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(RuntimeError, match=rf"in use by process {holder.pid}; .*--workdir"):
            WorkDir(tmp_path, CONFIG)
    finally:
        holder.kill()
        holder.communicate()
    WorkDir(tmp_path, CONFIG).close()


def test_a_refused_opening_gives_the_lock_up(tmp_path):
    WorkDir(tmp_path, CONFIG).close()
    with pytest.raises(ValueError):
        WorkDir(tmp_path, {"seed": 1})
    WorkDir(tmp_path, CONFIG).close()


def test_undeclared_log(tmp_path):
    with WorkDir(tmp_path, CONFIG, logs=["metrics"]) as workdir:
        with pytest.raises(ValueError, match="'rollouts' is not one of"):
            workdir.append("rollouts", {})
        workdir.append("metrics", {"b": 1, "a": np.float32(0.1)})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"a":0.10000000149011612,"b":1}\n'


# A kill between any two steps. Every audited file operation under the directory (open, mkdir, remove, rename,
# truncate, those of orbax included) and every fsync is a step; the process ends just before step number k.
LADDER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.storage import workdir_test as t
from espl_jax.storage.workdir import WorkDir

def run(path, die_at, log_steps):
    steps = 0
    def step():
        nonlocal steps
        steps += 1
        if steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    def hook(event, args):
        if event.partition(".")[0] in ("open", "os", "shutil") and str(path) in str(args[:1]):
            step()
    fsync = os.fsync
    def counted_fsync(descriptor):
        step()
        fsync(descriptor)
    os.fsync = counted_fsync
    sys.addaudithook(hook)
    with WorkDir(path, t.CONFIG, keep=1) as workdir:
        restored = workdir.restore(t.ABSTRACT)
        if restored:
            workdir.write_json("population.json", {{"created": restored[0]}})
        for iteration in range(restored[0] + 1 if restored else 1, 4):
            t.advance(workdir, iteration)
    if log_steps:
        print(steps, flush=True)

def in_child(*args):
    child = os.fork()
    if child == 0:
        run(*args)
        os._exit(0)
    return os.waitpid(child, 0)[1]

folder = Path({folder!r})
for k in {ks}:
    path = folder / str(k)
    status = in_child(path, k, k == 0)
    if k:
        assert os.WIFSIGNALED(status), (k, status)
        status = in_child(path, 0, False)
    assert status == 0, (k, status)
"""


def run_ladder(folder, ks):
    # jax starts its threads in the children only: forking a process without threads is safe.
    code = LADDER.format(tests=str(Path(__file__).parents[2]), folder=str(folder), ks=list(ks))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_killed_anywhere_ends_the_same(folder, every):
    steps = int(run_ladder(folder, [0]))
    assert steps > 50
    ks = range(1, steps + 1, every)
    run_ladder(folder, ks)
    for k in ks:
        assert contents(folder / str(k)) == contents(folder / "0"), k


def test_killed_at_some_steps(tmp_path):
    assert_killed_anywhere_ends_the_same(tmp_path, every=41)


@pytest.mark.slow
def test_killed_at_every_step(tmp_path):
    assert_killed_anywhere_ends_the_same(tmp_path, every=1)
