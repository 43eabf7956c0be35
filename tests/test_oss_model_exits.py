"""How commands end: an exit code an error, one line a fault, and never a traceback but for a bug."""

import errno
import os
import signal
import subprocess
import sys
from unittest import mock

import click
import pytest

from converter.errors import Different
from oss_model import exits
from oss_model.errors import Incomplete, InputError, OutOfMemory, place_faults
from oss_model.exits import ending, run_click, run_command


def system(number: int, *file: str) -> OSError:
    return OSError(number, os.strerror(number), *file)


ENDINGS = [
    (InputError("a", "b"), 2, ["a", "b"]),
    (Different(["a", "b"]), 1, ["a", "b"]),
    (Incomplete("a"), 3, ["a"]),
    (OutOfMemory("a"), 3, ["a"]),
    (KeyboardInterrupt(), 130, ["interrupted"]),
    (KeyboardInterrupt("go on"), 130, ["interrupted; go on"]),
    (system(errno.EACCES, "f"), 2, ["f: permission denied; give another place, or ask for permission"]),
    (system(errno.EROFS, "f"), 2, ["f: on a read-only file system; give another place, or have it mounted for writing"]),
    (system(errno.ENOTDIR, "f"), 2, ["f: below a file, where only a directory can have anything in it; give another place"]),
    (system(errno.ENAMETOOLONG, "f"), 2, ["f: a name longer than the file system allows; give a shorter one"]),
    (system(errno.ELOOP, "f"), 2, ["f: symbolic links that lead in a circle; mend them, or give another place"]),
    (system(errno.ENOENT, "f"), 2, ["f: no such file or directory; make it, or give another place"]),
    (system(errno.ENOSPC), 3, ["the disk is full; make room"]),
    (system(errno.EDQUOT, "f"), 3, ["f: the quota is used up; make room"]),
    (system(errno.EIO, "f"), 3, ["f: reading or writing failed (input/output error); see that the disk is in order"]),
    # As safetensors and tensorstore say it.
    (Exception("I/O error: No space left on device (os error 28)"), 3, ["the disk is full; make room"]),
    (ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"), 3, ["the disk is full; make room"]),
    (ModuleNotFoundError("no", name="tokenizers.models"), 2,
     ["the package tokenizers.models is needed, and not installed; see Install in README.md"]),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "lines"), ENDINGS, ids=lambda value: type(value).__name__)
def test_an_error_has_one_exit_code_and_a_line_a_fault(error, code, lines, capsys):
    def fails():
        raise error

    assert ending(error) == (code, lines)
    assert run_command(fails) == code
    assert capsys.readouterr() == ("", "".join(f"error: {line}\n" for line in lines))


NO_ROOM = ImportError("a.so: failed to map segment from shared object")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread"), system(errno.ENOMEM), NO_ROOM])
def test_out_of_memory_is_said_with_what_is_free(error, monkeypatch):
    code, [line] = ending(error)
    assert code == 3
    assert line.startswith("out of memory (")
    assert " are free; " in line
    monkeypatch.setattr(exits, "free_memory", mock.Mock(side_effect=MemoryError))
    assert "none is left even to see how much; end other programs" in ending(error)[1][0]


@pytest.mark.parametrize("error", [ValueError("x"), system(errno.EBADF), ModuleNotFoundError("x", name="oss_model.moo")])
def test_what_nobody_expected_is_a_bug_with_its_traceback(error, capsys):
    def fails():
        raise error

    assert run_command(fails) == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback (most recent call last):\n")
    assert "in fails" in err
    assert err.splitlines()[-1].startswith("error: this is a bug of convert-oss, not of your input: please report it")


def test_click_commands_end_likewise(capsys):
    @click.command()
    @click.option("--number", type=int)
    def command(number):
        """Say nothing."""
        return number

    assert run_click(command, "command", []) == 0
    assert run_click(command, "command", ["--number", "4"]) == 4
    assert capsys.readouterr() == ("", "")
    assert run_click(command, "command", ["--help"]) == 0
    assert "Say nothing." in capsys.readouterr().out
    assert run_click(command, "command", ["--number", "x"]) == 2
    problem = "Invalid value for '--number': 'x' is not a valid integer."
    assert capsys.readouterr() == ("", f"error: {problem} (try command --help)\n")
    assert run_click(command, "command", ["--number", ""]) == 2
    problem = "expected no empty argument, found one; is a variable of the shell not set?"
    assert capsys.readouterr() == ("", f"error: command: {problem}\n")


# --- places -----------------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_made_is_found_without_writing(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert place_faults(tmp_path / "new" / "and" / "below") == place_faults(tmp_path) == place_faults(tmp_path / "file") == []
    for name, what in (("file/x", "below a file"), ("loop/x", "symbolic links"), ("n" * 300, "a name longer")):
        (line,) = place_faults(tmp_path / name)
        assert line.startswith(f"{tmp_path / name}: {what}")
    assert place_faults("") == ["expected a name, found an empty one; give another place"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize(("flags", "what"), [(os.ST_RDONLY, "on a read-only file system; "), (0, "permission denied; ")])
def test_a_place_that_cannot_be_written_says_why(tmp_path, monkeypatch, flags, what):
    """The superuser may write anywhere, and tests do not mount: the system's answers are put in."""

    class Mounted:
        f_flag = flags

    monkeypatch.setattr(os, "access", lambda *arguments: False)
    monkeypatch.setattr(os, "statvfs", lambda path: Mounted)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "new", tmp_path / "file"):
        (line,) = place_faults(path)
        assert line.startswith(f"{path}: {what}")
    assert place_faults(tmp_path) == []  # a directory: its user will see


