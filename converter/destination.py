"""DST: what may be there already, and how the finished checkpoint gets there in one step."""

import os
from pathlib import Path

from converter.manifest import known_files, read_finished
from converter.store import MANIFEST, sync
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
        if not self._is_empty():
            manifest = read_finished(self.path)
            if manifest is None:
                damaged = (self.path / MANIFEST).exists()
                what = f"its {MANIFEST} is damaged" if damaged else "it is not a checkpoint of this command"
                raise InputError(
                    f"{self.path}: expected a new or empty directory, found one with other files in it; "
                    f"{what}, so it is never overwritten: give another name"
                )
            if not overwrite:
                raise InputError(
                    f"{self.path}: expected a new or empty directory, found a finished checkpoint; "
                    "give another name, or --overwrite to replace it when the new one is whole"
                )
            self._check_for_strangers(manifest)

    def _check_for_strangers(self, manifest: dict) -> None:
        """
        Raises:
          InputError: naming each file in DST that is not the checkpoint's, and that would be gone with it.
        """
        files = (path for path in self.path.rglob("*") if path.is_symlink() or not path.is_dir())
        strange = {path.relative_to(self.path).as_posix() for path in files} - known_files(manifest)
        if strange:
            raise InputError(
                *(f"{self.path / name}: not in {MANIFEST}, so --overwrite does not remove it; move it away"
                  for name in sorted(strange))
            )  # fmt: skip

    def only_tidying_left(self, fingerprint: dict) -> bool:
        """Whether an earlier run of the same conversion was cut off after it had put the checkpoint in its place."""
        workspace = Workspace(self.partial)
        if not workspace.is_ours() or workspace.checkpoint.exists():
            return False
        return (read_finished(self.path) or {}).get("fingerprint") == fingerprint

    def finish(self, workspace: Workspace) -> None:
        """Put the checkpoint, which is whole and synced, in its place."""
        if not self._is_empty():
            self.path.rename(workspace.directory / "replaced")
        workspace.checkpoint.rename(self.path)
        sync(self.path.parent)
        workspace.clear()

    def _is_empty(self) -> bool:
        """Whether there is nothing at DST, or an empty directory."""
        return not self.path.is_dir() or not any(self.path.iterdir())
