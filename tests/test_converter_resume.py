"""Cut off anywhere, a conversion is taken up, ends byte-identical, and never looks complete before it is."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from converter import conversion, convert, destination, store
from converter.cli import main
from converter.errors import Different, Incomplete
from converter.store import Store
from converter.workspace import MARK, Workspace
from oss_model.config import ModelConfig
from oss_model.errors import InputError
from oss_model.synthetic import write_checkpoint

TIME_STAMPED = {"_CHECKPOINT_METADATA", "conversion.json"}


@pytest.fixture(scope="module")
def hf(sources) -> Path:
    return sources["hf"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A source of one layer, where the number of chunks does not matter."""
    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=1, layer_types=())
    return write_checkpoint(tmp_path_factory.mktemp("small") / "source", cfg)


@pytest.fixture(scope="module")
def small_out(small, tmp_path_factory) -> Path:
    """Converted, as float32. Read only."""
    out = tmp_path_factory.mktemp("small") / "out"
    convert(small, out, "float32", verify=False)
    return out


@pytest.fixture(scope="module")
def small_whole(small, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted conversion of it to bfloat16 writes."""
    out = tmp_path_factory.mktemp("small") / "out"
    convert(small, out, verify=False)
    return contents(out)


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted conversion writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(hf, out, verify=False)
    return contents(out)


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    found = {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
    manifest = json.loads(found["conversion.json"])
    found["hashes"] = json.dumps([manifest["tensors"], manifest["files"].keys() - TIME_STAMPED], default=sorted).encode()
    return {name: data for name, data in found.items() if name not in TIME_STAMPED}


@pytest.fixture
def fail_after(monkeypatch):
    """Make the n-th chunk fail, half written, as a full disk does."""

    def install(count: int) -> None:
        write, left = Store.write_chunk, [count]

        def failing(self, chunk, pieces):
            left[0] -= 1
            if left[0] < 0:
                path = self.directory / chunk.path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, chunk, pieces)

        monkeypatch.setattr(Store, "write_chunk", failing)

    yield install
    monkeypatch.undo()


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


def tree(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


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
    (out / "notes.md").symlink_to("/dev/null")
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        convert(small, out, overwrite=True)
    assert caught.value.faults == [
        f"{out}/{name}: not in conversion.json, so --overwrite does not remove it; move it away"
        for name in ("notes.md", "run-1/step_100")
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


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of ours catches it."""


@pytest.fixture
def kill(monkeypatch):
    """Make the process die just before, or just after, the n-th rename or exchange below a directory (n from 0)."""

    def install(below: Path, number: int, after: bool, exchange: bool = True, patch=monkeypatch) -> list[str]:
        seen = []

        def dying(function, does_nothing=False):
            def rename(one, other, **options):
                if below not in Path(one).parents or does_nothing:
                    return function(one, other, **options)
                seen.append(f"{Path(one).relative_to(below)} -> {Path(other).relative_to(below)}")
                if len(seen) <= number:
                    return function(one, other, **options)
                if after and len(seen) == number + 1:
                    function(one, other, **options)
                raise Killed

            return rename

        for name in ("rename", "replace"):
            patch.setattr(os, name, dying(getattr(os, name)))
        found = destination.exchange if exchange else lambda one, other: False
        patch.setattr(destination, "exchange", dying(found, does_nothing=not exchange))
        return seen

    yield install
    monkeypatch.undo()


def checkpoints_below(directory: Path) -> list[dict[str, bytes]]:
    """What `contents` says of everything below that looks finished."""
    return [contents(path.parent) for path in directory.rglob("conversion.json") if (path.parent / "_METADATA").exists()]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_killed_at_any_rename_one_of_the_two_is_whole_and_a_rerun_ends_it(
    small, small_whole, small_out, tmp_path, kill, monkeypatch, exchange, after
):
    out, old = tmp_path / "out", contents(small_out)
    for number in range(20):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(small_out, out)
        seen = kill(tmp_path, number, after, exchange)
        try:
            convert(small, out, overwrite=True, verify=False)
            died = False
        except Killed:
            died = True
        monkeypatch.undo()
        assert any(found in (old, small_whole) for found in checkpoints_below(tmp_path)), seen
        if not died:
            break
        if number % 2:  # by another command, which must not lose anything either
            with pytest.raises(InputError, match="found a finished checkpoint; give another name, or --overwrite"):
                convert(small, out, "mxfp4", verify=False)
            assert contents(out) in (old, small_whole)
        convert(small, out, overwrite=True, verify=False)
        assert contents(out) == small_whole, seen
        assert [path.name for path in tmp_path.iterdir()] == ["out"], seen
    steps = ["out.partial/checkpoint -> out"] if exchange else ["out -> out.partial/replaced", "out.partial/checkpoint -> out"]
    assert seen[-len(steps) :] == steps
    assert number == len(seen)


@pytest.mark.parametrize("spoilt", [True, False])
def test_the_old_checkpoint_goes_back_where_the_new_one_is_gone(
    small, small_out, small_whole, tmp_path, kill, monkeypatch, spoilt
):
    """Between two renames of a version that noted nothing; or where a hand has been at the new one since."""
    out, partial = Path(shutil.copytree(small_out, tmp_path / "out")), tmp_path / "out.partial"
    kill(tmp_path, 4, False, exchange=False)
    with pytest.raises(Killed):
        convert(small, out, overwrite=True, verify=False)
    monkeypatch.undo()
    assert not out.exists()
    if spoilt:
        (partial / "checkpoint" / "_METADATA").unlink()
    else:
        state = json.loads((partial / "state.json").read_text())
        del state["placing"]
        (partial / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="found a finished checkpoint; give another name, or --overwrite"):
        convert(small, out)
    assert contents(out) == contents(small_out)
    assert convert(small, out, overwrite=True).status == "resumed"
    assert contents(out) == small_whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_has_come_in_the_way_since_is_left_alone(small, small_out, small_whole, tmp_path, kill, monkeypatch):
    out = Path(shutil.copytree(small_out, tmp_path / "out"))
    kill(tmp_path, 4, False, exchange=False)
    with pytest.raises(Killed):
        convert(small, out, overwrite=True, verify=False)
    monkeypatch.undo()
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError) as caught:
        convert(small, out, overwrite=True)
    assert str(caught.value) == (
        f"{out}: expected the place of a checkpoint, found other files in it; move them away, and the same command goes on "
        f"(what belongs there is whole, in {out}.partial)"
    )
    assert (out / "thesis.tex").read_text() == "years of work"
    shutil.rmtree(out)
    assert convert(small, out, overwrite=True).status == "resumed"
    assert contents(out) == small_whole


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_comes_to_the_destination_while_the_conversion_runs_is_left_alone(small, small_out, tmp_path, overwrite):
    out = tmp_path / "out"
    if overwrite:
        shutil.copytree(small_out, out)

    def put(progress):
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("years of work")

    with pytest.raises(InputError, match=r"move it away|found one with other files in it"):
        convert(small, out, progress=put, overwrite=overwrite)
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    assert convert(small, out, overwrite=overwrite).status == "resumed"


