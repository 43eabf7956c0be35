"""Repositories of the Hugging Face hub where a directory is expected, as in `convert-oss openai/gpt-oss-20b DST`.

huggingface_hub downloads, into its own cache: what is there is not downloaded again; HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE
and the token of `hf auth login` are honoured. Only what is needed comes: of one directory of the repository the weights,
configuration and tokenizer, and nothing of `original/` or `metal/` unless that is the directory.
"""

import contextlib
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from oss_model.buckets import path_of
from oss_model.errors import CommandError, Incomplete, InputError, meaning, nothing_at
from oss_model.hub_answers import COMMIT, looked_at, no_hub
from oss_model.terminal import counted

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ("*.safetensors", "*.json", "*.jinja")
TRIES = 5  # of a download that breaks off; the files that are whole are kept
WAIT_SECONDS = 1.0  # before the second, twice as long before each after it
_CACHED = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(?:/(.*))?")


def is_id(text: str) -> bool:
    """Whether this names a repository, and nothing that is here: no directory, nor a place in one that is."""
    return bool(ID.fullmatch(text)) and not Path(text).exists() and not Path(text).parent.is_dir()


def local(text: str | Path, revision: str | None = None, subfolder: str | None = None, download: bool = True) -> Path:
    """The directory that is meant: as given, or that of a repository, in the cache.

    Args:
      text: a path, or OWNER/NAME.
      revision, subfolder: of a repository.
      download: whether what is not in the cache may be downloaded; else that is bad input.

    Raises:
      InputError: if there is no such repository or revision, if it may not be read, or is not in the cache and cannot be
        downloaded; and for `revision` or `subfolder` of what is no repository.
      Incomplete: if the download breaks off again and again, or there is too little room for it.
    """
    text = str(text)
    if not is_id(text):
        asked = [f"--{name}" for name, value in (("revision", revision), ("subfolder", subfolder)) if value is not None]
        if asked:
            raise InputError(f"{', '.join(asked)}: expected SRC to be a hub repository, OWNER/NAME, found {text}; leave it out")
        return path_of(text)
    if subfolder is not None and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", subfolder):
        raise InputError(f"--subfolder: expected a directory in the repository, such as original, found {subfolder!r}")
    need(text)
    return _snapshot(text, revision, subfolder, download)


def need(repository: str) -> None:
    """
    Raises:
      InputError: if huggingface_hub is not installed.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise InputError(
            f"{repository}: expected a directory, found nothing; if it is a repository of the Hugging Face hub, install"
            " huggingface_hub (`pip install '.[hub]'`), or `hf download` it and give the directory" + _or_here(repository)
        ) from None


def origin(directory: Path) -> dict[str, str] | None:
    """{"repository", "commit", "subfolder"} of a directory in the hub's cache; None of any other."""
    found = _CACHED.fullmatch(str(directory))
    if found is None:
        return None
    owner, name, commit, subfolder = found.groups()
    return {"repository": f"{owner}/{name}", "commit": commit} | ({"subfolder": subfolder} if subfolder else {})


