"""The reader of our own chunks: what Orbax reads, read once, checked, and damage told by its place."""

import dataclasses
import json
import os
import random
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from oss_model import InputError, ModelConfig, create_model_from_checkpoint, zarr
from oss_model.layouts import parameter_name
from oss_model.params import stored_parameters
from oss_model.zarr import ChunkFile, StoredArray, open_arrays
from parity import others
from parity.candidate import Candidate
from parity.comparison import compare


def values(model: nnx.Module) -> dict[str, jax.Array]:
    return {parameter_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}


def mesh_of(**sizes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))]).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.fixture
def broken(checkpoints, tmp_path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(checkpoints["bfloat16"], tmp_path / "dst"))


# --- whose reader ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"use_ocdbt": True}, {"use_ocdbt": False, "use_zarr3": True}], ids=["ocdbt", "zarr3"])
def test_what_orbax_wrote_is_read_by_orbax_and_is_the_same(checkpoints, tmp_path, cfg, options, monkeypatch):
    ours = create_model_from_checkpoint(checkpoints["bfloat16"], cfg)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(tmp_path / "theirs", nnx.state(ours))
    assert open_arrays(tmp_path / "theirs") is None
    assert open_arrays(checkpoints["bfloat16"]) is not None
    monkeypatch.setattr(ChunkFile, "read", lambda *_: pytest.fail("this reader is for our own chunks"))
    theirs = create_model_from_checkpoint(tmp_path / "theirs", cfg)
    for (name, want), got in zip(values(ours).items(), values(theirs).values(), strict=True):
        assert np.asarray(want).tobytes() == np.asarray(got).tobytes(), name


def test_each_chunk_is_read_once_whatever_number_of_devices_hold_it(even_cfg, even_checkpoints, monkeypatch):
    read, path, one = [], even_checkpoints["float32"], StoredArray._read_chunk

    def noted(self, index, out):
        read.append((self.directory, index))
        one(self, index, out)

    monkeypatch.setattr(StoredArray, "_read_chunk", noted)
    for mesh in (None, mesh_of(fsdp=8), mesh_of(tensor=8), mesh_of(expert=2, tensor=2, fsdp=2)):
        read.clear()
        create_model_from_checkpoint(path, even_cfg, mesh)
        chunks = [(array.directory, n) for array in open_arrays(path).values() for n in range(-(-array.shape[0] // array.rows))]
        assert sorted(read) == sorted(chunks)


def test_no_more_is_read_than_the_shards_that_are_here_lie_in(even_cfg, even_checkpoints, monkeypatch):
    """As one process of several: of a mesh whose other devices are somebody else's."""
    from oss_model import placing

    array = open_arrays(even_checkpoints["float32"])["layers.0.mlp.gate_up.weight.value"]
    sharding = jax.NamedSharding(mesh_of(expert=8), jax.P("expert"))
    mine = {device: index for device, index in sharding.addressable_devices_indices_map(array.shape).items() if device.id == 3}
    monkeypatch.setattr(type(sharding), "addressable_devices_indices_map", lambda self, shape: mine)
    like = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    assert placing._Assembly(like, placing.Rows(array.rows, array.read)).steps() == [slice(6, 7), slice(7, 8)]


def test_a_chunk_that_is_filled_up(tmp_path):
    """The last one, where its rows do not divide: what fills it up is read for its checksum alone."""
    import tensorstore

    want = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    description = zarr.describe((7, 5), want.dtype, 3)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "a")}, "metadata": description}
    tensorstore.open(spec, create=True).result()[...] = want
    got = np.empty((7, 5), np.float32)
    StoredArray(tmp_path / "a", (7, 5), want.dtype, 3).read(slice(0, 7), got)
    assert np.array_equal(got, want)
    assert os.path.getsize(tmp_path / "a/c/2/0") == 3 * 5 * 4 + 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codecs", [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ("chunk_key_encoding", {"name": "default", "configuration": {"separator": "."}}),
        ("data_type", "float16"),
        ("shape", [9, 2, 160, 97]),
        ("storage_transformers", [{"name": "other"}]),
    ],
)
def test_an_array_of_another_form_is_not_taken_for_ours(broken, field, value):
    file = broken / "layers.0.mlp.gate_up.weight.value/zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    assert open_arrays(broken) is None


# --- a lie cannot hide ---------------------------------------------------------------------------------------------


def _big_endian(path: Path) -> None:
    file = path / "layers.1.attn.q_proj.weight.value/zarr.json"
    file.write_text(file.read_text().replace("little", "big"))


def _left_out(path: Path) -> None:
    metadata = json.loads((path / "_METADATA").read_text())
    del metadata["tree_metadata"]["('layers', '1', 'attn', 'sinks', 'value')"]
    (path / "_METADATA").write_text(json.dumps(metadata))


def _not_to_be_read(path: Path) -> None:
    metadata = json.loads((path / "_METADATA").read_text())
    metadata["tree_metadata"]["('layers', '1', 'attn', 'sinks', 'value')"]["value_metadata"]["skip_deserialize"] = True
    (path / "_METADATA").write_text(json.dumps(metadata))