# --- a destination that cannot be renamed -----------------------------------------------------------------------

MOUNTED = """
set -e
mount -t tmpfs tmpfs "$DST"
mkdir "$DST/lost+found"
exec "$PYTHON" - <<'END'
import os, sys
from pathlib import Path
from converter.cli import main, verify_main
source, out = os.environ["SRC"], os.environ["DST"]
def run(*options):
    assert main([source, out, "-q", *options]) == 0
    assert verify_main([out, source, "-q"]) == 0
    assert "lost+found" in os.listdir(out) and "convert-oss.partial" not in os.listdir(out)
    assert "out.partial" not in os.listdir(Path(out).parent)
run()
run("--dtype", "mxfp4", "--overwrite")
import orbax.checkpoint as ocp
ocp.StandardCheckpointer().restore(out)
END
"""


@pytest.mark.parametrize("bound", [False, True], ids=["a file system", "a directory of the same file system"])
def test_a_real_mount_point(small, tmp_path, bound):
    """In a mount namespace of its own, where the system allows one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "volume").mkdir()
    script = MOUNTED.replace("-t tmpfs tmpfs", f'--bind "{tmp_path}/volume"') if bound else MOUNTED
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", tmp_path / "out"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    environment = os.environ | {"SRC": str(small), "DST": str(tmp_path / "out"), "PYTHON": sys.executable}
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def mounted(tmp_path, monkeypatch) -> Path:
    """A directory that behaves like a mount point: nothing can be renamed into it, out of it, or to or from its name."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "lost+found").mkdir()

    def refusing(function):
        def rename(one, other, **options):
            if out in (Path(one), Path(other)):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            if (out in Path(one).parents) != (out in Path(other).parents):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return function(one, other, **options)

        return rename

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, refusing(getattr(os, name)))
        patch.setattr(destination, "exchange", refusing(destination.exchange))
        ismount = os.path.ismount
        patch.setattr(os.path, "ismount", lambda path: Path(path) == out or ismount(path))
        yield out


