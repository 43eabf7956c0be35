"""`DST.partial`: an unfinished conversion, and who may work on it.

state.json        what is being converted, to what: see `converter.manifest.fingerprint`
lock*             held by the processes at work; a process that dies lets go of its own
journal.I-of-N    chunks that are on the disk
done.I-of-N       process I has written its share
checkpoint/       becomes DST
replaced/         what was at DST, with --overwrite, for the moment between two renames
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

from converter.journal import Hashes, Journal, read_journals
from converter.store import sync, write_file
from oss_model.errors import InputError

OURS = ("state.json", "lock", "journal.", "done.", "checkpoint", "replaced")


class Workspace:
    def __init__(self, directory: Path, process: tuple[int, int] = (1, 1)):
        self.directory = directory
        self.checkpoint = directory / "checkpoint"
        self.process = process
        self._name = "{}-of-{}".format(*process)
        self._locks: list[int] = []

    def check(self) -> None:
        """
        Raises:
          InputError: if there is something else where the unfinished conversion would go.
        """
        if self.directory.is_symlink() or (self.directory.exists() and not self.directory.is_dir()):
            raise InputError(f"{self.directory}: expected room for the unfinished conversion, found a file; move it away")
        if self.directory.is_dir():
            foreign = sorted(path.name for path in self.directory.iterdir() if not path.name.startswith(OURS))
            if foreign:
                raise InputError(
                    f"{self.directory}: expected an unfinished conversion, found other files ({foreign[0]}); move them away"
                )

    def enter(self, fingerprint: dict, restart: bool) -> None:
        """Lock the workspace, and begin or take up the conversion that `fingerprint` describes.

        Args:
          restart: throw away an unfinished conversion of something else instead of refusing.

        Raises:
          InputError: if another process is at work on it, or what was begun is not what is wanted now.
        """
        index, count = self.process
        self.directory.mkdir(parents=True, exist_ok=True)
        alone = self._lock("lock", fcntl.LOCK_EX)
        if not alone and (count == 1 or not self._lock_shared()):
            raise self._busy("another convert-oss is writing there")
        if count > 1 and not self._lock(f"lock.{self._name}", fcntl.LOCK_EX):
            raise self._busy(f"process {index}/{count} is already at work there")
        state = self._state()
        wanted = {"fingerprint": fingerprint, "processes": count}
        if state is not None and state.get("fingerprint") != fingerprint:
            if not (alone and restart):
                raise self._changed(state.get("fingerprint") or {}, fingerprint)
            self._clear()
            state = None
        if not alone and (state is None or state["processes"] != count):
            raise self._busy(f"a conversion by {state['processes'] if state else 'an unknown number of'} processes runs there")
        if state is None:
            self._clear()  # of what was left by a kill before there was a state, or after the last rename
        if state != wanted:
            write_file(self.directory / "state.json", json.dumps(wanted).encode(), durable=True)
        self.checkpoint.mkdir(exist_ok=True)
        if alone and count > 1:
            fcntl.flock(self._locks[0], fcntl.LOCK_SH)  # lets the others in

    def journal(self) -> Journal:
        return Journal(self.directory / f"journal.{self._name}")

    def journaled(self) -> dict[str, Hashes]:
        """What all processes have noted, in this run and in earlier ones."""
        return read_journals(sorted(self.directory.glob("journal.*")))

    def share_done(self) -> bool:
        """Note that this process's share is written. Returns whether it is the one to finish.

        Of those that find all shares written, the first to take the lock finishes; the others wait for it.
        """
        write_file(self.directory / f"done.{self._name}", b"", durable=True)
        count = self.process[1]
        if not all((self.directory / f"done.{index}-of-{count}").exists() for index in range(1, count + 1)):
            return False
        with contextlib.suppress(FileNotFoundError):  # another one has finished, and tidied up
            self._lock("lock.finish", fcntl.LOCK_EX, wait=True)
        return self.checkpoint.is_dir()

    def reopen_share(self) -> None:
        """Take back `share_done`, before chunks are written again."""
        (self.directory / f"done.{self._name}").unlink(missing_ok=True)

    def leave(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def discard(self) -> None:
        """Remove everything, once DST is in its place."""
        self._clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _lock(self, name: str, kind: int, wait: bool = False) -> bool:
        path = self.directory / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, kind | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(fd).st_ino == path.stat().st_ino:
                self._locks.append(fd)
                return True
        except (BlockingIOError, FileNotFoundError):
            pass  # held; or whoever held it has finished, and removed the directory
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return False

    def _lock_shared(self) -> bool:
        """Another of our processes, when it begins, holds the lock alone for a moment; a converter that works alone, on."""
        for _ in range(100):
            if self._lock("lock", fcntl.LOCK_SH):
                return True
            time.sleep(0.1)
        return False

    def _state(self) -> dict | None:
        try:
            return json.loads((self.directory / "state.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None  # not begun, or cut short by a power loss before anything else was written

    def _clear(self) -> None:
        """Remove all but the locks; the state last, so that what is left can be told."""
        for path in sorted(self.directory.iterdir(), key=lambda path: path.name == "state.json"):
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("lock"):
                path.unlink()
        sync(self.directory)

    def _busy(self, what: str) -> InputError:
        self.leave()
        return InputError(f"{self.directory}: {what}; wait until it has ended, or end it")

    def _changed(self, old: dict, new: dict) -> InputError:
        self.leave()
        lines = []
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                lines.append(
                    f"{self.directory}: an unfinished conversion with another {key}: expected {_short(old.get(key))}, "
                    f"found {_short(new.get(key))}; remove that directory, or --overwrite, to begin anew"
                )
        return InputError(*lines)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."
