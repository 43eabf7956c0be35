"""The conversion: plan, stream, finish, verify."""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from converter.chunks import Reader
from converter.destination import Destination
from converter.ends import Sink, Source
from converter.errors import Different, Incomplete
from converter.finished import is_complete
from converter.journal import Hashes, Journal
from converter.manifest import fingerprint, make_manifest, read_finished
from converter.plan import Chunk, Plan, make_plan
from converter.preflight import Needs, measure
from converter.progress import Counter, Progress
from converter.source import companions, open_source
from converter.store import Store, load_orbax
from converter.threads import in_threads, interruptible, stop_here
from converter.verify import a_line_a_tensor, check_buffer
from converter.workspace import Workspace
from oss_model.config import PARAM_DTYPES
from oss_model.errors import InputError, meaning, system_error
from oss_model.memory import peak_rss
from oss_model.shards import Checkpoint


@dataclasses.dataclass
class Result:
    """What a conversion did; `--json` prints these fields."""

    # "complete"; "resumed": complete, taken up where an earlier run ended; "already-complete": an earlier run has made it;
    # "share-written": see `process`
    status: str
    source: str
    destination: str
    source_layout: str
    dtype: str
    tensors: int
    chunks: int
    bytes_read: int  # of the source, for converting
    bytes_written: int  # of chunk files, by this run
    seconds: float
    peak_rss_bytes: int
    verified: bool


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: str = "bfloat16",
    *,
    overwrite: bool = False,
    verify: bool = True,
    max_memory: int | None = None,
    process: tuple[int, int] = (1, 1),
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Convert the safetensors checkpoint `src` to an Orbax checkpoint at `dst`.

    A conversion that was cut off, by whatever, is taken up by calling this again with the same arguments. One that is
    complete is left as it is, with status "already-complete", as long as the source has not changed since.

    Args:
      src: a directory in one of the layouts of `oss_model.layouts`, recognised by content.
      dst: a new or empty directory, or with `overwrite` a finished checkpoint, which is replaced when the new one is
        whole.
      dtype: how parameters are stored: "bfloat16", "float32", or "mxfp4" (experts packed, everything else bfloat16).
      overwrite: also begins anew where an unfinished conversion of something else is in the way.
      verify: read back what was written and compare it with the source decoded anew.
      max_memory: resident bytes of this process, all in, at the most.
      process: (I, N): write the I-th of N shares, I from 1. Whichever process is last finishes the checkpoint; the
        others return with status "share-written".

    Raises:
      InputError: if the source or the destination cannot be used, naming every fault; `dst` is left as it was.
      Incomplete: if writing failed, for want of space for example; what is written is kept.
      Different: if what was written is not what was read (a broken disk, a source that changed).
      KeyboardInterrupt: after Ctrl-C, once the chunks under way are written; what is written is kept.
    """
    start = time.perf_counter()
    if dtype not in PARAM_DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(PARAM_DTYPES)}, found {dtype!r}")
    if not 1 <= process[0] <= process[1]:
        raise InputError(f"process: expected I/N with I from 1 to N, found {process[0]}/{process[1]}")
    destination = Destination(dst)
    checkpoint = open_source(src, dtype)
    with checkpoint.shards, interruptible() as stop:
        plan = make_plan(checkpoint, dtype)
        workspace = Workspace(destination.partial, process)
        run = Run(checkpoint, plan, workspace, progress, stop)
        before = fingerprint(checkpoint, dtype)
        try:
            status, verified = run.to_its_end(destination, before, overwrite, verify, max_memory)
        except OSError as error:
            raise _incomplete(error, workspace) from error
        finally:
            workspace.leave()
    return Result(
        status=status,
        source=str(Path(src).resolve()),
        destination=str(Path(dst).resolve()),
        source_layout=checkpoint.layout.name,
        dtype=dtype,
        tensors=len(plan.targets),
        chunks=len(plan.chunks),
        bytes_read=run.bytes_read,
        bytes_written=run.bytes_written,
        seconds=round(time.perf_counter() - start, 3),
        peak_rss_bytes=peak_rss(),
        verified=verified,
    )


class Run:
    """One process's work on one conversion."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        workspace: Workspace,
        progress: Callable[[Progress], None],
        stop: threading.Event,
    ):
        self.checkpoint, self.plan, self.workspace, self.stop = checkpoint, plan, workspace, stop
        self.sink: Sink = Store(workspace.checkpoint)
        self.needs = Needs(0, 0, 0, 1)
        self.bytes_read = self.bytes_written = self.kept = 0
        self._progress = progress

    def to_its_end(
        self, destination: Destination, before: dict, overwrite: bool, verify: bool, max_memory: int | None
    ) -> tuple[str, bool]:
        """Do all that is left to do. Returns the status, and whether the checkpoint was verified.

        Args:
          before: the fingerprint of the source as it is read.
        """

        def is_there() -> bool:
            """Whether there is nothing to do; another process may see to that at any time."""
            if overwrite:
                return False
            return is_complete(destination.path, self.checkpoint, self.plan, before, self._progress, self.stop)

        if destination.take_up(self.workspace) and (read_finished(destination.path) or {}).get("fingerprint") == before:
            return "resumed", False
        if is_there():
            return "already-complete", False
        source = self.checkpoint.directory
        destination.check(source, overwrite)
        self.workspace.check()
        load_orbax()  # before memory is measured, for it is most of it
        self.needs = measure(self.checkpoint, self.plan, self.workspace.checkpoint, max_memory)
        self.workspace.lock()
        if is_there():
            return "already-complete", False
        destination.check(source, overwrite)
        self.workspace.begin(before, restart=overwrite)
        if self.stream():
            self.finish(before, verify)
            destination.check(source, overwrite)  # once more: that may have taken hours
            destination.finish(self.workspace)
        if self.workspace.checkpoint.exists():  # neither this process has finished, nor another
            return "share-written", False
        return "resumed" if self.kept else "complete", verify

    def stream(self) -> bool:
        """Write this process's share of the chunks that are not there yet. Returns whether it is to finish."""
        index, count = self.workspace.process
        share = self.plan.chunks[index - 1 :: count]
        whole = self._whole(share)
        self.kept = len(whole)
        todo = [chunk for chunk in share if chunk.path not in whole]
        if todo and not self.workspace.reopen_share():
            return False
        show = Counter("converting", share, self._progress)
        for chunk in share:
            if chunk.path in whole:
                show.add(chunk)
        self._write(todo, show)
        self.sink.settle_names(share)
        return self.workspace.share_done()

    def finish(self, before: dict, verify: bool) -> None:
        """Write everything that is not a chunk, what makes the checkpoint complete last, and wait for the disk."""
        self._fill_gaps()
        if fingerprint(self.checkpoint, self.plan.dtype) != before:
            raise InputError(f"{self.checkpoint.directory}: changed while it was read; leave it alone and convert again")
        directory, hashes = self.workspace.checkpoint, self.workspace.journaled()
        self.sink.describe(self.plan, companions(self.checkpoint.directory))
        if verify:
            self._verify(hashes)
        self.sink.complete(self.plan, lambda: make_manifest(self.checkpoint, self.plan, hashes, directory))

    def _fill_gaps(self) -> None:
        """Write what is missing of any share, although it was called done: a power loss, or a hand, may have taken it."""
        hashes = self.workspace.journaled()
        gaps = [chunk for chunk in self.plan.chunks if chunk.path not in hashes or not self.sink.is_whole(chunk)]
        self._write(gaps, Counter("converting", gaps, self._progress))

    def _write(self, chunks: list[Chunk], show: Counter) -> None:
        with contextlib.closing(self.workspace.journal()) as journal:
            for chunk, nbytes in in_threads(lambda: self._writer(journal), chunks, self.needs.workers, self.stop):
                # Here, while the threads go on: the disk has been at work on these pages since they were written.
                self.sink.settle(chunk)
                self.bytes_read += nbytes
                self.bytes_written += chunk.nbytes
                show.add(chunk)
            journal.sync()
        stop_here(self.stop)

    def _writer(self, journal: Journal) -> Callable[[Chunk], tuple[Chunk, int]]:
        reader: Source = Reader(self.checkpoint)

        def write(chunk: Chunk) -> tuple[Chunk, int]:
            before, pieces = reader.bytes_read, reader.pieces(chunk)
            stored = self.sink.write_chunk(chunk, pieces)
            journal.add(chunk.path, Hashes(stored, pieces.digests))
            return chunk, reader.bytes_read - before

        return write

    def _whole(self, share: list[Chunk]) -> set[str]:
        """Paths of the chunks that an earlier run has noted, read back: a power loss may have taken what was there."""
        journaled = self.workspace.journaled()

        def checker():
            buffer = check_buffer()

            def check(chunk: Chunk) -> tuple[Chunk, bool]:
                digest, _ = self.sink.check(chunk, None, buffer)
                whole = digest == journaled[chunk.path].stored
                if whole:  # the run that wrote it may have been killed before its fsync
                    self.sink.settle(chunk)
                return chunk, whole

            return check

        noted = [chunk for chunk in share if chunk.path in journaled]
        show = Counter("resuming", noted, self._progress)
        whole = set()
        for chunk, is_whole in in_threads(checker, self.sink.ahead(noted), self.needs.workers, self.stop):
            whole |= {chunk.path} if is_whole else set()
            show.add(chunk)
        stop_here(self.stop)
        return whole

    def _verify(self, hashes: dict[str, Hashes]) -> None:
        def checker():
            reader, buffer = Reader(self.checkpoint), check_buffer()

            def check(chunk: Chunk) -> tuple[Chunk, str | None]:
                digest, line = self.sink.check(chunk, reader.pieces(chunk), buffer)
                if line is None and digest != hashes[chunk.path].stored:
                    line = (
                        f"{self.workspace.checkpoint}: {chunk.target.name}: {chunk.path}: its hash has changed; convert again"
                    )
                return chunk, line

            return check

        show, wrong = Counter("verifying", self.plan.chunks, self._progress), []
        for chunk, line in in_threads(checker, self.plan.chunks, self.needs.workers, self.stop):
            if line:
                wrong.append((chunk, line))
                self.sink.discard(chunk)
            show.add(chunk)
        stop_here(self.stop)
        if wrong:
            raise Different(a_line_a_tensor(self.workspace.checkpoint, wrong))


def _incomplete(error: OSError, workspace: Workspace) -> InputError | Incomplete:
    """What the system's error means: before the first chunk a place that cannot be used, after it an interruption."""
    found = system_error(error, str(error.filename or workspace.directory))
    if not os.path.isdir(workspace.checkpoint):
        return InputError(*found.faults if found else [f"{workspace.directory}: {error}; give another place"])
    what, to_do = meaning(error) or (f"writing failed ({error})", "")
    to_do = to_do if isinstance(found, Incomplete) else "mend that"
    return Incomplete(f"{workspace.directory}: {what}; what is written is kept there: {to_do}, and the same command resumes")
