"""DST: what may be there already, and how the finished checkpoint gets there in one step."""

import os
from pathlib import Path

from converter.manifest import read_manifest
from converter.store import MANIFEST, METADATA, sync
from converter.workspace import Workspace
from oss_model.errors import InputError


class Destination:
    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    @property
    def partial(self) -> Path:
        """Where it is written; `DST.partial/checkpoint` is renamed to DST when it is whole."""
        return self.path.with_name(self.path.name + ".partial")

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

    def only_tidying_left(self, fingerprint: dict) -> bool:
        """Whether an earlier run of the same conversion was cut off after it had put the checkpoint in its place."""
        if not is_finished(self.path) or not self.partial.is_dir() or (self.partial / "checkpoint").exists():
            return False
        return (read_manifest(self.path) or {}).get("fingerprint") == fingerprint

    def finish(self, workspace: Workspace) -> None:
        """Put the checkpoint, which is whole and synced, in its place."""
        if self.path.is_dir() and any(self.path.iterdir()):
            self.path.rename(workspace.directory / "replaced")
        workspace.checkpoint.rename(self.path)
        sync(self.path.parent)
        workspace.discard()


def is_finished(directory: Path) -> bool:
    """Whether `directory` is a checkpoint this package has finished."""
    return all((directory / name).is_file() for name in (MANIFEST, *METADATA))
