import concurrent.futures
import contextlib
import http.server
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from espl_jax.environments.retrievers import server
from espl_jax.environments.retrievers.load import Bm25, RetrievalError, SearchServer, open_retriever
from espl_jax.environments.retrievers.serve import make_server
from espl_jax.types import Passage
from tests.reflectors.faulty_server import closed, send

TREES = [
    Passage("Oak", "A tall tree.\nIt is old."),
    Passage("Elm", "A tree near the old tree."),
    Passage("Stone", "Zoë's “stone” 石."),
]


@contextlib.contextmanager
def running(listening):
    threading.Thread(target=listening.serve_forever, args=[0.02], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/retrieve"
    finally:
        listening.shutdown()
        listening.server_close()


@contextlib.contextmanager
def answering(*behaviours):
    """Yields an address and the requests that came; each gets the next behaviour, the last one for good."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            behave = behaviours[min(len(requests), len(behaviours)) - 1]
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                behave(self, request, len(requests) - 1)

    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield address, requests


def body(content, status=200):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda handler, request, number: send(handler, status, content)


def hang(handler, request, number):
    time.sleep(3)


def dribble(handler, request, number):
    """Blank after blank, which JSON allows: no read waits for long."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.01)


def half(handler, request, number):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"result": [')


def result(*documents):
    return body({"result": [list(documents)]})


OAK = {"id": "0", "contents": '"Oak"\nA tall tree.'}
FOUND = [[Passage("Oak", "A tall tree.")]]


def test_through_the_protocol_as_in_this_process():
    bm25 = Bm25(TREES)
    queries = ["tree", "", "zoë stone", "unknown", "石", "\ud800"]
    with running(make_server(bm25)) as address:
        retriever = open_retriever(address, timeout=10.0)
        for count in (1, 5):
            assert retriever.search(queries, count) == bm25.search(queries, count)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: retriever.search(["tree"], 2), range(40)))
        assert found == [bm25.search(["tree"], 2)] * 40


def ask(address, request):
    with urllib.request.urlopen(address, json.dumps(request).encode()) as answer:
        return json.loads(answer.read())["result"]


def test_served_documents_with_scores_and_without():
    bm25 = Bm25(TREES)
    (_, score), _ = bm25.rank("old", 2)
    with running(make_server(bm25)) as address:
        elm = {"id": "1", "contents": '"Elm"\nA tree near the old tree.'}
        assert ask(address, {"queries": ["elm"], "topk": 1}) == [[elm]]
        (first, second), nothing = ask(address, {"queries": ["old", "?"], "return_scores": True})
        assert [first["document"]["id"], second["document"]["id"]] == ["0", "1"]
        assert first["score"] == pytest.approx(score)
        assert nothing == []


@pytest.mark.parametrize("request_", [[], {}, {"queries": ["x"], "topk": "y"}, {"queries": [5]}])
def test_served_refusals(request_):
    with running(make_server(Bm25(TREES))) as address:
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(address, request_)
        assert ask(address, {"queries": ["elm"]})


