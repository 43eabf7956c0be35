"""Progress on standard error: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_SECONDS = 10


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function (phase, done, total in bytes) that shows how far things are."""
    if quiet:
        yield lambda phase, done, total: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _lines()


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        yield show


def _lines() -> Callable[[str, int, int], None]:
    last = {"phase": "", "time": 0.0}

    def show(phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != last["phase"] or done == total or now - last["time"] >= LINE_SECONDS:
            print(
                f"{phase}: {done / 1e9:.2f} of {total / 1e9:.2f} GB ({done * 100 // max(total, 1)}%)",
                file=sys.stderr,
                flush=True,
            )
            last.update(phase=phase, time=now)

    return show
