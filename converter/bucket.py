"""DST as a prefix of a bucket, gs://BUCKET/NAME, which knows no locks and no renames.

None are needed. Everything is written where it will stay, each object under a precondition (`converter.bucket_store`), and
what makes the prefix a checkpoint last. `CLAIM`, which exactly one process can make, says what is converted there: whoever
wants something else is refused, and told by whom. Whoever wants the same goes on with it: after a kill that is how a
conversion resumes, with nothing to wait for and nothing to break; and of two that are at it at once each writes what it
does not find, the same bytes, one completes it, and the other finds that done.
"""

import json
import os
import socket
import time
from pathlib import Path

from converter.bucket_store import BucketStore
from converter.journal import Hashes
from converter.manifest import known_files, read_finished
from converter.plan import Plan
from converter.store import MANIFEST
from converter.workspace import short
from oss_model import buckets
from oss_model.buckets import Conflict, GsPath
from oss_model.errors import InputError, raise_all
from oss_model.files import parse_json

INSIDE = "convert-oss.partial"
CLAIM = f"{INSIDE}/state.json"
TRIES = 5  # of making one, where others come and go


class Bucket:
    """A `converter.ends.Destination`."""

    def __init__(self, path: GsPath, process: tuple[int, int] = (1, 1)):
        self.path, self.process = path, process
        self.notes: list[str] = []
        self._store, self._plan = BucketStore(path), None
        self._claim = 0  # its generation
        self._may_go = False  # whether it is this process's own, and nothing is begun by it

    @property
    def work(self) -> Path:
        return self.path

    @property
    def checkpoint(self) -> Path:
        return self.path

    def sink(self, plan: Plan) -> BucketStore:
        self._plan = plan
        return self._store

    def is_under_way(self) -> bool:
        return False  # there is no such step

    def take_up(self) -> bool:
        """Whether an earlier run has made the checkpoint complete, and was cut off before it took back its claim."""
        claim = buckets.found(self.path / CLAIM)
        if claim is None or read_finished(self.path) is None:
            return False
        buckets.delete(self.path / CLAIM, claim.generation)
        return True

    def check(self, source: Path, overwrite: bool) -> None:
        if source == self.path or source in self.path.parents or self.path in source.parents:
            raise InputError(f"{self.path}: expected a place apart from the source, found one in {source}; give another")
        there = self._store.look()
        if MANIFEST in there and read_finished(self.path) is not None:
            raise InputError(
                f"{self.path}: expected a new or empty prefix, found a finished checkpoint; give another name: in a bucket"
                " nothing is replaced"
            )
        if not there or CLAIM in there:  # whose it is `lock` finds out
            return
        names = sorted({name.partition("/")[0] for name in there})
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise InputError(f"{self.path}: expected a new or empty prefix, found other objects ({some}); give another name")

    def lock(self, before: dict) -> None:
        claim = {
            "what": "An unfinished conversion of convert-oss, which the same command takes up.",
            "by": f"process {os.getpid()} on {socket.gethostname()}",
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "fingerprint": before,
        }
        for _ in range(TRIES):
            try:
                self._claim = buckets.write(self.path / CLAIM, json.dumps(claim).encode()).generation
                self._may_go = True
                return
            except Conflict:
                there = buckets.found(self.path / CLAIM)
                if there is not None and self._is_the_same(before):
                    self._claim = there.generation
                    return
        raise InputError(f"{self.path / CLAIM}: expected a claim that stays, found one that comes and goes; run this again")

    def _is_the_same(self, before: dict) -> bool:
        """Whether the claim that is there is of this conversion; False: it has gone.

        Raises:
          InputError: if it is of another.
        """
        try:
            claim = parse_json((self.path / CLAIM).read_bytes())
            old, who = claim["fingerprint"], f"{claim['by']}, since {claim['since']}"
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path / CLAIM}: expected a claim of convert-oss, found something else; remove it") from None
        raise_all(
            [
                f"{self.path}: an unfinished conversion with another {key} ({who}): expected {short(old.get(key))}, found"
                f" {short(before.get(key))}; give another name, or `gcloud storage rm -r {self.path}` to begin anew"
                for key in sorted(old.keys() | before.keys())
                if old.get(key) != before.get(key)
            ]
        )
        self.notes.append(f"begun by {who}: gone on with; where that is at work still, both write the same")
        return True

    def begin(self, before: dict, restart: bool) -> None:
        self._may_go = False

    def journal(self) -> "_NotedWithEach":
        return _NotedWithEach()

    def journaled(self) -> dict[str, Hashes]:
        assert self._plan is not None
        self._store.look()
        return self._store.noted(self._plan)

    def reopen_share(self) -> bool:
        return self.is_pending()

    def share_done(self) -> bool:
        """Whether all shares are written, or this process is alone. Of several that find so at once each may finish."""
        assert self._plan is not None
        return self.process[1] == 1 or self.journaled().keys() == {chunk.path for chunk in self._plan.chunks}

    def finish(self, source: Path, overwrite: bool) -> None:
        buckets.delete(self.path / CLAIM, self._claim)

    def is_pending(self) -> bool:
        return read_finished(self.path) is None

    def leave(self) -> None:
        if self._may_go:
            buckets.delete(self.path / CLAIM, self._claim)
            self._may_go = False

    def kept_in(self) -> Path | None:
        return self.path

    def unknown_files(self, manifest: dict) -> list[str]:
        return sorted(self._store.look().keys() - known_files(manifest) - {CLAIM})


class _NotedWithEach:
    """A `converter.ends.Noted`: it is noted with each chunk's object, by `BucketStore.write_chunk`."""

    def add(self, chunk: str, hashes: Hashes) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...
