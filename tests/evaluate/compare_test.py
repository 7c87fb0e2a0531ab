"""Sampling what a command line asks for, with a tiny model."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from espl_jax.data.problems import ProblemSet
from espl_jax.environments.arithmetic import Arithmetic
from espl_jax.environments.math import Math
from espl_jax.evaluate import compare as comparing
from espl_jax.evaluate.compare import (
    chat_format,
    check_gradable,
    compare,
    find_model,
    load_model,
    sample_in_batches,
    sampling_of,
)
from espl_jax.evaluate.prompts import read_prompt
from espl_jax.evaluate.request import Request
from espl_jax.pretrained import smollm2
from espl_jax.pretrained.numerics import CHOSEN
from espl_jax.rollouts.evaluation import summarize
from espl_jax.run import parts as run_parts
from espl_jax.run import weights
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.sampling.truncation import Truncation
from espl_jax.text.chat_format import ChatFormat
from espl_jax.types import Problem
from tests.support import fakes

SAMPLING = {
    "group_size": 2,
    "temperature": 1.0,
    "max_new_tokens": 5,
    "chat_template_kwargs": {},
    "show_thinking": None,
}
GIVEN = {**SAMPLING, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop_strings": ("!",), "context_limit": 99}
GIVEN |= {"tool_format": "auto", "max_rows": None}
SETTINGS = {
    "group_size": 2,
    "sampling": Sampling(max_new_tokens=5),
    "chat": ChatFormat(),
    "capacity": Capacity(),
}
RUN = {"mode": "rl", "num_iterations": 3}


class Letters(fakes.Letters):
    """Grades noise; a problem's own answer in a box is a success."""

    def grade(self, problems, replies):
        grades = super().grade(problems, replies)
        return [
            dataclasses.replace(grade, success=grade.success or reply.startswith(r"\boxed"))
            for grade, reply in zip(grades, replies, strict=True)
        ]


@pytest.fixture
def loaded(monkeypatch):
    """Sources of the models that were loaded, and how."""
    calls = []

    def load(source, **numerics):
        calls.append((source, numerics))
        return fakes.model()

    monkeypatch.setattr(comparing, "load_pretrained", load)
    monkeypatch.setattr(comparing, "find_model", lambda source: None)
    monkeypatch.setattr(comparing, "make_environment", lambda *_: Letters())
    monkeypatch.setattr(comparing.sharding, "make_mesh", lambda sizes: None)
    return calls


def request(*prompts, sets=None, batch_size=4, **changes):
    fields = {
        "models": ("tiny",),
        "prompts": {each or "default": read_prompt(each) for each in prompts},
        "problem_sets": sets or {"four": ProblemSet(fakes.PROBLEMS, "four")},
        "numerics": {},
        "mesh": {},
        "environment": "arithmetic",
        "answer_format": "boxed",
        "instruction": None,
        "options": {},
        "reward": "",
        "sampling": GIVEN,
        "seed": 0,
        "batch_size": batch_size,
        "out": (),
    }
    return Request(**{**fields, **changes})


@pytest.mark.slow
def test_batches_draw_what_the_whole_draws():
    prompts = fakes.PROMPTS[:2]
    key = comparing.stream_key(0, "evaluation", 0)
    arguments = (fakes.model(), prompts, fakes.PROBLEMS, Letters())
    (whole,) = sample_in_batches(*arguments, 4, key=key, **SETTINGS)
    parts = list(sample_in_batches(*arguments, 3, key=key, **SETTINGS))
    assert [len(part.problems) for part in parts] == [2, 2]  # and not 3 and 1
    assert (np.concatenate([part.tokens for part in parts], axis=1) == whole.tokens).all()


def test_every_model_prompt_and_problem_set(loaded, tmp_path, capsys):
    results, rollouts = tmp_path / "a.json", tmp_path / "b.jsonl"
    sets = {"four": ProblemSet(fakes.PROBLEMS, "four"), "one": ProblemSet(fakes.PROBLEMS[:1], "one")}
    asked = request(
        "Add.", "", sets=sets, models=("x", "y"), numerics={"dtype": "bfloat16"}, out=(results, rollouts)
    )
    cells = compare(asked)
    assert [(cell.model, cell.data, cell.prompt) for cell in cells] == [
        (model, name, prompt) for model in "xy" for name in sets for prompt in ("Add.", "default")
    ]
    # Each model once; what was not given suits the CPU.
    assert [source for source, _ in loaded] == ["x", "y"]
    assert loaded[0][1] == {"mesh": None, **dict.fromkeys(CHOSEN, "auto"), "dtype": "bfloat16"}
    # The same weights under two names: the same random numbers, hence the same figures.
    assert [cell.evaluation for cell in cells[:4]] == [cell.evaluation for cell in cells[4:]]

    saved = json.loads(results.read_text())
    assert saved["settings"]["max_new_tokens"] == 5 and saved["settings"]["seed"] == 0
    assert saved["results"] == json.loads(json.dumps([dataclasses.asdict(cell) for cell in cells]))
    lines = [json.loads(line) for line in rollouts.read_text().splitlines()]
    assert len(lines) == 2 * 2 * (4 + 1) * 2
    mine = [
        line for line in lines if (line["model"], line["data"], line["prompt"]) == ("x", "four", "default")
    ]
    assert np.mean([line["success"] for line in mine]) == cells[1].evaluation.accuracy
    assert {line["problem"] for line in mine} == {problem.id for problem in fakes.PROBLEMS}

    shown = capsys.readouterr()
    assert shown.out.startswith("| model |  prompt | data | problems |")
    assert "Samples per problem: 2, temperature: 1, max. new tokens: 5." in shown.out
    assert "y, one: 1 of 1 problems" in shown.err