def at(out: Path) -> dict[str, bytes] | None:
    """`contents` of the checkpoint at a mount point; None where what completes it is not there."""
    if not (out / "_METADATA").exists():
        return None
    found = {name: data for name, data in tree(out).items() if not name.startswith("convert-oss.partial/")}
    return {name: data for name, data in found.items() if name not in TIME_STAMPED}


def without_hashes(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name != "hashes"}


@pytest.mark.parametrize("why", ["a mount point", "a parent that cannot be written"])
def test_where_the_destination_cannot_be_renamed_the_work_is_done_inside(
    small, small_whole, mounted, tmp_path, monkeypatch, capsys, why
):
    if why != "a mount point":
        access = os.access
        monkeypatch.setattr(os.path, "ismount", lambda path: False)
        monkeypatch.setattr(os, "access", lambda path, mode, **options: Path(path) != tmp_path and access(path, mode))
    assert main([str(small), str(mounted), "--dry-run"]) == 0
    assert f"\nworks in {mounted}/convert-oss.partial until all is whole\n" in capsys.readouterr().out
    assert os.listdir(mounted) == ["lost+found"]
    places = set()

    def look(progress):
        places.update(path.relative_to(tmp_path).as_posix() for path in [*tmp_path.iterdir(), *mounted.iterdir()])

    convert(small, mounted, "float32", progress=look)
    assert places == {"out", "out/lost+found", "out/convert-oss.partial"}
    convert(small, mounted, overwrite=True)
    assert contents(mounted) == small_whole
    assert (mounted / "lost+found").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_killed_at_any_rename_at_a_mount_point(
    small, small_whole, small_out, mounted, tmp_path, kill, monkeypatch, overwrite, after
):
    new, old = without_hashes(small_whole), without_hashes(contents(small_out))
    number, numbers = 0, [1000]
    while numbers:
        number = numbers.pop()
        shutil.rmtree(mounted)
        (mounted / "lost+found").mkdir(parents=True)
        if overwrite:
            shutil.copytree(small_out, mounted, dirs_exist_ok=True)
        with monkeypatch.context() as patch:
            seen = kill(mounted, number, after, patch=patch)
            with pytest.raises(Killed) if number < 1000 else contextlib.nullcontext():
                convert(small, mounted, overwrite=overwrite, verify=False)
        if (
            number == 1000
        ):  # nothing was killed: this is what there is to be killed at, the first and the last, and some between
            last = len(seen)
            numbers = sorted({0, 1, 2, 3, *range(4, last, 11), *range(last - 5, last)})
            assert seen[-1] == "convert-oss.partial/checkpoint/conversion.json -> conversion.json"
            continue
        assert at(mounted) in (None, old, new), seen[-1]
        workspace = mounted / "convert-oss.partial"
        whole = at(mounted) or at(workspace / "checkpoint") == new or at(workspace / "replaced") == old
        assert whole or not overwrite, seen[-1]
        if number % 2:  # by another command, which must not lose anything either
            if overwrite or at(mounted) or at(workspace / "checkpoint"):
                with pytest.raises(InputError, match=r"finished checkpoint; give another name|with another dtype"):
                    convert(small, mounted, "mxfp4", verify=False)
            assert at(mounted) in (None, old, new), seen[-1]
        convert(small, mounted, overwrite=overwrite or at(mounted) is not None, verify=False)
        assert contents(mounted) == small_whole, seen[-1]
        assert sorted(os.listdir(mounted)) == sorted([*os.listdir(small_out), "lost+found"])


