"""The comparison of methods: the commands it starts, the records it reads, and its intervals."""

import csv
import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from espl_jax.console import command_line
from espl_jax.models import lora
from espl_jax.rollouts import intervals
from espl_jax.run.check_config import check_config
from espl_jax.types import SystemPrompt
from experiments import compare_methods
from experiments.methods import ended
from experiments.methods.methods import GROUPS, variants
from experiments.methods.runs import CELLS, Record, Run, read
from experiments.methods.tasks import PRESETS, TASKS, Task
from tests.conftest import ROOT
from tests.support import tiny
from tests.support.flags import fresh_flags

PROMPTS = {
    "p0": {"text": "Add.", "principles": []},
    "p3": {"text": "Add.", "principles": ["Use a box."]},
}
TASK = Task("configs/quickstart.py", {"population.text": "Add."}, feedback="There is no box.")
NONE, HALF, BOTH = {"a": [0], "b": [0]}, {"a": [1, 0], "b": [0, 1]}, {"b": [1], "a": [1]}
LEFT = {
    "rl": ({("initial", "p0"): NONE, ("trained", "p0"): HALF}, "p0"),
    "evolution": ({("initial", "p0"): NONE, ("initial", "p3"): HALF}, "p3"),
    "espl": (
        {(w, p): NONE for w in ("initial", "trained") for p in PROMPTS} | {("trained", "p3"): BOTH},
        "p3",
    ),
}
"""Mode -> successes by (weights, prompt) and problem, and the deployed prompt."""


def of(out, spec, seed=0):
    (variant,) = variants(spec)
    return Run(variant, seed, TASK, out)


def leave(run, mode):
    """Writes what a run leaves."""
    cells, deployed = LEFT[mode]
    run.workdir.mkdir(parents=True)
    evaluations = [
        {"split": "test", "weights": weights, "prompt": prompt, "problem": problem, "success": success}
        for (weights, prompt), graded in cells.items()
        for problem, successes in graded.items()
        for success in successes
    ]
    evaluations.append(evaluations[0] | {"split": "validation", "problem": "v"})
    metrics = [
        {
            "iteration": i,
            "reward": 0.25 * i,
            "success": 0.5,
            "new_tokens": 1.5,
            "population": 3,
            "trained_tokens": 5 * (mode != "evolution"),
            "reflector": {"completion_tokens": 7},
            "time": {"rollouts": 2.0, "update": 1.0, "total": 3.0},
        }
        for i in (1, 2)
    ]
    for name, lines in (("evaluations", evaluations), ("metrics", metrics)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.workdir / f"{name}.jsonl").write_text(text)
    results = {"deployed": {"id": deployed, **PROMPTS[deployed]}, "test": {w: {} for w, _ in cells}}
    config = {"num_prompts": 3, "batch_size": 2, "group_size": 4}
    for name, value in (("config", config), ("results", results)):
        (run.workdir / f"{name}.json").write_text(json.dumps(value))


def value(command, flag):
    return next((each.partition("=")[2] for each in command if each.startswith(f"--{flag}=")), None)


@pytest.fixture
def started(monkeypatch):
    """The commands of all runs, which end at once and leave what `LEFT` says."""
    commands = []

    def process(run, command):
        commands.append(command)
        if command[2] == "espl_jax.main":
            leave(run, value(command, "config.mode"))
            return ""
        if command[3] == "kl":
            return "[0.125, 0.25]"
        return json.dumps([{"a": 1.0, "b": 0.5}] * len(json.loads(Path(command[5]).read_text())))

    monkeypatch.setattr(Run, "_process", process)
    return commands


def compare(monkeypatch, out, methods, *more, task=TASK):
    """Runs the command."""
    monkeypatch.setitem(TASKS, "sums", task)
    arguments = ["--task=sums", f"--out={out}", f"--methods={methods}", *more]
    monkeypatch.setattr(sys, "argv", ["compare_methods", *arguments])
    compare_methods.main()


def test_cells_that_a_method_does_not_have_are_those_it_starts_from(started, tmp_path):
    for method in LEFT:
        of(tmp_path, method).finish()
    rl, evolution, espl = (
        {cell: rates.tolist() for cell, rates in read(of(tmp_path, method).path).tests["test"].items()}
        for method in LEFT
    )
    trained, prompted = ("trained", "deployed"), ("initial", "deployed")
    assert rl == {
        ("initial", "root"): [0, 0],
        prompted: [0, 0],
        ("trained", "root"): [0.5, 0.5],
        trained: [0.5, 0.5],
    }
    assert evolution[trained] == evolution[prompted] == [0.5, 0.5]
    assert evolution["trained", "root"] == [0, 0]
    assert [espl[cell] for cell in CELLS] == [[0, 0], [0, 0], [0, 0], [1, 1]]
    assert [read(of(tmp_path, method).path).kl for method in LEFT] == [0.25, 0, 0.25]


