"""verify-oss: any flipped, missing or foreign byte is found, and named."""

import json
import random
import shutil
from pathlib import Path

import pytest

from converter import convert
from converter.audit import verify_checkpoint
from converter.cli import verify_main
from oss_model.errors import InputError
from oss_model.shards import Checkpoint


@pytest.fixture(scope="module")
def good(sources, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("good") / "out"
    convert(sources["hf"], out, verify=False)
    return out


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def flip(path: Path, seed: int = 0) -> int:
    data = bytearray(path.read_bytes())
    where = random.Random(f"{seed} {path.name} {len(data)}").randrange(len(data))
    data[where] ^= 1 << random.Random(where).randrange(8)
    path.write_bytes(data)
    return where


def test_a_copy_is_verified_with_and_without_its_source(copy, sources):
    for source in (None, sources["hf"]):
        found = verify_checkpoint(copy, source)
        assert (found.status, found.differences, found.tensors) == ("pass", [], 88)
    # The same model in another layout: the same values, but another config.json.
    found = verify_checkpoint(copy, sources["openai"])
    assert found.differences == [f"{copy}: config.json: differs from {sources['openai'] / 'config.json'}"]


@pytest.mark.long
def test_a_flipped_bit_in_any_file_is_found_and_named(copy):
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert len(files) > 168 + 88
    beside = [path for path in files if path.parent == copy]
    for number, path in enumerate([*beside, *random.Random(0).sample(files, 60)]):
        before = path.read_bytes()
        flip(path, number)
        name = path.relative_to(copy).as_posix()
        lines = verify_checkpoint(copy).differences
        assert len(lines) == 1, (name, lines)
        assert name in lines[0], (name, lines)
        if "/c/" in name:
            assert f"{copy}: {name.split('.value/')[0]}: " in lines[0]
        path.write_bytes(before)
    assert verify_checkpoint(copy).status == "pass"


def test_a_chunk_exchanged_for_another_good_one_is_found(copy):
    chunks = copy / "layers.2.mlp.down.weight.value" / "c"
    shutil.copyfile(chunks / "1/0/0", chunks / "2/0/0")
    assert verify_checkpoint(copy).differences == [
        f"{copy}: layers.2.mlp.down.weight: its values do not match their hash in conversion.json; convert again"
    ]


def test_missing_truncated_and_foreign_files_are_all_named(copy):
    (copy / "norm.scale.value/c/0").unlink()
    (copy / "layers.0.attn.sinks.value/zarr.json").unlink()
    (copy / "config.json").unlink()
    (copy / "layers.3.mlp.gate_up.weight.value/c/9/0/0").mkdir(parents=True)
    (copy / "layers.3.mlp.gate_up.weight.value/c/9/0/0/0").write_bytes(b"foreign")
    path = copy / "lm_head.weight.value/c/0/0"
    path.write_bytes(path.read_bytes()[:-1])
    assert verify_checkpoint(copy).differences == [
        f"{copy}: config.json: missing; copy it again",
        f"{copy}: layers.0.attn.sinks.value/zarr.json: missing; copy it again",
        f"{copy}: layers.3.mlp.gate_up.weight.value/c/9/0/0/0: not in conversion.json; move it away",
        f"{copy}: lm_head.weight: lm_head.weight.value/c/0/0: expected 97732 bytes, found 97731; convert again",
        f"{copy}: norm.scale: norm.scale.value/c/0: missing; convert again",
    ]


def test_a_source_of_other_values_differs_by_tensor_and_byte(copy, sources, tmp_path):
    other = Path(shutil.copytree(sources["hf"], tmp_path / "other"))
    from oss_model.shards import Shards

    with Shards(other) as shards:
        tensor = shards.tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"]
    data = bytearray((other / "model.safetensors").read_bytes())
    data[tensor.offset + 16 * 3 * 2] ^= 0x07  # expert 0, row 2 (the second of the gate), first byte: its low nibble
    (other / "model.safetensors").write_bytes(data)
    assert verify_checkpoint(copy, other).differences == [
        f"{copy}: layers.1.mlp.gate_up.weight: layers.1.mlp.gate_up.weight.value/c/0/0/0/0: differs from the source, "
        "first in byte 192; convert again"
    ]


def test_a_tensor_of_many_chunks_is_one_line(copy, sources, tmp_path):
    other = Path(shutil.copytree(sources["hf"], tmp_path / "other"))
    with Checkpoint(other).shards as shards:
        tensor = shards.tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"]
    data = bytearray((other / "model.safetensors").read_bytes())
    for expert in (1, 3, 4):
        data[tensor.offset + expert * (tensor.nbytes // tensor.shape[0])] ^= 0x07
    (other / "model.safetensors").write_bytes(data)
    (copy / "layers.2.mlp.down.weight.value/c/7/0/0").unlink()
    where = f"{copy}: layers.1.mlp.gate_up.weight: "
    assert verify_checkpoint(copy, other).differences == [
        f"{where}3 of {tensor.shape[0]} chunks, the first layers.1.mlp.gate_up.weight.value/c/1/0/0/0: differs from the "
        "source, first in byte 0; convert again",
        f"{copy}: layers.2.mlp.down.weight: layers.2.mlp.down.weight.value/c/7/0/0: missing; convert again",
    ]


def test_exit_codes_and_streams(copy, sources, capsys):
    assert verify_main([str(copy), str(sources["hf"]), "-q", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out).items() >= {"status": "pass", "tensors": 88, "differences": []}.items()
    flip(copy / "embedding.weight.value/c/0/0")
    assert verify_main([str(copy), "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"error: {copy}: embedding.weight: embedding.weight.value/c/0/0: its bytes and its checksum disagree; convert again\n"
    )


def test_what_is_no_checkpoint_of_ours_is_bad_input(sources, tmp_path, capsys):
    for path, found in ((tmp_path / "nowhere", "nothing"), (sources["hf"], "another directory")):
        with pytest.raises(InputError, match=f"expected a checkpoint written by convert-oss, found {found}"):
            verify_checkpoint(path)
        assert verify_main([str(path)]) == 2


def test_verification_after_conversion_finds_a_disk_that_lies(sources, tmp_path, monkeypatch):
    from converter.errors import Different
    from converter.store import Store

    write = Store.write_chunk

    def lying(self, chunk, pieces):
        digest = write(self, chunk, pieces)
        if chunk.path == "layers.4.attn.k_proj.weight.value/c/0/0/0":
            flip(self.directory / chunk.path)
        return digest

    monkeypatch.setattr(Store, "write_chunk", lying)
    with pytest.raises(Different) as caught:
        convert(sources["hf"], tmp_path / "out")
    assert len(caught.value.differences) == 1
    assert "layers.4.attn.k_proj.weight: layers.4.attn.k_proj.weight.value/c/0/0/0: " in caught.value.differences[0]
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert convert(sources["hf"], tmp_path / "out").status == "resumed"


def test_a_checkpoint_cut_otherwise_is_still_compared_with_its_source(sources, tmp_path, monkeypatch):
    """As one made by an older version: its chunks are its own, and the source's bytes still count."""
    source = Path(shutil.copytree(sources["hf"], tmp_path / "source"))
    with monkeypatch.context() as patch:
        patch.setattr("oss_model.layouts.WHOLE_BYTES", 1)
        patch.setattr("oss_model.layouts.PARTS", 7)
        convert(source, tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out", source).status == "pass"
    with Checkpoint(source).shards as shards:
        tensor = shards.tensors["model.layers.1.self_attn.q_proj.weight"]
    with open(tensor.file, "r+b") as f:
        f.seek(tensor.offset + 5)
        f.write(b"\x55")
    found = verify_checkpoint(tmp_path / "out", source)
    assert found.status == "fail"
    assert any("layers.1.attn.q_proj.weight" in line and "differs from the source" in line for line in found.differences)
