"""Work in parallel, results in the calling thread, and an orderly end whatever happens."""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

WORKERS = max(2, min(8, len(os.sched_getaffinity(0))))


def in_threads(make: Callable[[], Callable], items: Iterable, workers: int = WORKERS) -> Iterator[Any]:
    """Apply a function to all items, in `workers` threads, and yield what it returns as it comes.

    Args:
      make: called once in each thread for the function: what belongs to one thread lives in its closure.

    If the function raises, or the caller stops (Ctrl-C), what is under way is finished, nothing more is begun, and
    no thread is left behind.
    """
    todo, lock, stop = iter(items), threading.Lock(), threading.Event()
    results: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            function = make()
            while not stop.is_set():
                with lock:
                    item = next(todo, stop)  # `stop` itself marks the end: no item is it
                if item is stop:
                    break
                results.put((function(item), None))
        except BaseException as error:
            stop.set()
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
        stop.set()
        for thread in threads:
            thread.join()
