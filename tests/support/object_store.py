"""A local server for the part of the Google Cloud Storage API that gcsfs and tensorstore use.

https://docs.cloud.google.com/storage/docs/json_api. Every change of an object is one step of a history, so
that tests can go back to what a kill between any two of them would have left.
"""

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

OBJECT = r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)"


class ObjectStore:
    """Buckets in memory: any bucket is there, and empty at first.

    Attributes:
      url: of the server.
      history: every change in order: (bucket/name, content), None for a removal.
      uploads: the contents so far of those in parts, by bucket/name.
      fails: called with a method, a bucket/name and what is written; true where the request is to fail.
    """

    def __init__(self):
        self.history = []
        self.fails = lambda method, name, content: False
        self.uploads = {}
        self._objects = {}
        self._lock = threading.Lock()
        store = self

        class Handler(_Handler):
            objects = store

        self._server = _Server(("localhost", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://localhost:{self._server.server_port}"

    @contextlib.contextmanager
    def serving(self):
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def environment(self):
        """Returns environment variables that point gcsfs and tensorstore here, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "FSSPEC_GCS_TOKEN": "anon",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def read(self, name):
        """The content of bucket/name, or None."""
        with self._lock:
            return self._objects.get(name, (None, 0))[0]

    def names(self, prefix=""):
        """All bucket/name that begin so, sorted."""
        with self._lock:
            return sorted(name for name in self._objects if name.startswith(prefix))

    def change(self, name, content, expected=None):
        """Writes an object, or removes it; returns its generation, 0 where the expected one was not there."""
        with self._lock:
            generation = self._objects.get(name, (None, 0))[1]
            if expected is not None and expected != generation:
                return 0
            self.history.append((name, content))
            if content is None:
                self._objects.pop(name, None)
            else:
                self._objects[name] = (content, len(self.history))
            return len(self.history)

    def copy_history(self, bucket, steps, to):
        """Creates a bucket with the state of another after its first `steps` changes."""
        changes = [(name, x) for name, x in self.history if name.startswith(f"{bucket}/")]
        for name, content in changes[:steps]:
            self.change(to + name.removeprefix(bucket), content)

    def describe(self, name):
        """The resource of an object, or None."""
        with self._lock:
            if name not in self._objects:
                return None
            content, generation = self._objects[name]
        bucket, _, key = name.partition("/")
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": key,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # clients end while an answer is under way
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    objects: ObjectStore
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        path, query = self._asked()
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", path):
            self._json(self._listing(match[1], query))
        elif match := re.fullmatch(OBJECT, path):
            name = f"{match[1]}/{unquote(match[2])}"
            if self.objects.fails("GET", name, None):
                return self._answer(403)
            found = self.objects.describe(name)
            if found is None:
                return self._answer(404)
            if query.get("ifGenerationNotMatch") == found["generation"]:
                return self._answer(304)
            if query.get("alt") == "media":
                self._media(name, found)
            else:
                self._json(found)
        elif re.fullmatch(r"/storage/v1/b/[^/]+", path):
            self._json({"name": path.rpartition("/")[2]})
        else:
            self._answer(501)

    def do_POST(self):
        path, query = self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/batch/storage/v1":
            return self._batch(body)
        if path == "/resumable":
            return self._resumed(query["object"], body)
        match = re.fullmatch(r"/(?:upload|resumable/upload)/storage/v1/b/([^/]+)/o", path)
        if not match:
            return self._answer(501)
        if query["uploadType"] == "multipart":
            boundary = re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"])[1].encode()
            _, described, content, _ = body.split(b"--" + boundary)
            query["name"] = json.loads(re.split(rb"\r?\n\r?\n", described, maxsplit=1)[1])["name"]
            body = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r")
        elif query["uploadType"] == "resumable":
            query["name"] = json.loads(body)["name"]
        name = f"{match[1]}/{query['name']}"
        if query["uploadType"] == "resumable":
            where = f"{self.objects.url}/resumable?{urlencode({'object': name})}"
            self.objects.uploads[name] = b""
            return self._answer(200, b"", {"Location": where})
        if self.objects.fails("POST", name, body):
            return self._answer(403)
        expected = query.get("ifGenerationMatch")
        if not self.objects.change(name, body, None if expected is None else int(expected)):
            return self._answer(412)
        self._json(self.objects.describe(name))

    def _resumed(self, name, part):
        # A part of a resumable upload: "bytes a-b/total", where the last part alone knows the total.
        self.objects.uploads[name] += part
        if self.headers["Content-Range"].endswith("/*"):
            done = len(self.objects.uploads[name])
            return self._answer(308, b"", {"Range": f"bytes=0-{done - 1}"})
        body = self.objects.uploads.pop(name)
        if self.objects.fails("POST", name, body):
            return self._answer(403)
        self.objects.change(name, body)
        self._json(self.objects.describe(name))

    def do_DELETE(self):
        path, query = self._asked()
        match = re.fullmatch(OBJECT, path)
        self._answer(self._delete(f"{match[1]}/{unquote(match[2])}", query.get("ifGenerationMatch")))

    def _delete(self, name, expected=None):
        if self.objects.fails("DELETE", name, None):
            return 403
        if self.objects.describe(name) is None:
            return 404
        return 204 if self.objects.change(name, None, None if expected is None else int(expected)) else 412

    def _batch(self, body):
        # gcsfs sends many removals as one request and reads the status of each from the answer.
        parts = []
        for bucket, key in re.findall(rb"DELETE /storage/v1/b/([^/]+)/o/(\S+) HTTP", body):
            code = self._delete(f"{bucket.decode()}/{unquote(key.decode())}")
            parts.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {code} x\r\n\r\n{{}}\r\n")
        content = "".join(parts) + "--part--"
        self._answer(200, content.encode(), {"Content-Type": "multipart/mixed; boundary=part"})

    def _listing(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in self.objects.names(f"{bucket}/{prefix}"):
            key = name.removeprefix(f"{bucket}/")
            if key < query.get("startOffset", "") or ("endOffset" in query and key >= query["endOffset"]):
                continue
            head, cut, _ = key[len(prefix) :].partition(delimiter or "\0")
            if delimiter and cut:
                prefixes.add(prefix + head + delimiter)
            elif found := self.objects.describe(name):
                items.append(found)
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _media(self, name, found):
        content = self.objects.read(name) or b""
        headers = {"x-goog-generation": found["generation"], "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._answer(200, content, headers)
        begin, end = int(asked[1]), int(asked[2] or len(content) - 1)
        if begin >= len(content):
            return self._answer(416)
        part = content[begin : end + 1]
        place = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
        self._answer(206, part, {**headers, "Content-Range": place})

    def _asked(self):
        split = urlsplit(self.path)
        return split.path, dict(parse_qsl(split.query))

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code, content=b"", headers=None):
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
