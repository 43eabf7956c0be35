"""What can be wrong when an Orbax checkpoint is read, and how it is told: there is none, memory ran out, or it is damaged."""

import contextlib
import errno
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import jax

from oss_model.errors import CommandError, InputError, OutOfMemory, nothing_at, system_errno, system_error
from oss_model.memory import free_memory, out_of_memory, size
from oss_model.zarr import METADATA

LISTED = 3  # of the names found in its place
# Entries of a directory that `StandardCheckpointer` saved, as Orbax 0.12 names them.
ORBAXS = re.compile(r"_\w+|array_metadatas|commit_success\.txt|d|manifest\.ocdbt|ocdbt\.process_\d+")


@contextlib.contextmanager
def restoring(path: Path, nbytes: int = 0) -> Iterator[None]:
    """Errors of Orbax while it reads the checkpoint at `path`, as what they are.

    Args:
      nbytes: of the parameters that are read.

    Raises:
      OutOfMemory: if memory ran out, of the host or of a device.
      InputError: if a file is damaged or missing, or may not be read.
      Incomplete: if the disk failed.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:  # Orbax raises bare Exceptions for whatever happens; the cause of the first says what
        if (reason := out_of_memory(error)) is not None:
            raise OutOfMemory(
                f"{path}: out of memory while it was read ({reason}): what is read takes {size(nbytes)}, {_free()} free; "
                "end other programs, load it onto more devices, or store it with --dtype mxfp4"
            ) from error
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        found = system_error(cause, str(path))
        if found is None or system_errno(cause) in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            reason = str(cause).split(" [tensorstore", 1)[0].partition("\n")[0]
            reason = f"{type(cause).__name__} {reason}" if isinstance(cause, KeyError) else reason
            found = InputError(f"{path}: expected a whole checkpoint, found one that cannot be read ({reason}): try verify-oss")
        raise found from error


def _free() -> str:
    """What is free, on the device that runs out first."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}  # the host's own has none
    if "bytes_limit" in stats:
        return f"{size(stats['bytes_limit'] - stats['bytes_in_use'])} of {device} are"
    return f"{size(free_memory())} are"


def not_a_checkpoint(path: Path, *, safetensors: bool = False) -> InputError:
    """For a path that holds none: what was looked for, what is there, and what to do.

    Args:
      safetensors: whether those would have done too.
    """
    wanted = [METADATA, "*.safetensors"] if safetensors else [METADATA]
    looked = f"{path}: expected an Orbax checkpoint{' or safetensors' if safetensors else ''} ({', '.join(wanted)}), found"
    partial = path.with_name(f"{path.name}.partial")
    if not path.exists():
        if partial.is_dir():
            return InputError(f"{looked} nothing, and an unfinished conversion in {partial}: run the same convert-oss again")
        found = nothing_at(path)
        return InputError(f"{looked} {found if '?' in found else f'nothing; convert-oss SRC {path} makes one'}")
    if not path.is_dir():
        return InputError(f"{looked} a file; give a directory")
    if (partial := path / "convert-oss.partial").is_dir():
        return InputError(f"{looked} an unfinished conversion in {partial}: run the same convert-oss again")
    below = {file.parent for name in wanted for depth in ("*", "*/*") for file in path.glob(f"{depth}/{name}")}
    if below:
        return InputError(f"{looked} some in directories of it; give one: {_list(str(place) for place in below)}")
    names = [entry.name for entry in path.iterdir()]
    if any(name.endswith(".safetensors") for name in names):
        return InputError(f"{looked} safetensors; convert them first: convert-oss {path} DST")
    found = f"other files ({_list(names)})" if names else "an empty directory"
    return InputError(f"{looked} {found}; give another, or make one with convert-oss")


def replace_faults(path: Path, beside: Collection[str] = ()) -> list[str]:
    """What is wrong with saving by Orbax where `path` is, which removes all that is there: a line, or none.

    Args:
      beside: names of what was put beside the arrays.
    """
    if not path.is_dir():
        return [f"{path}: expected a directory to save to, or nothing, found a file; move it"] if os.path.lexists(path) else []
    others = [entry.name for entry in path.iterdir() if not ORBAXS.fullmatch(entry.name) and entry.name not in beside]
    removed = "saving would remove it; move it elsewhere, or save to another directory"
    return [f"{path}: expected nothing but what was saved there before, found {_list(others)}: {removed}"] if others else []


def _list(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:LISTED]) + (f" and {len(shown) - LISTED} more" if len(shown) > LISTED else "")