def _of_another_dtype(path: Path) -> None:
    file = path / "layers.1.attn.q_proj.weight.value/zarr.json"
    file.write_text(file.read_text().replace("bfloat16", "float16"))


@pytest.mark.long
@pytest.mark.parametrize("lie", [_big_endian, _of_another_dtype, _left_out, _not_to_be_read])
@pytest.mark.parametrize("whole", [False, True], ids=["a chunk each", "--read-with-orbax"])
def test_lying_metadata_fails_in_parity(broken, sources, lie, whole):
    lie(broken)
    try:
        report = compare(sources["hf"], broken, layers=False, tokens=4, read_with_orbax=whole)
    except InputError:
        return
    assert report.verdict == "fail"


def test_what_others_read_is_what_is_compared(broken, monkeypatch):
    """A reader of ours that is wrong is not believed: a chunk of each parameter is read by tensorstore too, or all by Orbax."""
    names = list(stored_parameters(broken))
    right = others.whole(broken, stored_parameters(broken))
    one = StoredArray._read_chunk

    def wrong(self, index, out):
        one(self, index, out)
        out.view(np.uint8)[0] ^= 1

    monkeypatch.setattr(StoredArray, "_read_chunk", wrong)
    for candidate in (Candidate(broken), Candidate(broken, read_with_orbax=True)):
        arrays, found, loaded = open_arrays(broken), candidate.restore(names), candidate.loaded(names)
        for name in names:
            rows = arrays[f"{name}.value"].rows
            start = zlib.crc32(name.encode()) % -(-len(right[name]) // rows) * rows
            part = slice(None) if candidate.read_with_orbax else slice(start, start + rows)
            assert found[name][part].tobytes() == right[name][part].tobytes()
            assert loaded[name].tobytes() != right[name].tobytes()


# --- damage --------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused_while_loading_and_named(broken, cfg):
    """Whatever the chunk; benchmarks of real sizes do it 200 times (scripts/stress/flip_bits.py)."""
    draw = random.Random(0)
    chunks = sorted(path for path in broken.glob("*.value/c/**/*") if path.is_file())
    for _ in range(25):
        file = draw.choice(chunks)
        data = bytearray(file.read_bytes())
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        whole = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(InputError) as caught:
            create_model_from_checkpoint(broken, cfg)
        (line,) = caught.value.faults
        assert line.startswith(f"{broken}: {file.relative_to(broken)}: its bytes and its checksum disagree; copy it again")
        file.write_bytes(whole)
    create_model_from_checkpoint(broken, cfg)


def test_all_that_is_damaged_is_told_a_line_each(broken, cfg):
    shutil.rmtree(broken / "layers.1.mlp.down.weight.value/c/3")
    with open(broken / "norm.scale.value/c/0", "ab") as file:
        file.write(b"more")
    for n in (2, 4):
        with open(broken / f"layers.0.mlp.gate_up.weight.value/c/{n}/0/0/0", "r+b") as file:
            file.write(b"others")
    size = cfg.hidden_size * 2 + 4
    with pytest.raises(InputError) as caught:
        create_model_from_checkpoint(broken, cfg)
    again, disagree = "copy it again, or convert again (verify-oss checks all)", "its bytes and its checksum disagree"
    assert caught.value.faults == [
        f"{broken}: layers.0.mlp.gate_up.weight.value/c/2/0/0/0: {disagree}; {again} (and 1 more like it)",
        f"{broken}: layers.1.mlp.down.weight.value/c/3/0/0: missing; {again}",
        f"{broken}: norm.scale.value/c/0: expected {size} bytes, found {size + 4}; {again}",
    ]


def test_packed_experts_with_a_damaged_scale_name_it(checkpoints, tmp_path, cfg):
    path = Path(shutil.copytree(checkpoints["mxfp4"], tmp_path / "dst"))
    with open(path / "layers.2.mlp.down.scales.value/c/5/0/0", "r+b") as file:
        file.write(b"other scales")
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.down\.scales\.value/c/5/0/0: its bytes and its checksum"):
        create_model_from_checkpoint(path, dataclasses.replace(cfg, param_dtype="bfloat16"))


# --- what it is good for -------------------------------------------------------------------------------------------


def test_what_is_read_into_is_the_array(checkpoints, monkeypatch):
    """On a CPU nothing is copied; and it may be donated."""
    from oss_model import placing

    held, empty = [], placing._empty
    monkeypatch.setattr(placing, "_empty", lambda shape, dtype: held.append(empty(shape, dtype)) or held[-1])
    monkeypatch.setattr(placing, "LARGE", 0)
    model = create_model_from_checkpoint(checkpoints["bfloat16"], ModelConfig.tiny())
    weight = model.layers[0].mlp.gate_up.weight.get_value()
    assert any(a.ctypes.data == weight.unsafe_buffer_pointer() for a in held)
    twice = jax.jit(lambda a: a * 2, donate_argnums=0)
    want = np.asarray(weight).astype(np.float32) * 2
    assert np.array_equal(np.asarray(twice(weight)).astype(np.float32), want)
