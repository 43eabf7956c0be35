"""Progress on standard error: a bar on a terminal and in a notebook, a line now and then elsewhere."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator

from converter.plan import Chunk
from oss_model.memory import rss, size
from oss_model.terminal import takes_bars

LINE_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Progress:
    phase: str  # "comparing", "resuming", "converting", "verifying"
    bytes_done: int
    bytes_total: int
    tensors_done: int
    tensors_total: int


class Counter:
    """Counts chunks as they are done, and reports."""

    def __init__(self, phase: str, chunks: list[Chunk], progress: Callable[[Progress], None]):
        self._phase, self._progress = phase, progress
        self._total = sum(chunk.nbytes for chunk in chunks)
        self._left: dict[str, int] = {}
        for chunk in chunks:
            self._left[chunk.target.name] = self._left.get(chunk.target.name, 0) + 1
        self._done = self._tensors_done = 0

    def add(self, chunk: Chunk) -> None:
        self._done += chunk.nbytes
        self._left[chunk.target.name] -= 1
        self._tensors_done += self._left[chunk.target.name] == 0
        self._progress(Progress(self._phase, self._done, self._total, self._tensors_done, len(self._left)))


Show = Callable[[Progress], None]


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Show]:
    """Yield a function for `convert(progress=)`, which shows how far it is: tensors, bytes, rate, time left, memory."""
    if quiet:
        yield lambda progress: None
    elif takes_bars(sys.stderr):
        with _bar() as show:
            yield show
    else:
        yield _lines()


@contextlib.contextmanager
def _bar() -> Iterator[Show]:
    import rich.progress
    from rich.console import Console
    from rich.table import Column

    console = Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        *([rich.progress.TextColumn("{task.fields[tensors]} tensors")] if console.width >= 76 else []),  # else all would wrap
        rich.progress.DownloadColumn(table_column=Column(no_wrap=True)),
        rich.progress.TransferSpeedColumn(table_column=Column(no_wrap=True)),
        rich.progress.TimeRemainingColumn(table_column=Column(no_wrap=True)),
        rich.progress.TextColumn("{task.fields[memory]}"),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        tasks: dict = {}

        def show(progress: Progress) -> None:
            tensors, memory = f"{progress.tensors_done}/{progress.tensors_total}", f"{rss() >> 20} MiB"
            if progress.phase not in tasks:
                tasks[progress.phase] = bar.add_task(progress.phase, total=progress.bytes_total, tensors=tensors, memory=memory)
            bar.update(tasks[progress.phase], completed=progress.bytes_done, tensors=tensors, memory=memory)

        yield show


def _lines() -> Show:
    begun: dict[str, tuple[float, int]] = {}  # of each phase: when, and how much was there already
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        now, whole = time.monotonic(), progress.bytes_done == progress.bytes_total
        first = progress.phase not in begun
        start, there = begun.setdefault(progress.phase, (now, progress.bytes_done))
        if not (first or whole or now - last >= LINE_SECONDS):
            return
        last = now
        rate = (progress.bytes_done - there) / (now - start) if now > start else 0
        left = f", {(progress.bytes_total - progress.bytes_done) / rate:.0f} s left" if rate and not whole else ""
        print(
            f"{progress.phase}: {size(progress.bytes_done)} of {size(progress.bytes_total)}, "
            f"{progress.tensors_done} of {progress.tensors_total} tensors, {size(rate)}/s{left}, {rss() >> 20} MiB",
            file=sys.stderr,
            flush=True,
        )

    return show
