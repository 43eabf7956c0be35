"""The self-test's runs, shared among processes of this machine."""

import contextlib
import multiprocessing.connection
import signal
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import transformers

from oss_model.errors import Incomplete
from oss_model.memory import CORES, free_memory
from parity.injection.outcomes import SelfTest
from parity.injection.selftest import Convert, Progress, self_test

DEVICES = 8  # simulated, for the mistakes of meshes
PROCESS_BYTES = 4 << 30  # one comes to take 3 GB, with all that it compiles


def processes_here() -> int:
    """How many of them this machine has cores and memory for; one, where they would share an accelerator."""
    _simulate_devices()
    return max(1, min(CORES, free_memory() // PROCESS_BYTES)) if jax.default_backend() == "cpu" else 1


def in_processes(processes: int, scratch: Path, convert: Convert, *, progress: Progress, **options: Any) -> SelfTest:
    """`self_test(**options)`, with its runs shared among processes of this machine; one is this one.

    Raises:
      Incomplete: a process was ended from outside.
      Exception: what ended one of them.
    """
    if processes == 1:
        _simulate_devices()
        return self_test(scratch, convert, progress=progress, **options)
    spawn, start, result = multiprocessing.get_context("spawn"), time.monotonic(), SelfTest()
    with contextlib.ExitStack() as stack:
        running: dict[Connection, Any] = {}
        done: dict[Connection, tuple[int, int]] = {}
        parts: dict[Connection, SelfTest] = {}
        for which in range(processes):
            ours, theirs = spawn.Pipe(duplex=False)
            given = options | {"share": (which, processes)}
            process = spawn.Process(target=_process, args=(theirs, scratch / str(which), convert, given), daemon=True)
            process.start()
            stack.enter_context(ours)
            stack.callback(process.join)  # after all are told to end: nothing is written where the caller clears up
            theirs.close()  # so that its end is seen here
            running[ours], done[ours] = process, (0, 0)
        for process in running.values():
            stack.callback(process.terminate)
        while working := [pipe for pipe in running if pipe not in parts]:
            for pipe in multiprocessing.connection.wait(working):
                assert isinstance(pipe, Connection)
                try:
                    said = pipe.recv()
                except EOFError:
                    running[pipe].join()
                    code = running[pipe].exitcode
                    why = ", as by a system without memory" if code == -signal.SIGKILL else ""
                    raise Incomplete(f"a process of the self-test was ended, exit code {code}{why}; run it again") from None
                if isinstance(said, Exception):
                    raise said
                if isinstance(said, SelfTest):
                    parts[pipe] = said
                    continue
                count, total, what = said
                done[pipe] = count, total
                counts, totals = zip(*done.values(), strict=True)
                if all(totals):
                    progress(sum(counts), sum(totals), what)
    for pipe in running:
        result.add(parts[pipe])
    result.seconds = time.monotonic() - start
    return result


def _simulate_devices() -> None:
    with contextlib.suppress(RuntimeError):  # they are there already
        jax.config.update("jax_num_cpu_devices", DEVICES)  # mistakes of meshes are put into the process


def _process(pipe: Connection, scratch: Path, convert: Convert, options: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the first process, and that one the others
    _simulate_devices()
    transformers.logging.set_verbosity_error()
    try:
        pipe.send(self_test(scratch, convert, progress=lambda *state: pipe.send(state), **options))
    except Exception as e:
        e.add_note(traceback.format_exc())
        pipe.send(e)
