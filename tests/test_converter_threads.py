"""Work in threads, its journal and its progress: an orderly end, whole lines, units that say something."""

import errno
import os
import threading
import time

import pytest

from converter import journal as journals
from converter.journal import Hashes, Journal, read_journals
from converter.progress import Progress, progress_bar
from converter.threads import in_threads, still_wanted


def test_whoever_stops_taking_results_ends_what_is_under_way():
    """As the second Ctrl-C does; the first lets it finish."""
    ended = threading.Event()

    def slow(item):
        if item:
            try:
                for _ in range(1000):
                    still_wanted()
                    time.sleep(0.01)
            finally:
                ended.set()
        return item

    def take():
        for _ in in_threads(lambda: slow, range(4), workers=2):
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        take()
    assert time.monotonic() - start < 2
    assert ended.is_set()
    still_wanted()  # this thread is nobody's


def test_an_error_waits_for_what_is_under_way():
    begun, finished = threading.Event(), []

    def work(item):
        if not item:
            begun.wait()
            raise ValueError("the first")
        begun.set()
        time.sleep(0.2)
        still_wanted()
        finished.append(item)

    with pytest.raises(ValueError, match="the first"):
        list(in_threads(lambda: work, range(2), workers=2))
    assert finished == [1]


# --- the journal ------------------------------------------------------------------------------------------------


@pytest.fixture
def short_writes(monkeypatch):
    """Writes of at most seven bytes, of which the n-th, and all after it, find the disk full."""

    def install(full_after: int = 10**9):
        write, left = os.write, [full_after]

        def short(fd, data):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(fd, data[:7])

        monkeypatch.setattr(journals.os, "write", short)

    yield install
    monkeypatch.undo()


def hashes(number: int) -> Hashes:
    return Hashes(bytes([number]) * 16, (bytes([number, 1]) * 8,))


def test_a_line_that_the_system_takes_in_parts_is_whole(tmp_path, short_writes):
    short_writes()
    journal = Journal(tmp_path / "journal")
    threads = [threading.Thread(target=journal.add, args=(f"chunk/{number}", hashes(number))) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert read_journals([tmp_path / "journal"]) == {f"chunk/{number}": hashes(number) for number in range(20)}


def test_a_line_cut_short_by_a_full_disk_spoils_no_other(tmp_path, short_writes, monkeypatch):
    journal = Journal(tmp_path / "journal")
    journal.add("chunk/0", hashes(0))
    with monkeypatch.context():
        short_writes(full_after=3)
        with pytest.raises(OSError, match="No space left"):
            journal.add("chunk/1", hashes(1))
    monkeypatch.undo()
    journal.add("chunk/2", hashes(2))
    journal.close()
    assert read_journals([tmp_path / "journal"]) == {"chunk/0": hashes(0), "chunk/2": hashes(2)}


def test_a_closed_journal_writes_into_nobody_elses_file(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.close()
    with open(tmp_path / "other", "wb"), pytest.raises(OSError, match="Bad file descriptor"):
        journal.add("chunk/0", hashes(0))
    assert (tmp_path / "other").read_bytes() == b""


# --- progress ---------------------------------------------------------------------------------------------------


def test_progress_of_a_small_checkpoint_is_in_small_units(capsys):
    with progress_bar(quiet=False) as show:
        show(Progress("converting", 4_100, 2_300_000, 1, 88))
        show(Progress("converting", 2_300_000, 2_300_000, 88, 88))
        show(Progress("verifying", 41_800_000_000, 41_800_000_000, 411, 411))
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("converting: 4.1 KB of 2.3 MB, 1 of 88 tensors, 0 bytes/s, ")
    assert second.startswith("converting: 2.3 MB of 2.3 MB, 88 of 88 tensors, ")
    assert third.startswith("verifying: 41.8 GB of 41.8 GB, 411 of 411 tensors, ")
