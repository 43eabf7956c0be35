"""A server that speaks what huggingface_hub asks of the Hugging Face hub to download and upload, with faults on demand."""

import base64
import hashlib
import json
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = tuple[int, dict[str, str], bytes]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """One repository, at one commit.

    Attributes:
      url: for HF_ENDPOINT.
      files: path in the repository -> content.
      busy: how many of the next downloads of a file are answered by 503.
      cut: how many of them stop in the middle.
      lies: files whose length is said to be a byte more than it is.
      token: that must come with each request; None: none.
      asked: paths of files that were downloaded -> how often.
      made: repositories that were made -> what was said of them.
      pushed: path -> content, of the last commit; large files go to `stored`, by their hash, before.
      refused: the status by which the next uploads of large files are answered, and how many of them.
      says: makes of "info", "tree", or the method and name of a file, with status, headers and content of a good answer, what
        is answered instead; bytes are sent as they are, as the whole of it.
    """

    def __init__(self, directories: dict[str, Path], repository: str = "openai/gpt-oss-20b"):
        self.repository, self.token = repository, None
        self.files = {
            f"{prefix}{path.relative_to(directory).as_posix()}": path.read_bytes()
            for prefix, directory in directories.items()
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        self.busy = self.cut = 0
        self.lies: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.made: dict[str, dict] = {}
        self.pushed: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.refused = (503, 0)
        self.says: Callable[[str, Answer], Answer | bytes] = lambda kind, answer: answer
        hub = self

        class Handler(_Handler):
            served = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def constants(self) -> dict[str, str]:
        """Those of huggingface_hub, where it is imported already: it reads its environment once."""
        return {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}"}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        hub, path = self.served, urllib.parse.unquote(self.path.partition("?")[0])
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            said = json.loads(data)
            name = f"{said.get('organization', 'me')}/{said['name']}"
            if name in hub.made:
                return self._json({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
            hub.made[name] = said
            return self._json({"url": f"{hub.url}/{name}", "id": name})
        if path == "/api/validate-yaml":  # of a model card
            return self._json({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = json.loads(data)["files"]
            large = {file["path"]: "lfs" if file["size"] > 10_000 else "regular" for file in files}
            kinds = [{"path": name, "uploadMode": how, "shouldIgnore": False} for name, how in large.items()]
            return self._json({"files": kinds})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            for one in objects:
                if one["oid"] not in hub.stored:
                    one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}
            return self._json({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            lines = [json.loads(line) for line in data.splitlines()]
            values = [(line["key"], line["value"]) for line in lines]
            hub.pushed = {v["path"]: base64.b64decode(v["content"]) for key, v in values if key == "file"}
            hub.pushed |= {v["path"]: hub.stored[v["oid"]] for key, v in values if key == "lfsFile"}
            return self._json({"commitOid": COMMIT, "commitUrl": f"{hub.url}/me/x/commit/{COMMIT}", "pullRequestUrl": None})
        return self._send(404, b"{}")

    def do_PUT(self) -> None:
        hub, data = self.served, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, left = hub.refused
        if left:
            hub.refused = (status, left - 1)
            return self._send(status, b"no")
        hub.stored[self.path.rpartition("/")[2]] = data
        return self._send(200, b"")

    def _json(self, found: dict, status: int = 200) -> None:
        self._send(status, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _answer(self, body: bool) -> None:
        hub, path = self.served, urllib.parse.unquote(self.path.partition("?")[0])
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        api, resolve = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
        if not path.startswith((api, resolve)):
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            return self._says("info", json.dumps({"id": hub.repository, "sha": COMMIT, "siblings": []}).encode())
        if path.startswith(f"{api}/revision/"):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith(f"{api}/tree/"):
            found = [{"type": "file", "path": name, "size": len(data), "oid": _id(data)} for name, data in hub.files.items()]
            return self._says("tree", json.dumps(found).encode())
        return self._file(path.removeprefix(resolve).partition("/")[2], body)

    def _file(self, name: str, body: bool) -> None:
        hub = self.served
        data = hub.files.get(name)
        if data is None:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_id(data)}"', "Accept-Ranges": "bytes"}
        if not body:
            return self._says(f"HEAD {name}", b"", headers | {"Content-Length": str(len(data) + (name in hub.lies))})
        hub.asked[name] += 1
        if hub.busy:
            hub.busy -= 1
            return self._send(503, b"busy")
        start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]) if "Range" in self.headers else 0
        rest = data[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if hub.cut and len(rest) > 10:
            hub.cut -= 1
            self._send(206 if start else 200, rest[: len(rest) // 2], headers | {"Content-Length": str(len(rest))})
            self.close_connection = True
            self.connection.close()
            return None
        return self._says(f"GET {name}", rest, headers, 206 if start else 200)

    def _says(self, kind: str, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        said = self.served.says(kind, (status, headers or {}, data))
        if not isinstance(said, bytes):
            return self._send(said[0], said[2], said[1])
        self.close_connection = True
        self.wfile.write(said)
        return None

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


def _id(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
