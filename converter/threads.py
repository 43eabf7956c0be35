"""Work in parallel, results in the calling thread, and an orderly end whatever happens."""

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from oss_model.exits import SIGNALS, interrupt
from oss_model.memory import CORES

WORKERS = max(2, min(8, CORES))
PATIENCE = 1.0  # seconds, for a thread that hangs in the system when nobody waits for its result any more

_thread = threading.local()


class Abandoned(Exception):
    """Ends what a thread of `in_threads` is at, where nobody waits for the result any more."""


def still_wanted() -> None:
    """Called now and then by whatever takes long, in any thread.

    Raises:
      Abandoned: in a thread of `in_threads`, after a second Ctrl-C.
    """
    if hasattr(_thread, "abandoned") and _thread.abandoned.is_set():
        raise Abandoned


def in_threads(
    make: Callable[[], Callable], items: Iterable, workers: int = WORKERS, stop: threading.Event | None = None
) -> Iterator[Any]:
    """Apply a function to all items, in `workers` threads, and yield what it returns as it comes.

    Args:
      make: called once in each thread for the function: what belongs to one thread lives in its closure.
      stop: once it is set, what is under way is finished and yielded, and nothing more is begun.

    If the function raises, the error is raised here, when what is under way is finished. KeyboardInterrupt here, or in the
    code that takes the results, ends it at once, wherever it calls `still_wanted`. No thread is left behind, unless it
    hangs.
    """
    stop, abandoned = stop or threading.Event(), threading.Event()
    todo, lock, failed, end = iter(items), threading.Lock(), threading.Event(), object()
    results: queue.SimpleQueue = queue.SimpleQueue()  # the kernel, not this queue, holds back who writes too fast

    def work() -> None:
        _thread.abandoned = abandoned
        try:
            function = make()
            while not stop.is_set() and not failed.is_set():
                with lock:
                    item = next(todo, end)
                if item is end:
                    break
                results.put((function(item), None))
        except BaseException as error:
            failed.set()
            results.put((None, error))
        finally:
            results.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif result[1] is not None:
                raise result[1]
            else:
                yield result[0]
    except (KeyboardInterrupt, GeneratorExit):
        abandoned.set()
        raise
    finally:
        failed.set()
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()) if abandoned.is_set() else None)


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets. A second one interrupts at once, as usual.

    The same goes for every signal that would raise KeyboardInterrupt; in our commands SIGTERM is one. Off the main
    thread, where signals cannot be handled, nothing sets the event.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    usual = {number: handler for number, handler in before.items() if handler in (signal.default_int_handler, interrupt)}

    def as_usual() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        as_usual()

    for number in usual:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        as_usual()


def stop_here(stop: threading.Event) -> None:
    """Raise KeyboardInterrupt if the event of `interruptible` is set."""
    if stop.is_set():
        raise KeyboardInterrupt
