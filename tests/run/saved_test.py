"""A run read back out of its work directory, which stays as it is."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax import train as loop
from espl_jax.evolution.deployment import best_rated
from espl_jax.models import lora
from espl_jax.models.params import abstract, to_storage
from espl_jax.parallel.sharding import make_mesh
from espl_jax.run import parts as run_parts
from espl_jax.run import saved, weights
from espl_jax.run.saved import check_run, is_run, read_run
from espl_jax.storage import workdir as storage_workdir
from espl_jax.storage.workdir import WorkDir
from tests.support import fakes


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(weights, "load_pretrained", fakes.load_pretrained)
        monkeypatch.setattr(run_parts.sharding, "make_mesh", lambda sizes: None)
        yield


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    return fakes.workdir(tmp_path_factory.mktemp("runs") / "espl")


def test_reads_what_training_would_resume_from(workdir):
    config = fakes.config()
    read = read_run(workdir)
    with WorkDir(workdir, config.to_dict()) as folder:
        parts = run_parts.assemble(config)
        resumed = loop.restore(folder, config, parts)
    assert (read.iteration, read.root, read.population) == (2, resumed.root, resumed.population)
    expected = parts.policy(resumed.train_state).params
    assert jax.tree.all(jax.tree.map(np.array_equal, read.model.params, expected))
    assert jax.tree.all(jax.tree.map(np.array_equal, read.adapters, resumed.train_state.trainable))
    assert any(np.any(x) for x in jax.tree.leaves(lora.detach(read.model.params)[1]))
    assert read.model.config.lora_scale == config.lora.scale


def test_nothing_is_touched_and_no_lock_needed(workdir):
    config = fakes.config().to_dict()
    with WorkDir(workdir, config) as folder:  # as a run that is going on holds it
        folder.append("metrics", {"iteration": 3})
        (workdir / "checkpoints" / "00000003").mkdir()
        before = contents(workdir)
        assert read_run(workdir).iteration == 2
        assert contents(workdir) == before and (workdir / "checkpoints" / "00000003").is_dir()


def test_a_checkpoint_that_is_replaced_while_it_is_read(workdir, tmp_path, monkeypatch):
    load, seen = storage_workdir.storage_arrays.load, []

    def replaced(path, leaves):
        seen.append(path.parent.name)
        if len(seen) == 1:  # the run has made a newer one, and removed this one
            path.parent.rename(path.parent.parent / "00000007")
        return load(path, leaves)

    monkeypatch.setattr(storage_workdir.storage_arrays, "load", replaced)
    copy = tmp_path / "run"
    for name, content in contents(workdir).items():
        file = copy / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert read_run(copy).iteration == 7
    assert seen == ["00000002", "00000007"]


def test_problems_are_not_needed(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i} + 1?", "answer": "1"}) + "\n" for i in range(6)))
    workdir = fakes.workdir(tmp_path / "run", mode="rl", data__train=str(data))
    data.unlink()
    assert read_run(workdir).iteration == 2


def test_all_weights(tmp_path):
    read = read_run(fakes.workdir(tmp_path / "run", mode="rl", lora__rank=0))
    reference = fakes.model(remat="none", param_dtype="float32", dtype="float32").params
    assert read.adapters is None
    trained, before = (tree["layers"]["mlp"]["up"]["weight"] for tree in (read.model.params, reference))
    np.testing.assert_array_equal(trained, before + 0.5)


def test_prompts_alone(tmp_path):
    read = read_run(fakes.workdir(tmp_path / "run", mode="reflection"))
    reference = fakes.model(remat="none", param_dtype="float32", dtype="float32").params
    assert read.adapters is None
    assert jax.tree.all(jax.tree.map(np.array_equal, read.model.params, reference))
    # Each prompt replaces the one before.
    assert read.prompt() == read.population.members[-1] != read.root


@pytest.mark.parametrize("rank", [0, 3])
def test_on_a_mesh_in_other_dtypes(tmp_path, rank):
    workdir = fakes.workdir(tmp_path / "run", mode="rl", lora__rank=rank)
    one, many = read_run(workdir), read_run(workdir, make_mesh({"tensor": 8}), param_dtype="bfloat16")
    path = ("layers", "mlp", "up", "lora_b" if rank else "weight")
    ours, others = (functools.reduce(dict.get, path, read.model.params) for read in (many, one))
    assert len(ours.sharding.device_set) == 8
    np.testing.assert_array_equal(ours, others)
    assert many.model.config.param_dtype == "bfloat16"
    assert many.model.params["embedding"]["weight"].dtype == (jnp.bfloat16 if rank else jnp.float32)


@pytest.mark.parametrize("sizes", [None, {"tensor": 8}])
def test_trained_weights_in_int8(tmp_path, sizes):
    """They were trained in float32, and are rounded to be evaluated."""
    workdir = fakes.workdir(tmp_path / "run", mode="rl", lora__rank=0)
    exact, rounded = read_run(workdir), read_run(workdir, sizes and make_mesh(sizes), param_dtype="int8")
    assert rounded.model.config.param_dtype == "int8"
    wanted = to_storage(exact.model.params, rounded.model.config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), rounded.model.params) == jax.tree.map(
        lambda weight: (weight.shape, weight.dtype), abstract(rounded.model.config)
    )
    for ours, other in zip(*map(jax.tree.leaves, (rounded.model.params, wanted)), strict=True):
        # Compiled together, the divisions may be rounded differently.
        np.testing.assert_allclose(ours, other, rtol=1e-6, atol=ours.dtype == np.int8)


def test_prompts_by_name(workdir):
    read = read_run(workdir)
    assert read.prompt("root") == read.prompt("p0") == read.root
    assert read.prompt("p1").id == "p1" and read.prompt() == best_rated(read.population).prompt
    with pytest.raises(
        ValueError, match=r"prompt='p99': no such prompt; give deployed, root, or one of p0, p1"
    ):
        read.prompt("p99")


def test_where_there_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json; give the --workdir"):
        read_run(tmp_path)
    with WorkDir(tmp_path, fakes.config().to_dict()):
        pass
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        read_run(tmp_path)


def test_what_is_a_run(workdir, tmp_path):
    assert is_run(workdir) and not is_run(tmp_path) and not is_run("smollm2") and not is_run("x" * 300)
    for text in ('{"model_type": "llama"}', '["mode", "num_iterations"]', "{"):
        (tmp_path / "config.json").write_text(text)
        assert not is_run(tmp_path)


def test_a_run_is_checked_without_its_weights(workdir, monkeypatch):
    monkeypatch.setattr(saved, "load_reference", None)
    monkeypatch.setattr(storage_workdir.storage_arrays.ocp, "load", None)
    assert check_run(workdir).mode == fakes.config().mode


def test_configurations_of_another_version(workdir, tmp_path):
    """Without any one field that is read, and without a whole group of them."""
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    config = json.loads((workdir / "config.json").read_text())
    groups = {
        group: {**config, group: {k: v for k, v in config[group].items() if k != name}}
        for group, name in (("model", "remat"), ("lora", "scale"), ("environment", "show_thinking"))
    }
    groups["model."] = {name: value for name, value in config.items() if name != "model"}
    for group, changed in groups.items():
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(
            ValueError, match=rf"by another version .*it has no {group.strip('.')}.*evaluate or"
        ):
            read_run(tmp_path)


def test_every_field_that_loading_reads_is_asked_for(workdir, tmp_path):
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    config = json.loads((workdir / "config.json").read_text())
    for group in ("model", "lora"):
        for name in config[group]:
            without = {key: value for key, value in config[group].items() if key != name}
            (tmp_path / "config.json").write_text(json.dumps({**config, group: without}))
            try:
                read_run(tmp_path)
            except ValueError as error:
                assert f"it has no {group}.{name})" in str(error)


@pytest.mark.parametrize("damage", ["root", "population", "population.created"])
def test_a_state_of_another_version(workdir, monkeypatch, damage):
    read = saved.read_checkpoint

    def older(*args):
        iteration, arrays, state = read(*args)
        *groups, name = damage.split(".")
        del functools.reduce(dict.get, groups, state)[name]
        return iteration, arrays, state

    monkeypatch.setattr(saved, "read_checkpoint", older)
    with pytest.raises(
        ValueError, match=r"written by another version of espl_jax .*evaluate or export it with"
    ):
        read_run(workdir)


def test_the_choice_that_the_run_wrote_down_stands(tmp_path):
    path = fakes.workdir(tmp_path, mode="evolution")
    read = read_run(path)
    by_ratings = best_rated(read.population).prompt
    for iteration, expected in ((read.iteration, "p2"), (read.iteration - 1, by_ratings.id)):
        results = {"iteration": iteration, "deployed": {"id": "p2"}}
        (path / "results.json").write_text(json.dumps(results))
        assert read.prompt().id == expected != "p0"
    assert by_ratings.id != "p2"


def test_adapters_that_do_not_fit(workdir, monkeypatch):
    shapes = saved.abstract_trainable

    def other_rank(config, *args, **kwargs):
        config = config.copy_and_resolve_references()
        config.lora.rank = 5
        return shapes(config, *args, **kwargs)

    monkeypatch.setattr(saved, "abstract_trainable", other_rank)
    with pytest.raises(ValueError, match=r"lora_a'\]: float32\[.*2\] saved, float32\[.*5\] now"):
        read_run(workdir)
