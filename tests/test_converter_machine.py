"""What the machine does meanwhile: disks that are really full or read-only, limits, clocks that jump, sources that shrink."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from converting import contents

from converter import convert
from converter.cli import main

CUT_OFF = """
import os, signal, sys
from converter import convert
from converter.cli import main
source, out = sys.argv[1:3]
"""


def run(code: str, *arguments: object, before: str = "true") -> subprocess.CompletedProcess:
    """Python code in a process, and a mount namespace, of its own, after some commands of a shell there."""
    shell = ["unshare", "-m", "sh", "-c", f'{before} && exec "$0" -c "$@"', sys.executable, CUT_OFF + code]
    return subprocess.run([*shell, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def volume(tmp_path) -> Path:
    """Where a file system can be mounted, in a namespace of its own."""
    place = tmp_path / "volume"
    place.mkdir()
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    return place


def only_line(result: subprocess.CompletedProcess) -> str:
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line


def test_a_disk_that_somebody_else_fills_meanwhile(small, volume):
    """The rerun, once there is room, goes on."""
    code = """
from pathlib import Path
from converter.store import Store
filler, write = Path(out).with_name("filler"), Store.write_chunk
left = [8]
def fill(self, chunk, pieces):
    left[0] -= 1
    if left[0] == 0:
        try:
            with open(filler, "wb", 0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass
    return write(self, chunk, pieces)
Store.write_chunk = fill
code = main([source, out, "-q"])
Store.write_chunk = write
filler.unlink()
print(code, os.path.exists(out), convert(source, out).status)
"""
    result = run(code, small, volume / "out", before=f"mount -t tmpfs -o size=16M tmpfs {volume}")
    assert result.stdout == "3 False resumed\n", result.stderr
    assert "the disk is full; what is written is kept there: make room, and the same command resumes" in only_line(result)


def test_a_disk_that_is_too_small_from_the_start(small, volume):
    code = "print(main([source, out, '-q']), os.listdir(os.path.dirname(out)))"
    result = run(code, small, volume / "out", before=f"mount -t tmpfs -o size=256K tmpfs {volume}")
    assert result.stdout == "2 []\n", result.stderr
    assert "bytes of free space, found " in only_line(result)


def test_a_disk_that_is_read_only(small, volume):
    code = "print(main([source, out, '-q']), os.listdir(os.path.dirname(out)))"
    result = run(code, small, volume / "out", before=f"mount -t tmpfs -o ro tmpfs {volume}")
    assert result.stdout == "2 []\n", result.stderr
    assert "on a read-only file system; give another place, or have it mounted for writing" in only_line(result)


@pytest.mark.parametrize("to", ["orbax", "hf-bf16"])
def test_a_limit_on_the_size_of_files(small, tmp_path, to):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
code = main([source, out, "-q", "--to", "{to}"])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print(code, os.path.exists(out), main([source, out, "-q", "--to", "{to}"]), os.path.exists(out))
"""
    called = [sys.executable, "-c", CUT_OFF + code, str(small), str(tmp_path / "out")]
    result = subprocess.run(called, capture_output=True, text=True)
    assert result.stdout == "3 False 0 True\n", result.stderr
    assert "a file larger than is allowed; what is written is kept there: allow more (ulimit -f), and" in only_line(result)


def test_a_source_that_shrinks_while_it_is_read(hf, whole, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(hf, source)  # with its times
    file = source / "model.safetensors"

    def shrink(progress) -> None:
        os.truncate(file, file.stat().st_size // 4)

    with pytest.raises(ValueError, match=r"model.safetensors: ended at byte \d+, \d+ bytes early; it changed while it"):
        convert(source, out, progress=shrink)
    assert not out.exists()
    assert main([str(source), str(out)]) == 2  # it is damaged for good
    assert "found a truncated or damaged one" in capsys.readouterr().err
    shutil.copy2(hf / "model.safetensors", file)
    assert convert(source, out).status == "resumed"
    assert contents(out) == whole


def test_a_clock_that_jumps_back_between_runs(hf, whole, tmp_path, fail_after, monkeypatch):
    """What is there is dated in the future then; what counts is what is in it."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(hf, source)
    fail_after(10)
    with pytest.raises(Exception, match="the disk is full"):
        convert(source, out)
    monkeypatch.undo()
    ahead = time.time() + 20 * 365 * 86400
    for path in tmp_path.rglob("*"):
        if source not in (path, *path.parents):
            os.utime(path, (ahead, ahead))
    past = time.gmtime(978_307_200)  # 2001
    monkeypatch.setattr(time, "gmtime", lambda *_: past)
    monkeypatch.setattr(time, "time", lambda: 978_307_200.0)
    result = convert(source, out)
    assert result.status == "resumed"
    assert 0 < result.seconds < 600
    assert contents(out) == whole
    assert json.loads((out / "conversion.json").read_text())["created"] == "2001-01-01T00:00:00Z"
    for path in out.rglob("*"):
        os.utime(path, (ahead, ahead))
    assert convert(source, out).status == "already-complete"
    monkeypatch.undo()
    assert convert(source, out).status == "already-complete"
