"""What the README shows is what happens."""

import re
import sys
from pathlib import Path

import jax
import pytest

from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.run.tasks import make_environment
from espl_jax.sampling.settings import Sampling
from espl_jax.text.chat_format import ChatFormat
from espl_jax.types import Grade, Problem
from tests.support import fakes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks():
    """The README's Python, in order."""
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class TestYourOwnEnvironment:
    """The code is that of the README, in a module of its own, found by its name on the command line."""

    PROBLEM = Problem("n", "Which number is it?", "12")

    @pytest.fixture
    def guess(self, tmp_path, monkeypatch):
        (tmp_path / "guess.py").write_text(blocks()[0], encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "guess", raising=False)
        return make_environment("guess:Guess", "", None, {"turns": 3})

    def play(self, environment, *guesses):
        """The transcript of a game, and its grade."""
        transcript = []
        for guess in guesses:
            transcript.append({"role": "assistant", "content": guess})
            transcript += environment.respond(self.PROBLEM, transcript) or []
        return transcript, environment.grade([self.PROBLEM], [transcript])[0]

    def test_is_short(self):
        assert len([line for line in blocks()[0].splitlines() if line.strip()]) <= 40

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


def test_the_example_runs():
    source, seen = blocks()[-1], {}
    exec(compile(source, "README.md", "exec"), seen)
    assert seen["prompts"][0].id != seen["prompts"][1].id
    assert seen["samples"].tokens.shape == (2, 2, 4, 8)
    assert seen["rewards"].any() and not seen["rewards"].all(), (
        "the example should have something to learn from"
    )
    assert float(seen["count"]) == 1.0
    # On policy the ratio is one up to rounding: 0.011 in the mean over many tokens, and here are eight.
    assert float(seen["metrics"]["log_ratio_abs"] / seen["metrics"]["tokens"]) < 0.05


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\b((?:configs|experiments|tests)/\w+\.py)", README)))
)
def test_files_that_it_names_are_there(path):
    assert (ROOT / path).is_file()


def test_every_module_has_its_place_in_the_tree():
    tree = README.partition("espl_jax/\n")[2].partition("```")[0]
    modules = {p.name for p in (ROOT / "espl_jax").iterdir() if p.name not in ("__init__.py", "__pycache__")}
    assert not {name for name in modules if name not in tree}
