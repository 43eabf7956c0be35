"""The conversion: plan, stream, finish, verify."""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from converter.destinations import destination_of, refuse
from converter.ends import Destination, Noted
from converter.errors import Different, Incomplete
from converter.finished import is_complete
from converter.form import Form, make_form
from converter.job import Job, open_job
from converter.journal import Hashes
from converter.manifest import make_manifest, read_finished
from converter.plan import Chunk
from converter.preflight import Needs, measure
from converter.progress import Counter, Progress
from converter.threads import in_threads, interruptible, stop_here
from converter.verify import a_line_a_tensor, check_buffer
from oss_model.buckets import path_of
from oss_model.errors import InputError, meaning, system_error
from oss_model.memory import peak_rss


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
    to: str = "orbax"  # the form: "orbax", or a layout of safetensors
    # Where experts' values became MXFP4: the rule, and the relative error (RMSE) of all of them and of each tensor.
    quantization: dict | None = None
    notes: list[str] = dataclasses.field(default_factory=list)  # what whoever uses it should know


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: str | None = None,
    *,
    to: str = "orbax",
    quantizer: str | None = None,
    like: str | os.PathLike | None = None,
    merge: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    ignore_config_key: Sequence[str] = (),
    overwrite: bool = False,
    verify: bool = True,
    max_memory: int | None = None,
    process: tuple[int, int] = (1, 1),
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Convert the checkpoint `src` to another form at `dst`: safetensors to Orbax, Orbax to safetensors, one layout to another.

    A conversion that was cut off, by whatever, is taken up by calling this again with the same arguments. One that is
    complete is left as it is, with status "already-complete", as long as the source has not changed since.

    Args:
      src: a directory of safetensors in one of the layouts of `oss_model.layouts`, or an Orbax checkpoint, ours or one that
        training saved; recognised by content.
      dst: a new or empty directory, or with `overwrite` a finished checkpoint, which is replaced when the new one is
        whole.
      dtype: how parameters are stored: "bfloat16", "float32", or "mxfp4" (experts packed, everything else bfloat16). The
        first that the form has if None. On the way to safetensors float32 is rounded to bfloat16 if need be.
      to: "orbax", or a layout of safetensors: "hf" (MXFP4), "hf-bf16", "openai".
      quantizer: the rule by which values become MXFP4 (`oss_model.quantization.RULES`); without one they never do.
      like: a packed checkpoint: blocks whose values are the same there keep its bytes.
      merge: a directory of LoRA updates (`oss_model.save_lora`), added to the weights in float32.
      tokenizer: a directory whose tokenizer, template and generation_config.json are copied, instead of the source's.
      ignore_config_key: keys of config.json that nobody here knows, and that are left out.
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
    form = make_form(to, dtype, quantizer, like, merge, ignore_config_key)
    if not 1 <= process[0] <= process[1]:
        raise InputError(f"process: expected I/N with I from 1 to N, found {process[0]}/{process[1]}")
    destination = destination_of(path_of(dst), process)
    refuse(destination.path, form.to, overwrite)
    with open_job(src, form, tokenizer) as job, interruptible() as stop:
        source, plan = job.source, job.plan
        run = Run(job, destination, progress, stop)
        try:
            status, verified = run.to_its_end(overwrite, verify, max_memory)
        except OSError as error:
            raise _incomplete(error, destination) from error
        finally:
            destination.leave()
    return Result(
        status=status,
        source=str(path_of(src).resolve()),
        destination=str(destination.path.resolve()),
        source_layout=source.layout.name,
        dtype=form.dtype,
        tensors=len(plan.targets),
        chunks=len(plan.chunks),
        bytes_read=run.bytes_read,
        bytes_written=run.bytes_written,
        seconds=round(time.perf_counter() - start, 3),
        peak_rss_bytes=peak_rss(),
        verified=verified,
        to=form.to,
        quantization=quantization_of(destination.path, form) if any(t.parts[0].is_quantized for t in plan.targets) else None,
        notes=[*job.notes, *destination.notes],
    )


def quantization_of(directory: Path, form: Form) -> dict | None:
    """What a finished checkpoint lost where values became MXFP4; None where it is not finished yet."""
    manifest = read_finished(directory)
    if manifest is None:
        return None
    tensors = {name: entry["relative_rmse"] for name, entry in manifest["tensors"].items() if "relative_rmse" in entry}
    return {"rule": form.quantizer, "relative_rmse": manifest.get("relative_rmse"), "tensors": tensors}


