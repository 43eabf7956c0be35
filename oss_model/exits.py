"""How a command ends: every exit code, and the one place that turns an error into one.

0    done, or passed
1    different: the comparison diverged, or verification found a difference
2    bad usage, bad input, a bad place, or too little room: found before the first byte was written
3    incomplete: something could not be ended, for want of space or memory for example; the line says what to do
4    the self-test of check-parity failed
70   a bug of ours, with its traceback
130  interrupted, by Ctrl-C or by SIGTERM
"""

import _thread
import contextlib
import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from oss_model.errors import CommandError, Incomplete, InputError, OutOfMemory, meant, nothing_at, system_error
from oss_model.memory import free_memory, out_of_memory, size
from oss_model.terminal import shown

BUG, INTERRUPTED = 70, 130
SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN = "interrupt again"  # name of a thread
OURS = ("oss_model", "converter", "parity", "")


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command to whatever end it comes to: the lines of an error go to standard error, its exit code is returned.

    SIGTERM does what Ctrl-C does, and neither standard output nor standard error need be open, or stay so.

    Args:
      command: returns an exit code, 0 if None. `SystemExit` passes through.
    """
    _keep_streams()
    _hush_what_nobody_catches()
    with _interruptible():
        try:
            code = command() or 0
        except (Exception, KeyboardInterrupt) as error:
            code = _report(error)
        return code or _unwritten()


def run_click(command: Any, name: str, argv: Sequence[str] | None = None) -> int:
    """`run_command` for a `click.Command`, whose wrong usage is bad input like any other.

    Args:
      name: of the command, as people type it.
      argv: its arguments; those of the process if None.

    Where a shell asks for completion (docs/commands.md), that is answered, and the process ends.
    """
    command._main_shell_completion({}, name)  # of `click.Command.main`, which ends in exit codes of its own

    def run() -> int | None:
        arguments = list(sys.argv[1:] if argv is None else argv)
        if "" in arguments:
            raise InputError(f"{name}: expected no empty argument, found one; is a variable of the shell not set?")
        with command.make_context(name, arguments) as context:
            return command.invoke(context)

    return run_command(run)


def ending(error: BaseException) -> tuple[int, list[str]]:
    """The exit code that `error` ends a command with, and the lines that say why."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, ["; ".join(["interrupted", *map(str, error.args)])]
    if isinstance(error, CommandError):
        return error.exit_code, error.faults
    if type(error).__module__ == "click.exceptions":  # which is not imported here: wrong usage, or --help has been shown
        found: Any = error
        if not hasattr(error, "format_message"):
            return found.exit_code, []
        hint = f" (try {found.ctx.command_path} --help)" if getattr(error, "ctx", None) else ""
        return InputError.exit_code, [f"{_said(found)}{hint}"]
    if (reason := out_of_memory(error)) is not None:
        left = "none is left even to see how much"  # by `ulimit -v`, for example
        with contextlib.suppress(MemoryError, ImportError):
            left = f"{size(free_memory())} are free"
        return OutOfMemory.exit_code, [f"out of memory ({reason}): {left}; end other programs, or use a machine with more"]
    if (found := system_error(error)) is not None:
        return found.exit_code, found.faults
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OURS:
        return InputError.exit_code, [f"the package {error.name} is needed, and not installed; see Install in README.md"]
    return BUG, ["this is a bug of convert-oss, not of your input: please report it, with the lines above, where you got it"]


def _said(error: Any) -> str:
    """What click says; of a value that it refuses with what was meant perhaps, as it does itself of an option."""
    if getattr(error, "possibilities", None):  # of an option: the nearest alone
        error.possibilities = difflib.get_close_matches(error.option_name, error.possibilities, 1, 0)
    text = error.format_message()
    wrong = re.search(r"'([^']*)' (?:is not one of|does not exist)", text)
    if wrong is None:
        return text
    choices = {choice: choice for choice in getattr(error.param.type, "choices", ())}
    other = meant(wrong[1], choices) if choices else nothing_at(Path(wrong[1])).removeprefix("nothing")
    return text.removesuffix(".") + other


def _report(error: BaseException) -> int:
    code, lines = ending(error)
    if code == BUG:
        traceback.print_exception(error)
    for line in lines:
        print(shown(f"error: {line}", sys.stderr), file=sys.stderr)
    return code


def _hush_what_nobody_catches() -> None:
    """What Orbax raises, it also logs, whole tracebacks long; and the reads it no longer waits for end in yet others."""
    logging.getLogger("absl").addFilter(_is_no_traceback)
    logging.getLogger("asyncio").addFilter(_is_nothing)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _is_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _is_nothing(record: logging.LogRecord) -> bool:
    return False


def _unraisable(found: Any) -> None:
    """`sys.unraisablehook`, but for coroutines that nobody awaits, and for results that come after their loop is closed.

    Ctrl-C while a callback of the garbage collector runs (JAX has one) would be forgotten with it: it is raised again.
    """
    if isinstance(found.exc_value, KeyboardInterrupt):
        for number in [number for number in SIGNALS if signal.getsignal(number) is interrupt][:1]:
            _again(number)  # while it runs still, perhaps: then this is called once more
        return
    if not isinstance(found.object, types.CoroutineType) and str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def interrupt(number: int, frame: types.FrameType | None) -> None:
    """What our commands do at SIGINT and SIGTERM: raise KeyboardInterrupt, as soon as no module is being imported.

    A C extension that is interrupted while it is made raises what it likes, or crashes (jaxlib, torch).
    """
    while frame is not None and frame.f_code is not run_command.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return _again(number)
        frame = frame.f_back
    raise KeyboardInterrupt


def _again(number: int) -> None:
    """The same signal, a moment later."""
    timer = threading.Timer(0.02, _thread.interrupt_main, [number])
    timer.name, timer.daemon = AGAIN, True
    timer.start()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """`interrupt` at both signals, unless somebody has other plans: `command &` in a script ignores SIGINT."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    main = threading.current_thread() is threading.main_thread()
    ours = [number for number in SIGNALS if main and signal.getsignal(number) is usual[number]]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer) and thread.name == AGAIN:
                thread.cancel()
                thread.join()
        for number in ours:
            signal.signal(number, usual[number])


# --- standard output and standard error -------------------------------------------------------------------------


class _Outlet(io.FileIO):
    """A standard stream that may break: what cannot be written any more is dropped, and `error` says why.

    Otherwise the first line after `| head -1` has gone would end the command, and Python would fail once more when it
    flushes the streams at its own end.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            return len(data)


def _keep_streams() -> None:
    """Make the process's own streams such outlets; those that somebody has put in their place stay."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # closed, as by `2>&-`: a checkpoint's file would get the number, and the libraries' warnings
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _outlet(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _outlet(sys.stderr, 2)


def _outlet(stream: TextIO | None, fd: int) -> TextIO:
    raw = _Outlet(fd, "wb", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):  # None: it was closed
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    with contextlib.suppress(OSError):
        stream.flush()
    buffer = raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw)  # python -u has none
    through, lines = stream.write_through, stream.line_buffering
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=lines, write_through=through)


def _unwritten() -> int:
    """0, or the exit code of a result that did not reach a file: a reader who has left is none."""
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    error = raw.error if isinstance(raw, _Outlet) else None
    if error is None or error.errno == errno.EPIPE:
        return 0
    return _report(system_error(error, "standard output") or Incomplete(f"standard output: {error}"))