def _snapshot(repository: str, revision: str | None, subfolder: str | None, download: bool) -> Path:
    from huggingface_hub import constants, snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    wanted: dict = {
        "repo_id": repository,
        "allow_patterns": [prefix + pattern for pattern in FILES],
        "ignore_patterns": [f"{prefix}*/*"],
    }
    with _explained(repository, revision), looked_at(repository):
        wanted["revision"] = _resolved(repository, revision)
        files = _missing(wanted)
        size = sum(file.file_size or 0 for file in files)
        if files and not download:
            raise InputError(
                f"{repository}: expected its files in the hub's cache for a dry run, found {len(files)} missing,"
                f" {size / 1e9:.2f} GB; `hf download {repository}` brings them"
            )
        if files:
            cache = Path(constants.HF_HUB_CACHE)
            _check_room(cache, size)
            print(f"{repository}: downloading {counted(len(files), 'file')}, {size / 1e9:.2f} GB, to {cache}", file=sys.stderr)
        for attempt in range(TRIES):
            try:
                with quietly():
                    return Path(snapshot_download(**wanted)) / (subfolder or "")
            except Exception as error:
                if attempt == TRIES - 1 or not may_pass(error):
                    raise
                time.sleep(WAIT_SECONDS * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _resolved(repository: str, revision: str | None) -> str:
    """The revision, and its commit with it; that in the cache where the hub does not let us in any more."""
    from huggingface_hub import HfApi, constants, errors

    named = revision or constants.DEFAULT_REVISION
    try:
        found = HfApi().resolve_revision(repository, revision=named)
    except errors.HfHubHTTPError as error:
        if isinstance(error, errors.RevisionNotFoundError):
            raise
        try:
            found = HfApi().resolve_revision(repository, revision=named, local_files_only=True)
        except errors.RevisionResolutionError:
            raise error from None
    if not COMMIT.fullmatch(str(found.resolved)):  # it becomes part of paths
        raise no_hub(repository, f"expected a commit, found {str(found.resolved)[:80]!r}")
    return found


def _missing(wanted: dict) -> list:
    """What would be downloaded; nothing where the hub cannot be asked, which `snapshot_download` then says."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        with quietly():
            return [file for file in snapshot_download(**wanted, dry_run=True) if file.will_download]  # type: ignore[union-attr]
    except DryRunError:
        return []


def _check_room(cache: Path, size: int) -> None:
    place = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise Incomplete(
            f"{cache}: expected {size / 1e9:.2f} GB of free space for the download, found {free / 1e9:.2f} GB; make room,"
            " or set HF_HOME to another place"
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Bars are for terminals."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def may_pass(error: BaseException) -> bool:
    """Whether to try once more: the server is busy, or the connection broke."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code in (408, 429, 500, 502, 503, 504)
    return is_hubs(error)


@contextlib.contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """The hub's errors in a line."""
    from huggingface_hub import errors

    at = f" at {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{repository}: expected a repository that may be read, found one that is gated; ask for access on its page, then"
            " `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{repository}: expected a directory or a hub repository, found neither; one that is private takes `hf auth login`"
            f"{_or_here(repository)}"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repository}: --revision: expected a branch, tag or commit, found no {revision}") from None
    except (errors.LocalEntryNotFoundError, errors.RevisionResolutionError) as error:
        why = "HF_HUB_OFFLINE is set" if _offline() else f"the hub cannot be reached: {reason(error.__cause__ or error)}"
        raise InputError(
            f"{repository}{at}: expected a directory, or a hub repository in the cache, found neither, or not all of it; {why}"
            f"{_or_here(repository)}"
        ) from None
    except errors.HFValidationError as error:
        raise InputError(f"{repository}: expected a directory or a hub repository, found neither ({reason(error)})") from None
    except Exception as error:
        if isinstance(error, CommandError | MemoryError) or meaning(error) is not None:
            raise
        if not is_hubs(error):  # the library stumbles over what it was told
            raise no_hub(repository, f"{type(error).__name__}: {reason(error)}") from None
        if not may_pass(error):
            raise InputError(
                f"{repository}{at}: expected files that may be downloaded, found an error: {reason(error)}"
            ) from None
        raise Incomplete(
            f"{repository}{at}: the download broke off {TRIES} times ({reason(error)}); the files that are whole are kept:"
            " run the same command again"
        ) from None


def _or_here(repository: str) -> str:
    """A directory that was meant perhaps."""
    return nothing_at(Path(repository)).removeprefix("nothing")


def cause(error: BaseException) -> BaseException:
    """Of an upload's failure, which is wrapped: what it was."""
    return error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error


def is_hubs(error: BaseException) -> bool:
    """Whether it is the hub's, or that of the library by which it is asked, of which there is more than one."""
    from huggingface_hub.errors import HfHubHTTPError

    (transport,) = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"][:1] or [HfHubHTTPError]
    return isinstance(error, transport) or "Consistency check failed" in str(error)


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def reason(error: BaseException) -> str:
    """Its first line, and not all of that."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
