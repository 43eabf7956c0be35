"""Objects of Google Cloud Storage where a path is expected, gs://BUCKET/NAME, by way of google-cloud-storage (`[gs]`).

The library finds credentials, tries again what may pass (429, 5xx, a broken connection; with growing pauses, for
RETRY_SECONDS at the most), goes on with uploads and downloads that were cut, and compares checksums. Here is what its answers
mean: a missing object is a `FileNotFoundError`, what a person has to mend an `InputError`, what may pass later `Incomplete`.

Nothing is ever written but under a precondition: the generation that the object has, or that there is none (`write`).
STORAGE_EMULATOR_HOST is honoured.
"""

import base64
import contextlib
import errno
import fnmatch
import io
import os
import pathlib
import stat
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from oss_model.errors import Incomplete, InputError, local_path

SCHEME = "gs:"
RETRY_SECONDS = 120.0
WAIT_SECONDS = 1.0  # before the second try, twice as long before each after it
TRIES = 3  # of an upload that arrives as something else
STREAMS = 16  # requests at a time: one alone gets a small part of what the service gives
FETCH_BYTES = 16 << 20  # read in one request, of what is read in small pieces

_thread = threading.local()


class GsPath(pathlib.PosixPath):
    """gs://BUCKET/NAME, to be read like any path. What is written goes through `write`, and by no method of `Path`.

    A directory is a prefix that some object has. Other methods than those below ask the disk, where there is no such file.
    """

    def __str__(self) -> str:
        return "gs://" + "/".join(self.parts[1:]) if self.parts[:1] == (SCHEME,) else super().__str__()

    def __fspath__(self) -> str:
        return str(self)

    def as_posix(self) -> str:
        return str(self)

    @property
    def bucket(self) -> str:
        return "".join(self.parts[1:2])

    @property
    def key(self) -> str:
        """The object's name in its bucket."""
        return "/".join(self.parts[2:])

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> "GsPath":
        return self

    def resolve(self, strict: bool = False) -> "GsPath":
        return self

    def exists(self, **options: Any) -> bool:
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        return False

    def is_file(self, **options: Any) -> bool:
        return bool(self.key) and found(self) is not None

    def is_dir(self, **options: Any) -> bool:
        return bool(self.bucket) and any(True for _ in _listed(self, most=1))

    def stat(self, **options: Any) -> os.stat_result:
        """Of an object: its size, and for its time the generation, which is another whenever it is written."""
        there = found(self)
        if there is None:
            raise _missing(self)
        return os.stat_result((stat.S_IFREG, 0, 0, 0, 0, 0, there.size, 0, 0, 0), {"st_mtime_ns": there.generation})

    def iterdir(self) -> Iterator["GsPath"]:
        with _explained(self):
            listing = _listed(self, delimiter="/")
            names = [blob.name for blob in listing]
            names += [prefix.rstrip("/") for prefix in listing.prefixes]
        below = f"{self.key}/" if self.key else ""
        return (self / name.removeprefix(below) for name in sorted(names) if name != below)

    def glob(self, pattern: str, **options: Any) -> Iterator["GsPath"]:  # type: ignore[override]
        depth = pattern.count("/")
        if not depth:
            return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))
        names = sorted({"/".join(name.split("/")[: depth + 1]) for name in listed(self) if name.count("/") >= depth})
        parts = pattern.split("/")
        return (self / n for n in names if all(map(fnmatch.fnmatchcase, n.split("/"), parts)))

    def rglob(self, pattern: str, **options: Any) -> Iterator["GsPath"]:  # type: ignore[override]
        """Objects alone."""
        names = sorted(listed(self))
        return (self / name for name in names if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern))

    def read_bytes(self) -> bytes:
        return read(self)

    def read_text(self, encoding: str | None = None, errors: str | None = None, **options: Any) -> str:
        return read(self).decode(encoding or "utf-8", errors or "strict")


def path_of(text: str | os.PathLike) -> pathlib.Path:
    """What is meant by a path that is read, or that a checkpoint is written to: on the disk, or gs://BUCKET/NAME.

    Raises:
      InputError: for an address of another kind, or one without a bucket.
    """
    address = os.fspath(text)
    if not address.startswith(f"{SCHEME}/"):
        return local_path(text)
    path = GsPath(address)
    if not path.bucket:
        raise InputError(f"{address}: expected gs://BUCKET/NAME, found no bucket in it")
    return path


