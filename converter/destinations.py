"""Which destination a path has."""

from pathlib import Path

from converter.bucket import Bucket
from converter.directory import Directory
from converter.ends import Destination
from oss_model.buckets import GsPath
from oss_model.errors import raise_all


def destination_of(path: Path, process: tuple[int, int] = (1, 1)) -> Destination:
    """
    Args:
      process: (I, N): this is the I-th of N that write shares.
    """
    return Bucket(path, process) if isinstance(path, GsPath) else Directory(path, process)


def refuse(path: Path, to: str, overwrite: bool) -> None:
    """
    Raises:
      InputError: for what a bucket cannot have.
    """
    if not isinstance(path, GsPath):
        return
    faults = []
    if not path.key:
        faults.append(f"{path}: expected a name in the bucket, found none; give gs://{path.bucket}/NAME")
    if overwrite:
        faults.append(f"{path}: --overwrite: expected a directory, found a bucket, where nothing is replaced; give a new name")
    if to != "orbax":
        faults.append(
            f"{path}: --to {to}: in a bucket only Orbax checkpoints are written, found {to}; write it to a disk, and copy it by"
            f" `gcloud storage cp -r`"
        )
    raise_all(faults)
