"""A server that speaks what is asked of Google Cloud Storage here, in its JSON API, with faults on demand.

By google-cloud-storage, gcsfs and tensorstore: objects with generations, preconditions, CRC-32C and metadata; uploads in one
piece, in two parts, and resumable; ranges; lists with prefix and delimiter. The emulators that PyPI has know no preconditions,
which are what conversions to a bucket stand on.

    python tests/gcs_server.py          prints its address, and serves until it is ended
"""

import base64
import contextlib
import email.parser
import email.policy
import itertools
import json
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import google_crc32c

PAGE = 1000  # names that a list has at the most, as the service's
QUANTUM = 256 << 10  # of a resumable upload that breaks off, whole ones of these are kept


class Object(NamedTuple):
    data: bytes
    generation: int
    metadata: dict[str, str]
    crc32c: str  # of `data`, as JSON has it

    def said(self, bucket: str, name: str) -> dict[str, Any]:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.generation / 1e6))
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self.generation}",
            "bucket": bucket,
            "name": name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metageneration": "1",
            "crc32c": self.crc32c,
            "etag": f"e{self.generation}",
            "timeCreated": stamp,
            "updated": stamp,
            "storageClass": "STANDARD",
            "contentType": "application/octet-stream",
        } | ({"metadata": self.metadata} if self.metadata else {})


class Session(NamedTuple):
    """A resumable upload."""

    name: str
    about: dict[str, Any]
    wanted: str | None  # ifGenerationMatch
    data: bytearray


