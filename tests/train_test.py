"""The whole loop on a tiny model: what each mode changes, what is written, and exact resume."""

import collections
import contextlib
import functools
import io
import json
import re
import threading

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from espl_jax import train as loop
from espl_jax.evolution import lineage
from espl_jax.evolution import population as populations
from espl_jax.reflectors.local import local_reflector
from espl_jax.run import parts, reflection, tasks, update
from espl_jax.sampling import scheduler
from espl_jax.sampling.draft_lengths import Acceptance
from espl_jax.storage import status
from espl_jax.storage.workdir import read_checkpoint
from espl_jax.train import train
from espl_jax.training.optimizer import make_optimizer
from espl_jax.types import Grade, SystemPrompt
from tests.support import fakes, listed_programs
from tests.support.compiled_ahead import LISTED, Waiting

LOGS = ("rollouts", "problems", "reflections", "lineage", "evaluations")


# One optimizer for all runs: it is a static argument of the step, which is then compiled once.
optimizer = functools.cache(make_optimizer)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The tiny model, an environment that it does not always fail in, and a reflector of sound advice."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        fakes.take_over(monkeypatch)
        monkeypatch.setattr(parts, "make_optimizer", optimizer)
        monkeypatch.setattr(reflection, "local_reflector", lambda model, **settings: fakes.scripted_replies)
        yield


make_mesh = parts.sharding.make_mesh


def run(path, **changes):
    shown = io.StringIO()
    results = train(fakes.config(**changes), path, Console(file=shown, width=200))
    return results, shown.getvalue()


def lines(path, log):
    file = path / f"{log}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def arrays(path):
    """The arrays of the newest checkpoint, as numpy, by name."""
    newest = max((path / "checkpoints").iterdir())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {}
    for name, described in json.loads((newest / "COMMIT").read_text())["arrays"].items():
        dtype, _, shape = described.partition("[")
        shapes[name] = jax.ShapeDtypeStruct(json.loads(f"[{shape}"), dtype, sharding=device)
    if not shapes:
        return {}
    return {name: np.asarray(x) for name, x in ocp.load(newest / "arrays", shapes).items()}


def outcome(path):
    """All that a run leaves but the clock's numbers and its configuration."""
    metrics = [{k: v for k, v in record.items() if k != "time"} for record in lines(path, "metrics")]
    texts = {log: (path / f"{log}.jsonl").read_bytes() for log in LOGS if (path / f"{log}.jsonl").exists()}
    texts |= {name: (path / name).read_bytes() for name in ("population.json", "results.json", "lineage.txt")}
    return {"metrics": metrics, **texts, "arrays": {k: v.tobytes() for k, v in arrays(path).items()}}


