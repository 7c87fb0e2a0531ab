"""A search agent from chat template to gradient: messages, masks and failing retrievers."""

import concurrent.futures
import json
import socket
import threading

import jax
import numpy as np
import pytest

from espl_jax.data.encyclopedia import problems as encyclopedia_problems
from espl_jax.environments.retrievers.load import Bm25, SearchServer
from espl_jax.environments.search import Search
from espl_jax.rollouts import collect
from espl_jax.sampling.generate import Samples
from espl_jax.sampling.settings import Sampling
from espl_jax.text.chat import encode
from espl_jax.training.batches import train_batches
from tests.support.fakes import PROMPTS, model, tokenizer
from tests.text.tools_test import PLAIN, WITH_TOOLS

LIMIT = 12_000


class Script:
    """Replaces the sampler: a scripted policy writes each turn of a row and receives the answers."""

    def __init__(self, policy):
        self.policy = policy
        self.heard = {}  # place -> texts that were said to the row

    def __call__(self, params, config, system_tokens, problem_tokens, keys, *_, respond, **__):
        shape = keys.shape[:3]
        tokens, drawn = np.zeros((*shape, LIMIT), np.int32), np.zeros((*shape, LIMIT), bool)
        lengths = np.zeros(shape, np.int32)
        for place in np.ndindex(*shape):
            heard = self.heard.setdefault(place, [])
            while True:
                said = encode(tokenizer(), self.policy(place, heard) + "<|im_end|>")
                start = lengths[place]
                tokens[place][start : start + len(said)] = said
                drawn[place][start : start + len(said)] = True
                lengths[place] += len(said)
                answer = respond(place, tokens[place][: lengths[place]].copy())
                if isinstance(answer, concurrent.futures.Future):
                    answer = answer.result(timeout=30)
                if not answer:
                    break
                tokens[place][lengths[place] : lengths[place] + len(answer)] = answer
                lengths[place] += len(answer)
                heard.append(tokenizer().decode(answer))
        nothing = np.zeros(tokens.shape, np.float32)
        cutoffs = np.full(tokens.shape, -np.inf, np.float32)
        return Samples(tokens, lengths, nothing, nothing, np.zeros(shape, bool), cutoffs, drawn, 0)


def search_for(*queries):
    call = {"name": "search", "arguments": {"query_list": queries}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


@pytest.fixture
def run(monkeypatch):
    def run(environment, problems, policy, template=PLAIN, prompts=PROMPTS[:1], group_size=1):
        script = Script(policy)
        monkeypatch.setattr(collect, "sample_tree", script)
        monkeypatch.setattr(tokenizer(), "chat_template", template)
        rollouts = collect.collect_rollouts(
            model(),
            prompts,
            problems,
            environment,
            key=jax.random.key(0),
            group_size=group_size,
            sampling=Sampling(max_new_tokens=LIMIT),
        )
        return rollouts, script

    return run


@pytest.mark.parametrize("template", [PLAIN, WITH_TOOLS], ids=["described", "template"])
@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "test"])
def test_a_policy_that_knows_the_encyclopedia_is_always_right(run, template, split):
    """It looks up page after page, and answers only if each was among what it was told."""
    problems = encyclopedia_problems.questions(split).problems

    def policy(place, heard):
        problem = problems[place[1]]
        titles = encyclopedia_problems.plan(problem.id)
        for title, told in zip(titles, heard, strict=False):
            assert f"[1] {title}: " in told
        if len(heard) < len(titles):
            return search_for(titles[len(heard)])
        assert problem.answer in heard[-1]
        return f"I have found it.\nAnswer: {problem.answer}."

    environment = Search(Bm25(encyclopedia_problems.passages()))
    rollouts, _ = run(environment, problems, policy, template)
    assert len(problems) == {"train": 196, "test": 64}[split]
    assert rollouts.success.all() and (rollouts.rewards == 1).all()
    hops = np.array([len(encyclopedia_problems.plan(problem.id)) for problem in problems])
    assert set(hops) == {1, 2, 3}
    np.testing.assert_array_equal(rollouts.metrics["searches"][0, :, 0], hops)
    assert not rollouts.metrics["malformed_calls"].any() and not rollouts.metrics["failed_searches"].any()
    # Where nothing is looked up, nothing is known.
    guessing, _ = run(environment, problems, lambda *_: "Answer: Velmora", template)
    assert guessing.success.mean() < 0.05