# --- processes --------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time
from oss_model.exits import run_command

def command():
    fds = [open("/dev/null") for _ in range(2)]
    assert min(f.fileno() for f in fds) > 2, "a file got the number of a standard stream"
    for n in range(3):
        print("line", n, flush=True)
        print("progress", n, file=sys.stderr, flush=True)
        time.sleep(0.02)
    if sys.argv[1] == "bug":
        raise ValueError("no")
    if sys.argv[1] == "sleep":
        time.sleep(60)

sys.exit(run_command(command))
"""


def shell(line: str) -> tuple[int, str, str]:
    """Exit code and streams of `line`, in which RUN is the program above. In bash, which tells the code of a pipe's parts."""
    run = f"{sys.executable} -c '{PROGRAM}'"
    done = subprocess.run(["bash", "-c", line.replace("RUN", run)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("what", "code"), [("pass", 0), ("bug", 70)])
@pytest.mark.parametrize(
    ("streams", "out"),
    [("2>&1 | head -1", "line 0\n"), ("2>&-", "line 0\nline 1\nline 2\n"), (">&- 2>&-", ""), ("2>/dev/full >&-", "")],
)
def test_streams_that_are_closed_keep_the_code(streams, out, what, code):
    assert shell(f"RUN {what} {streams}; exit ${{PIPESTATUS[0]}}") == (code, out, "")


def test_a_result_that_could_not_be_written_is_incomplete():
    assert shell("RUN pass >/dev/full 2>&1 | cat; exit ${PIPESTATUS[0]}")[0] == 3
    code, _, err = shell("RUN pass >/dev/full")
    assert (code, err.splitlines()[-1]) == (3, "error: standard output: the disk is full; make room")
    assert "Exception ignored" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_does_what_ctrl_c_does(number, start):
    process = start([sys.executable, "-c", PROGRAM, "sleep"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate()
    assert (process.returncode, err.splitlines()[-1]) == (130, "error: interrupted")
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "ignored"), [("SIGINT", ""), ("SIGTERM", ""), ("SIGTERM", "SIGINT")])
def test_a_signal_is_not_forgotten_in_a_callback_of_the_garbage_collector(number, ignored):
    """Where Python says "Exception ignored", and goes on. SIGINT is ignored where a script says `command &`."""
    code = f"""
import gc, signal, sys, time
from oss_model.exits import run_command

if {bool(ignored)}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

def collected(phase, info):
    if phase == "stop":
        gc.callbacks.remove(collected)
    signal.raise_signal(signal.{number})

def command():
    gc.callbacks.append(collected)
    for _ in range(100):
        gc.collect()
        time.sleep(0.1)

sys.exit(run_command(command))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_what_is_being_imported(number, tmp_path):
    """An extension makes something else of it, or crashes."""
    made = "import signal, time\nsignal.raise_signal(signal.{0})\ntime.sleep(0.2)\nprint('imported', flush=True)\n"
    (tmp_path / "extension.py").write_text(
        "try:\n    import inner\nexcept BaseException as error:\n    raise ImportError('half made') from error\n"
    )
    (tmp_path / "inner.py").write_text(made.format(number))
    code = "import sys, time; from oss_model.exits import run_command; sys.path.insert(0, sys.argv[1])\n"
    code += "def command():\n    import extension\n    time.sleep(60)\nsys.exit(run_command(command))"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "imported\n", "error: interrupted\n")


def test_what_orbax_leaves_behind_is_not_shown():
    """Reads nobody waits for any more: they end after the command, each in a traceback of its own."""
    code = """
import asyncio, logging, sys
from oss_model.errors import InputError
from oss_model.exits import run_command

async def read():
    try:
        await asyncio.sleep(9)
    finally:
        raise Exception("Encountered error while reading array")

class Late:
    def __del__(self):
        loop.call_soon_threadsafe(print)

class Ours:
    def __del__(self):
        raise ValueError("of ours")

def command():
    global loop, task
    loop = asyncio.new_event_loop()
    task = loop.create_task(read())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    try:
        raise KeyError("raised")
    except KeyError:
        logging.getLogger("absl").exception("raised, and logged too")
    raise InputError("no")

code = run_command(command)
del task
Late()
if len(sys.argv) > 1:
    Ours()
sys.exit(code)
"""
    for more in ([], ["ours"]):
        run = subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True)
        shown = [line for line in run.stderr.splitlines() if not line.startswith((" ", "Traceback", "Exception ignored"))]
        assert (run.returncode, shown[0]) == (2, "error: no"), run.stderr
        assert shown[1:] == (["ValueError: of ours"] if more else []), run.stderr