@pytest.mark.parametrize("mode", ["espl", "rl", "evolution", "reflection"])
def test_modes(mode, tmp_path):
    results, shown = run(tmp_path, mode=mode)
    metrics, rollouts = lines(tmp_path, "metrics"), lines(tmp_path, "rollouts")
    trains, evolves = mode in ("espl", "rl"), mode != "rl"

    # Every mode spends the same N * M * B rollouts, each numbered once.
    assert [record["iteration"] for record in metrics] == [1, 2]
    places = collections.Counter((r["iteration"], r["slot"], r["problem"], r["sample"]) for r in rollouts)
    assert len(places) == len(rollouts) == 2 * 12
    assert collections.Counter(r["iteration"] for r in rollouts) == {1: 12, 2: 12}
    slots = 1 if mode in ("rl", "reflection") else 2
    assert {r["slot"] for r in rollouts} == set(range(slots))
    for record in metrics:
        drawn = [r for r in rollouts if r["iteration"] == record["iteration"]]
        assert record["reward"] == pytest.approx(np.mean([r["reward"] for r in drawn]))
        assert record["success"] == pytest.approx(np.mean([r["success"] for r in drawn]))
        assert record["truncated"] == pytest.approx(np.mean([r["truncated"] for r in drawn]))
        assert record["held_out"] is not None and record["time"]["total"] > 0

    # The report and what it reads besides.
    assert "</html>" in (tmp_path / "report.html").read_text() and "was not written" not in shown
    assert json.loads((tmp_path / "machine.json").read_text())["peak_bytes"]["host"] > 2**20
    problems = lines(tmp_path, "problems")
    assert {each["id"] for each in problems} == {r["problem"] for r in rollouts}

    # Weights change in two of the modes, prompts in three.
    saved = arrays(tmp_path)
    if trains:
        assert saved[".step"] == 2
        assert all(np.any(x) for name, x in saved.items() if name.startswith(".trainable"))
        assert metrics[0]["log_ratio_abs"] < 1e-4 and metrics[0]["grad_norm"] > 0
    else:
        assert saved == {} and "grad_norm" not in metrics[0]
    population = json.loads((tmp_path / "population.json").read_text())
    root, *born = lines(tmp_path, "lineage")
    assert (root["event"], root["id"]) == ("root", "p0") and {e["event"] for e in born} <= {"born"}
    assert [member["id"] for member in population["members"]] == ["p0"] + [child["id"] for child in born]
    if evolves:
        assert len(born) >= 2 and lines(tmp_path, "reflections")
        assert metrics[0]["children"] == ["p1"] and born[0]["parents"] == ["p0"]
        # The newest member always runs.
        assert "p1" in {r["prompt"] for r in rollouts if r["iteration"] == 2}
    else:
        assert born == [] and lines(tmp_path, "reflections") == []
        assert {r["prompt"] for r in rollouts} == {"p0"}
    if mode == "reflection":
        assert {child["operator"] for child in born} == {"mutation"}
        assert {r["prompt"] for r in rollouts if r["iteration"] == 2} == {"p1"}
        assert results["deployed"]["id"] == born[-1]["id"]

    # The test is run for the weights that there are, and the prompts that there are.
    assert list(results["test"]) == ["initial", "trained"] if trains else ["initial"]
    assert all("root" in cells for cells in results["test"].values())
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    evaluations = lines(tmp_path, "evaluations")
    assert collections.Counter(e["split"] for e in evaluations)["validation"] == 2 * 2 * 3
    assert results["reason"] and f"{results['deployed']['id']}  " in (tmp_path / "lineage.txt").read_text()
    assert "Test accuracy:" in shown and f"Best prompt: {results['deployed']['id']}" in shown
    assert "iteration 2/2" in shown and str(tmp_path) in shown