def test_a_prompt_draws_the_same_beside_others(loaded):
    alone, together = compare(request("Add.")), compare(request("", "Add.", batch_size=2))
    assert alone[0] == together[1]


def test_seeds_and_prefixes():
    """More samples, and fewer problems, keep what was drawn before."""
    prompts = [read_prompt("Add.")]

    def tokens(seed=0, samples=2, problems=4):
        settings = {**SETTINGS, "group_size": samples, "key": comparing.stream_key(seed, "evaluation", 0)}
        (drawn,) = sample_in_batches(
            fakes.model(), prompts, fakes.PROBLEMS[:problems], Letters(), 4, **settings
        )
        return drawn.tokens

    assert (tokens(samples=3)[:, :, :2] == tokens()).all()
    assert (tokens(problems=2) == tokens()[:, :2]).all()
    assert (tokens(seed=1) != tokens()).any()


def test_figures_are_those_of_the_rollouts(loaded):
    asked = request("Add.")
    (whole,) = sample_in_batches(
        fakes.model(),
        list(asked.prompts.values()),
        fakes.PROBLEMS,
        Letters(),
        4,
        key=comparing.stream_key(0, "evaluation", 0),
        **SETTINGS,
    )
    assert [cell.evaluation for cell in compare(asked)] == summarize(whole)


@pytest.mark.parametrize(
    "environment", [Math(), Math("expression"), Arithmetic(), Arithmetic("boxed", unit="kg")]
)
def test_problems_that_can_be_graded(environment):
    answers = ["4", "-1,234", "0.5"]
    check_gradable(environment, ProblemSet(tuple(Problem(a, a, a) for a in answers), "x"))


@pytest.mark.parametrize(
    ("environment", "answer", "complaint"),
    [
        (Math(), "{4", r"gold answers of 1 of 2 problems as wrong, first that of q1, '\{4'"),
        (Arithmetic(), "four", "problem q1: answer='four' holds no number"),
    ],
)
def test_problems_that_cannot_be_graded_are_refused_before_a_model_is_loaded(
    loaded, monkeypatch, environment, answer, complaint
):
    monkeypatch.setattr(comparing, "make_environment", lambda *_: environment)
    bad = ProblemSet((Problem("q0", "a", "1"), Problem("q1", "b", answer)), "bad")
    with pytest.raises(ValueError, match=f"--data=bad.jsonl: .*{complaint}"):
        compare(request("", sets={"bad.jsonl": bad}))
    assert loaded == []


def test_the_weights_of_a_run(tmp_path, monkeypatch):
    """A run's own numerics hold where no others are given."""
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    asked = []

    def read_run(*args, **numerics):
        asked.append((*args, numerics))
        return types.SimpleNamespace(model="its model")

    monkeypatch.setattr(comparing, "read_run", read_run)
    assert load_model(str(tmp_path), "the mesh", {"dtype": "float32"}) == "its model"
    assert asked == [(str(tmp_path), "the mesh", {"dtype": "float32"})]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a model in a folder, with settings that are not the usual ones."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(weights, "load_pretrained", fakes.load_pretrained)
        monkeypatch.setattr(run_parts.sharding, "make_mesh", lambda sizes: None)
        return fakes.workdir(
            tmp_path_factory.mktemp("runs") / "run",
            mode="evolution",
            model__chat_template_kwargs='{"enable_thinking": false, "effort": "low"}',
            environment__show_thinking=True,
            sampling__top_p=0.9,
            sampling__stop_strings=("User:",),
        )


def test_a_run_sees_conversations_as_it_was_trained(workdir):
    chat = chat_format(str(workdir), GIVEN)
    assert chat.template_arguments == {"enable_thinking": False, "effort": "low"}
    assert chat.show_thinking is True
    given = {**GIVEN, "chat_template_kwargs": {"effort": "high"}, "show_thinking": False}
    chat = chat_format(str(workdir), given)
    assert chat.template_arguments == {"enable_thinking": False, "effort": "high"}
    assert chat.show_thinking is False
    assert chat_format("smollm2", GIVEN) == ChatFormat(stop_strings=("!",))


