"""What the tests of gs:// share that is no fixture: what is in a bucket, and conversions in processes of their own."""

import multiprocessing
import os
from pathlib import Path

from converting import TIME_STAMPED
from gcs_server import Gcs

from converter.bucket import CLAIM
from converter.bucket_store import COMMIT
from oss_model import buckets

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["orbax.checkpoint", "converter.conversion", "google.cloud.storage", "google_crc32c"])


def fill(gcs: Gcs, prefix: str, directory: Path) -> str:
    """Copy a directory to the bucket, as `gcloud storage cp -r` does. Its address."""
    for path in directory.rglob("*"):
        if path.is_file():
            gcs.put(f"{prefix}/{path.relative_to(directory).as_posix()}", path.read_bytes())
    return f"gs://{gcs.bucket}/{prefix}"


def stored(gcs: Gcs, prefix: str) -> dict[str, bytes]:
    """What `converting.contents` says of a directory, of a finished checkpoint in a bucket."""
    files = gcs.files(prefix)
    assert files.pop(COMMIT).startswith(b"Checkpoint commit was successful")
    assert CLAIM not in files
    assert files.keys() >= TIME_STAMPED
    return {name: data for name, data in files.items() if name not in TIME_STAMPED}


def begin(gcs: Gcs, *arguments: object, **options: object):
    """`converter.convert`, in a process of its own, which exits as the command does."""
    process = _context.Process(target=_convert, args=(gcs.environment, arguments, options))
    process.start()
    return process


def _convert(environment: dict[str, str], arguments: tuple, options: dict) -> None:
    os.environ.update(environment)
    buckets.WAIT_SECONDS = 0.001
    from converter import convert
    from oss_model.exits import run_command

    with open(options.pop("said", os.devnull), "a") as said:
        os.dup2(said.fileno(), 2)

        def run() -> None:
            result = convert(*arguments, **options)
            print(f"{result.status}; {'; '.join(result.notes)}", file=said, flush=True)

        code = run_command(run)
    os._exit(code)