def test_trackers_follow_checkpoints_and_results(tmp_path, monkeypatch):
    calls = []

    @contextlib.contextmanager
    def tracking(config, workdir, say):
        def update():
            newest = max(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
            calls.append((newest, (tmp_path / "results.json").exists(), status.read(workdir).state))

        assert config["trackers"] == ("wandb",) and workdir == str(tmp_path)
        yield update

    monkeypatch.setattr(loop, "tracking", tracking)
    run(tmp_path, mode="evolution", trackers=("wandb",))
    assert calls == [(1, False, "running"), (2, False, "running"), (2, True, "running")]
    assert status.read(tmp_path).state == "finished"


def test_copies_of_a_prompt_are_one_player(tmp_path):
    run(tmp_path, num_iterations=1, mode="evolution")
    (record,) = lines(tmp_path, "metrics")
    rewards = [r["reward"] for r in lines(tmp_path, "rollouts")]
    assert record["tournament"] == {"prompts": ["p0"], "values": [pytest.approx(np.mean(rewards))]}
    assert record["groups"] == 2


@pytest.mark.slow
def test_adapters_of_int8_weights(tmp_path):
    """Sampler and trainer, and the reference of the KL, use the same rounded weights."""
    changes = {"model__param_dtype": "int8", "model__sampling_layout": "unstacked", "loss__kl_coef": 0.1}
    run(tmp_path, mode="rl", **changes)
    first, second = lines(tmp_path, "metrics")
    assert max(first["log_ratio_abs"], second["log_ratio_abs"]) < 1e-4
    assert first["grad_norm"] > 0 and 0 <= first["kl"] < 1e-6 < second["kl"]
    assert json.loads((tmp_path / "config.json").read_text())["model"]["param_dtype"] == "int8"


@pytest.mark.slow
def test_full_fine_tuning_leaves_the_reference_alone(tmp_path):
    before = jax.device_get(fakes.model(remat="none", param_dtype="float32", dtype="float32").params)
    settings = {
        "lora__rank": 0,
        "loss__kl_coef": 0.1,
        "loss__microbatch_rows": 3,
        "optimizer__learning_rate": 1e-3,
    }
    run(tmp_path, **settings)
    after = jax.device_get(fakes.model(remat="none", param_dtype="float32", dtype="float32").params)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    saved = arrays(tmp_path)
    trained = saved[".trainable['layers']['mlp']['up']['weight']"]
    assert trained.shape == before["layers"]["mlp"]["up"]["weight"].shape
    assert np.abs(trained - before["layers"]["mlp"]["up"]["weight"]).max() > 1e-5
    first, second = lines(tmp_path, "metrics")
    # The policy begins as the reference and leaves it.
    assert abs(first["kl"]) < 1e-6 < second["kl"]


@pytest.mark.parametrize("policy", ["reference", "current"])
def test_who_reflects(policy, tmp_path, monkeypatch):
    seen = []

    def listen(model, **settings):
        weights = model.params["layers"]["mlp"]["up"]
        seen.append(jax.device_get(weights.get("lora_b")) if "lora_b" in weights else None)
        return fakes.scripted_replies

    monkeypatch.setattr(reflection, "local_reflector", listen)
    run(tmp_path, reflection__policy=policy, checkpoint_keep=5)
    if policy == "reference":
        assert seen == [None, None]
        return
    # The weights that made the rollouts: untouched in the first iteration, once updated in the second.
    assert not seen[0].any() and seen[1].any()
    (tmp_path / "checkpoints" / "00000002").rename(tmp_path / "later")
    assert np.array_equal(seen[1], arrays(tmp_path)[".trainable['layers']['mlp']['up']['lora_b']"])


@pytest.mark.parametrize(
    ("constrained", "reasoning"),
    [
        pytest.param(False, "none", marks=pytest.mark.slow),
        pytest.param(True, "none", marks=pytest.mark.slow),
        (True, "brief"),
    ],
    ids=str,
)
def test_the_models_own_reflection_runs(constrained, reasoning, tmp_path, monkeypatch, caplog):
    """The programs are those that a plan lists, and noise that a limit cuts off makes no child."""
    monkeypatch.setattr(reflection, "local_reflector", local_reflector)
    settings = {"evaluation__every": 0, "reflection__opening": True, "reflection__constrained": constrained}
    settings |= {"reflection__reasoning": reasoning, "reflection__reasoning_tokens": 40}
    settings |= {"reflection__max_new_tokens": 16, "reflection__verbatim_chars": 0}
    settings |= {"mode": "reflection", "num_iterations": 1}
    with listed_programs.nothing_else(fakes.config(**settings), monkeypatch, caplog) as seen:
        run(tmp_path, **settings)
    # Reasoning that was cut off is followed by nothing.
    assert ("constrained" in seen) == (constrained and reasoning == "none") or reasoning == "brief"
    transcripts = lines(tmp_path, "reflections")
    stages = collections.Counter(t["stage"] for t in transcripts)
    assert stages["summary"] == 12 and stages["critique"] == 2
    assert all(t["reply"].startswith("Summary: The attempt") for t in transcripts if t["stage"] == "summary")
    (record,) = lines(tmp_path, "metrics")
    assert record["no_child"] == {"mutation": "no_edits"} and record["drops"]
    if constrained and reasoning == "none":
        critiques = [t for t in transcripts if t["stage"] == "critique"]
        assert all(t["reply"].startswith("ADD: ") and not t["ended"] for t in critiques)
        assert record["drops"]["truncated"] == 2


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """A run of four iterations that nothing interrupts."""
    path = tmp_path_factory.mktemp("straight")
    run(path, num_iterations=4)
    return path, outcome(path)


def test_a_longer_run_is_a_short_one_resumed(straight, tmp_path):
    run(tmp_path, num_iterations=2)
    _, shown = run(tmp_path, num_iterations=4)
    assert "resumed after iteration 2" in shown
    assert outcome(tmp_path) == straight[1]


def test_a_run_that_fell_over_repeats_what_was_not_saved(straight, tmp_path, monkeypatch):
    step = update.policy_gradient_step
    calls = collections.Counter()

    def fails_the_third_time(*args, **kwargs):
        calls["step"] += 1
        if calls["step"] == 3:
            raise RuntimeError("the power is gone")
        return step(*args, **kwargs)

    monkeypatch.setattr(update, "policy_gradient_step", fails_the_third_time)
    with pytest.raises(RuntimeError, match="the power is gone"):
        run(tmp_path, num_iterations=4, checkpoint_every=2)
    # What the third iteration had written is undone before it is written again.
    run(tmp_path, num_iterations=4, checkpoint_every=2)
    assert calls["step"] == 5
    assert outcome(tmp_path) == straight[1]


def test_a_resumed_run_drafts_the_same(tmp_path, monkeypatch):
    """Drafts are looked up in earlier rollouts, which a resumed run reads from its log."""
    seen, texts = [], scheduler.DraftTexts

    def listen(prompts, problems, past, **settings):
        seen.append([[text.tolist() for text in of_problem] for of_problem in past])
        return texts(prompts, problems, past, **settings)

    monkeypatch.setattr(scheduler, "DraftTexts", listen)
    monkeypatch.setattr(Acceptance, "choose", lambda self, rows, width, read, lengths: lengths[-1])
    settings = {"sampling__draft_tokens": 2, "batch_size": 6, "evaluation__every": 0, "mode": "rl"}
    run(tmp_path / "straight", num_iterations=3, **settings)
    begun, seen[:] = seen[:3], []
    assert [sum(map(len, past)) for past in begun] == [0, 36, 72]
    run(tmp_path / "resumed", num_iterations=2, **settings)
    seen.clear()
    run(tmp_path / "resumed", num_iterations=3, **settings)
    assert seen[0] == begun[2]
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "straight")


