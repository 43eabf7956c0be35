"""Work in parallel, results in the calling thread, and an orderly end whatever happens."""

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2  # macOS has no affinity
WORKERS = max(2, min(8, CORES))


def in_threads(
    make: Callable[[], Callable], items: Iterable, workers: int = WORKERS, stop: threading.Event | None = None
) -> Iterator[Any]:
    """Apply a function to all items, in `workers` threads, and yield what it returns as it comes.

    Args:
      make: called once in each thread for the function: what belongs to one thread lives in its closure.
      stop: once it is set, what is under way is finished and yielded, and nothing more is begun.

    If the function raises, the error is raised here. Whatever happens, no thread is left behind.
    """
    stop = stop or threading.Event()
    todo, lock, failed, end = iter(items), threading.Lock(), threading.Event(), object()
    results: queue.SimpleQueue = queue.SimpleQueue()  # the kernel, not this queue, holds back who writes too fast

    def work() -> None:
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
    finally:
        failed.set()
        for thread in threads:
            thread.join()


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
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is signal.default_int_handler]

    def as_usual() -> None:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        as_usual()

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        as_usual()


def stop_here(stop: threading.Event) -> None:
    """Raise KeyboardInterrupt if the event of `interruptible` is set."""
    if stop.is_set():
        raise KeyboardInterrupt
