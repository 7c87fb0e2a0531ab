"""What a model card says."""

import dataclasses
import json
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from espl_jax.environments.search import Search
from espl_jax.export.model_card import hub_name, model_card, serve_adapter
from espl_jax.rollouts.evaluation import Evaluation
from espl_jax.types import SystemPrompt
from tests.support import fakes

PROMPT = SystemPrompt(
    id="p3", text="Reply.", principles=("Add.",), mu=31.0, sigma=2.0, operator="mutation", iteration=1
)
BASE = "org/name-1.5"


def cell(accuracy):
    low, high = accuracy - 0.1, accuracy + 0.1
    known = {"reward": accuracy, "accuracy": accuracy, "low": low, "high": high, "num_problems": 2}
    rest = {field.name: None for field in dataclasses.fields(Evaluation)}
    return rest | known | {"num_samples": 3}


RESULTS = {
    "deployed": {"id": "p3"},
    "test": {
        "initial": {"root": cell(0.1), "deployed": cell(0.2)},
        "trained": {"root": cell(0.3), "deployed": cell(0.4)},
    },
}


def card(prompt=PROMPT, iteration=2, config=None, **settings):
    config = (config or fakes.config()).to_dict()
    return model_card(config, prompt, **{"base": BASE, "iteration": iteration, "folder": "out", **settings})


def code_blocks(text):
    return [token.content for token in MarkdownIt().parse(text) if token.type == "fence"]


def front_matter(text):
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_front_matter():
    assert front_matter(card())["base_model"] == BASE
    assert front_matter(card())["library_name"] == "transformers"
    assert front_matter(card(adapter=True))["library_name"] == "peft"
    assert "lora" in front_matter(card(adapter=True))["tags"]
    # A path of this machine is nothing that the hub could link to.
    local = model_card(fakes.config().to_dict(), PROMPT, base="/models/a.gguf", iteration=2, folder="out")
    assert "base_model" not in front_matter(local)


def test_what_is_said():
    text = card(results=RESULTS, metrics={"iteration": 2, "reward": 0.25, "held_out": None})
    for said in (
        "2 of 2 iterations",
        "2602.14697",
        "addition:digits=1,count=6",
        "optimizer.learning_rate",
        "created by mutation in iteration 1, with a rating of 31.00 ± 2.00",
        "temperature 1.0), with 95% intervals; the deployed prompt is p3",
        "0.25",
    ):
        assert said in text, said
    assert "| trained | 30.0% [20.0, 40.0] | 40.0% [30.0, 50.0] |" in re.sub(" +", " ", text)
    assert "held_out |" not in text
    assert PROMPT.render() + "\n" in code_blocks(text)
    assert any("AutoModelForCausalLM.from_pretrained" in block for block in code_blocks(text))
    assert any("transformers serve out" in block for block in code_blocks(text))
    whole = next(block for block in code_blocks(text) if block.startswith("{"))
    assert json.loads(whole) == json.loads(json.dumps(fakes.config().to_dict()))


def test_code_is_python():
    for adapter in (False, True):
        code = next(block for block in code_blocks(card(adapter=adapter)) if "import" in block)
        compile(code, "card", "exec")
        assert ("PeftModel" in code) == adapter


def test_before_the_end_and_without_a_test():
    assert "there are no test results" in card(iteration=1)
    assert "Exported before the test at the end of the run" in card()
    nothing = fakes.config(data__test="")
    assert "no test problems" in card(config=nothing, results={"deployed": {"id": "p3"}, "test": {}})


@pytest.mark.parametrize("text", ["```\n# not a heading\n```", "---\n", "a ```` b", "<details>"])
def test_a_prompt_cannot_break_the_page(text):
    assert SystemPrompt(text=text).render() + "\n" in code_blocks(card(SystemPrompt(id="p1", text=text)))


def test_an_empty_prompt():
    assert "Prompt p0 is empty" in card(SystemPrompt(id="p0"))


def test_what_the_user_said_beside_the_problem():
    boxed = fakes.config(environment__name="math", environment__answer_format="boxed")
    assert any("\\boxed{}" in block for block in code_blocks(card(config=boxed)))
    searching = code_blocks(card(config=fakes.config(environment__name="search"), tools=Search.tools))
    assert any("`Answer:`" in block for block in searching) and any('"query_list"' in x for x in searching)
    assert not any("\\boxed{}" in block for block in searching)
    own = fakes.config(environment__instruction="Answer in Latin.")
    assert "Answer in Latin.\n" in code_blocks(card(config=own))
    kwargs = fakes.config(model__chat_template_kwargs='{"enable_thinking": false}')
    assert '`{"enable_thinking": false}`' in card(config=kwargs)


def test_hub_names():
    assert hub_name("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_name("org/name@main") == "org/name@main"
    assert hub_name("/a/b.gguf") == "/a/b.gguf"
    assert hub_name("dir/model.gguf").endswith("/dir/model.gguf") and hub_name("dir/model.gguf")[0] == "/"


def test_a_revision_of_the_base():
    text = card(base="org/name@v2", adapter=True)
    assert "base_model: org/name\n" in text
    assert 'from_pretrained("org/name", revision="v2")' in text
    assert "vllm serve org/name --revision v2 --enable-lora" in text


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (17, 32), (32, 32), (600, 600)])
def test_serving_an_adapter_makes_room_for_its_rank(rank, room):
    assert f"--enable-lora --max-lora-rank {room} --lora-modules evolved=out" in serve_adapter(
        "a/b", "out", rank
    )


def test_the_template_that_an_adapter_is_served_with():
    assert "--chat-template out/chat_template.jinja" in serve_adapter("a/b", "out", 8)
    file = "additional_chat_templates/tool_use.jinja"
    assert f"--chat-template out/{file}" in card(adapter=True, template_file=file)


def test_adapters_of_a_copy():
    assert "were trained on `smollm2`, a copy" in card(adapter=True)
    assert "were trained on" not in card()
