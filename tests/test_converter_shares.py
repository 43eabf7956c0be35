"""Processes that convert together or one after the other, and are killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from converting import contents

from converter import convert, store
from converter.errors import Different
from converter.form import Form
from converter.job import open_job
from converter.workspace import Workspace
from oss_model.errors import InputError

SLOWLY = """
import sys, time
from converter.store import Store
from converter.cli import main
write = Store.write_chunk
def slow(*args):
    time.sleep(0.01)
    return write(*args)
Store.write_chunk = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def begin(start):
    return lambda *argv: start([sys.executable, "-c", SLOWLY, *map(str, argv)], stderr=subprocess.PIPE, text=True)


def wait_for_chunks(out: Path, count: int) -> None:
    journals = out.with_name(out.name + ".partial")
    deadline = time.monotonic() + 60
    while sum(path.read_bytes().count(b"chunk") for path in journals.glob("journal.*")) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.long
def test_sigkill_at_any_moment(hf, whole, tmp_path, begin):
    out = tmp_path / "out"
    for count in (1, 40, 120):
        process = begin(hf, out)
        wait_for_chunks(out, count)
        process.kill()
        process.communicate()
        assert not out.exists()
    result = convert(hf, out)
    assert (result.status, result.verified) == ("resumed", True)
    assert result.bytes_written < 0.6 * sum(len(data) for name, data in whole.items() if "/c/" in name)
    assert contents(out) == whole


def test_ctrl_c_finishes_what_is_under_way_and_says_how_to_go_on(hf, whole, tmp_path, begin):
    out = tmp_path / "out"
    process = begin(hf, out, "-q")
    wait_for_chunks(out, 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert err == f"error: interrupted; what is written is kept in {out}.partial: run the same command again to go on\n"
    assert process.returncode == 130
    assert not out.exists()
    noted = len([line for line in (tmp_path / "out.partial" / "journal.1-of-1").read_text().splitlines() if line])
    files = len([path for path in (tmp_path / "out.partial").glob("checkpoint/*/c/**/*") if path.is_file()])
    assert noted == files
    assert convert(hf, out).status == "resumed"
    assert contents(out) == whole


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_one_checkpoint_and_one_of_them_dies(hf, whole, tmp_path, begin, count):
    out = tmp_path / "out"
    processes = [begin(hf, out, "-q", "--process", f"{index}/{count}") for index in range(1, count + 1)]
    wait_for_chunks(out, 20)
    processes[-1].kill()
    for process in processes[:-1]:
        assert process.wait() == 0, process.stderr.read()
    processes[-1].communicate()
    assert not out.exists()
    again = begin(hf, out, "-q", "--process", f"{count}/{count}")
    assert again.communicate()[1] == ""
    assert again.returncode == 0
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def of_the_first_share(out: Path) -> Path:
    """A chunk that process 1/2 has written."""
    name, partial = "layers.0.mlp.gate_up.weight.value/c/4/0/0/0", out.with_name("out.partial")
    assert name in (partial / "journal.1-of-2").read_text()
    return partial / "checkpoint" / name


def lose(path: Path, how: str) -> None:
    """What a power loss may do to a share that was called done."""
    if how == "its file":
        path.unlink()
    elif how == "its directory":
        shutil.rmtree(path.parents[2])
    elif how == "its end":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        journal = next(parent for parent in path.parents if parent.name == "checkpoint").with_name("journal.1-of-2")
        journal.write_bytes(b"".join(line for line in journal.read_bytes().splitlines(True) if b'c/4/0/0/0"' not in line))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("how", ["its file", "its directory", "its end", "its line in the journal"])
def test_who_finishes_writes_what_other_shares_have_lost(small, small_whole, tmp_path, how, verify):
    out = tmp_path / "out"
    assert convert(small, out, process=(1, 2), verify=verify).status == "share-written"
    lose(of_the_first_share(out), how)
    assert convert(small, out, process=(2, 2), verify=verify).status == "complete"
    assert contents(out) == small_whole


def test_who_finishes_mends_another_share_that_verification_has_found_wrong(small, small_whole, tmp_path):
    """The line says to convert again, which must be true of every share, whichever has the damage."""
    out = tmp_path / "out"
    convert(small, out, process=(1, 2))
    wrong = of_the_first_share(out)
    wrong.write_bytes(bytes(wrong.stat().st_size))
    with pytest.raises(Different, match=r"gate_up.weight: .*/c/4/0/0/0: differs from the source, .*; convert again"):
        convert(small, out, process=(2, 2))
    assert not out.exists()
    assert convert(small, out, process=(2, 2)).verified
    assert contents(out) == small_whole


def test_a_share_is_not_written_again_while_another_process_finishes(tmp_path):
    mine, other = (Workspace(tmp_path / "out.partial", (index, 2)) for index in (1, 2))
    for workspace in (mine, other):
        workspace.lock()
        workspace.begin({"source": {}, "layout": "hf", "dtype": "bfloat16", "version": []}, restart=False)
    assert not mine.share_done()
    assert other.share_done()
    with ThreadPoolExecutor() as pool:
        again = pool.submit(mine.reopen_share)
        with pytest.raises(TimeoutError):
            again.result(0.1)
        assert (tmp_path / "out.partial" / "done.1-of-2").exists()
        other.leave()
        assert again.result(10)
    other.lock()
    assert not other.share_done()  # it was taken back
    assert mine.share_done()
    shutil.rmtree(mine.checkpoint)  # finished
    mine.leave()
    assert not other.reopen_share()
    other.leave()


def test_a_share_is_on_the_disk_by_name_before_it_is_called_done(small, tmp_path, monkeypatch):
    fsync, synced, checked = os.fsync, {}, []

    def recording(fd):
        fsync(fd)
        synced[os.fstat(fd).st_ino] = os.fstat(fd).st_mtime_ns

    def done(path, data, durable=False):
        if path.name.startswith("done."):
            checkpoint = path.parent / "checkpoint"
            for found in [checkpoint, *checkpoint.rglob("*")]:
                assert synced.get(found.stat().st_ino) == found.stat().st_mtime_ns, found
                checked.append(found)
        store.write_file(path, data, durable)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr("converter.workspace.write_file", done)
    convert(small, tmp_path / "out", process=(2, 2))
    assert len(checked) > 50


def test_the_same_share_twice_at_once_is_refused(hf, tmp_path):
    mine = Workspace(tmp_path / "out.partial", (1, 2))
    mine.lock()
    with open_job(hf, Form()) as job:
        mine.begin(job.before, restart=False)
    with pytest.raises(InputError, match=r"process 1/2 is already at work there; wait until it has ended, or end it"):
        convert(hf, tmp_path / "out", process=(1, 2))
    with pytest.raises(InputError, match="a conversion by 2 processes runs there"):
        convert(hf, tmp_path / "out", process=(1, 3))
    with pytest.raises(InputError, match="another convert-oss is writing there"):
        convert(hf, tmp_path / "out")
    mine.leave()
    assert convert(hf, tmp_path / "out").status == "complete"