def test_every_rating_follows_from_the_logs(straight, tmp_path):
    """Members that had to leave, and uncertainty that grows with the weights, included."""
    settings = {"population__max_size": 2, "ratings__drift_sigma": 0.5, "ratings__system": "openskill"}
    run(tmp_path, num_iterations=4, evaluation__every=0, **settings)
    for path, options in ((straight[0], {}), (tmp_path, {"system": "openskill"})):
        history, metrics = lines(path, "lineage"), lines(path, "metrics")
        saved = populations.from_json(json.loads((path / "population.json").read_text()))
        members = lineage.members_of(history, saved.members)
        assert len(members) == saved.created > 3
        again = lineage.recompute_ratings(history, metrics, **options)
        assert again == {member.id: (member.mu, member.sigma) for member in members}
        assert sum(len(member.tournaments) for member in members) == sum(
            len(record["tournament"]["prompts"])
            for record in metrics
            if len(record["tournament"]["prompts"]) > 1
        )
    assert metrics[-1]["drift_sigma"] == 0.5 and "left" in {event["event"] for event in history}


def test_the_prompt_to_deploy_can_be_chosen_on_validation(tmp_path):
    settings = {"deployment__rule": "validation", "deployment__candidates": 2, "evaluation__every": 0}
    results, shown = run(tmp_path, mode="evolution", **settings)
    tried = [e for e in lines(tmp_path, "evaluations") if e["weights"] == "deployment"]
    assert {e["split"] for e in tried} == {"validation"} and len({e["prompt"] for e in tried}) == 2
    means = {
        p: np.mean([e["reward"] for e in tried if e["prompt"] == p]) for p in {e["prompt"] for e in tried}
    }
    assert means[results["deployed"]["id"]] == max(means.values())
    assert results["reason"].startswith("highest mean reward on validation") and results["reason"] in shown


@pytest.mark.slow
def test_resume_on_eight_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(parts.sharding, "make_mesh", make_mesh)
    for path, counts in (("whole", [2]), ("parts", [1, 2])):
        for count in counts:
            run(tmp_path / path, num_iterations=count, evaluation__every=0, mode="rl")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_a_finished_run_does_not_train_again(straight, monkeypatch):
    path, before = straight

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(loop, "iterate", refuse)
    results, _ = run(path, num_iterations=4)
    assert outcome(path) == before
    assert results["deployed"]["id"] == json.loads(before["results.json"])["deployed"]["id"]


def test_another_configuration_is_refused(straight):
    path, before = straight
    assert {"data.train", "data.validation", "data.test"} < set(read_checkpoint(path, None)[2]["inputs"])
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.01 saved, 0.5 now"):
        run(path, num_iterations=4, optimizer__learning_rate=0.5)
    assert outcome(path) == before


def test_start_from_a_population(straight, tmp_path):
    path, _ = straight
    saved = populations.from_json(json.loads((path / "population.json").read_text()))
    settings = {"population__start_from": str(path / "population.json"), "population__text": ""}
    run(tmp_path, mode="evolution", num_iterations=1, **settings)
    first = {r["prompt"] for r in lines(tmp_path, "rollouts")}
    assert first <= {member.id for member in saved.members} and saved.members[-1].id in first
    events = [(event["event"], event["id"]) for event in lines(tmp_path, "lineage")]
    assert events[: len(saved.members)] == [("root", member.id) for member in saved.members]
    assert events[len(saved.members)] == ("born", f"p{saved.created}")