def stored_at(directory: pathlib.Path) -> dict[str, Any]:
    """What tensorstore calls a place: the specification of a key-value store."""
    if isinstance(directory, GsPath):
        return {"driver": "gcs", "bucket": directory.bucket, "path": f"{directory.key}/"}
    return {"driver": "file", "path": f"{directory}/"}


class Object(NamedTuple):
    """What the bucket says of an object.

    Attributes:
      crc32c: of all its bytes, as the service has made it of what it has stored.
      generation: another one whenever it is written.
      metadata: what was noted with it.
    """

    size: int
    crc32c: int
    generation: int
    metadata: dict[str, str]


class Conflict(Exception):
    """Something else is there than what a precondition says."""

    def __init__(self, path: GsPath):
        super().__init__(f"{path}: written by somebody else meanwhile")
        self.path = path


# --- reading ------------------------------------------------------------------------------------------------------


def found(path: GsPath) -> Object | None:
    """None where there is no such object."""
    with _explained(path):
        blob = _bucket(path).get_blob(path.key, retry=_retry())
    return None if blob is None else _object(blob)


def listed(path: GsPath) -> dict[str, Object]:
    """Every object below `path`: its name from there on -> what the bucket says of it."""
    below = f"{path.key}/" if path.key else ""
    with _explained(path):
        return {blob.name.removeprefix(below): _object(blob) for blob in _listed(path)}


def read(path: GsPath, offset: int = 0, nbytes: int | None = None, generation: int | None = None) -> bytes:
    """An object, or at most `nbytes` of it from `offset` on.

    Args:
      generation: that it must have still.

    Raises:
      FileNotFoundError: if there is none, or no such generation of it.
      InputError: if it may not be read.
      Incomplete: if the service does not answer.
    """
    from google.api_core.exceptions import RequestRangeNotSatisfiable
    from google.cloud.storage.exceptions import DataCorruption

    part = {} if nbytes is None else {"start": offset, "end": offset + nbytes - 1}
    for _ in range(TRIES):
        taken = _Taken()
        with _explained(path), contextlib.suppress(DataCorruption):
            try:
                _bucket(path).blob(path.key, generation=generation).download_to_file(
                    taken, **part, raw_download=True, single_shot_download=True, checksum="crc32c", retry=_retry()
                )
            except RequestRangeNotSatisfiable:  # it ends before
                return b""
            return taken.data
    raise Incomplete(
        f"{path}: arrived {TRIES} times as something else than what is stored, by its CRC-32C; see that this machine and its"
        " network are in order, and run the same command again"
    )


class _Taken(io.RawIOBase):
    """Keeps what is written to it, in one piece, without a copy."""

    data = b""

    def write(self, data: Any) -> int:
        self.data = data
        return len(data)


# --- writing ------------------------------------------------------------------------------------------------------


def write(path: GsPath, data: bytes, *, generation: int = 0, metadata: Mapping[str, str] | None = None) -> Object:
    """Store an object in place of its `generation`; 0: where there is none. What is there afterwards.

    The service compares what arrives with the CRC-32C that is sent along. An object that is there already with the same
    bytes and the same metadata is as good: it may be this one, whose answer was lost.

    Raises:
      Conflict: if another object is there.
      InputError: if nobody may write there.
      Incomplete: if the service does not answer, or what arrives is something else again and again.
    """
    from google.api_core.exceptions import BadRequest
    from google.cloud.storage.exceptions import DataCorruption

    crc = crc32c(data)
    for attempt in range(TRIES):
        blob = _bucket(path).blob(path.key)
        blob.metadata, blob.crc32c = dict(metadata or {}) or None, _text(crc)
        try:
            with _explained(path):
                blob.upload_from_file(
                    io.BytesIO(data), size=len(data), if_generation_match=generation, checksum="crc32c", retry=_retry(),
                    content_type="application/octet-stream",
                )  # fmt: skip
            return _object(blob)
        except Conflict:
            there = found(path)
            if there is None or (there.size, there.crc32c, there.metadata) != (len(data), crc, dict(metadata or {})):
                raise
            return there
        except (BadRequest, DataCorruption) as error:
            if isinstance(error, BadRequest) and "CRC32C" not in str(error):
                raise InputError(f"{path}: the service refuses it ({reason(error)}); give another name") from None
            if attempt == TRIES - 1:
                raise Incomplete(
                    f"{path}: arrived {TRIES} times as something else than what was sent, by its CRC-32C; see that this machine"
                    " and its network are in order: what is written is kept, and the same command resumes"
                ) from None
    raise AssertionError("the last attempt returns or raises")


