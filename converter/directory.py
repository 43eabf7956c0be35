"""DST: what may be there already, and how the finished checkpoint gets there: in one step, or what completes it last."""

import functools
import os
import shutil
from pathlib import Path

from converter.ends import Sink
from converter.journal import Hashes, Journal
from converter.manifest import known_files, manifest_hash, read_finished
from converter.places import can_be_renamed, exchange
from converter.plan import Plan
from converter.shard_store import CONFIG
from converter.sinks import sink_of
from converter.store import MANIFEST, METADATA
from converter.workspace import Workspace
from oss_model.errors import InputError, raise_all
from oss_model.files import sync

INSIDE = "convert-oss.partial"


class Directory:
    """A `converter.ends.Destination`.

    Args:
      process: (I, N): this is the I-th of N that write shares.
    """

    def __init__(self, path: str | os.PathLike, process: tuple[int, int] = (1, 1)):
        self.path, self.process = Path(path), process
        self.notes: list[str] = []

    @functools.cached_property
    def is_inside(self) -> bool:
        """Whether the work is done inside DST, because DST itself cannot be renamed, or because it was begun there."""
        if self.path.is_symlink() or not self.path.is_dir():
            return False
        return Workspace(self.path / INSIDE).is_ours() or not can_be_renamed(self.path)

    @functools.cached_property
    def partial(self) -> Path:
        """Where the checkpoint is written: its `checkpoint` becomes DST when it is whole, or its entries move into DST."""
        return self.path / INSIDE if self.is_inside else self.path.with_name(f"{self.path.name}.partial")

    @functools.cached_property
    def workspace(self) -> Workspace:
        return Workspace(self.partial, self.process)

    @property
    def work(self) -> Path:
        return self.workspace.directory

    @property
    def checkpoint(self) -> Path:
        return self.workspace.checkpoint

    def sink(self, plan: Plan) -> Sink:
        return sink_of(self.checkpoint, plan)

    def lock(self, before: dict) -> None:
        self.workspace.lock()

    def begin(self, before: dict, restart: bool) -> None:
        self.workspace.begin(before, restart)

    def journal(self) -> Journal:
        return self.workspace.journal()

    def journaled(self) -> dict[str, Hashes]:
        return self.workspace.journaled()

    def reopen_share(self) -> bool:
        return self.workspace.reopen_share()

    def share_done(self) -> bool:
        return self.workspace.share_done()

    def is_pending(self) -> bool:
        return self.checkpoint.exists()

    def leave(self) -> None:
        self.workspace.leave()

    def kept_in(self) -> Path | None:
        return self.partial if self.partial.is_dir() else None

    def check(self, source: Path, overwrite: bool) -> None:
        self._check(source, overwrite)
        self.workspace.check()

    def _check(self, source: Path, overwrite: bool) -> None:
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
                if any(self.path.glob("*.safetensors")):
                    what += ", and holds safetensors (SRC comes first, then DST)"
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
        raise_all(
            [
                f"{self.path}/{name}: not in {MANIFEST}, so --overwrite does not remove it; move it away"
                for name in self.unknown_files(manifest)
            ]
        )

    def unknown_files(self, manifest: dict) -> list[str]:
        """Every file in the checkpoint at DST that its manifest does not name: relative paths.

        A directory in which it names none is told as a whole, `name/`.
        """
        known, staying = known_files(manifest), set(self._staying())
        top = {path.name for path in self.path.iterdir() if path.is_dir() and not path.is_symlink()} - staying
        foreign = top - {name.partition("/")[0] for name in known}
        files = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_symlink() or not path.is_dir())
        names = {path.as_posix() for path in files if len(path.parts) == 1 or path.parts[0] not in staying | foreign}
        return sorted((names - known) | {f"{name}/" for name in foreign})

    def finish(self, source: Path, overwrite: bool) -> None:
        """Put the checkpoint, which is whole and synced, in its place; what is there is exchanged for it, or set aside.

        What is to happen is noted before anything is renamed, so that `take_up` can end it after a kill.
        """
        self._check(source, overwrite)  # once more: writing may have taken hours
        workspace = self.workspace
        if workspace.replaced.exists():  # of an earlier --overwrite, whose new checkpoint is what is at DST
            shutil.rmtree(workspace.replaced)
        note: dict = {"new": manifest_hash(workspace.checkpoint), "old": manifest_hash(self.path)}
        if self.is_inside:
            note["set aside"] = sorted(self._entries(), key=_completeness, reverse=True)
            note["move in"] = sorted(os.listdir(workspace.checkpoint), key=_completeness)
        workspace.note_placing(note)
        self._place(workspace, note)
        self._end(workspace)

    def is_under_way(self) -> bool:
        workspace = self.workspace
        return workspace.is_ours() and (workspace.placing() is not None or workspace.replaced.exists())

    def take_up(self) -> bool:
        """End what an earlier run was cut off at while it put its checkpoint in its place. Returns whether it is there now.

        Where that cannot be ended, because the new checkpoint is not whole any more, the old one goes back.

        Raises:
          InputError: if something else is in the way; everything is left as it is.
        """
        workspace = self.workspace
        only_tidying_left = workspace.is_ours() and not workspace.checkpoint.exists() and manifest_hash(self.path) is not None
        if not (self.is_under_way() or only_tidying_left):
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
        ours = {*note["set aside"], *note["move in"]} if note and self.is_inside else set()
        if here is None and set(self._entries()) - ours:
            raise self._in_the_way(workspace)
        if note and here in (None, note["old"]) and self._place(workspace, note):
            self._end(workspace)
            return True
        if manifest_hash(self.path) is None:
            self._put_back(workspace, note)
        if note:
            workspace.note_placing(None)
        return False

    def _place(self, workspace: Workspace, note: dict) -> bool:
        """Do what is noted, or what is left of it. Returns whether that could be done: whether the new one is whole."""
        if self.is_inside:
            return self._move_in(workspace, note)
        if manifest_hash(workspace.checkpoint) != note["new"]:
            return False
        if self._is_empty() or not exchange(workspace.checkpoint, self.path):
            if not self._is_empty():
                self.path.rename(workspace.replaced)
            workspace.checkpoint.rename(self.path)
        return True

    def _move_in(self, workspace: Workspace, note: dict) -> bool:
        """`_place`, entry by entry. What has been moved is found out by looking: this can be begun again at any point."""
        workspace.replaced.mkdir(exist_ok=True)
        for name in note["set aside"]:
            if not os.path.lexists(workspace.replaced / name):
                (self.path / name).rename(workspace.replaced / name)
        sync(workspace.replaced)
        sync(self.path)
        waiting = [name for name in note["move in"] if os.path.lexists(workspace.checkpoint / name)]
        if not all(os.path.lexists(self.path / name) for name in note["move in"] if name not in waiting):
            return False
        if any(os.path.lexists(self.path / name) for name in waiting):
            raise self._in_the_way(workspace)
        for name in waiting:
            if name == MANIFEST:
                sync(self.path)  # so that a power loss does not leave what completes it alone
            (workspace.checkpoint / name).rename(self.path / name)
        return True

    def _put_back(self, workspace: Workspace, note: dict | None) -> None:
        """What was set aside, to its place; and what was moved in, where `_move_in` was cut off, back to where it was."""
        old = set(os.listdir(workspace.replaced)) if workspace.replaced.exists() else set()
        if not self.is_inside:
            if old:
                workspace.replaced.rename(self.path)
        else:
            workspace.checkpoint.mkdir(exist_ok=True)
            new = [name for name in note["move in"] if name in old or name not in note["set aside"]] if note else []
            for name in new:
                if os.path.lexists(self.path / name):
                    (self.path / name).rename(workspace.checkpoint / name)
            for name in sorted(old, key=_completeness):
                (workspace.replaced / name).rename(self.path / name)
        self._sync(workspace)

    def _end(self, workspace: Workspace) -> None:
        """What is left to do once the checkpoint is in its place."""
        self._sync(workspace)
        workspace.clear()

    def _sync(self, workspace: Workspace) -> None:
        """Wait until the disk knows what is where."""
        sync(workspace.directory)
        sync(self.path if self.is_inside else self.path.parent)

    def _in_the_way(self, workspace: Workspace) -> InputError:
        return InputError(
            f"{self.path}: expected the place of a checkpoint, found other files in it; move them away, and the same "
            f"command goes on (what belongs there is whole, in {workspace.directory})"
        )

    def _is_empty(self) -> bool:
        """Whether there is nothing at DST, or an empty directory."""
        return not self._entries()

    def _entries(self) -> list[str]:
        """The names in DST, but for what stays there in any case."""
        return sorted(set(os.listdir(self.path)) - self._staying()) if self.path.is_dir() else []

    def _staying(self) -> set[str]:
        """Directories in DST that are nobody's business where it cannot be renamed: no work of ours moves or removes them."""
        return {INSIDE, "lost+found"} if self.is_inside else set()


def _completeness(name: str) -> tuple[bool, bool, bool, str]:
    """Sorts the names in a checkpoint: what makes it complete comes last."""
    return name == MANIFEST, name in METADATA, name == CONFIG, name