def test_command(tmp_path):
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps({"title": "Oak", "text": "A tall tree."}))
    command = [
        sys.executable,
        "-m",
        "espl_jax.environments.retrievers.serve",
        f"--passages={path}",
        "--port=0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert SearchServer(address, 10.0).search(["tree"], 3) == FOUND
        finally:
            process.terminate()


@pytest.mark.parametrize(
    "document",
    [
        {"document": OAK, "score": 1.5},
        {"document": {"title": "Oak", "text": "A tall tree.", "contents": "other"}},
        OAK,
        {"title": "Oak", "text": "A tall tree."},
    ],
)
def test_forms_of_documents(document):
    with answering(result(document)) as (address, requests):
        assert SearchServer(address, 10.0).search(["tree"], 3) == FOUND
    assert requests == [{"queries": ["tree"], "topk": 3, "return_scores": True}]


@pytest.mark.parametrize("line", [b"SSH-2.0-" + b"x" * 10_000, b"HTTP/1.1 500 " + b"x" * 10_000 + b"\r\n"])
def test_messages_are_short(monkeypatch, line):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    with answering(lambda handler, request, number: handler.wfile.write(line + b"\r\n")) as (address, _):
        with pytest.raises(RetrievalError, match=r"x{100}") as caught:
            SearchServer(address, 10.0).search(["tree"], 3)
        assert len(str(caught.value)) < 400


def test_more_documents_than_asked_for_and_none():
    with answering(result(OAK, OAK, OAK), result()) as (address, _):
        assert SearchServer(address, 10.0).search(["tree"], 1) == FOUND
        assert SearchServer(address, 10.0).search(["tree"], 1) == [[]]


@pytest.mark.parametrize(
    "bad",
    [
        {"contents": ""},
        {"document": {"title": " ", "text": "\n"}},
        {"document": None},
        {"document": {"text": None}},
        {},
        {"id": "1"},
        "tree",
    ],
)
def test_one_bad_document_does_not_spoil_the_others(bad):
    with answering(result(bad, OAK, OAK)) as (address, _):
        assert SearchServer(address, 10.0).search(["tree"], 1) == FOUND
    with answering(body({"result": [[bad], [OAK]]})) as (address, _):
        assert SearchServer(address, 10.0).search(["stone", "tree"], 1) == [[], *FOUND]


def test_blank_documents_alone_are_nothing_found():
    documents = {"contents": " "}, {"text": ""}, {"document": None}, {"document": {"text": None}}, {}
    with answering(result(*documents)) as (address, _):
        assert SearchServer(address, 10.0).search(["tree"], 2) == [[]]


def test_blank_queries_are_not_sent():
    with answering(result(OAK)) as (address, requests):
        assert SearchServer(address, 10.0).search(["", " \n"], 1) == [[], []]
        assert SearchServer(address, 10.0).search(["", "tree", " "], 1) == [[], *FOUND, []]
    assert [request["queries"] for request in requests] == [["tree"]]


@pytest.mark.parametrize(
    ("behave", "message"),
    [
        (body(b"<html>"), "an answer that is no JSON: b'<html>'"),
        (body(b"\xff\xfe\x00"), "no JSON"),
        (body(b"[" * 100_000), "no JSON"),
        (body(b""), "no JSON"),
        (body([]), "without a 'result' that is a list of lists"),
        (body({"results": []}), "without a 'result'"),
        (body({"result": {"0": []}}), "without a 'result'"),
        (body({"result": [None]}), "without a 'result'"),
        (body({"result": []}), "0 results for 1 queries"),
        (body({"result": [[], []]}), "2 results for 1 queries"),
        (result("tree"), "cannot be read: a str"),
        (result({"document": {"id": "1"}}), "no field 'text' or 'contents'"),
        (result({"contents": 5}), "the field 'contents' is 5"),
        (body({"detail": "out of\nmemory"}, 500), r'status 500 .*: {"detail": "out of\\nmemory"}'),
        (body(b"", 404), r"status 404 Not Found: \(nothing more\)"),
        (body(b"", 307), "status 307"),
        (body(b"x" * 10_000, 503), "status 503 Service Unavailable: x{200}$"),
    ],
)
def test_junk_is_a_failure_at_once(behave, message):
    with answering(behave) as (address, requests):
        with pytest.raises(RetrievalError, match=message) as caught:
            SearchServer(address, 10.0).search(["tree"], 3)
        assert str(caught.value).startswith(f"the search server {address} failed: ")
    assert len(requests) == 1


def test_huge_answers_are_not_read(monkeypatch):
    monkeypatch.setattr(server, "MAX_RESPONSE_BYTES", 1000)
    at_limit = json.dumps({"result": [[OAK]]}).ljust(1000).encode()
    with answering(body(at_limit), body(at_limit + b" ")) as (address, _):
        assert SearchServer(address, 10.0).search(["tree"], 3) == FOUND
        with pytest.raises(RetrievalError, match="more than 1000 bytes"):
            SearchServer(address, 10.0).search(["tree"], 3)


@pytest.mark.parametrize("behave", [hang, dribble])
def test_no_answer_in_time(behave):
    with answering(behave) as (address, requests):
        begun = time.monotonic()
        with pytest.raises(RetrievalError, match=r"no whole answer within 0\.3 seconds"):
            SearchServer(address, 0.3).search(["tree"], 3)
        assert time.monotonic() - begun < 2.5  # the server would take 3
    assert len(requests) == 1


@pytest.mark.parametrize("failing", [closed, half])
def test_lost_connections_are_tried_again(monkeypatch, failing):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    with answering(failing, failing, result(OAK)) as (address, requests):
        assert SearchServer(address, 10.0).search(["tree"], 3) == FOUND
        assert len(requests) == 3
    with answering(failing) as (address, requests):
        with pytest.raises(RetrievalError, match="no connection"):
            SearchServer(address, 10.0).search(["tree"], 3)
        assert len(requests) == server.ATTEMPTS


def test_dead_server(monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    with answering(result(OAK)) as (address, _):
        pass
    with pytest.raises(RetrievalError, match=r"no connection \(ConnectionRefusedError"):
        SearchServer(address, 10.0).search(["tree"], 3)
    with pytest.raises(RetrievalError, match="no connection"):
        SearchServer(f"http://{'a' * 70}.invalid/retrieve", 10.0).search(["tree"], 3)


@pytest.mark.parametrize(
    "url", ["http://localhost:8000", "http://localhost:8000/", "localhost:8000/retrieve"]
)
def test_address_that_is_not_whole(url):
    with pytest.raises(ValueError, match="is not the whole address of a server") as caught:
        SearchServer(url, 10.0)
    assert repr(url) in str(caught.value)


def test_bad_numbers():
    with pytest.raises(ValueError, match=r"timeout=0\.0"):
        SearchServer("http://localhost:8000/retrieve", 0.0)
    with pytest.raises(ValueError, match="count=0"):
        SearchServer("http://localhost:8000/retrieve", 1.0).search(["tree"], 0)