def delete(path: GsPath, generation: int) -> None:
    """Remove that generation of an object, where it is there still."""
    with contextlib.suppress(FileNotFoundError, Conflict), _explained(path):
        _bucket(path).blob(path.key).delete(if_generation_match=generation, retry=_retry())


def crc32c(data: bytes) -> int:
    import google_crc32c

    return google_crc32c.value(data)


# --- the library --------------------------------------------------------------------------------------------------


def need(path: GsPath) -> None:
    """
    Raises:
      InputError: if google-cloud-storage is not installed.
    """
    try:
        import google.cloud.storage  # noqa: F401
    except ImportError:
        raise InputError(
            f"{path}: gs:// takes google-cloud-storage, which is not installed (`pip install '.[gs]'`); or copy by"
            " `gcloud storage cp -r`, and give the directory"
        ) from None


def _bucket(path: GsPath) -> Any:
    """By a client of this thread's own: the sessions below them are not for several."""
    client = getattr(_thread, "client", None)
    if client is None:
        need(path)
        from google.cloud import storage

        with _explained(path):
            client = _thread.client = storage.Client()
    return client.bucket(path.bucket)


def _listed(path: GsPath, delimiter: str | None = None, most: int | None = None) -> Any:
    bucket, below = _bucket(path), f"{path.key}/" if path.key else ""
    with _explained(path):
        pages = bucket.list_blobs(
            prefix=below, delimiter=delimiter, max_results=most, retry=_retry(),
            fields="items(name,size,crc32c,generation,metadata),prefixes,nextPageToken",
        )  # fmt: skip
        return _Pages(list(pages), set(pages.prefixes))


class _Pages(list):
    def __init__(self, blobs: list, prefixes: set[str]):
        super().__init__(blobs)
        self.prefixes = prefixes


def _object(blob: Any) -> Object:
    return Object(blob.size, int.from_bytes(base64.b64decode(blob.crc32c or "")), blob.generation, dict(blob.metadata or {}))


def _text(crc: int) -> str:
    """As JSON has it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_delay(initial=WAIT_SECONDS, maximum=32.0, multiplier=2.0).with_timeout(RETRY_SECONDS)


def _missing(path: GsPath) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


@contextlib.contextmanager
def _explained(path: GsPath) -> Iterator[None]:
    """The library's errors as what they are."""
    import requests
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    try:
        yield
    except api.NotFound as error:
        if "bucket does not exist" in str(error):
            raise InputError(f"{path}: expected a bucket, found none called {path.bucket}: is the name right?") from None
        raise _missing(path) from None
    except api.PreconditionFailed:
        raise Conflict(path) from None
    except (api.Forbidden, api.Unauthorized) as error:
        raise InputError(
            f"{path}: permission denied ({reason(error)}); `gcloud auth application-default login`, or ask for permission"
        ) from None
    except auth.TransportError as error:
        raise _gave_up(path, error) from None
    except auth.GoogleAuthError as error:
        raise InputError(
            f"{path}: expected credentials for Google Cloud, found none that are good ({reason(error)});"
            " `gcloud auth application-default login`"
        ) from None
    except (api.RetryError, api.ServerError, api.TooManyRequests, requests.RequestException, InvalidResponse) as error:
        raise _gave_up(path, error) from None
    except ConnectionError as error:
        raise _gave_up(path, error) from None
    except (api.BadRequest, DataCorruption):
        raise
    except api.GoogleAPICallError as error:
        raise InputError(f"{path}: the service refuses it ({reason(error)}); is the name right?") from None


def _gave_up(path: GsPath, error: BaseException) -> Incomplete:
    cause = getattr(error, "cause", None) or error
    return Incomplete(
        f"{path}: the service failed again and again, for {RETRY_SECONDS:.0f} s ({reason(cause)}); what is written is kept:"
        " run the same command again"
    )


def reason(error: BaseException) -> str:
    """What the service says of it, or else its first line, and not all of that."""
    response, text = getattr(error, "response", None), str(getattr(error, "message", None) or error)
    if response is not None:
        try:
            text = f"{response.status_code} {response.json()['error']['message']}"
        except (ValueError, KeyError, TypeError):  # no JSON, or none that is known
            text = f"{response.status_code} {response.reason}"
    return text.strip().partition("\n")[0][:160] or type(error).__name__