def test_tables_need_the_records_of_ended_runs_alone(started, tmp_path, monkeypatch, capsys):
    compare(monkeypatch, tmp_path, "rl,evolution,espl")
    for method in LEFT:
        shutil.rmtree(of(tmp_path, method).workdir)
    count = len(started)
    compare(monkeypatch, tmp_path, "rl,evolution,espl", "--seeds=0,1", "--tables")
    assert len(started) == count
    text = (tmp_path / "results.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    (espl,) = (line for line in cells if line[:2] == ["espl", "1"])
    low, high = intervals.interval(2, 2)
    assert espl[-2:] == [f"100.0% [{100 * low:.1f}, {100 * high:.1f}]", "0.2500"]
    assert ["espl - rl", "1", "+50.0 points (no interval: all problems have the same difference)"] in cells
    assert "espl, seed 0:\n\n> Add.\n>\n> G0. Use a box.\n" in text
    rows = list(csv.DictReader((tmp_path / "iterations.csv").open()))
    assert [row["method"] + row["iteration"] for row in rows[:3]] == ["rl1", "rl2", "evolution1"]
    expected = {"reward": "0.5", "drawn_tokens": "36", "reflector_tokens": "7", "seconds": "3.0"}
    assert rows[1].items() >= expected.items()  # 36: 3 x 2 x 4 rollouts of 1.5
    assert [(row["kl"], row["test"]) for row in rows[:4]] == [
        ("0.125", ""),
        ("0.25", "0.5"),
        ("0.0", ""),
        ("0.0", "0.5"),
    ]
    assert value(started[0], "config.checkpoint_keep") == "4"  # all iterations of the quickstart
    compare(monkeypatch, tmp_path, "evolution", "--tables")  # the other records stay in the tables
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert [line.split()[1] for line in lines[4:7]] == ["evolution", "espl", "rl"]


def test_runs_that_have_ended_are_not_started_again(started, tmp_path, monkeypatch):
    compare(monkeypatch, tmp_path, "rl")
    compare(monkeypatch, tmp_path, "rl,espl", "--seeds=0,1")
    mains = [command for command in started if command[2] == "espl_jax.main"]
    assert [(value(x, "config.mode"), value(x, "config.seed")) for x in mains] == [
        ("rl", "0"),
        ("espl", "0"),
        ("rl", "1"),
        ("espl", "1"),
    ]
    assert all(value(x, "config.population.text") == "Add." for x in mains)


@pytest.mark.parametrize("changed", ["batch_size=9", "arguments"])
def test_records_of_another_task_are_refused(changed, started, tmp_path, monkeypatch):
    compare(monkeypatch, tmp_path, "rl")
    more = ["--", "--config.batch_size=9"]
    if changed != "arguments":
        monkeypatch.setitem(TASK.fields, "batch_size", 9)
        more = []
    with pytest.raises(SystemExit, match=r"rl-0.json: made with .*; name another --out"):
        compare(monkeypatch, tmp_path, "rl", *more)


def roots(command):
    return json.loads(Path(value(command, "config.population.start_from")).read_text())


def test_controls_start_from_the_prompts_of_other_runs(started, tmp_path, monkeypatch):
    compare(monkeypatch, tmp_path, "rl_from_evolved,rl_from_feedback,rl_from_random")
    evolution, evolved, fed_back, random = (x for x in started if x[2] == "espl_jax.main")
    assert value(evolution, "config.mode") == "evolution" and not value(
        evolution, "config.population.start_from"
    )
    assert {value(x, "config.mode") for x in (evolved, fed_back, random)} == {"rl"}
    assert roots(evolved) == PROMPTS["p3"]
    assert roots(fed_back) == {"text": "Add.", "principles": ["There is no box."]}
    (principle,) = roots(random)["principles"]
    assert len(principle.split()) == 4  # as "G0. Use a box."
    assert not set(principle.lower().strip(".").split()) & {"use", "a", "box"}


def test_the_weights_of_one_run_under_the_prompt_of_another(started, tmp_path, monkeypatch):
    compare(monkeypatch, tmp_path, "rl_under_evolved")
    *_, command = started
    assert command[2:5] == ["experiments.methods.ended", "test", str(of(tmp_path, "rl").workdir)]
    (cell,) = json.loads(Path(command[5]).read_text())
    assert cell == {"weights": "trained", "prompt": PROMPTS["p3"], "data": ""}
    record = read(of(tmp_path, "rl_under_evolved").path)
    assert [record.tests["test"][cell].tolist() for cell in CELLS] == [
        [0, 0],
        [0.5, 0.5],
        [0.5, 0.5],
        [1, 0.5],
    ]
    assert record.kl == 0.25 and record.deployed.principles == ("Use a box.",)


def test_harder_problems_are_tested_in_the_cells_that_a_method_has(started, tmp_path, monkeypatch, capsys):
    task = dataclasses.replace(TASK, hard="addition:digits=3,count=9")
    run = functools.partial(dataclasses.replace, task=task)
    asked = {}
    for method in [*LEFT, "rl_under_evolved"]:
        run(of(tmp_path, method)).finish()
        cells = json.loads(Path(started[-1][5]).read_text())
        assert {cell["data"] for cell in cells} <= {"", task.hard}
        asked[method] = [(cell["weights"], cell["prompt"]) for cell in cells if cell["data"]]
    root = [("initial", "root"), ("trained", "root")]
    assert asked == {
        "rl": root,
        "evolution": [("initial", "root"), ("initial", "deployed")],
        "espl": [*CELLS],
        "rl_under_evolved": [("trained", PROMPTS["p3"])],
    }
    compare(monkeypatch, tmp_path, "rl,espl,rl_under_evolved", "--tables", task=task)
    said = capsys.readouterr().out
    assert said.count("Accuracy on harder problems") == 1 and said.count("| espl - rl ") == 2


def test_more_rollouts_are_those_of_all_prompts(started, tmp_path, monkeypatch):
    methods = "rl_more;espl:num_prompts=1,selection.strategy=ucb"
    compare(monkeypatch, tmp_path, methods, "--", "--config.model.source=exported/{method}-{seed}")
    more, changed = (x for x in started if x[2] == "espl_jax.main")
    assert value(more, "config.model.source") == "exported/rl_more-0"
    assert value(more, "config.group_size") == "12"  # three prompts with four rollouts each
    assert value(changed, "config.num_prompts") == "1"
    assert value(changed, "config.selection.strategy") == "ucb"
    assert (tmp_path / "espl_num_prompts=1_selection.strategy=ucb-0.json").is_file()


def test_a_process_that_fails_ends_the_comparison_with_what_it_said(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "print('disk is full'); raise SystemExit(3)"]
    monkeypatch.setattr(Run, "command", lambda run: command)
    with pytest.raises(SystemExit, match="rl, seed 0 ended with exit code 3:\ndisk is full"):
        compare(monkeypatch, tmp_path / "new", "rl")


def test_a_preset_is_several_tasks_with_a_folder_each(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "other", TASK)
    monkeypatch.setitem(PRESETS, "both", ("sums", "other"))
    compare(monkeypatch, tmp_path, "rl", "--task=both")
    assert [value(x, "workdir") for x in started if x[2] == "espl_jax.main"] == [
        str(tmp_path / "sums" / "rl-0"),
        str(tmp_path / "other" / "rl-0"),
    ]
    said = capsys.readouterr().out
    assert "# sums\n\nTest accuracy" in said and "# other\n\nTest accuracy" in said
    assert (tmp_path / "other" / "results.md").is_file()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("espl,ppo", "--methods=espl,ppo: unknown method 'ppo'; choose from espl, rl"),
        ("espl:num_prompts", "'num_prompts' is not field=value"),
    ],
)
def test_unknown_methods_are_refused(methods, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        compare(monkeypatch, "x", methods)
    assert message in capsys.readouterr().err


def test_groups_of_methods_are_taken_once():
    specs = [each.spec for each in variants("rl;ablations;espl:selection.strategy=ucb;proposers")]
    assert specs[:2] == ["rl", "espl"] and len(specs) == len(set(specs))
    assert set(specs) == {"rl", *GROUPS["ablations"], *GROUPS["proposers"]}
    assert [each.spec for each in variants("rl,controls")][-1] == "rl_under_evolved"


@pytest.mark.parametrize("task", TASKS)
def test_changed_fields_pass_the_checks_of_a_run(task, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    specs = ["espl", "rl_from_feedback"]
    specs += [*GROUPS["ablations"], *GROUPS["proposers"]] if task == "convention" else []
    more = ("--config.environment.search.retriever=http://host/retrieve",) if task == "search" else ()
    for variant in variants(";".join(specs)):
        command = Run(variant, 0, TASKS[task], tmp_path, more).command()
        argv = ["main", *(each for each in command[3:] if not each.startswith("--workdir"))]
        monkeypatch.setattr(sys, "argv", argv)
        with fresh_flags():
            holder = command_line.define_config()
            command_line.parse_flags(argv)
            check_config(holder.value, files=False)


def test_kl_is_summed_where_tokens_were_drawn():
    """Against the definition, position by position."""
    params, config = tiny.params(), tiny.CONFIG
    trained = lora.attach(params, tiny.adapters())
    tokens = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
    drawn = np.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]], bool)
    ours, theirs = (jax.nn.softmax(tiny.logits(each, config, tokens)) for each in (trained, params))
    expected = sum(
        float((ours[place] * np.log(ours[place] / theirs[place])).sum())
        for place in zip(*drawn.nonzero(), strict=True)
    )
    assert expected > 1e-4
    found = ended._summed_kl(trained, params, config, tokens, drawn)
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_curves_have_the_iterations_that_all_seeds_have(tmp_path):
    curves = pytest.importorskip("experiments.methods.curves", exc_type=ImportError)

    def record(method, seed, rewards):
        rows = [{"reward": x, "validation": None} for x in rewards]
        return Record(method, seed, rows, {}, 0.0, SystemPrompt())

    records = [record("rl", 0, [0, 1, 2]), record("rl", 1, [1, 1]), record("espl", 0, [5])]
    found = curves.curves(records, "reward")
    assert {method: seeds.tolist() for method, seeds in found.items()} == {
        "rl": [[0, 1], [1, 1]],
        "espl": [[5]],
    }
    assert curves.curves(records, "validation") == {}
    curves.draw(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
