"""The command: `python -m espl_jax.environments.retrievers.serve --passages=wiki.jsonl --port=8000`.

One index for several hosts, by the protocol that `SearchServer` speaks, at http://host:port/retrieve.
"""

from __future__ import annotations

import argparse
import http.server
import json
import sys

from espl_jax.environments.retrievers.load import Bm25, RetrievalError
from espl_jax.storage import json_values


def make_server(bm25: Bm25, host: str = "127.0.0.1", port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server that is listening (port 0: at a free one, its `server_port`); call its `serve_forever`."""

    class Retrieve(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            try:
                status, answer = 200, {"result": _results(bm25, json_values.parse(body))}
            except RetrievalError as error:
                status, answer = 500, {"detail": str(error)}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                status, answer = 400, {"detail": f"{type(error).__name__}: {error}"}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return http.server.ThreadingHTTPServer((host, port), Retrieve)


def _results(bm25: Bm25, request: dict) -> list[list[dict]]:
    def item(number: int, score: float) -> dict:
        passage = bm25.passage(number)
        document = {"id": str(number), "contents": f'"{passage.title}"\n{passage.text}'}
        return {"document": document, "score": score} if request.get("return_scores") else document

    count = request.get("topk") or 3
    return [[item(*found) for found in bm25.rank(query, count)] for query in request["queries"]]


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description="Serves BM25 over a file of passages at /retrieve.")
    parser.add_argument("--passages", required=True, help="file of passages (.jsonl)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all interfaces"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 picks a free one")
    args = parser.parse_args()
    try:
        server = make_server(Bm25.open(args.passages), args.host, args.port)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"http://{args.host}:{server.server_port}/retrieve", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
