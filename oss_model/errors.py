"""What ends a command in a line instead of a traceback, and what the operating system's errors mean in such a line."""

import contextlib
import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote


class CommandError(Exception):
    """What a person is told in whole lines, one a fault. `oss_model.exits` prints them and exits with `exit_code`.

    Each line says what is wrong, where, what was expected, what was found and what to do.
    """

    exit_code: int

    def __init__(self, *faults: str):
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


class InputError(CommandError, ValueError):
    """Input that cannot be used: a file, a configuration, an argument, or a place to write to.

    All faults known at the time are reported together.
    """

    exit_code = 2


class Incomplete(CommandError):
    """What was begun could not be ended, for want of space for example. What to do, and what is kept, is in the line."""

    exit_code = 3


class OutOfMemory(CommandError, MemoryError):
    """Memory ran out, of the machine, of a device or of what this process may take."""

    exit_code = 3


def raise_all(faults: list[str]) -> None:
    """Raise one `InputError` naming every fault, or return if there is none."""
    if faults:
        raise InputError(*faults)


# --- the operating system's errors ------------------------------------------------------------------------------

ELSEWHERE = "give another place"
# errno -> what it means, and what to do. A place that cannot be used is bad input,
_PLACE = {
    errno.EACCES: ("permission denied", f"{ELSEWHERE}, or ask for permission"),
    errno.EPERM: ("not permitted", f"{ELSEWHERE}, or ask for permission"),
    errno.EROFS: ("on a read-only file system", f"{ELSEWHERE}, or have it mounted for writing"),
    errno.ENOTDIR: ("below a file, where only a directory can have anything in it", ELSEWHERE),
    errno.ENAMETOOLONG: ("a name longer than the file system allows", "give a shorter one"),
    errno.ELOOP: ("symbolic links that lead in a circle", f"mend them, or {ELSEWHERE}"),
    errno.ENOENT: ("no such file or directory", f"make it, or {ELSEWHERE}"),
    errno.EISDIR: ("a directory, where a file is expected", "give another name"),
    errno.EEXIST: ("there already", "give another name, or move it away"),
    errno.ENOTEMPTY: ("a directory that is not empty", "give another name, or move it away"),
}
# and what fails on the way leaves the work incomplete.
_TROUBLE = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the quota is used up", "make room"),
    errno.EFBIG: ("a file larger than is allowed", "allow more (ulimit -f)"),
    errno.EIO: ("reading or writing failed (input/output error)", "see that the disk is in order"),
    errno.EMFILE: ("too many open files", "allow more (ulimit -n)"),
}


def system_errno(error: BaseException) -> int | None:
    """The operating system's own number for `error`; None if the error is not the system's.

    safetensors and tensorstore, which are not written in Python, say it in the message alone.
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os[ _]error(?:_code)?\W+(\d+)", str(error))
    return int(found[1]) if found else None


def meaning(error: BaseException) -> tuple[str, str] | None:
    """What an error of the operating system means, and what to do; None for one that says nothing to a person."""
    number = system_errno(error)
    return (_PLACE | _TROUBLE).get(number) if number is not None else None


def system_error(error: BaseException, where: str | None = None) -> CommandError | None:
    """The operating system's `error` as what a person is told; None if it is none, or one that only a bug can bring.

    Args:
      where: what it is about, if the error does not know: an error of writing does not.
    """
    found = meaning(error)
    if found is None:
        return None
    where = where or getattr(error, "filename", None)
    kind = InputError if system_errno(error) in _PLACE else Incomplete
    return kind("; ".join(found) if where is None else f"{where}: {'; '.join(found)}")


def meant(word: str, known: Mapping[str, object]) -> str:
    """What to add to an error about `word`, where one of those that are known, each as it is to be told, is almost it."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.65)
    return f"; did you mean {known[close[0]]}?" if close else ""


GGUF = "GGUF is llama.cpp's, and not read here: give the safetensors that it was made from"


def nothing_at(path: Path) -> str:
    """What a path that leads to no directory leads to: a file, or nothing, and perhaps another was meant, with another name."""
    if path.exists():
        return f"a file{f'; {GGUF}' if path.suffix == '.gguf' else ''}"
    other = ""
    if not str(path).startswith("gs://"):
        with contextlib.suppress(OSError):  # that may not be listed
            missing = next(part for part in (path, *path.parents) if part.parent.is_dir())
            there = {place.name: place / path.relative_to(missing) for place in missing.parent.iterdir()}
            other = meant(missing.name, {name: place for name, place in there.items() if place.exists()})
    return f"nothing{other}"


_BY_ITS_TOOL = "of these gs:// alone is read and written: copy it to a disk by a tool of its own, and give the directory"
_BY_WAY_OF = {
    "gs": "here none is taken, gs:// neither: `gcloud storage cp -r` it, and give the directory",
    # tensorstore could; but Orbax 0.12 takes the address for a path that is not absolute.
    "s3": "Orbax does not read s3://: mount the bucket (mountpoint-s3), or `aws s3 cp --recursive` it, and give the directory",
}


def local_path(text: str | os.PathLike) -> Path:
    """What is meant by a path: `file://` and a `~` that no shell has expanded are understood.

    Raises:
      InputError: for an address of another kind, which would name a directory `gs:` here.
    """
    found = os.fspath(text)
    if found.startswith("file:/"):
        found = unquote(re.sub(r"^file:/+", "/", found))
    elif scheme := re.match(r"([a-z][a-z0-9+.-]+):/", found):
        raise InputError(f"{found}: expected a path on a disk, found an address; {_BY_WAY_OF.get(scheme[1], _BY_ITS_TOOL)}")
    return Path(found).expanduser() if found.startswith("~") else Path(found)


def file_faults(file: str | os.PathLike) -> list[str]:
    """What is wrong with a file that is to be written at the end, found out before the long part; `-` is standard output."""
    if os.fspath(file) == "-":
        return []
    faults = place_faults(file)
    if not faults and Path(file).is_dir():
        faults = [f"{file}: expected a file to write, found a directory; give a name in it"]
    if not faults and not Path(file).absolute().parent.is_dir():
        faults = [f"{file}: expected a file in an existing directory; make {Path(file).parent} first"]
    return faults


def place_faults(path: str | os.PathLike) -> list[str]:
    """What is wrong with `path` as the place of a new file or directory, found out without writing: a line, or none.

    A directory that is there already is for its user to judge.
    """
    if not os.fspath(path):
        return [f"expected a name, found an empty one; {ELSEWHERE}"]
    try:
        os.stat(path)
        place = Path(path)
    except FileNotFoundError:
        place = next(up for up in Path(os.path.abspath(path)).parents if os.path.exists(up))
    except OSError as error:
        found = system_error(error, os.fspath(path))
        return [f"{path}: {error.strerror}; {ELSEWHERE}" if found is None else str(found)]
    else:
        if place.is_dir():
            return []
    if os.access(place, os.W_OK | os.X_OK if place.is_dir() else os.W_OK):
        return []
    number = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
    return [str(system_error(OSError(number, ""), os.fspath(path)))]
