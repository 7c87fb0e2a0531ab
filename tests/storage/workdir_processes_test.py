"""One work directory of several processes: what all write and read, and what the first one decides."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from espl_jax.storage.workdir import WorkDir, read_checkpoint
from tests.storage.workdir_test import CONFIG
from tests.support.two_processes import run_pair

SHARDED = {
    "rows": ((16, 6), jnp.bfloat16, PartitionSpec("data")),
    "tiles": ((8, 12), jnp.float32, PartitionSpec("data", "model")),
    "whole": ((3,), jnp.float32, PartitionSpec()),
    "count": ((), jnp.int32, PartitionSpec()),
}


def values(iteration):
    """Any bits at all, NaNs among them."""
    rng = np.random.default_rng(iteration)
    return {
        name: np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
        for name, (shape, dtype, _) in SHARDED.items()
    }


def mesh(shape=(4, 2)):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def abstract(mesh):
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for name, (shape, dtype, spec) in SHARDED.items()
    }


def arrays(mesh, iteration):
    """Every process has the whole value and lays out its own shards."""
    return {
        name: jax.make_array_from_callback(x.shape, NamedSharding(mesh, SHARDED[name][2]), x.__getitem__)
        for name, x in values(iteration).items()
    }


def assert_equal_bits(restored, iteration):
    for name, value in values(iteration).items():
        for shard in restored[name].addressable_shards:
            assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes(), name


def both_save(path):
    """A run of two processes, begun, abandoned and taken up again."""
    with WorkDir(path, CONFIG, keep=1) as workdir:
        assert workdir.restore(abstract(mesh())) is None
        for iteration in (1, 2):
            workdir.append("metrics", {"iteration": iteration})
            workdir.save(iteration, arrays(mesh(), iteration), {"position": iteration})
            assert (workdir.path / "checkpoints" / f"{iteration:08d}" / "COMMIT").exists()
            assert workdir.read("metrics")[-1] == {"iteration": iteration}
        workdir.write_json("population.json", [1])
        workdir.append("metrics", {"iteration": 3})
    with WorkDir(path, CONFIG, keep=1) as workdir:
        iteration, restored, state = workdir.restore(abstract(mesh((2, 4))))
        assert (iteration, state) == (2, {"position": 2}) and restored["tiles"].sharding.mesh == mesh((2, 4))
        assert_equal_bits(restored, 2)
        assert workdir.read("metrics") == [{"iteration": 1}, {"iteration": 2}]


def both_fail(path):
    """What goes wrong in the first process, each error printed by both."""

    def said(act):
        with pytest.raises(Exception) as error:
            act()
        text = str(error.value).partition("\n")[0].replace(os.getcwd(), "here")
        print(type(error.value).__name__, text, flush=True)

    os.chdir(f"{path}-{jax.process_index()}")  # as if each had a disk of its own
    said(lambda: WorkDir("run", CONFIG))
    said(lambda: WorkDir(path, {**CONFIG, "seed": 1}))
    with WorkDir(path, CONFIG) as workdir:
        said(lambda: WorkDir(path, CONFIG))
        said(lambda: workdir.save(2, {}, {}))
        said(lambda: workdir.save(3, {"here": jnp.ones(3)}, {}))
        said(lambda: workdir.restore({**abstract(mesh()), "count": jax.ShapeDtypeStruct((), jnp.int32)}))
        if jax.process_index() == 0:
            (workdir.path / "lineage.jsonl").unlink(missing_ok=True)
            (workdir.path / "lineage.jsonl").symlink_to("/dev/full")
        workdir.append("lineage", {"iteration": 3})
        said(lambda: workdir.save(3, {}, {}))


def test_two_processes(tmp_path):
    path = tmp_path / "run"
    names = "from tests.storage import workdir_processes_test as t\n"
    for index in range(2):
        (tmp_path / f"run-{index}").mkdir()
    first, second = run_pair(f"{names}t.both_save(sys.argv[1]); t.both_fail(sys.argv[1])", path)
    assert first == second
    unseen, other, used, older, alone, unshared, full = first.splitlines()
    assert unseen.startswith("RuntimeError config.json in here/run, which all processes have to see, differs")
    assert other == f"ValueError {path} holds a run with a different configuration:"
    assert used.startswith(f"RuntimeError {path} is in use by process")
    assert older == f"ValueError iteration=2: {path} already has a checkpoint of iteration 2"
    assert alone.startswith("ValueError ['here'] is only on the devices of this process; with 2 processes")
    assert unshared.startswith("ValueError ['count'] is only on the devices of this process")
    assert full.startswith("OSError [Errno 28] the disk is full")

    (path / "lineage.jsonl").unlink()
    assert [json.loads(line) for line in (path / "metrics.jsonl").open()] == [
        {"iteration": 1},
        {"iteration": 2},
    ]
    assert json.loads((path / "population.json").read_text()) == [1]
    assert_equal_bits(read_checkpoint(path, abstract(mesh((2, 4))))[1], 2)
    with WorkDir(path, CONFIG) as workdir:  # one process with eight devices
        iteration, restored, _ = workdir.restore(abstract(mesh()))
        assert iteration == 2 and [each.name for each in (path / "checkpoints").iterdir()] == ["00000002"]
        assert_equal_bits(restored, 2)
