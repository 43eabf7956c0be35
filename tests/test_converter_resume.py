"""Cut off anywhere, a conversion is taken up, ends byte-identical, and never looks complete before it is."""

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from converting import contents, tree

from converter import convert
from converter.errors import Incomplete
from converter.workspace import MARK, Workspace
from oss_model.errors import InputError


def cut_off(hf: Path, out: Path, fail_after, monkeypatch, count: int = 100) -> Path:
    """Convert until the disk is full; returns the unfinished checkpoint."""
    fail_after(count)
    with pytest.raises(Incomplete):
        convert(hf, out)
    monkeypatch.undo()
    assert not out.exists()
    return out.with_name(out.name + ".partial") / "checkpoint"


def test_a_full_disk_loses_nothing(hf, whole, tmp_path, fail_after, monkeypatch):
    out = tmp_path / "out"
    fail_after(100)
    with pytest.raises(Incomplete) as caught:
        convert(hf, out)
    assert str(caught.value) == (
        f"{out}.partial: the disk is full; what is written is kept there: make room, and the same command resumes"
    )
    monkeypatch.undo()
    assert not out.exists()
    result = convert(hf, out)
    assert result.status == "resumed"
    total = sum(len(data) for name, data in whole.items() if "/c/" in name)
    written = sum(len(data) for name, data in whole.items() if "/c/" in name) - result.bytes_written
    assert 0 < result.bytes_written < total
    assert written > total // 3
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("seed", range(4))
def test_power_loss_may_take_any_part_of_what_was_written(hf, whole, tmp_path, fail_after, monkeypatch, seed):
    partial = cut_off(hf, tmp_path / "out", fail_after, monkeypatch)
    chance = random.Random(seed)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in [*chance.sample(files, len(files) // 2), *partial.parent.glob("journal.*")]:
        data = path.read_bytes()
        keep = chance.randrange(len(data))
        # Dropped, truncated, or of its full length with zeros where data had not arrived.
        match chance.randrange(3) if partial in path.parents else 1:
            case 0:
                path.unlink()
            case 1:
                path.write_bytes(data[:keep])
            case 2:
                path.write_bytes(data[:keep] + bytes(len(data) - keep))
    assert convert(hf, tmp_path / "out").verified
    assert contents(tmp_path / "out") == whole


def test_everything_is_on_the_disk_before_the_rename(hf, tmp_path, monkeypatch):
    fsync, synced, checked = os.fsync, {}, []

    def recording(fd):
        fsync(fd)
        synced[os.fstat(fd).st_ino] = os.fstat(fd).st_mtime_ns

    def rename(self, target):
        for path in [self, *self.rglob("*")]:
            assert synced.get(path.stat().st_ino) == path.stat().st_mtime_ns, path
            checked.append(path)
        return os.rename(self, target)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(Path, "rename", rename)
    convert(hf, tmp_path / "out", verify=False)
    assert len(checked) > 168 * 2
    assert synced.get(tmp_path.stat().st_ino) is not None


def test_another_dtype_source_or_version_is_noticed(hf, whole, tmp_path, fail_after, monkeypatch):
    out = tmp_path / "out"
    source = tmp_path / "source"
    subprocess.run(["cp", "-rp", hf, source], check=True)
    cut_off(source, out, fail_after, monkeypatch)
    what_to_do = "remove that directory, or --overwrite, to begin anew"
    with pytest.raises(InputError) as caught:
        convert(source, out, "mxfp4")
    assert caught.value.faults == [
        f'{out}.partial: an unfinished conversion with another dtype: expected "bfloat16", found "mxfp4"; {what_to_do}'
    ]
    before = (source / "model.safetensors").stat().st_mtime_ns
    os.utime(source / "model.safetensors")
    with pytest.raises(InputError, match=r"an unfinished conversion with another source: expected .*, found .*; remove that"):
        convert(source, out)
    os.utime(source / "model.safetensors", ns=(before, before))
    with monkeypatch.context() as patch:
        patch.setattr("converter.manifest.FORMAT", 99)
        with pytest.raises(InputError, match=r"an unfinished conversion with another version: expected .*, found .*99"):
            convert(source, out)
    assert convert(source, out, "mxfp4", overwrite=True).status == "complete"
    assert json.loads((out / "conversion.json").read_text())["dtype"] == "mxfp4"


def test_a_source_that_changes_while_it_is_read_is_refused(hf, tmp_path):
    source = tmp_path / "source"
    subprocess.run(["cp", "-rp", hf, source], check=True)

    def touch(progress):
        os.utime(source / "model.safetensors")

    with pytest.raises(InputError, match="changed while it was read; leave it alone and convert again"):
        convert(source, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_a_second_converter_refuses(hf, tmp_path):
    busy = []

    def another(progress):
        if not busy:
            with pytest.raises(InputError) as caught:
                convert(hf, tmp_path / "out")
            busy.append(str(caught.value))

    convert(hf, tmp_path / "out", progress=another)
    assert busy == [f"{tmp_path}/out.partial: another convert-oss is writing there; wait until it has ended, or end it"]


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoint/weights.bin", "journal.1-of-1", "state.json", "lock"])
def test_what_is_not_an_unfinished_conversion_is_left_alone(small, tmp_path, name):
    """Whatever it is called: nothing there says that it is ours."""
    path = tmp_path / "out.partial" / name
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    with pytest.raises(InputError) as caught:
        convert(small, tmp_path / "out", overwrite=True)
    assert str(caught.value) == (
        f"{tmp_path}/out.partial: expected an unfinished conversion, found other files ({name.split('/')[0]}); move them away"
    )
    assert tree(tmp_path) == {f"out.partial/{name}": b"years of work"}


def test_what_is_put_beside_an_unfinished_conversion_is_left_alone(small, tmp_path, fail_after, monkeypatch):
    """Names that only begin like ours; with the options that throw most away."""
    partial = cut_off(small, tmp_path / "out", fail_after, monkeypatch, 10).parent
    (partial / "checkpoint-500").mkdir()
    for name in ("checkpoint-500/model.bin", "journal.md", "locked.txt", "done.1-of-1.bak", "replaced.old"):
        (partial / name).write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        convert(small, tmp_path / "out", "float32", overwrite=True)
    some = "checkpoint-500, done.1-of-1.bak, journal.md and 2 more"
    assert str(caught.value) == f"{partial}: expected an unfinished conversion, found other files ({some}); move them away"
    assert tree(tmp_path) == before


def test_an_unfinished_conversion_of_version_0_1_0_is_taken_up(small, tmp_path, fail_after, monkeypatch):
    """Its lock says nothing; its state.json does."""
    partial = cut_off(small, tmp_path / "out", fail_after, monkeypatch, 10).parent
    (partial / "lock").write_bytes(b"")
    assert convert(small, tmp_path / "out").status == "resumed"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("lock", [None, b"", MARK[:20], bytes(len(MARK))])
def test_cut_off_before_the_workspace_says_whose_it_is(small, tmp_path, lock):
    (tmp_path / "out.partial").mkdir()
    if lock is not None:
        (tmp_path / "out.partial" / "lock").write_bytes(lock)
    assert convert(small, tmp_path / "out", verify=False).status == "complete"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_what_the_manifest_names_and_nothing_else(small, small_out, tmp_path):
    out = Path(shutil.copytree(small_out, tmp_path / "out"))
    (out / "run-1").mkdir()
    (out / "run-1" / "step_100").write_text("weeks of training")
    (out / "for later").mkdir()
    (out / "notes.md").symlink_to("/dev/null")
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        convert(small, out, overwrite=True)
    assert caught.value.faults == [
        f"{out}/{name}: not in conversion.json, so --overwrite does not remove it; move it away"
        for name in ("for later/", "notes.md", "run-1/")
    ]
    assert tree(tmp_path) == before


def test_a_damaged_manifest_proves_nothing(small, small_out, tmp_path):
    out = Path(shutil.copytree(small_out, tmp_path / "out"))
    text = (out / "conversion.json").read_text()
    (out / "conversion.json").write_text(text.replace("float32", "float64", 1))
    with pytest.raises(InputError, match=r"its conversion.json is damaged, so it is never overwritten: give another name"):
        convert(small, out, overwrite=True)


@pytest.mark.parametrize("moment", ["before tidying", "while tidying"])
def test_cut_off_at_the_very_end(hf, whole, tmp_path, monkeypatch, moment):
    convert(hf, tmp_path / "out", "mxfp4")  # replaced below: the old one must not be lost before the new one is there

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    if moment == "before tidying":
        clear = Workspace.clear
        monkeypatch.setattr(Workspace, "clear", lambda self: clear(self) if self._state() is None else dies())
    else:
        monkeypatch.setattr("converter.workspace.shutil", SimpleNamespace(rmtree=dies))
    with pytest.raises(KeyboardInterrupt):
        convert(hf, tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    result = convert(hf, tmp_path / "out")
    assert result.status == "resumed"
    assert result.bytes_written == 0
    assert contents(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_and_left_as_it_was(small, tmp_path, monkeypatch, number):
    def flock(fd, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match=r"out\.partial: expected a file system that locks files, found one that does not"):
        convert(small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
