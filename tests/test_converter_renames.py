"""Killed at any rename, the old checkpoint or the new one is whole; where nothing can be renamed, the work is done inside."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from converting import TIME_STAMPED, contents, tree

from converter import convert, directory
from converter.cli import main
from oss_model.errors import InputError


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
        found = directory.exchange if exchange else lambda one, other: False
        patch.setattr(directory, "exchange", dying(found, does_nothing=not exchange))
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
from collections.abc import Iterator
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
def mounted(tmp_path, monkeypatch) -> Iterator[Path]:
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
        patch.setattr(directory, "exchange", refusing(directory.exchange))
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


@pytest.mark.long
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