def test_a_run_is_drawn_from_like_other_models():
    sampling = sampling_of(GIVEN | {"top_p": 0.8, "min_p": 0.1})
    assert sampling.truncation == Truncation(top_p=0.8, min_p=0.1) and sampling.context_limit == 99


def test_those_settings_reach_the_sampling(workdir, loaded, monkeypatch):
    monkeypatch.setattr(weights, "load_pretrained", fakes.load_pretrained)
    seen = []

    def collect(*args, chat, **settings):
        seen.append((chat.template_arguments, chat.show_thinking))
        return comparing_collect(*args, chat=chat, **settings)

    comparing_collect = comparing.collect_rollouts
    monkeypatch.setattr(comparing, "collect_rollouts", collect)
    compare(request("", models=(str(workdir), "x")))
    assert seen == [({"enable_thinking": False, "effort": "low"}, True), ({}, False)]


def test_models_are_looked_for_before_any_is_sampled(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(comparing, "find_model", find_model)
    (tmp_path / "model.gguf").write_bytes(b"")
    for missing, complaint in (
        ("none.gguf", "none.gguf does not exist"),
        ("no such model", "neither a local folder nor a model name"),
        (str(tmp_path), "config.json"),
    ):
        with pytest.raises(ValueError, match=f"--model={missing}: .*{complaint}"):
            compare(request("", models=(str(tmp_path / "model.gguf"), missing)))
    assert loaded == []


def test_a_run_is_looked_for_with_its_model(workdir, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(smollm2, "find_gguf", lambda: found.append("smollm2"))
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["source"] = "smollm2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        find_model(str(tmp_path))
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    find_model(str(tmp_path))
    assert found == ["smollm2"]


def test_an_adapter_is_looked_for_with_its_base(tmp_path):
    settings = {"base_model_name_or_path": str(tmp_path / "none.gguf")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(FileNotFoundError, match=r".*none.gguf does not exist"):
        find_model(str(tmp_path))


def test_a_run_without_a_checkpoint_is_told_from_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fakes.config().to_dict()))
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("problem_set", ["four", "one"])
def test_what_was_done_before_an_error_is_kept(loaded, monkeypatch, tmp_path, capsys, problem_set):
    """Whether a later model fails on its first problem set or on its second."""
    sets = {"four": ProblemSet(fakes.PROBLEMS, "four"), "one": ProblemSet(fakes.PROBLEMS[:1], "one")}
    sample, left = comparing.collect_rollouts, [True] * (2 + (problem_set == "one"))

    def fail(*args, **sampling):
        if not left:
            raise RuntimeError("out of memory")
        left.pop()
        return sample(*args, **sampling)

    monkeypatch.setattr(comparing, "collect_rollouts", fail)
    path = tmp_path / "a.json"
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(request("Add.", sets=sets, models=("x", "y"), out=(path,)))
    done = [(cell["model"], cell["data"]) for cell in json.loads(path.read_text())["results"]]
    assert done == [("x", "four"), ("x", "one"), ("y", "four")][: 2 + (problem_set == "one")]
    assert "| x " in capsys.readouterr().out or problem_set == "four"


def test_problems_without_room_are_named_before_any_is_sampled(loaded, monkeypatch):
    monkeypatch.setattr(comparing, "collect_rollouts", lambda *args, **sampling: pytest.fail("sampled"))
    long = [fakes.Problem(f"long{i}", "a" * (60 + i), "1") for i in range(3)]
    sets = {"four": ProblemSet(fakes.PROBLEMS, "four"), "some": ProblemSet((*fakes.PROBLEMS, *long), "some")}
    refusal = (
        r"--data=some: 2 of 7 problems are too long \(long1, long2\): with prompt 'Add\.' the longest "
        r"has 95 tokens, which leaves no room in a context of 94; raise --context_limit \(tiny supports 4096"
    )
    sampling = {**GIVEN, "context_limit": 94}
    with pytest.raises(ValueError, match=refusal):
        compare(request("", "Add.", sets=sets, batch_size=1, sampling=sampling))


def test_nothing_is_shown_where_nothing_was_done(loaded, monkeypatch, tmp_path, capsys):
    def fail(*args, **numerics):
        raise ValueError("damaged")

    monkeypatch.setattr(comparing, "load_pretrained", fail)
    with pytest.raises(ValueError, match="damaged"):
        compare(request("Add.", out=(tmp_path / "a.json",)))
    assert not capsys.readouterr().out and not (tmp_path / "a.json").exists()


def test_a_mesh_that_does_not_fit_is_refused(loaded, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"--mesh=.*tensor.*does not match the 8 devices"):
        compare(request("", mesh={"tensor": 3}))
    assert jax.device_count() == 8