def test_the_loss_covers_the_models_own_tokens_alone(run):
    """Token by token: the mask is true where the model spoke, its last token of each turn included."""
    problems = encyclopedia_problems.questions("train", count=4).problems
    spoken = {}

    def policy(place, heard):
        titles = encyclopedia_problems.plan(problems[place[1]].id)
        said = search_for(titles[len(heard)]) if len(heard) < len(titles) else f"Answer: {place}"
        spoken.setdefault(place, []).append(f"{said}<|im_end|>")
        return said

    environment = Search(Bm25(encyclopedia_problems.passages()))
    rollouts, script = run(environment, problems, policy, prompts=PROMPTS[:2], group_size=2)
    advantages = np.tile(np.array([1, -1], np.float32), (2, 4, 1))
    (batch,) = train_batches(rollouts, advantages)
    places = list(np.ndindex(2, 4, 2))
    assert batch.mask.shape[:2] == (1, len(places))
    for row, place in enumerate(places):
        mask, targets = batch.mask[0, row], batch.targets[0, row]
        length = rollouts.lengths[place]
        np.testing.assert_array_equal(targets[:length], rollouts.tokens[place][:length])
        assert not mask[length:].any()
        edges = np.flatnonzero(np.diff(mask[:length].astype(int))) + 1
        pieces = np.split(np.arange(length), edges)
        own = [tokenizer().decode(targets[piece]) for piece in pieces[::2]]
        told = [tokenizer().decode(targets[piece]) for piece in pieces[1::2]]
        assert mask[0] and own == spoken[place] and told == script.heard[place]
        assert all("<tool_response>" in text and text.endswith("<|im_start|>assistant\n") for text in told)


def test_calls_that_cannot_be_read_are_answered_and_counted(run):
    problems = encyclopedia_problems.questions("test", count=1).problems
    replies = ["<tool_call>{search}</tool_call>", '<tool_call>{"name": "find"}</tool_call>', "Answer: no"]
    environment = Search(
        Bm25(encyclopedia_problems.passages()), rewards={"exact_match": 1.0, "malformed_calls": -0.25}
    )
    rollouts, script = run(environment, problems, lambda place, heard: replies[len(heard)])
    one, other = script.heard[0, 0, 0]
    assert "Error: the call is not JSON" in one and "there is no tool 'find'" in other
    assert rollouts.metrics["malformed_calls"].tolist() == [[[2.0]]]
    assert rollouts.rewards.tolist() == [[[-0.5]]]
    assert "[tool]\nError: the call is not JSON" in rollouts.replies[0][0][0]


class TestBrokenServers:
    """Failures affect only the rewards of the rollouts that made the request."""

    @pytest.fixture
    def address(self):
        listening = socket.create_server(("127.0.0.1", 0))
        yield listening
        listening.close()

    def broken(self, run, retriever, timeout):
        problems = encyclopedia_problems.questions("test", count=3).problems

        def policy(place, heard):
            return (
                search_for("anything") if place[1] and not heard else f"Answer: {problems[place[1]].answer}"
            )

        rollouts, script = run(Search(retriever, timeout=timeout), problems, policy)
        assert rollouts.success.all(), "the conversation went on"
        assert rollouts.metrics["failed_searches"].ravel().tolist() == [0, 1, 1]
        return script.heard[0, 1, 0][0]

    def test_dead(self, run, address):
        port = address.getsockname()[1]
        address.close()
        told = self.broken(run, SearchServer(f"http://127.0.0.1:{port}/retrieve", 5.0), 20.0)
        assert "Error: the search failed" in told

    def test_hanging(self, run, address):
        port = address.getsockname()[1]
        told = self.broken(run, SearchServer(f"http://127.0.0.1:{port}/retrieve", 60.0), 0.5)
        assert "Error: the search failed, it took longer than 0.5 seconds" in told

    def test_junk(self, run, address):
        def answer():
            while True:
                try:
                    connection, _ = address.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<!x>\n")

        threading.Thread(target=answer, daemon=True).start()
        port = address.getsockname()[1]
        told = self.broken(run, SearchServer(f"http://127.0.0.1:{port}/retrieve", 5.0), 20.0)
        assert "Error: the search failed" in told
