"""DST: what may be there already, and how the finished checkpoint gets there in one step."""

import os
import shutil
from pathlib import Path

from converter.manifest import known_files, manifest_hash, read_finished
from converter.places import exchange
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

    def finish(self, workspace: Workspace) -> None:
        """Put the checkpoint, which is whole and synced, in its place; what is there is exchanged for it, or set aside.

        What is to happen is noted before anything is renamed, so that `take_up` can end it after a kill.
        """
        if workspace.replaced.exists():  # of an earlier --overwrite, whose new checkpoint is what is at DST
            shutil.rmtree(workspace.replaced)
        workspace.note_placing({"new": manifest_hash(workspace.checkpoint), "old": manifest_hash(self.path)})
        self._place(workspace)

    def take_up(self, workspace: Workspace) -> bool:
        """End what an earlier run was cut off at while it put its checkpoint in its place. Returns whether it is there now.

        Where that cannot be ended, because the new checkpoint is not whole any more, the old one goes back.

        Raises:
          InputError: if something else is in the way; everything is left as it is.
        """
        if not workspace.is_ours():
            return False
        under_way = workspace.placing() or workspace.replaced.exists()
        if not under_way and (workspace.checkpoint.exists() or manifest_hash(self.path) is None):
            return False
        workspace.lock()
        try:
            with workspace.finishing():
                return self._take_up(workspace)
        finally:
            workspace.leave()

    def _take_up(self, workspace: Workspace) -> bool:
        note, here = workspace.placing(), manifest_hash(self.path)
        if note is None and here and not workspace.checkpoint.exists():
            workspace.tidy()
            return True
        if note and here == note["new"]:
            self._end(workspace)
            return True
        if here is None and not self._is_empty():
            raise InputError(
                f"{self.path}: expected the place of a checkpoint, found other files in it; move them away, and the same "
                f"command goes on (what belongs there is whole, in {workspace.directory})"
            )
        if note and here in (None, note["old"]) and manifest_hash(workspace.checkpoint) == note["new"]:
            self._place(workspace)
            return True
        if here is None and workspace.replaced.exists():
            workspace.replaced.rename(self.path)
            sync(workspace.directory)
            sync(self.path.parent)
        if note:
            workspace.note_placing(None)
        return False

    def _place(self, workspace: Workspace) -> None:
        if self._is_empty() or not exchange(workspace.checkpoint, self.path):
            if not self._is_empty():
                self.path.rename(workspace.replaced)
            workspace.checkpoint.rename(self.path)
        self._end(workspace)

    def _end(self, workspace: Workspace) -> None:
        """What is left to do once the checkpoint is in its place."""
        sync(workspace.directory)
        sync(self.path.parent)
        workspace.clear()

    def _is_empty(self) -> bool:
        """Whether there is nothing at DST, or an empty directory."""
        return not self.path.is_dir() or not any(self.path.iterdir())
