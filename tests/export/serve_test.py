"""A server that nobody here wrote, `transformers serve`, answers under the exported system prompt unasked."""

import json
import urllib.request

import pytest

from espl_jax.pretrained.load import load_pretrained
from espl_jax.pretrained.save import save_pretrained
from espl_jax.types import SystemPrompt
from tests.support.served import MISSING, transformers_serve

PROMPT = SystemPrompt(
    text='You are a pirate called "Réd\\Beard {{ 🦜 }}".\nEvery answer begins with "Arrr!".',
    principles=("Speak of the sea.", "Never say {% endif %}."),
)
QUESTIONS = ("Who are you?", "What do you do all day?", "How much is 2 + 2?")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights, exported with the prompt and without."""
    model = load_pretrained("smollm2", param_dtype="bfloat16")
    made = {name: tmp_path_factory.mktemp("served") / name for name in ("evolved", "plain")}
    for (name, folder), prompt in zip(made.items(), (PROMPT, None), strict=True):
        save_pretrained(folder, model.params, model.config, model.tokenizer, prompt)
        assert (folder / "system_prompt.txt").exists() == (name == "evolved")
    return made


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server on the CPU, without network."""
    with transformers_serve(tmp_path_factory.mktemp("server") / "log") as address:
        yield address


def ask(server, folder, *messages):
    body = {"model": str(folder), "messages": messages, "temperature": 0.0, "seed": 0, "max_tokens": 24}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"pip install 'transformers[serving]': needs {', '.join(MISSING)}")
def test_answers_under_the_evolved_prompt_unasked(server, folders):
    system = {"role": "system", "content": PROMPT.render()}
    different = 0
    for question in QUESTIONS:
        user = {"role": "user", "content": question}
        unasked = ask(server, folders["evolved"], user)
        told = ask(server, folders["plain"], system, user)
        without = ask(server, folders["plain"], user)
        print(f"{question}\n  evolved: {unasked}\n  plain, told: {told}\n  plain: {without}")
        assert unasked == told
        different += unasked[0] != without[0]
        # As clients of newer habits send it, and with a system message of their own.
        assert (
            ask(server, folders["evolved"], user | {"content": [{"type": "text", "text": question}]}) == told
        )
        other = {"role": "system", "content": "Be brief."}
        assert ask(server, folders["evolved"], other, user) == ask(server, folders["plain"], other, user)
    assert different == len(QUESTIONS)
