"""A server that nobody here wrote, `transformers serve`, reflects; its replies outlive it."""

import json

import pytest

from espl_jax.pretrained.load import load_pretrained
from espl_jax.pretrained.save import save_pretrained
from espl_jax.reflectors.journal import Journal
from espl_jax.reflectors.openai import OpenAIReflector
from espl_jax.reflectors.openai_server import OpenAIServer
from espl_jax.reflectors.replay import ReplayReflector, Transcripts
from espl_jax.types import Question
from tests.support.messages import system, user
from tests.support.served import MISSING, transformers_serve

QUESTIONS = ("Who are you?", "Name a colour.", "How much is 2 + 2?")
CONVERSATIONS = [[system("Answer in one sentence."), user(question)] for question in QUESTIONS]
EDITS = {"type": "array", "items": {"type": "string"}}
SCHEMA = {
    "type": "object",
    "properties": {"edits": EDITS},
    "required": ["edits"],
    "additionalProperties": False,
}
SCHEMED = [Question(conversation=each, grammar=SCHEMA) for each in CONVERSATIONS[:2]]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"pip install 'transformers[serving]': needs {', '.join(MISSING)}")
def test_replies_arrive_and_outlive_the_server(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model = load_pretrained("smollm2", param_dtype="bfloat16")
    folder = tmp_path / "model"
    save_pretrained(folder, model.params, model.config, model.tokenizer)

    def reflect_on(address, journal):
        server = OpenAIServer(
            base_url=f"{address}/v1",
            model=str(folder),
            temperature=0.7,
            max_new_tokens=16,
            concurrency=3,
            timeout=300.0,
            max_retries=1,
        )
        reflect = OpenAIReflector(server, iteration=1, journal=journal)
        replies = reflect(CONVERSATIONS)
        replies += [reply.text for reply in reflect.ask(SCHEMED)]
        return replies, reflect

    path = tmp_path / "replies.jsonl"
    with transformers_serve(tmp_path / "log") as address, Journal(path) as journal:
        replies, reflect = reflect_on(address, journal)
        for entry in map(json.loads, path.read_text().splitlines()):
            print(entry["number"], entry["schema"] is not None, repr(entry["reply"]), entry["usage"])
    counts = reflect.counts
    print(counts)
    assert all(replies) and reflect.replayed == 0
    assert (counts["requests"], counts["failed"], counts["retries"]) == (5, 0, 0)
    assert counts["prompt_tokens"] > 5 * 10 and 5 <= counts["completion_tokens"] <= 5 * 16
    # The server is gone.
    with Journal(path) as journal:
        again, replayed = reflect_on(address, journal)
    assert again == replies and replayed.counts == counts and replayed.replayed == 5
    recorded = ReplayReflector(Transcripts(path), iteration=1)
    assert recorded(CONVERSATIONS) + [reply.text for reply in recorded.ask(SCHEMED)] == replies
