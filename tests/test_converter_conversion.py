"""The whole conversion: what Orbax restores is the source, value for value, in every layout and dtype."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from converter import convert
from oss_model import layouts, mxfp4
from oss_model.config import ModelConfig
from oss_model.errors import InputError
from oss_model.shards import Checkpoint, write_shard
from oss_model.synthetic import write_checkpoint

RESTORE = """
import sys
import numpy as np, jax
path, out = sys.argv[1:]
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
trees = [
    ocp.StandardCheckpointer().restore(path),
    ocp.PyTreeCheckpointer().restore(path),
    v1.load(path),
]
assert not {name for name in sys.modules if name.split(".")[0] in ("oss_model", "converter", "parity")}
for number, tree in enumerate(trees):
    leaves = {".".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    np.savez(f"{out}/{number}.npz", **{n: np.asarray(a).reshape(-1).view(np.uint8) for n, a in leaves.items()})
    np.savez(f"{out}/{number}-types.npz", **{n: np.array([str(a.dtype), *map(str, a.shape)]) for n, a in leaves.items()})
"""


@pytest.fixture(scope="module", params=["hf", "hf-bf16", "hf-bf16-misnamed", "openai"])
def source(request, tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / request.param, request.param)


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "hf", "hf")


def make_source(path: Path, layout: str) -> Path:
    """A tiny checkpoint whose first sinks are all zero."""
    write_checkpoint(path, ModelConfig.tiny(), layout.removesuffix("-misnamed"))
    checkpoint = Checkpoint(path)
    arrays = {name: checkpoint.shards.read(name) for name in checkpoint.shards.tensors}
    signature = checkpoint.shards.signature()
    checkpoint.shards.close()
    sinks = next(name for name in arrays if name.endswith("sinks"))
    arrays[sinks][:] = 0
    if layout == "hf-bf16-misnamed":
        arrays = {rename(name): array for name, array in arrays.items()}
        signature = {rename(name): info for name, info in signature.items()}
    write_shard(path / "model.safetensors", signature, arrays.values())
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "notes.txt").write_text("not part of a model")
    return path


def rename(name: str) -> str:
    return name + "_blocks" if name.endswith(("gate_up_proj", "down_proj")) else name


def expected(source: Path, dtype: str) -> dict[str, np.ndarray]:
    """Every parameter, by the table and the decoder, whole tensors at a time."""
    checkpoint = Checkpoint(source)
    found = {entry.model: entry.to_model(checkpoint.read(entry)) for entry in checkpoint.entries()}
    checkpoint.shards.close()
    if dtype != "mxfp4":
        for name in [name for name in found if name.endswith(".blocks")]:
            stem = name.removesuffix("blocks")
            found[stem + "weight"] = mxfp4.decode(found.pop(name), found.pop(stem + "scales"))
    if dtype == "float32":
        found = {name: array.astype(np.float32) for name, array in found.items()}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def restore(path: Path, out: Path) -> list[dict[str, tuple[str, bytes]]]:
    """Restore with Orbax three ways, in a process that has none of our code: name -> (dtype and shape, bytes)."""
    out.mkdir()
    subprocess.run([sys.executable, "-c", RESTORE, path, out], check=True, cwd=out, capture_output=True)
    trees = []
    for number in range(3):
        data, types = np.load(out / f"{number}.npz"), np.load(out / f"{number}-types.npz")
        trees.append({name.removesuffix(".value"): (" ".join(types[name]), data[name].tobytes()) for name in data.files})
    return trees


def as_restored(arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, bytes]]:
    return {name: (" ".join([str(a.dtype), *map(str, a.shape)]), a.tobytes()) for name, a in arrays.items()}


def test_every_layout_restores_to_the_same_values_in_plain_orbax(source, tmp_path):
    result = convert(source, tmp_path / "out")
    wanted = as_restored(expected(source, "bfloat16"))
    assert set(wanted) == set(layouts.parameters(ModelConfig.tiny()))
    for tree in restore(tmp_path / "out", tmp_path / "restored"):
        assert tree == wanted
    assert not any(expected(source, "bfloat16")["layers.0.attn.sinks"].view(np.uint16))
    assert (result.status, result.source_layout, result.tensors, result.verified) == ("complete", source.name, 88, True)


@pytest.mark.parametrize("dtype", ["float32", "mxfp4"])
def test_other_dtypes_restore_in_plain_orbax(hf, tmp_path, dtype):
    convert(hf, tmp_path / "out", dtype)
    for tree in restore(tmp_path / "out", tmp_path / "restored"):
        assert tree == as_restored(expected(hf, dtype))


def test_companions_are_copied_and_nothing_is_left_beside(hf, tmp_path):
    convert(hf, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert found == {
        "_METADATA", "_CHECKPOINT_METADATA", "conversion.json",
        "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    assert (tmp_path / "out" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_destination_is_used(hf, tmp_path):
    (tmp_path / "out").mkdir()
    convert(hf, tmp_path / "out")
    assert (tmp_path / "out" / "_METADATA").exists()


def test_overwrite_replaces_a_finished_checkpoint_only_when_told(hf, tmp_path):
    out = tmp_path / "out"
    convert(hf, out)
    with pytest.raises(InputError, match="found a finished checkpoint; give another name, or --overwrite"):
        convert(hf, out, "mxfp4")
    assert json.loads((out / "conversion.json").read_text())["dtype"] == "bfloat16"
    convert(hf, out, "mxfp4", overwrite=True)
    assert json.loads((out / "conversion.json").read_text())["dtype"] == "mxfp4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "mount point"])
def test_replacing_follows_no_link_out(small, tmp_path, monkeypatch, inside):
    """A file and a chunk became links to elsewhere, where nothing is touched. A directory that did is a stranger's."""
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    if inside:
        monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == out)
    convert(small, out, verify=False)
    elsewhere.mkdir()
    for name in ("config.json", "norm.scale.value/c/0"):
        kept = (out / name).rename(elsewhere / name.replace("/", "-"))
        (out / name).symlink_to(kept)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    (out / "stranger").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"stranger: not in conversion\.json, so --overwrite does not remove it"):
        convert(small, out, "mxfp4", overwrite=True, verify=False)
    (out / "stranger").unlink()
    convert(small, out, "mxfp4", overwrite=True, verify=False)
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert not any(path.is_symlink() for path in out.rglob("*"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_directory_is_never_touched(hf, tmp_path, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="it is not a checkpoint of this command, so it is never overwritten"):
        convert(hf, tmp_path / "out", overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]


def test_the_source_is_never_written_into(hf, tmp_path):
    source = Path(shutil.copytree(hf, tmp_path / "source"))
    for destination, found in (
        (source, "the source itself"),
        (source / "out", "inside the source"),
        (tmp_path, "one that holds"),
    ):
        with pytest.raises(InputError, match=f"expected a directory apart from the source, found {found}"):
            convert(source, destination, overwrite=True)
    assert sorted(path.name for path in source.iterdir()) == sorted(path.name for path in hf.iterdir())


def test_a_bf16_source_is_not_packed(tmp_path):
    source = make_source(tmp_path / "hf-bf16", "hf-bf16")
    with pytest.raises(InputError, match=r"found Hugging Face, bfloat16: layers\.0\.mlp\.down\.weight and"):
        convert(source, tmp_path / "out", "mxfp4")
    assert not (tmp_path / "out").exists()


def rewrite(source: Path, to: Path, change) -> Path:
    """A copy of `source` with `change(arrays)` done to its tensors (name -> array; dtypes may change)."""
    shutil.copytree(source, to)
    checkpoint = Checkpoint(to)
    arrays = {name: checkpoint.shards.read(name) for name in checkpoint.shards.tensors}
    checkpoint.shards.close()
    change(arrays)
    kinds = {"bfloat16": "BF16", "float32": "F32", "uint8": "U8"}
    signature = {name: (array.shape, kinds[array.dtype.name]) for name, array in arrays.items()}
    write_shard(to / "model.safetensors", signature, arrays.values())
    return to


def test_scales_out_of_range_are_all_named(hf, tmp_path):
    stem = "model.layers.{}.mlp.experts.{}_proj_scales"

    def damage(arrays):
        arrays[stem.format(1, "gate_up")][3, 4, 2] = 255
        arrays[stem.format(1, "gate_up")][5, 0, 0] = 253
        arrays[stem.format(4, "down")][8, 95, 4] = 254

    with pytest.raises(InputError) as caught:
        convert(rewrite(hf, tmp_path / "bad", damage), tmp_path / "out")
    file = tmp_path / "bad" / "model.safetensors"
    tail = "the file is damaged, or not MXFP4"
    assert caught.value.faults == [
        f"{file}: {stem.format(1, 'gate_up')}: expected scale bytes 0..252, found 2 of 8640 out of range, "
        f"the first 255 at [3, 4, 2]; {tail}",
        f"{file}: {stem.format(4, 'down')}: expected scale bytes 0..252, found 1 of 4320 out of range, "
        f"the first 254 at [8, 95, 4]; {tail}",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_float32_is_narrowed_exactly_or_refused(hf, tmp_path):
    name = "model.layers.2.self_attn.k_proj.weight"

    def widen(arrays):
        arrays[name] = arrays[name].astype(np.float32)
        arrays[name].reshape(-1)[0] = -0.0
        arrays[name].view(np.uint32).reshape(-1)[1] = 0x7FA10000  # a signalling NaN

    wide = rewrite(hf, tmp_path / "wide", widen)
    convert(wide, tmp_path / "narrowed")
    stored = (tmp_path / "narrowed" / "layers.2.attn.k_proj.weight.value" / "c" / "0" / "0" / "0").read_bytes()
    assert stored[:4] == bytes([0, 0x80, 0xA1, 0x7F])
    assert stored[4:-4] == expected(hf, "bfloat16")["layers.2.attn.k_proj.weight"].tobytes()[4:]

    def spoil(arrays):
        widen(arrays)
        arrays[name][5, 7] = arrays[name][100, 0] = 1 / 3

    fine = rewrite(hf, tmp_path / "fine", spoil)
    with pytest.raises(InputError) as caught:
        convert(fine, tmp_path / "out")
    assert caught.value.faults == [
        f"{fine / 'model.safetensors'}: {name}: expected float32 values that bfloat16 holds exactly, found 2 that it does not, "
        "the first at [5, 7]; store them whole with --dtype float32"
    ]
    assert not (tmp_path / "out").exists()
    convert(fine, tmp_path / "whole", "float32")
    stored = np.frombuffer((tmp_path / "whole" / "layers.2.attn.k_proj.weight.value" / "c/0/0/0").read_bytes()[:-4], np.float32)
    assert stored[5 * 96 + 7] == np.float32(1 / 3)
    assert stored.view(np.uint32)[1] == 0x7FA10000


def test_widening_keeps_every_bit(hf, tmp_path):
    patterns = np.arange(1 << 16, dtype=np.uint16)[-509 * 96 :].view(ml_dtypes.bfloat16).reshape(509, 96)

    def fill(arrays):
        arrays["lm_head.weight"] = patterns

    convert(rewrite(hf, tmp_path / "bits", fill), tmp_path / "out", "float32")
    stored = np.frombuffer((tmp_path / "out" / "lm_head.weight.value" / "c" / "0" / "0").read_bytes()[:-4], np.uint32)
    np.testing.assert_array_equal(stored, patterns.view(np.uint16).reshape(-1).astype(np.uint32) << 16)