def test_at_a_mount_point_the_old_checkpoint_goes_back_where_the_new_one_is_gone(small, small_out, mounted, kill, monkeypatch):
    old = without_hashes(contents(small_out))
    shutil.copytree(small_out, mounted, dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        seen = kill(mounted, 1000, True, patch=patch)
        convert(small, mounted, overwrite=True, verify=False)
    shutil.rmtree(mounted)
    shutil.copytree(small_out, mounted)
    with monkeypatch.context() as patch:
        kill(mounted, len(seen) - 8, True, patch=patch)
        with pytest.raises(Killed):
            convert(small, mounted, overwrite=True, verify=False)
    assert at(mounted) is None
    (mounted / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="expected the place of a checkpoint, found other files in it; move them away"):
        convert(small, mounted)
    (mounted / "thesis.tex").unlink()
    (mounted / "convert-oss.partial/checkpoint/_METADATA").unlink()
    with pytest.raises(InputError, match="found a finished checkpoint; give another name, or --overwrite"):
        convert(small, mounted)
    assert at(mounted) == old
    assert convert(small, mounted, overwrite=True).status == "resumed"
    assert "convert-oss.partial" not in os.listdir(mounted)


@pytest.mark.parametrize("name", ["convert-oss.partial/checkpoint/model.bin", "lost+found/model.bin"])
def test_elsewhere_such_names_are_somebody_elses(small, small_out, tmp_path, name):
    out = Path(shutil.copytree(small_out, tmp_path / "out"))
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("years of work")
    with pytest.raises(InputError, match=r"not in conversion.json, so --overwrite does not remove it; move it away"):
        convert(small, out, overwrite=True)


# --- processes that are killed ----------------------------------------------------------------------------------

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


def begin(*argv: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOWLY, *map(str, argv)], stderr=subprocess.PIPE, text=True)


def wait_for_chunks(out: Path, count: int) -> None:
    journals = out.with_name(out.name + ".partial")
    deadline = time.monotonic() + 60
    while sum(path.read_bytes().count(b"chunk") for path in journals.glob("journal.*")) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_sigkill_at_any_moment(hf, whole, tmp_path):
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


def test_ctrl_c_finishes_what_is_under_way_and_says_how_to_go_on(hf, whole, tmp_path):
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


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_one_checkpoint_and_one_of_them_dies(hf, whole, tmp_path, count):
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
    for process in processes:
        process.stderr.close()


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
    mine.begin(conversion.fingerprint(conversion.open_source(hf, "bfloat16"), "bfloat16"), restart=False)
    with pytest.raises(InputError, match=r"process 1/2 is already at work there; wait until it has ended, or end it"):
        convert(hf, tmp_path / "out", process=(1, 2))
    with pytest.raises(InputError, match="a conversion by 2 processes runs there"):
        convert(hf, tmp_path / "out", process=(1, 3))
    with pytest.raises(InputError, match="another convert-oss is writing there"):
        convert(hf, tmp_path / "out")
    mine.leave()
    assert convert(hf, tmp_path / "out").status == "complete"
