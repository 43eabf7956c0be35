"""A finished conversion that is asked for again: done already, or refused by the name of what has changed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from converter import convert, finished
from converter.cli import main
from converter.manifest import fingerprint
from oss_model.errors import InputError
from oss_model.shards import Checkpoint


@pytest.fixture
def source(sources, tmp_path) -> Path:
    return Path(shutil.copytree(sources["hf"], tmp_path / "source"))


@pytest.fixture
def out(source, tmp_path) -> Path:
    convert(source, tmp_path / "out", verify=False)
    return tmp_path / "out"


def snapshot(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and directory below: which it is, its size, and when it was written."""
    found = {path.relative_to(directory).as_posix(): path.lstat() for path in directory.rglob("*")}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def change_a_byte(source: Path, tensor: str, at: int = 0) -> None:
    with Checkpoint(source).shards as shards:
        found = shards.tensors[tensor]
    with open(found.file, "r+b") as file:
        file.seek(found.offset + at)
        byte = file.read(1)[0]
        file.seek(found.offset + at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("options", [[], ["--process", "2/3"], ["--no-verify"]])
def test_the_same_again_is_already_complete(source, out, tmp_path, monkeypatch, capsys, options):
    before = snapshot(tmp_path)
    monkeypatch.setattr(finished, "in_threads", None)  # by the times alone
    assert main([str(source), str(out), *options]) == 0
    assert capsys.readouterr().err == f"{out}: already complete, 88 tensors\n"
    assert main([str(source), str(out), "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = {"status": "already-complete", "bytes_read": 0, "bytes_written": 0, "tensors": 88, "verified": False}
    assert report.items() >= expected.items()
    assert snapshot(tmp_path) == before


def test_the_dry_run_says_so_too(source, out, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert main([str(source), str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == ["already complete: there is nothing to do", ""]
    assert main([str(source), str(out), "--dry-run", "--json"]) == 0
    expected = {"status": "already-complete", "bytes_read": 0, "bytes_written": 0, "space_needed": 0, "seconds": 0}
    assert json.loads(capsys.readouterr().out).items() >= expected.items()
    assert main([str(source), str(out), "--dry-run", "--dtype", "mxfp4"]) == 2
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("layout", ["hf", "hf-bf16", "openai"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_copy_of_the_source_is_hashed_and_found_the_same(sources, tmp_path, layout, dtype):
    convert(sources[layout], tmp_path / "out", dtype, verify=False)
    copy, phases = Path(shutil.copytree(sources[layout], tmp_path / "copy")), []
    for file in copy.iterdir():
        os.utime(file)
    found = convert(copy, tmp_path / "out", dtype, progress=lambda progress: phases.append(progress.phase))
    assert (found.status, set(phases)) == ("already-complete", {"comparing"})


def test_another_version_that_writes_the_same_makes_no_difference(source, out, monkeypatch):
    monkeypatch.setattr("converter.manifest.version", lambda name: "99.0")
    assert convert(source, out).status == "already-complete"


@pytest.mark.parametrize(
    ("layout", "tensor", "at"),
    [
        ("hf", "model.layers.1.mlp.experts.gate_up_proj_blocks", 1000),
        ("hf", "model.layers.3.mlp.experts.down_proj_scales", 7),
        ("hf", "lm_head.weight", -2),
        ("hf-bf16", "model.layers.0.mlp.experts.down_proj", 4),
        ("openai", "block.2.attn.qkv.weight", 0),
    ],
)
def test_one_value_changed_in_place_is_found_and_named(sources, tmp_path, capsys, layout, tensor, at):
    source, out = Path(shutil.copytree(sources[layout], tmp_path / "source")), tmp_path / "out"
    convert(source, out, verify=False)
    with Checkpoint(source).shards as shards:
        nbytes = shards.tensors[tensor].nbytes
    change_a_byte(source, tensor, at % nbytes)
    assert main([str(source), str(out)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: {source}/model.safetensors: {tensor}: differs from what {out} was converted from; give another name, or "
        "--overwrite to replace it when the new one is whole"
    ]
    assert convert(source, out, overwrite=True, verify=False).status == "complete"
    assert convert(source, out).status == "already-complete"


def test_another_tokenizer_of_the_same_size_is_named(source, out):
    (source / "generation_config.json").write_text((source / "generation_config.json").read_text().replace("{", "[", 1))
    with pytest.raises(InputError) as caught:
        convert(source, out)
    (line,) = caught.value.faults
    assert line.startswith(f"{source}/generation_config.json: differs from what {out} was converted from; give another name")


@pytest.mark.parametrize("change", ["a new file", "a larger file", "another layout", "another grid"])
def test_what_is_another_conversion_is_refused_as_ever(source, out, sources, monkeypatch, change):
    if change == "a new file":
        (source / "tokenizer.json").write_text("{}")
    elif change == "a larger file":
        (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    elif change == "another layout":
        source = sources["openai"]
    else:
        monkeypatch.setattr("oss_model.layouts.WHOLE_BYTES", 1)
        monkeypatch.setattr("oss_model.layouts.PARTS", 7)
    with pytest.raises(InputError) as caught:
        convert(source, out)
    assert caught.value.faults == [
        f"{out}: expected a new or empty directory, found a finished checkpoint; "
        "give another name, or --overwrite to replace it when the new one is whole"
    ]


def test_every_chunk_is_seen_in_its_place(source, out):
    (out / "norm.scale.value/c/0").unlink()
    os.truncate(out / "lm_head.weight.value/c/0/0", 100)
    (out / "config.json").unlink()
    again = "copy it again, or give another name, or --overwrite to replace it when the new one is whole"
    with pytest.raises(InputError) as caught:
        convert(source, out)
    assert sorted(caught.value.faults) == [
        f"{out}: config.json: missing, or not as conversion.json has it; {again}",
        f"{out}: lm_head.weight: lm_head.weight.value/c/0/0: missing, or not whole; {again}",
        f"{out}: norm.scale: norm.scale.value/c/0: missing, or not whole; {again}",
    ]
    assert convert(source, out, overwrite=True).verified


def test_told_to_overwrite_it_is_converted_again(source, out):
    before = (out / "conversion.json").stat().st_ino
    assert convert(source, out, overwrite=True, verify=False).status == "complete"
    assert (out / "conversion.json").stat().st_ino != before


def test_another_process_may_finish_while_this_one_begins(source, out, tmp_path, monkeypatch):
    aside = out.rename(tmp_path / "aside")

    def finish(*arguments):
        aside.rename(out)
        return measure(*arguments)

    from converter import conversion

    measure = conversion.measure
    monkeypatch.setattr(conversion, "measure", finish)
    assert convert(source, out).status == "already-complete"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_what_is_hashed_is_what_was_read(sources):
    """`Pieces.read_only` gives the digests that converting gives, chunk by chunk."""
    from converter.chunks import Reader
    from converter.form import Form
    from converter.plan import make_plan

    for layout in sources:
        checkpoint = Checkpoint(sources[layout])
        with checkpoint.shards:
            assert fingerprint(checkpoint, Form())["layout"] == layout
            reader = Reader(checkpoint)
            for chunk in make_plan(checkpoint, Form()).chunks:
                pieces = reader.pieces(chunk)
                for _ in pieces:
                    pass
                assert reader.pieces(chunk).read_only() == pieces.digests
