"""A chat server on this machine that fails as it is told to, request by request."""

import collections
import contextlib
import dataclasses
import http.server
import json
import socket
import threading
import time


@dataclasses.dataclass
class Served:
    """A running server and what it was asked.

    Attributes:
      address: for `base_url`.
      asked: one `(request, headers)` for each request, in order of arrival; names of headers in lower case.
      most: the most requests that were there at once.
    """

    address: str = ""
    asked: list = dataclasses.field(default_factory=list)
    most: int = 0

    def questions(self):
        """How often each last message was asked."""
        return collections.Counter(request["messages"][-1]["content"] for request, _ in self.asked)


@contextlib.contextmanager
def serve(script=None, port=0):
    """Yields a `Served`.

    Args:
      script: called with the request and its number among those with its last message, from 0, gives a
        behaviour, one of the functions below, or None for a good answer.
      port: a free one by default.
    """
    served, lock = Served(), threading.Lock()
    now = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            nonlocal now
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = served.questions()[request["messages"][-1]["content"]]
                headers = {name.lower(): value for name, value in self.headers.items()}
                served.asked.append((request, headers))
                now += 1
                served.most = max(served.most, now)
            try:
                behaviour = script(request, number) if script else None
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    (behaviour or answer())(self, request, number)
            finally:
                with lock:
                    now -= 1

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 100

        def handle_error(self, *args):
            pass

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    served.address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def send(handler, status, body, headers=()):
    handler.send_response(status)
    for name, value in {
        "Content-Type": "application/json",
        "Content-Length": len(body),
        **dict(headers),
    }.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def good_body(content, prompt_tokens=10, completion_tokens=3, finish_reason="stop", **fields):
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    message = {"role": "assistant", "content": content, "reasoning_content": "Let me see.", **fields}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def said(request, number):
    """What a good answer says."""
    return f"answer {number} to {request['messages'][-1]['content']}"


def answer(content=None, wait=0.0):
    """A good answer, after some seconds."""

    def behave(handler, request, number):
        time.sleep(wait)
        send(handler, 200, good_body(said(request, number) if content is None else content))

    return behave


def body(text):
    """This body, with the status of success."""
    return lambda handler, request, number: send(handler, 200, text)


def error(status, message="no", **headers):
    """An error as OpenAI's servers give it; `_` in the names of headers stands for `-`."""
    content = json.dumps({"error": {"message": message}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, request, number: send(handler, status, content, named)


def repeating_headers(status):
    """An error whose message repeats the request's headers, the key included."""

    def behave(handler, request, number):
        error(status, f"got {dict(handler.headers)}")(handler, request, number)

    return behave


def dribble(seconds):
    """A good answer, byte by byte, over so many seconds: no read of the client waits for long."""

    def behave(handler, request, number):
        content = good_body(said(request, number))
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for byte in content:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(seconds / len(content))

    return behave


def half(handler, request, number):
    """Half a body, and the connection is closed."""
    content = good_body(said(request, number))
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


def closed(handler, request, number):
    """No answer at all."""
    handler.connection.shutdown(socket.SHUT_RDWR)
