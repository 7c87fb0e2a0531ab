"""A hub on this machine: the few addresses of huggingface.co that a download asks for."""

import contextlib
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(repositories, gated=(), refusing_tokens=False):
    """Yields (address, paths asked for).

    Args:
      repositories: `org/name` -> {file name: bytes}; each has one commit, on the branch `main`.
      gated: those whose files are refused.
      refusing_tokens: answer everything as to a wrong token.
    """
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            if refusing_tokens:
                return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
            is_api = path.startswith("/api/models/")
            repository, _, rest = (
                path.removeprefix("/api/models")
                .strip("/")
                .partition({True: "/tree/" if "/tree/" in path else "/revision/", False: "/resolve/"}[is_api])
            )
            files = repositories.get(repository)
            revision, _, name = rest.partition("/")
            if files is None:
                return self.answer(401 if is_api else 404, X_Error_Code="RepoNotFound")
            if revision not in ("main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if "/revision/" in path:
                return self.answer(
                    200, json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode()
                )
            if "/tree/" in path:
                return self.answer(200, json.dumps([_entry(*file) for file in files.items()]).encode())
            if repository in gated:
                return self.answer(403, X_Error_Code="GatedRepo")
            if name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound")
            etag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(200, files[name], X_Repo_Commit=COMMIT, ETag=f'"{etag}"')

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _entry(name, content):
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
