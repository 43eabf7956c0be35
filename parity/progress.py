"""Progress on standard error: a bar on a terminal and in a notebook, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from oss_model.terminal import takes_bars

LINE_SECONDS = 10
Show = Callable[[int, int, str], None]


@contextlib.contextmanager
def progress_bar() -> Iterator[Show]:
    """Yield a function for `compare(progress=)`, which shows what is being done and how far it is."""
    if not takes_bars(sys.stderr):
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    what = TextColumn("{task.description:<10}", table_column=Column(max_width=30, no_wrap=True))
    columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _lines() -> Show:
    start = last = time.monotonic()

    def show(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            print(f"{done} of {total} done, {now - start:.0f} s: {what}", file=sys.stderr, flush=True)

    return show
