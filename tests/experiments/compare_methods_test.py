"""What the comparison of methods reads from work directories, and its intervals, on hand values."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest

from espl_jax.rollouts import intervals
from experiments import compare_methods
from experiments.methods import summary
from experiments.methods.runs import CELLS, Run, read


def left_by(run, cells, *, deployed):
    """Writes what a run leaves: `cells` is {(weights, prompt): {problem: successes}}."""
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
            "time": {"rollouts": 2.0, "update": 1.0, "total": 3.0},
        }
        for i in (1, 2)
    ]
    for name, lines in (("evaluations", evaluations), ("metrics", metrics)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.workdir / f"{name}.jsonl").write_text(text)
    config = {"num_prompts": 3, "batch_size": 2, "group_size": 4}
    (run.workdir / "config.json").write_text(json.dumps(config))
    (run.workdir / "results.json").write_text(json.dumps({"deployed": {"id": deployed, **PROMPTS[deployed]}}))


PROMPTS = {"p0": {"text": "Add."}, "p3": {"text": "Add.", "principles": ["Use a box."]}}


@pytest.fixture
def runs(tmp_path):
    def run(method, seed):
        return Run(method, seed, "configs/x.py", tmp_path)

    half, none, both = {"a": [1, 0], "b": [0, 1]}, {"a": [0], "b": [0]}, {"b": [1], "a": [1]}
    left_by(run("rl", 0), {("initial", "p0"): none, ("trained", "p0"): half}, deployed="p0")
    left_by(run("evolution", 0), {("initial", "p0"): none, ("initial", "p3"): half}, deployed="p3")
    cells = {(weights, prompt): none for weights in ("initial", "trained") for prompt in PROMPTS}
    left_by(run("espl", 0), cells | {("trained", "p3"): both}, deployed="p3")
    made = [run(method, 0) for method in ("rl", "evolution", "espl")]
    for each in made:
        each.keep()
    return made


def test_cells_that_a_method_does_not_have_are_those_it_starts_from(runs):
    rl, evolution, espl = (
        {cell: rates.tolist() for cell, rates in read(run.path).test.items()} for run in runs
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


def test_tables_need_the_records_of_ended_runs_alone(runs, tmp_path):
    for run in runs:
        shutil.rmtree(run.workdir)
    unfinished = Run("espl", 1, "configs/x.py", tmp_path)
    text = compare_methods.write(tmp_path, [*runs, unfinished])
    assert text == (tmp_path / "results.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    (espl,) = (line for line in cells if line[:2] == ["espl", "1"])
    low, high = intervals.interval(2, 2)
    assert espl[-1] == f"100.0% [{100 * low:.1f}, {100 * high:.1f}]"
    assert ["espl - rl", "1", "50.0% [50.0, 50.0]"] in cells
    assert "espl, seed 0:\n\n> Add.\n>\n> G0. Use a box.\n" in text
    rows = list(csv.DictReader((tmp_path / "iterations.csv").open()))
    assert [row["method"] + row["iteration"] for row in rows[:3]] == ["rl1", "rl2", "evolution1"]
    assert rows[1]["reward"] == "0.5"
    assert rows[1]["drawn_tokens"] == "36"  # 3 x 2 x 4 rollouts of 1.5
    assert rows[1]["seconds"] == "3.0"


def test_an_interval_over_seeds_is_wider_than_over_problems_alone():
    rng = np.random.default_rng(1)
    apart = (rng.random((4, 200)) < np.array([[0.2], [0.4], [0.6], [0.8]])).astype(float)
    together = (rng.random((4, 200)) < 0.5).astype(float)
    width = [high - low for low, high in map(summary.interval, (apart, together))]
    assert width[0] > 0.3 > 0.15 > width[1]


def test_paired_differences_know_that_problems_are_the_same():
    """Methods that differ on one problem in ten differ for certain, however hard the others are."""
    rates = np.tile(np.arange(200) % 2, (3, 1)).astype(float)
    better = rates.copy()
    better[:, ::10] = 1
    mean, low, high = summary.difference(better, rates)
    assert mean == pytest.approx(0.1)
    assert 0.05 < low < mean < high < 0.15


def test_what_cannot_vary_gets_wilsons_interval():
    assert summary.interval(np.zeros((3, 50))) == intervals.interval(0, 50)


def test_runs_that_have_ended_are_not_started_again(runs, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(Run, "finish", lambda run: started.append((run.method, run.seed)))
    monkeypatch.setattr(Run, "keep", lambda run: None)
    arguments = [f"--out={tmp_path}", "--config=configs/x.py", "--methods=rl,espl", "--seeds=0,1"]
    monkeypatch.setattr(sys, "argv", ["compare_methods", *arguments])
    compare_methods.main()
    assert started == [("rl", 1), ("espl", 1)]
    assert "Test accuracy" in capsys.readouterr().out


def test_records_of_another_task_are_refused(runs, tmp_path, monkeypatch):
    for changed in (["--config=configs/y.py"], ["--config=configs/x.py", "--", "--config.batch_size=9"]):
        monkeypatch.setattr(sys, "argv", ["compare_methods", f"--out={tmp_path}", *changed])
        with pytest.raises(SystemExit, match=r"rl-0.json: made with .*; name another --out"):
            compare_methods.main()


def test_a_run_that_fails_ends_the_comparison_with_what_it_said(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "print('disk is full'); raise SystemExit(3)"]
    monkeypatch.setattr(Run, "command", lambda run: command)
    monkeypatch.setattr(sys, "argv", ["compare_methods", f"--out={tmp_path}/new", "--methods=rl"])
    with pytest.raises(SystemExit, match="rl, seed 0 ended with exit code 3:\ndisk is full"):
        compare_methods.main()


def test_unknown_methods_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_methods", "--methods=espl,ppo"])
    with pytest.raises(SystemExit):
        compare_methods.main()
    assert "--methods=espl,ppo: 'ppo' is none; choose from espl, rl" in capsys.readouterr().err