def test_a_resumed_run_does_not_read_its_first_population_again(straight, tmp_path):
    file = tmp_path / "population.json"
    file.write_bytes((straight[0] / "population.json").read_bytes())
    settings = {"population__start_from": str(file), "population__text": "", "mode": "evolution"}
    run(tmp_path / "whole", **settings)
    run(tmp_path / "parts", num_iterations=1, **settings)
    file.unlink()
    run(tmp_path / "parts", **settings)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_rl_plays_the_root_alone(straight, tmp_path):
    path, _ = straight
    settings = {"population__start_from": str(path / "population.json"), "population__text": ""}
    results, _ = run(tmp_path, mode="rl", num_iterations=1, **settings)
    assert {r["prompt"] for r in lines(tmp_path, "rollouts")} == {"p0"}
    assert results["deployed"]["id"] == "p0"
    assert json.loads((tmp_path / "population.json").read_text()) == json.loads(
        (path / "population.json").read_text()
    )


def test_a_step_without_mixed_groups_is_skipped_and_counted(tmp_path, monkeypatch):
    class Hopeless(fakes.Letters):
        def grade(self, problems, replies):
            return [Grade(0.0, False)] * len(replies)

    monkeypatch.setattr(tasks, "Arithmetic", Hopeless)
    run(tmp_path, reflection__problems="mixed")
    first, second = lines(tmp_path, "metrics")
    assert (first["skipped_updates"], second["skipped_updates"]) == (1, 2)
    assert first["mixed_groups"] == 0 and "grad_norm" not in first
    assert first["no_child"] == {"mutation": "no_problems"}
    assert arrays(tmp_path)[".step"] == 0
    assert lines(tmp_path, "reflections") == []


def test_a_nan_stops_the_run_by_name(tmp_path, monkeypatch):
    class Undefined(fakes.Letters):
        def grade(self, problems, replies):
            return [Grade(float("nan"), False)] * len(replies)

    monkeypatch.setattr(tasks, "Arithmetic", Undefined)
    with pytest.raises(ValueError, match="nan"):
        run(tmp_path)


def test_profile_of_one_iteration(tmp_path):
    run(tmp_path, mode="evolution", profile_iteration=2, evaluation__every=0)
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0


def test_without_a_test_set_there_is_no_test(tmp_path):
    results, shown = run(tmp_path, mode="evolution", num_iterations=1, data__test="", evaluation__every=0)
    assert results["test"] == {} and "Best prompt" in shown
    assert lines(tmp_path, "evaluations") == []


def test_principles_of_the_root(tmp_path):
    settings = {"population__text": "", "population__principles": ("Be brief.",), "evaluation__every": 0}
    run(tmp_path, mode="reflection", num_iterations=1, **settings)
    root = json.loads((tmp_path / "population.json").read_text())["members"][0]
    assert (
        populations.start([SystemPrompt(principles=("Be brief.",))], 5).members[0].render() == "G0. Be brief."
    )
    assert root["principles"] == ["Be brief."] and root["text"] == ""


MICROBATCHES = {"mode": "rl", "data__test": "", "evaluation__every": 0, "loss__microbatch_rows": 4}
"""With microbatches, the shapes of an update are known."""


def test_programs_compiled_in_the_background_change_no_bit(tmp_path):
    """Whichever thread compiles a program first."""
    jax.clear_caches()
    _, shown = run(tmp_path / "ahead", num_iterations=1, compile_ahead="on", **MICROBATCHES)
    assert " for each bucket of system prompts, compiled ahead in the background." in shown
    for thread in threading.enumerate():
        if thread.name.startswith("compile-ahead"):
            thread.join(60)  # until the program that it compiles is done
            assert not thread.is_alive()
    # By default, nothing is compiled in the background on CPU.
    _, shown = run(tmp_path / "plain", num_iterations=1, **MICROBATCHES)
    assert ", each compiled when first needed." in shown and "compiled in" not in shown
    assert outcome(tmp_path / "ahead") == outcome(tmp_path / "plain")


@pytest.mark.slow
def test_no_program_compiled_in_the_background_is_met_late(tmp_path, monkeypatch, caplog):
    """Also in a resumed run, whose weights are committed to a device."""
    made = []

    def waiting(threads, finished):
        made.append(Waiting(threads, finished))
        return made[-1]

    monkeypatch.setattr(loop, "CompileAhead", waiting)
    for iterations in (1, 2):
        jax.clear_caches()
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            _, shown = run(tmp_path, num_iterations=iterations, compile_ahead="on", **MICROBATCHES)
        compiled = set(re.findall(r"Compiling jit\((\w+)\)", caplog.text))
        assert compiled and compiled.isdisjoint(LISTED)
        assert made[-1].called.keys() <= made[-1].shapes
        announced = re.search(r"Rollouts: .* columns; (\d+) programs .*, compiled ahead in the back", shown)
        assert f"Rollouts: {announced[1]} programs compiled in " in shown
        assert "Update: 1 program compiled in " in shown
