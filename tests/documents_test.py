"""What README.md, docs/ and examples/ show is what happens."""

import importlib.util
import re
import runpy
import sys

import jax
import numpy as np
import pytest

import espl_jax
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.run.tasks import make_environment
from espl_jax.sampling.settings import Sampling
from espl_jax.text.chat_format import ChatFormat
from espl_jax.types import Grade, Problem
from tests.layering_test import LAYERS
from tests.support import documents, fakes
from tests.support.documents import ROOT


def example(name):
    """The module examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestGuess:
    """The environment of examples/guess.py."""

    PROBLEM = Problem("n", "Which number is it?", "12")

    @pytest.fixture
    def guess(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "examples")
        monkeypatch.delitem(sys.modules, "guess", raising=False)
        return make_environment("guess:Guess", "", None, {"turns": 3})

    def play(self, environment, *guesses):
        """The transcript of a game, and its grade."""
        transcript = []
        for guess in guesses:
            transcript.append({"role": "assistant", "content": guess})
            transcript += environment.respond(self.PROBLEM, transcript) or []
        return transcript, environment.grade([self.PROBLEM], [transcript])[0]

    def test_plays(self, guess):
        transcript, grade = self.play(guess, "Is it 30?", "-3", "Then 12")
        assert [each["content"] for each in transcript[1::2]] == ["Lower.", "Higher."]
        assert grade == Grade(pytest.approx(1 / 3), True, "12", {"guesses": 3})
        transcript, grade = self.play(guess, "What?", "11", "13")
        assert [each["content"] for each in transcript[1::2]] == ["That is no number.", "Higher."]
        assert (grade.reward, grade.success) == (0.0, False)
        assert self.play(guess, "12")[1].reward == 1.0

    def test_is_sampled_in_turns(self, guess):
        rollouts = collect_rollouts(
            fakes.model(),
            fakes.PROMPTS[:2],
            [self.PROBLEM],
            guess,
            key=jax.random.key(0),
            group_size=4,
            sampling=Sampling(max_new_tokens=300),
            chat=ChatFormat(stop_strings=tuple("etaoinshrdlu")),
        )
        assert rollouts.metrics["guesses"].max() == 3 and "[user]\n" in rollouts.replies[0][0][0]
        assert (rollouts.drawn.sum(axis=-1) < rollouts.lengths).any()


class TestExamples:
    @pytest.fixture
    def tiny(self, monkeypatch):
        monkeypatch.setattr(espl_jax, "load_pretrained", lambda *_, **__: fakes.model())

    def test_functions(self, tiny):
        seen = runpy.run_path(str(ROOT / "examples" / "functions.py"))
        assert seen["samples"].tokens.shape == (2, 2, 4, 8) and float(seen["count"]) == 1.0

    @pytest.mark.slow
    def test_functions_with_the_real_model(self):
        seen = runpy.run_path(str(ROOT / "examples" / "functions.py"))
        assert seen["prompts"][0].id != seen["prompts"][1].id
        assert seen["rewards"].any() and not seen["rewards"].all(), "there should be something to learn from"
        # On policy the ratio is one up to rounding: 0.011 in the mean over many tokens, and here are eight.
        assert float(seen["metrics"]["log_ratio_abs"] / seen["metrics"]["tokens"]) < 0.05

    def test_evaluate(self, tiny, capsys):
        evaluations = example("evaluate").main(count=3, samples=2)
        assert [(each.num_problems, each.num_samples) for each in evaluations] == [(3, 2), (3, 2)]
        assert capsys.readouterr().out.startswith("plain: ")

    def test_train_is_given_a_sound_configuration(self, monkeypatch):
        module = example("train")
        monkeypatch.setattr(module, "train", lambda config, workdir: (config, workdir))
        config, workdir = module.main("w", batch_size=2, lora__rank=3)
        assert (config.num_iterations, config.mode, workdir) == (2, "rl", "w")
        assert (config.batch_size, config.lora.rank) == (2, 3)

    @pytest.mark.slow
    def test_train(self, monkeypatch, tmp_path):
        fakes.take_over(monkeypatch)
        small = {
            "data__train": "addition:digits=1,count=6",
            "data__validation": "addition:digits=1,count=2",
            "data__test": "addition:digits=1,count=2",
            "batch_size": 2,
            "group_size": 2,
            "lora__rank": 2,
            "loss__microbatch_rows": 1,
            "sampling__max_new_tokens": 4,
            "compilation_cache": "",
        }
        results = example("train").main(str(tmp_path), **small)
        assert results["iteration"] == 2 and set(results["test"]) == {"initial", "trained"}


def test_the_functions_of_the_readme_run(monkeypatch):
    monkeypatch.setattr(espl_jax, "load_pretrained", lambda *_, **__: fakes.model())
    (source,) = (code for language, code in documents.blocks(documents.texts()[0]) if language == "python")
    seen = {}
    exec(compile(source, "README.md", "exec"), seen)
    assert np.asarray(seen["advantages"]).shape == (1, 1, 4)
    assert seen["child"].principles == ("Give the name alone.",)


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=lambda path: path.name)
def test_files_and_pages_that_it_names_are_there(document):
    text = document.read_text(encoding="utf-8")
    for path in re.findall(
        r"\b((?:configs|docs|examples|experiments|tests|espl_jax)/[\w/]+\.(?:py|md))\b", text
    ):
        assert (ROOT / path).is_file(), path
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (document.parent / link).exists(), link


def test_every_room_has_its_place_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.partition("espl_jax/\n")[2].partition("```")[0]
    ignored = ("__init__.py", "__pycache__", "py.typed")
    rooms = {path.name for path in (ROOT / "espl_jax").iterdir() if path.name not in ignored}
    assert {name for name in rooms if name not in tree} == set()


def test_the_layers_of_the_architecture_are_those_that_are_enforced():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| ((?:`\w+`[,;]? ?)+)\|$", text, re.MULTILINE)
    shown = [set(re.findall(r"`(\w+)`", row)) for row in rows]
    assert shown[: len(LAYERS)] == LAYERS[::-1]


def test_the_reference_of_the_configuration_is_current():
    made = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
    assert made["TARGET"].read_text(encoding="utf-8") == made["page"](), (
        "run: python docs/make_configuration.py"
    )
