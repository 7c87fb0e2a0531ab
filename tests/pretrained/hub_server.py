"""A hub on this machine: the few addresses of huggingface.co that a download asks for."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")
_FILE = re.compile(r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@contextlib.contextmanager
def serve(repositories, gated=(), refusing_tokens=False, datasets=None):
    """Yields (address, paths asked for).

    Args:
      repositories: `org/name` -> {file name: bytes}; each has one commit, on the branch `main`.
      gated: those whose files are refused.
      refusing_tokens: answer everything as to a wrong token.
      datasets: likewise, of data sets.
    """
    asked = []
    kinds = {"models": repositories, "datasets": datasets or {}}

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            url = urlsplit(self.path)
            path = unquote(url.path)
            asked.append(path)
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if refusing_tokens:
                return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
            if api := _API.fullmatch(path):
                kind, repository, question, revision, name = api.groups()
            elif file := _FILE.fullmatch(path):
                kind, repository, revision, name = file.groups()
                question = "file"
            else:
                return self.answer(404)
            files = kinds[kind or "models"].get(repository)
            if files is None:
                return self.answer(404 if question == "file" else 401, X_Error_Code="RepoNotFound")
            if revision not in (None, "main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if question == "file":
                return self.answer_file(repository, files, name)
            if question == "tree":
                recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
                return self.answer_json(_tree(files, name, recursive))
            if question == "paths-info":
                return self.answer_json(_paths_info(files, parse_qs(sent.decode()).get("paths", [])))
            return self.answer_json({"id": repository, "sha": COMMIT, "siblings": []})

        def answer_file(self, repository, files, name):
            if repository in gated:
                return self.answer(403, X_Error_Code="GatedRepo")
            if name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound")
            etag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(200, files[name], X_Repo_Commit=COMMIT, ETag=f'"{etag}"')

        def answer_json(self, value):
            if value is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            return self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        do_HEAD = do_POST = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _entry(name, content):
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _folder(name):
    return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}


def _tree(files, folder, recursive):
    """What is in a folder, or None if there is no such folder."""
    start = f"{folder}/" if folder else ""
    inside = {name: content for name, content in files.items() if name.startswith(start)}
    if not inside and folder:
        return None
    depth = start.count("/")
    parents = {"/".join(name.split("/")[: depth + 1]) for name in inside if name.count("/") > depth}
    shown = {name: content for name, content in inside.items() if recursive or name.count("/") == depth}
    return [*map(_folder, sorted(parents)), *(_entry(*file) for file in shown.items())]


def _paths_info(files, paths):
    entries = [_entry(path, files[path]) for path in paths if path in files]
    folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
    return entries + [_folder(path) for path in folders]
