"""`DST.partial`, or `convert-oss.partial` inside DST: an unfinished conversion, and who may work on it.

lock              says in writing that the directory is ours; held by the processes at work, and by none that died
lock.I-of-N       held by process I; lock.finish: by the one that finishes
state.json        what is being converted, to what: see `converter.manifest.fingerprint`; and `placing`: see `note_placing`
journal.I-of-N    chunks that are written, with their hashes
done.I-of-N       process I has written its share
checkpoint/       becomes DST, or its entries move into DST
replaced/         what was at DST, with --overwrite, until the new checkpoint is there

Nothing is ever removed but these, and only where the lock's text, or a state.json of ours, proves that we wrote them.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from converter.journal import Hashes, Journal, read_journals
from oss_model.errors import InputError, place_faults, raise_all
from oss_model.files import parse_json, sync, write_file

MARK = b"This directory is convert-oss's own: an unfinished conversion, which the same command takes up.\n"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of network file systems
LOCK = re.compile(r"lock(\.finish|\.\d+-of-\d+)?")
FILE = re.compile(r"(state\.json|done\.\d+-of-\d+)(\.new)?|journal\.\d+-of-\d+")
DIRECTORIES = ("checkpoint", "replaced")


class Workspace:
    def __init__(self, directory: Path, process: tuple[int, int] = (1, 1)):
        self.directory = directory
        self.checkpoint, self.replaced = (directory / name for name in DIRECTORIES)
        self.process = process
        self._name = "{}-of-{}".format(*process)
        self._alone = False
        self._locks: list[int] = []  # the first is that of `lock`

    def check(self) -> None:
        """
        Raises:
          InputError: if there is something else where the unfinished conversion would go, or if it cannot be written there.
        """
        raise_all(place_faults(self.directory))
        if self.directory.is_symlink() or (self.directory.exists() and not self.directory.is_dir()):
            raise InputError(f"{self.directory}: expected room for the unfinished conversion, found a file; move it away")
        names = self._names()
        if self.is_ours() or (names == ["lock"] and self._is_cutshort()):
            names = [name for name in names if not (LOCK.fullmatch(name) or FILE.fullmatch(name) or name in DIRECTORIES)]
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(f"{self.directory}: expected an unfinished conversion, found other files ({some}); move them away")

    def is_ours(self) -> bool:
        """Whether there is a directory that says it is ours, or one of version 0.1.0, whose lock said nothing."""
        return self.directory.is_dir() and (self._read("lock").startswith(MARK) or self._state() is not None)

    def lock(self) -> None:
        """Make the directory where there is none, and be the one at work there: alone, or one of several processes.

        Raises:
          InputError: if there is something else, or another process is at work there.
        """
        index, count = self.process
        self.directory.mkdir(parents=True, exist_ok=True)
        self.check()
        self._alone = self._lock_alone_or_shared()
        if not self._read("lock").startswith(MARK):
            os.pwrite(self._locks[0], MARK, 0)
            os.fsync(self._locks[0])
            sync(self.directory)
        if count > 1 and not self._lock(f"lock.{self._name}", fcntl.LOCK_EX):
            raise self._busy(f"process {index}/{count} is already at work there")

    def begin(self, fingerprint: dict, restart: bool) -> None:
        """Begin the conversion that `fingerprint` describes, or take it up.

        Args:
          restart: throw away an unfinished conversion of something else instead of refusing.

        Raises:
          InputError: if what was begun is not what is wanted now.
        """
        count = self.process[1]
        state = self._state()
        wanted = {"fingerprint": fingerprint, "processes": count}
        if state is not None and state["fingerprint"] != fingerprint:
            if not (self._alone and restart):
                raise self._changed(state["fingerprint"], fingerprint)
            self.clear()
            state = None
        if not self._alone and (state is None or state["processes"] != count):
            raise self._busy(f"a conversion by {state['processes'] if state else 'an unknown number of'} processes runs there")
        if state is None:
            self.clear()  # of what was left by a kill before there was a state, or after the last rename
        if state != wanted:
            write_file(self.directory / "state.json", json.dumps(wanted).encode(), durable=True)
        self.checkpoint.mkdir(exist_ok=True)
        if self._alone and count > 1:
            fcntl.flock(self._locks[0], fcntl.LOCK_SH)  # lets the others in

    def journal(self) -> Journal:
        return Journal(self.directory / f"journal.{self._name}")

    def journaled(self) -> dict[str, Hashes]:
        """What all processes have noted, in this run and in earlier ones."""
        return read_journals(sorted(self.directory.glob("journal.*-of-*")))

    def share_done(self) -> bool:
        """Note that this process's share is written. Returns whether it is the one to finish.

        Of those that find all shares written, the first to take the lock finishes; the others wait for it.
        """
        write_file(self.directory / f"done.{self._name}", b"", durable=True)
        if not self._all_done():
            return False
        self._locks.append(self._wait_to_finish())
        return self.checkpoint.is_dir() and self._all_done()

    def reopen_share(self) -> bool:
        """Take back `share_done`, before chunks are written again. Returns whether they are still wanted.

        Not while another process finishes, which takes it that nobody writes; and once it has, there is nothing to write.
        """
        with self.finishing():
            (self.directory / f"done.{self._name}").unlink(missing_ok=True)
        return self.checkpoint.is_dir()

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Wait until no other process finishes the checkpoint, and keep it so."""
        fd = self._wait_to_finish()
        try:
            yield
        finally:
            os.close(fd)

    def placing(self) -> dict | None:
        """What `note_placing` has noted last; None where the checkpoint is not on its way to its place."""
        return (self._state() or {}).get("placing")

    def note_placing(self, note: dict | None) -> None:
        """Note, on the disk, that the checkpoint is on its way to its place; with None, that it is not."""
        state = {key: value for key, value in (self._state() or {}).items() if key != "placing"}
        state |= {"placing": note} if note else {}
        write_file(self.directory / "state.json", json.dumps(state).encode(), durable=True)

    def _all_done(self) -> bool:
        count = self.process[1]
        return all((self.directory / f"done.{index}-of-{count}").exists() for index in range(1, count + 1))

    def clear(self) -> None:
        """Remove all of ours but the locks; the state last, so that what is left can be told."""
        for name in sorted(self._names(), key=lambda name: name == "state.json"):
            if name in DIRECTORIES:
                shutil.rmtree(self.directory / name)
            elif FILE.fullmatch(name):
                (self.directory / name).unlink()
        sync(self.directory)

    def leave(self) -> None:
        """Let go of the locks. Who leaves last where nothing is left but locks removes the directory too."""
        try:
            with contextlib.suppress(OSError):
                if self._locks and all(LOCK.fullmatch(name) for name in self._names()):
                    fcntl.flock(self._locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for name in sorted(self._names(), reverse=True):  # `lock` last: its text says whose the others are
                        (self.directory / name).unlink()
                    self.directory.rmdir()
        finally:
            while self._locks:
                os.close(self._locks.pop())

    def tidy(self) -> None:
        """`clear`, unless other processes are at work there."""
        if self._alone:
            self.clear()

    def _lock_alone_or_shared(self) -> bool:
        """Take `lock`, alone if nobody has it. Returns whether it is held alone.

        Another of several processes, when it begins, holds it alone for a moment; a converter that works alone, on.
        """
        shared = self.process[1] > 1
        for _ in range(100 if shared else 1):
            if self._lock("lock", fcntl.LOCK_EX):
                return True
            if shared and self._lock("lock", fcntl.LOCK_SH):
                return False
            if shared:
                time.sleep(0.1)
        raise self._busy("another convert-oss is writing there")

    def _wait_to_finish(self) -> int:
        fd = os.open(self.directory / "lock.finish", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    def _lock(self, name: str, kind: int) -> bool:
        path = self.directory / name
        try:
            self.directory.mkdir(exist_ok=True)  # whoever held it may have removed the directory
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            return False  # is removing it
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == path.stat().st_ino:
                self._locks.append(fd)
                return True
        except (BlockingIOError, FileNotFoundError):
            pass  # held; or removed by whoever held it
        except OSError as error:
            os.close(fd)
            if error.errno not in _NO_LOCKS:
                raise
            with contextlib.suppress(OSError):
                path.unlink()
                self.directory.rmdir()
            raise InputError(
                f"{self.directory}: expected a file system that locks files, found one that does not ({error.strerror}); give"
                " another place, or have it mounted with locks"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return False

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.directory)) if self.directory.is_dir() else []

    def _read(self, name: str) -> bytes:
        try:
            return (self.directory / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return b""

    def _is_cutshort(self) -> bool:
        """Whether a kill, or a power loss, left of the lock's text only its beginning, or zeros."""
        return MARK.startswith(self._read("lock").rstrip(b"\0"))

    def _state(self) -> dict | None:
        """What state.json says; None if it is missing, was cut short before anything else was written, or is not ours."""
        try:
            state = parse_json(self._read("state.json"))
            ours = state["fingerprint"].keys() >= {"source", "layout", "dtype", "version"} and state["processes"] >= 1
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return state if ours else None

    def _busy(self, what: str) -> InputError:
        self.leave()
        return InputError(f"{self.directory}: {what}; wait until it has ended, or end it")

    def _changed(self, old: dict, new: dict) -> InputError:
        self.leave()
        lines = []
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                lines.append(
                    f"{self.directory}: an unfinished conversion with another {key}: expected {short(old.get(key))}, "
                    f"found {short(new.get(key))}; remove that directory, or --overwrite, to begin anew"
                )
        return InputError(*lines)


def short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."