class Run:
    """One process's work on one conversion."""

    def __init__(self, job: Job, destination: Destination, progress: Callable[[Progress], None], stop: threading.Event):
        self.job, self.plan, self.destination, self.stop = job, job.plan, destination, stop
        self.sink = destination.sink(job.plan)
        self.needs = Needs(0, 0, 0, 1)
        self.bytes_read = self.bytes_written = self.kept = 0
        self._progress = progress

    def to_its_end(self, overwrite: bool, verify: bool, max_memory: int | None) -> tuple[str, bool]:
        """Do all that is left to do. Returns the status, and whether the checkpoint was verified."""
        before, source, destination = self.job.before, self.job.source, self.destination

        def is_there() -> bool:
            """Whether there is nothing to do; another process may see to that at any time."""
            if overwrite:
                return False
            return is_complete(destination.path, source, self.plan, before, self._progress, self.stop)

        if destination.take_up() and (read_finished(destination.path) or {}).get("fingerprint") == before:
            return "resumed", False
        if is_there():
            return "already-complete", False
        destination.check(source.directory, overwrite)
        self.sink.load()  # before memory is measured, for it is most of it
        self.needs = measure(source, self.plan, self.sink, destination.checkpoint, max_memory)
        destination.lock(before)
        if is_there():
            return "already-complete", False
        destination.check(source.directory, overwrite)
        destination.begin(before, restart=overwrite)
        if self.stream():
            self.finish(verify)
            destination.finish(source.directory, overwrite)
        if destination.is_pending():  # neither this process has finished, nor another
            return "share-written", False
        return "resumed" if self.kept else "complete", verify

    def stream(self) -> bool:
        """Write this process's share of the chunks that are not there yet. Returns whether it is to finish."""
        index, count = self.destination.process
        units = self.plan.units[index - 1 :: count]
        share = [chunk for unit in units for chunk in unit]
        whole = self._whole(share)
        self.kept = len(whole)
        todo = [left for unit in units if (left := tuple(chunk for chunk in unit if chunk.path not in whole))]
        if todo and not self.destination.reopen_share():
            return False
        show = Counter("converting", share, self._progress)
        for chunk in share:
            if chunk.path in whole:
                show.add(chunk)
        self._write(todo, show)
        self.sink.settle_names(share)
        return self.destination.share_done()

    def finish(self, verify: bool) -> None:
        """Write everything that is not a chunk, what makes the checkpoint complete last, and wait for the disk."""
        self._fill_gaps()
        job, directory, hashes = self.job, self.destination.checkpoint, self.destination.journaled()
        if job.fingerprint() != job.before:
            raise InputError(f"{job.source.directory}: changed while it was read; leave it alone and convert again")
        self.sink.describe(self.plan, job.companions, job.config)
        if verify:
            self._verify(hashes)
        self.sink.complete(self.plan, lambda: make_manifest(job.source, job.before, self.plan, hashes, directory))

    def _fill_gaps(self) -> None:
        """Write what is missing of any share, although it was called done: a power loss, or a hand, may have taken it."""
        hashes = self.destination.journaled()
        gaps = [chunk for chunk in self.plan.chunks if chunk.path not in hashes or not self.sink.is_whole(chunk)]
        self._write([(chunk,) for chunk in gaps], Counter("converting", gaps, self._progress))

    def _write(self, units: list[tuple[Chunk, ...]], show: Counter) -> None:
        with contextlib.closing(self.destination.journal()) as journal:
            for unit, nbytes in in_threads(lambda: self._writer(journal), units, self.needs.workers, self.stop):
                self.bytes_read += nbytes
                for chunk in unit:
                    # Here, while the threads go on: the disk has been at work on these pages since they were written.
                    self.sink.settle(chunk)
                    self.bytes_written += chunk.nbytes
                    show.add(chunk)
            journal.sync()
        stop_here(self.stop)

    def _writer(self, journal: Noted) -> Callable[[tuple[Chunk, ...]], tuple[tuple[Chunk, ...], int]]:
        reader = self.job.reader()

        def write(unit: tuple[Chunk, ...]) -> tuple[tuple[Chunk, ...], int]:
            before = reader.bytes_read
            for chunk in unit:
                pieces = reader.pieces(chunk)
                stored = self.sink.write_chunk(chunk, pieces)
                journal.add(chunk.path, Hashes(stored, pieces.digests, pieces.lost))
            return unit, reader.bytes_read - before

        return write

    def _whole(self, share: list[Chunk]) -> set[str]:
        """Paths of the chunks that an earlier run has noted, read back: a power loss may have taken what was there."""
        journaled = self.destination.journaled()

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

    def _verify(self, hashes: Mapping[str, Hashes]) -> None:
        def checker():
            reader, buffer = self.job.reader(), check_buffer()

            def check(unit: tuple[Chunk, ...]) -> list[tuple[Chunk, str | None]]:
                return [(chunk, check_one(chunk)) for chunk in unit]

            def check_one(chunk: Chunk) -> str | None:
                digest, line = self.sink.check(chunk, reader.pieces(chunk), buffer)
                if line is None and digest != hashes[chunk.path].stored:
                    return (
                        f"{self.destination.checkpoint}: {chunk.target.name}: {chunk.path}: its hash has changed; convert again"
                    )
                return line

            return check

        show, wrong = Counter("verifying", self.plan.chunks, self._progress), []
        for unit in in_threads(checker, self.plan.units, self.needs.workers, self.stop):
            for chunk, line in unit:
                if line:
                    wrong.append((chunk, line))
                    self.sink.discard(chunk)
                show.add(chunk)
        stop_here(self.stop)
        if wrong:
            raise Different(a_line_a_tensor(self.destination.checkpoint, wrong))


def _incomplete(error: OSError, destination: Destination) -> InputError | Incomplete:
    """What the system's error means: before the first chunk a place that cannot be used, after it an interruption."""
    found = system_error(error, str(error.filename or destination.work))
    begun = False
    with contextlib.suppress(OSError):
        begun = destination.checkpoint.is_dir()
    if not begun:
        return InputError(*found.faults if found else [f"{destination.work}: {error}; give another place"])
    what, to_do = meaning(error) or (f"writing failed ({error})", "")
    to_do = to_do if isinstance(found, Incomplete) else "mend that"
    return Incomplete(f"{destination.work}: {what}; what is written is kept there: {to_do}, and the same command resumes")