class Gcs:
    """One bucket.

    Attributes:
      url: for STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL.
      objects: name -> object.
      fails: the statuses by which the next requests are answered.
      cut_uploads, cut_downloads: how many of the next break off in the middle.
      spoilt_uploads, spoilt_downloads: of how many of the next a byte arrives as another.
      lost_answers: how many of the next uploads are stored, and the connection breaks before that is said.
      forbidden: whether everything is.
      wrote: names of the objects that were uploaded -> how often.
      asked: "METHOD kind" -> how often.
      before, after: called with a name when it is about to be stored, and once it is.
    """

    def __init__(self, bucket: str = "bucket"):
        self.bucket = bucket
        self.objects: dict[str, Object] = {}
        self.sessions: dict[str, Session] = {}
        self.ended: dict[str, tuple[int, dict[str, Any]]] = {}
        self.fails: list[int] = []
        self.cut_uploads = self.cut_downloads = self.spoilt_uploads = self.spoilt_downloads = self.lost_answers = 0
        self.forbidden = False
        self.wrote: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.before: Callable[[str], None] = lambda name: None
        self.after: Callable[[str], None] = lambda name: None
        self.lock = threading.Lock()
        self._numbers = itertools.count(time.time_ns() // 1000)
        gcs = self

        class Handler(_Handler):
            served = gcs

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address) -> None:
                """Clients are killed in the middle of what they say."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """By which google-cloud-storage, gcsfs and tensorstore come here, and ask nobody else for a token."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, prefix: str) -> dict[str, bytes]:
        """What is below a prefix, as a directory would have it."""
        below = f"{prefix}/"
        return {name.removeprefix(below): o.data for name, o in self.objects.items() if name.startswith(below)}

    def put(self, name: str, data: bytes, metadata: dict[str, str] | None = None) -> Object:
        stored = Object(data, next(self._numbers), metadata or {}, _crc32c(data))
        self.objects[name] = stored
        return stored

    def store(self, name: str, data: bytes, about: dict[str, Any], wanted: str | None) -> tuple[int, dict[str, Any]]:
        """Store an object, under the precondition `wanted`. The status, and what is answered."""
        self.before(name)
        with self.lock:
            if not self._is_met(name, wanted):
                return 412, _error(412, "At least one of the pre-conditions you specified did not hold.")
            if self.spoilt_uploads and len(data) > 10:
                self.spoilt_uploads -= 1
                data = _spoilt(data)
            said = about.get("crc32c")
            if said is not None and said != _crc32c(data):
                return 400, _error(400, f"Provided CRC32C {said!r} doesn't match calculated CRC32C {_crc32c(data)!r}.")
            self.wrote[name] += 1
            found = self.put(name, data, about.get("metadata")).said(self.bucket, name)
        self.after(name)
        return 200, found

    def remove(self, name: str, wanted: str | None) -> tuple[int, dict[str, Any]]:
        with self.lock:
            if name not in self.objects:
                return 404, _error(404, f"No such object: {self.bucket}/{name}")
            if not self._is_met(name, wanted):
                return 412, _error(412, "At least one of the pre-conditions you specified did not hold.")
            del self.objects[name]
        return 204, {}

    def _is_met(self, name: str, wanted: str | None) -> bool:
        there = self.objects[name].generation if name in self.objects else 0
        return wanted is None or int(wanted) == there

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after, first, last = query.get("pageToken", ""), query.get("startOffset", ""), query.get("endOffset", "")
        items: list[dict] = []
        prefixes: set[str] = set()
        most, found = min(int(query.get("maxResults", PAGE)), PAGE), ""
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name <= after or name < first or (last and name >= last):
                continue
            rest = name.removeprefix(prefix)
            group = prefix + rest.partition(delimiter)[0] + delimiter if delimiter and delimiter in rest else None
            if group is not None and (group in prefixes or group <= after):
                found = name
                continue
            if len(items) + len(prefixes) == most:
                return {"items": items, "prefixes": sorted(prefixes), "nextPageToken": found}
            if group is None:
                items.append(self.objects[name].said(self.bucket, name))
            else:
                prefixes.add(group)
            found = name
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class _Handler(BaseHTTPRequestHandler):
    served: Gcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    rbufsize = wbufsize = 1 << 20

    def log_message(self, format: str, *args) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        gcs, parts = self.served, urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        kind = next((kind for kind in ("upload", "download", "batch") if parts.path.startswith(f"/{kind}/")), "api")
        gcs.asked[f"{self.command} {kind}"] += 1
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "upload" and length > 10 and gcs.cut_uploads:
            return self._cut_upload(query, length)
        data = self.rfile.read(length) if "chunked" not in self.headers.get("Transfer-Encoding", "") else self._chunks()
        if len(data) < length:  # whoever sent it has gone
            self.close_connection = True
            return None
        if gcs.fails:
            status = gcs.fails.pop(0)
            return self._json(status, _error(status, "try again"))
        if gcs.forbidden:
            return self._json(403, _error(403, "nobody does not have storage.objects.get access to the bucket."))
        _, _, rest = parts.path.partition("/storage/v1/b/")
        bucket, _, name = rest.partition("/o/") if "/o/" in rest else (rest.removesuffix("/o"), "", "")
        if bucket != gcs.bucket:
            return self._json(404, _error(404, "The specified bucket does not exist."))
        if kind == "upload":
            return self._upload(query, data)
        if self.command == "DELETE":
            status, found = gcs.remove(urllib.parse.unquote(name), query.get("ifGenerationMatch"))
            return self._json(status, found)
        if name:
            return self._object(urllib.parse.unquote(name), query)
        return self._json(200, gcs.list(query) if rest.endswith("/o") else {"kind": "storage#bucket", "name": bucket})

    def _chunks(self) -> bytes:
        found = b""
        while length := int(self.rfile.readline(), 16):
            found += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _upload(self, query: dict[str, str], data: bytes) -> None:
        gcs, how, wanted = self.served, query.get("uploadType"), query.get("ifGenerationMatch")
        if "upload_id" in query:
            return self._go_on(query["upload_id"], data)
        if how == "resumable":
            about = json.loads(data or b"{}")
            number = str(next(gcs._numbers))
            gcs.sessions[number] = Session(query.get("name") or about["name"], about, wanted, bytearray())
            where = f"{gcs.url}/upload/storage/v1/b/{gcs.bucket}/o?uploadType=resumable&upload_id={number}"
            return self._json(200, {}, {"Location": where, "X-GUploader-UploadID": number})
        about: dict[str, Any] = {}
        if how == "multipart":
            about, data = _parts(self.headers["Content-Type"], data)
        return self._json(*self._stored(query.get("name") or about["name"], data, about, wanted))

    def _go_on(self, number: str, data: bytes) -> None:
        """The next part of a resumable upload, or the question how much of it is there."""
        if number in self.served.ended:
            return self._json(*self.served.ended[number])
        session = self.served.sessions[number]
        span, _, total = self.headers["Content-Range"].removeprefix("bytes ").partition("/")
        if span != "*":
            session.data[int(span.partition("-")[0]) :] = data
        if total != "*" and len(session.data) == int(total):
            del self.served.sessions[number]
            answer = self._stored(session.name, bytes(session.data), session.about, session.wanted)
            self.served.ended[number] = answer  # whoever has not heard it asks again
            return self._json(*answer)
        there = {"Range": f"bytes=0-{len(session.data) - 1}"} if session.data else {}
        return self._json(308, {}, there)

    def _stored(self, name: str, data: bytes, about: dict, wanted: str | None) -> tuple[int, dict[str, Any]]:
        gcs = self.served
        status, found = gcs.store(name, data, about, wanted)
        if status == 200 and gcs.lost_answers:
            gcs.lost_answers -= 1
            self._break_off()
        return status, found

    def _cut_upload(self, query: dict[str, str], length: int) -> None:
        gcs = self.served
        gcs.cut_uploads -= 1
        data = self.rfile.read(length // 2)
        if "upload_id" in query:
            session = gcs.sessions[query["upload_id"]]
            start = int(self.headers["Content-Range"].removeprefix("bytes ").partition("-")[0])
            session.data[start:] = data[: len(data) // QUANTUM * QUANTUM]
        self._break_off()

    def _break_off(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def _object(self, name: str, query: dict[str, str]) -> None:
        gcs = self.served
        found = gcs.objects.get(name)
        if found is None or ("generation" in query and int(query["generation"]) != found.generation):
            return self._json(404, _error(404, f"No such object: {gcs.bucket}/{name}"))
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != found.generation:
            return self._json(412, _error(412, "At least one of the pre-conditions you specified did not hold."))
        if query.get("alt") != "media":
            return self._json(200, found.said(gcs.bucket, name))
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == found.generation:
            return self._send(304, b"", {})
        data, status = found.data, 200
        number = str(found.generation)
        headers = {"X-Goog-Hash": f"crc32c={found.crc32c}", "X-Goog-Generation": number, "ETag": f"e{number}"}
        headers |= {"X-Goog-Stored-Content-Length": str(len(data)), "X-Goog-Stored-Content-Encoding": "identity"}
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(int(last) + 1, len(data)) if last and first else len(data)
            if start >= len(data):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if gcs.spoilt_downloads and len(data) > 10:
            gcs.spoilt_downloads -= 1
            data = _spoilt(data)
        if gcs.cut_downloads and len(data) > 10:
            gcs.cut_downloads -= 1
            self._send(status, data[: len(data) // 2], headers | {"Content-Length": str(len(data))})
            return self._break_off()
        return self._send(status, data, headers)

    def _json(self, status: int, found: dict, headers: dict[str, str] | None = None) -> None:
        data = b"" if status == 204 else json.dumps(found).encode()
        self._send(status, data, {"Content-Type": "application/json; charset=UTF-8"} | (headers or {}))

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


def _parts(kind: str, data: bytes) -> tuple[dict[str, Any], bytes]:
    """JSON and content of an upload in two parts."""
    message = email.parser.HeaderParser(policy=email.policy.HTTP).parsestr(f"Content-Type: {kind}\r\n\r\n")
    mark = b"--" + str(message.get_param("boundary")).encode()
    _, first, rest = data.split(mark, 2)
    content = rest[: rest.rindex(mark)]
    line = b"\r\n" if first.startswith(b"\r\n") else b"\n"  # gcsfs has the latter
    return json.loads(first.partition(line * 2)[2]), content.removesuffix(line).partition(line * 2)[2]


def _crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def _spoilt(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"code": status, "message": message, "errors": [{"message": message, "reason": "x"}]}}


if __name__ == "__main__":
    print(Gcs().url, flush=True)
    sys.stdin.read()
