"""The two-by-two test of the deployed prompt."""

import dataclasses
import io
import json
import types

import pytest
from rich.console import Console

from espl_jax.console.progress import Progress
from espl_jax.data.problems import ProblemSet
from espl_jax.evolution import population as populations
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.rollouts.evaluation import summarize
from espl_jax.run import finish as run_finish
from espl_jax.run.finish import evaluate_on, finish
from espl_jax.run.job import Job
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.text.chat_format import ChatFormat
from espl_jax.types import SystemPrompt
from tests.support import fakes

POPULATION = populations.start(
    [SystemPrompt(text=text) for text in ("root", "second", "third")], 10
).with_ratings({"p0": (25.0, 3.0), "p1": (28.0, 2.0)})


def parts(trains=True, test=True):
    splits = {"validation": ProblemSet(fakes.PROBLEMS[:1], "a")}
    if test:
        splits["test"] = ProblemSet(fakes.PROBLEMS[1:3], "b")
    return types.SimpleNamespace(
        reference=fakes.model(),
        splits=splits,
        environment=fakes.Letters(),
        trains=trains,
        evolves=True,
        chat=ChatFormat(),
        sampling=Sampling(max_new_tokens=6),
        capacity=Capacity(),
        left_out={"test": ("long1", "long2")},
    )


@pytest.fixture
def folder(tmp_path):
    """A work directory that keeps what it is given."""
    written = types.SimpleNamespace(path=tmp_path, logs=[], files={})
    written.append = lambda log, record: written.logs.append((log, record))
    written.read = lambda log: []
    written.write_text = lambda name, text: written.files.update({name: text})
    written.write_json = lambda name, value: written.files.update({name: json.loads(json.dumps(value))})
    return written


@pytest.fixture
def sampled(monkeypatch):
    """What was asked of the sampler; replies are real."""
    calls = []

    def listen(model, prompts, problems, environment, **settings):
        calls.append(
            (model, [prompt.id for prompt in prompts], [problem.id for problem in problems], settings)
        )
        return collect_rollouts(model, prompts, problems, environment, **settings)

    monkeypatch.setattr(run_finish, "collect_rollouts", listen)
    return calls


def test_evaluation_is_logged_rollout_by_rollout(folder, sampled):
    config, prompts = fakes.config(evaluation__validation_samples=2), POPULATION.members[1:]
    evaluations = evaluate_on(
        Job(config, parts(), folder, None), "validation", fakes.model(), "current", prompts, 4
    )
    ((_, asked, problems, settings),) = sampled
    assert (asked, problems) == (["p1", "p2"], ["q0"])
    assert settings["group_size"] == 2
    assert settings["sampling"] == Sampling(max_new_tokens=6, temperature=1.0)
    assert [log for log, _ in folder.logs] == ["evaluations"] * 4
    records = [record for _, record in folder.logs]
    assert {(r["iteration"], r["split"], r["weights"]) for r in records} == {(4, "validation", "current")}
    for evaluation, prompt in zip(evaluations, ("p1", "p2"), strict=True):
        mine = [r["success"] for r in records if r["prompt"] == prompt]
        assert (
            evaluation.accuracy == pytest.approx(sum(mine) / 2) and evaluation.num_samples == len(mine) == 2
        )


def test_two_by_two(folder, sampled):
    config, shown = fakes.config(mode="espl"), io.StringIO()
    model = fakes.model()
    louder = {"final_norm": {"scale": 2 * model.params["final_norm"]["scale"]}}
    trained = dataclasses.replace(model, params=model.params | louder)
    progress = Progress(2, lambda *_: None, done=2, console=Console(file=shown, width=200))
    first = populations.start([SystemPrompt(text="root")], 10)
    results = finish(Job(config, parts(), folder, progress), trained, first.members[0], POPULATION)

    # Both weights, both prompts, the test problems, and the same random numbers.
    assert [(call[0] is trained, call[1], call[2]) for call in sampled] == [
        (False, ["p0", "p1"], ["q1", "q2"]),
        (True, ["p0", "p1"], ["q1", "q2"]),
    ]
    assert (sampled[0][3]["key"] == sampled[1][3]["key"]).all()
    assert results["deployed"]["id"] == "p1" and results["problems_left_out"] == {"test": 2}
    assert {weights: list(cells) for weights, cells in results["test"].items()} == {
        "initial": ["root", "deployed"],
        "trained": ["root", "deployed"],
    }
    for weights, model in (("initial", parts().reference), ("trained", trained)):
        settings = {name: sampled[0][3][name] for name in ("key", "group_size", "sampling")}
        prompts = [first.members[0], POPULATION.members[1]]
        expected = summarize(
            collect_rollouts(model, prompts, fakes.PROBLEMS[1:3], fakes.Letters(), **settings)
        )
        assert [dataclasses.asdict(each) for each in expected] == list(results["test"][weights].values())
    assert folder.files["results.json"] == json.loads(json.dumps(results))
    text = shown.getvalue()
    assert "deployed prompt (p1)" in text and "Best prompt: p1, rating 28.00 ± 2.00" in text
    before, after = results["test"]["initial"]["root"], results["test"]["trained"]["deployed"]
    assert f"Test accuracy: {100 * before['accuracy']:.1f}%" in text
    assert f"{100 * after['accuracy']:.1f}%" in text.split("before,")[1]


def test_the_root_alone_where_it_is_the_best(folder, sampled):
    progress = Progress(2, lambda *_: None, done=2, console=Console(file=io.StringIO()))
    first = populations.start([SystemPrompt(text="root")], 10)
    some = parts(trains=False)
    job = Job(fakes.config(mode="evolution"), some, folder, progress)
    results = finish(job, some.reference, first.members[0], first)
    assert [call[1] for call in sampled] == [["p0"]]
    assert {weights: list(cells) for weights, cells in results["test"].items()} == {"initial": ["root"]}


def test_without_test_problems_nothing_is_sampled(folder, sampled):
    progress = Progress(2, lambda *_: None, done=2, console=Console(file=io.StringIO()))
    some = parts(test=False)
    job = Job(fakes.config(), some, folder, progress)
    results = finish(job, some.reference, POPULATION.members[0], POPULATION)
    assert sampled == [] and results["test"] == {} and results["deployed"]["id"] == "p1"
    assert list(folder.files) == ["results.json", "lineage.txt"]
