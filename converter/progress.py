"""Progress on standard error: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from oss_model.memory import rss

if TYPE_CHECKING:
    from converter.conversion import Progress

LINE_SECONDS = 10
Show = Callable[["Progress"], None]


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator[Show]:
    """Yield a function that shows how far things are: tensors, bytes, rate, time left, memory."""
    if quiet:
        yield lambda progress: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _lines()


@contextlib.contextmanager
def _bar() -> Iterator[Show]:
    import rich.progress
    from rich.console import Console

    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[tensors]} tensors"),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[memory]}"),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict = {}

        def show(progress: "Progress") -> None:
            tensors, memory = f"{progress.tensors_done}/{progress.tensors_total}", f"{rss() >> 20} MiB"
            if progress.phase not in tasks:
                tasks[progress.phase] = bar.add_task(progress.phase, total=progress.bytes_total, tensors=tensors, memory=memory)
            bar.update(tasks[progress.phase], completed=progress.bytes_done, tensors=tensors, memory=memory)

        yield show


def _lines() -> Show:
    begun: dict[str, tuple[float, int]] = {}  # of each phase: when, and how much was there already
    last = 0.0

    def show(progress: "Progress") -> None:
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
            f"{progress.phase}: {progress.bytes_done / 1e9:.2f} of {progress.bytes_total / 1e9:.2f} GB, "
            f"{progress.tensors_done} of {progress.tensors_total} tensors, {rate / 1e9:.2f} GB/s{left}, {rss() >> 20} MiB",
            file=sys.stderr,
        )

    return show
