"""DST: what may be there already, and how the finished checkpoint gets there in one step.

Everything is written to `DST.partial/checkpoint`, which is renamed to DST when it is whole.
"""

import os
import shutil
from pathlib import Path

from converter.store import MANIFEST, METADATA, sync
from oss_model.errors import InputError


class Destination:
    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.checkpoint = self.partial / "checkpoint"

    def check(self, source: Path, overwrite: bool) -> None:
        """
        Raises:
          InputError: if writing here would lose something, or write into the source.
        """
        here, there = self.path.resolve(), source.resolve()
        if here == there or there in here.parents:
            what = "the source itself" if here == there else f"inside the source {source}"
            raise InputError(f"{self.path}: expected a directory apart from the source, found {what}; give another name")
        if here in there.parents:
            raise InputError(f"{self.path}: expected a directory apart from the source, found one that holds {source}")
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            found = "a symbolic link" if self.path.is_symlink() else "a file"
            raise InputError(f"{self.path}: expected a new or empty directory, found {found}; give another name")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not is_finished(self.path):
                raise InputError(
                    f"{self.path}: expected a new or empty directory, found one with other files in it; "
                    "it is not a checkpoint of this command, so it is never overwritten: give another name"
                )
            if not overwrite:
                raise InputError(
                    f"{self.path}: expected a new or empty directory, found a finished checkpoint; "
                    "give another name, or --overwrite to replace it when the new one is whole"
                )
        if self.partial.exists() and not self.checkpoint.is_dir() and any(self.partial.iterdir()):
            raise InputError(f"{self.partial}: expected an unfinished conversion, found other files; move them away")

    def prepare(self) -> Path:
        """An empty directory to write the checkpoint to."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.checkpoint.mkdir(parents=True)
        return self.checkpoint

    def finish(self) -> None:
        """Put the checkpoint, which is whole and synced, in its place."""
        if self.path.is_dir() and any(self.path.iterdir()):
            self.path.rename(self.partial / "replaced")
        self.checkpoint.rename(self.path)
        sync(self.path.parent)
        shutil.rmtree(self.partial)


def is_finished(directory: Path) -> bool:
    """Whether `directory` is a checkpoint this package has finished."""
    return all((directory / name).is_file() for name in (MANIFEST, *METADATA))
