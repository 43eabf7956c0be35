"""Directories of safetensors: lazy reading, and what is said about each way in which a directory can be wrong."""

import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from oss_model import InputError, ModelConfig, layouts, shards, synthetic
from oss_model.shards import INDEX, Checkpoint, Shards, write_shard

CFG = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=2, layer_types=())
SETTINGS = settings(derandomize=True, deadline=None, max_examples=60)
SINKS = "model.layers.0.self_attn.sinks"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> dict[str, Path]:
    """The same model in one file and in five. Read only."""
    root = tmp_path_factory.mktemp("shards")
    found = {}
    for name, limit in (("one", 10**9), ("many", 150_000)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthetic, "SHARD_BYTES", limit)
            found[name] = synthetic.write_checkpoint(root / name, CFG)
    assert len(list(found["one"].glob("*.safetensors"))) == 1
    assert len(list(found["many"].glob("*.safetensors"))) > 4
    return found


@pytest.fixture
def one(kept, tmp_path) -> Path:
    return shutil.copytree(kept["one"], tmp_path / "one")


@pytest.fixture
def many(kept, tmp_path) -> Path:
    return shutil.copytree(kept["many"], tmp_path / "many")


def faults(directory, opener=Checkpoint) -> list[str]:
    with pytest.raises(InputError) as caught:
        opener(directory)
    assert open_files(directory) == []
    return caught.value.faults


def open_files(directory) -> list[str]:
    return [file.path for file in psutil.Process().open_files() if Path(file.path).is_relative_to(Path(directory).resolve())]


def index_of(directory: Path) -> dict:
    return json.loads((directory / INDEX).read_text())


def edit_index(directory: Path, change) -> dict[str, str]:
    """Apply `change` to the index's weight_map; returns the map as it was."""
    index = index_of(directory)
    before = dict(index["weight_map"])
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))
    return before


def edit_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit_file(file: Path, change) -> None:
    """Apply `change` to a safetensors file's tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("which", ["one", "many"])
def test_every_tensor_equals_safetensors_own(kept, which, indexed, tmp_path):
    directory = kept[which]
    if (directory / INDEX).exists() != indexed:
        directory = shutil.copytree(directory, tmp_path / "copy")
        if indexed:
            weight_map = {name: file.name for file in directory.glob("*.safetensors") for name in load_file(file)}
            (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        else:
            (directory / INDEX).unlink()
    expected = {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}
    with Shards(directory) as source:
        assert source.tensors.keys() == expected.keys() == layouts.checkpoint_shapes(layouts.HF_MXFP4, CFG).keys()
        for name, array in expected.items():
            found = source.read(name)
            assert (found.shape, found.dtype) == (array.shape, array.dtype)
            assert found.tobytes() == array.tobytes(), name


@SETTINGS
@given(data=st.data())
def test_any_run_of_rows_equals_safetensors_own(kept, data):
    with Shards(kept["many"]) as source:
        name = data.draw(st.sampled_from(sorted(source.tensors)))
        rows = data.draw(st.slices(source.tensors[name].shape[0]).filter(lambda rows: rows.step in (None, 1)))
        with safe_open(source.tensors[name].file, framework="numpy") as theirs:
            expected = theirs.get_tensor(name)[rows]
        found = source.read(name, rows)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.tobytes() == expected.tobytes()


def test_a_slice_through_safetensors_own_lazy_reader(kept):
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    with Shards(kept["many"]) as source, safe_open(source.tensors[name].file, framework="numpy") as theirs:
        np.testing.assert_array_equal(source.read(name, slice(2, 5)), theirs.get_slice(name)[2:5])


def test_only_what_is_asked_for_is_read(kept, monkeypatch):
    read, real = [], os.preadv

    def preadv(fd, buffers, offset):
        read.append(real(fd, buffers, offset))
        return read[-1]

    monkeypatch.setattr(shards.os, "preadv", preadv)
    with Checkpoint(kept["many"]).shards as source:
        assert read == []
        assert open_files(kept["many"]) == []
        source.read("model.embed_tokens.weight", slice(500, 507))
        assert sum(read) == 7 * 96 * 2
        assert len(open_files(kept["many"])) == 1
    assert open_files(kept["many"]) == []


def test_reading_into_a_buffer(kept):
    buffer = np.full(1000, 255, np.uint8)
    with Shards(kept["one"]) as source:
        expected = source.read("model.layers.0.self_attn.k_proj.bias", slice(3, 30))
        found = source.read("model.layers.0.self_attn.k_proj.bias", slice(3, 30), buffer)
        assert np.shares_memory(found, buffer)
        np.testing.assert_array_equal(found, expected)
        assert (buffer[54:] == 255).all()
        again = source.read(SINKS, buffer=buffer)
        np.testing.assert_array_equal(again, source.read(SINKS))


def test_a_read_that_comes_in_pieces(kept, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(shards.os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:11]], offset))
    with Shards(kept["one"]) as source:
        found = source.read(SINKS)
        monkeypatch.undo()
        np.testing.assert_array_equal(found, source.read(SINKS))


def test_parts_of_a_fused_tensor(tmp_path):
    source = Checkpoint(synthetic.write_checkpoint(tmp_path / "openai", CFG, "openai"))
    with source.shards:
        fused = source.shards.read("block.1.attn.qkv.weight")
        parts = {entry.model: entry for entry in source.entries()}
        q, k, v = (parts[f"layers.1.attn.{name}_proj.weight"] for name in "qkv")
        for entry, start, stop in ((q, 0, 336), (k, 336, 504), (v, 504, 672)):
            np.testing.assert_array_equal(source.read(entry), fused[start:stop])
        np.testing.assert_array_equal(source.read(k, slice(5, 9)), fused[341:345])
        np.testing.assert_array_equal(source.read(k, slice(160, None)), fused[496:504])


def test_it_can_be_read_by_many_threads_and_leaves_nothing_open(kept, monkeypatch):
    """Two threads that open the same file at the same moment must not lose a file descriptor."""
    together, real = threading.Barrier(2, timeout=10), os.open

    def slow_open(*arguments):
        together.wait()
        return real(*arguments)

    with Shards(kept["one"]) as source:
        expected = source.read(SINKS)
        source.close()
        monkeypatch.setattr(shards.os, "open", slow_open)
        found = []
        threads = [threading.Thread(target=lambda: found.append(source.read(SINKS))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.undo()
        assert [array.tobytes() for array in found] == [expected.tobytes()] * 2
        assert len(open_files(kept["one"])) == 1
    assert open_files(kept["one"]) == []


def test_a_file_that_is_cut_while_it_is_read(one):
    file = one / "model.safetensors"
    with Shards(one) as source:
        tensor = source.tensors[SINKS]
        os.truncate(file, tensor.offset + 10)
        with pytest.raises(InputError) as caught:
            source.read(SINKS)
        assert caught.value.faults == [
            f"{file}: ended at byte {tensor.offset + 10}, {28 - 10} bytes early; it changed while it was read"
        ]


def test_a_file_that_goes_away_before_it_is_read(one):
    file = one / "model.safetensors"
    with Shards(one) as source:
        file.unlink()
        with pytest.raises(InputError) as caught:
            source.read(SINKS)
        assert caught.value.faults == [
            f"{file}: cannot be opened any more (No such file or directory); it changed while it was read"
        ]


def test_signature_and_recognition(kept, sources):
    checkpoint = Checkpoint(kept["many"])
    assert checkpoint.cfg == CFG
    assert checkpoint.layout is layouts.HF_MXFP4
    assert checkpoint.shards.signature()[SINKS] == ((14,), "BF16")
    assert {name: Checkpoint(path).layout.name for name, path in sources.items()} == {name: name for name in sources}


def test_float32_tensors_are_read_as_such(one):
    def widen(tensors):
        tensors[SINKS] = tensors[SINKS].astype(np.float32)

    edit_file(one / "model.safetensors", widen)
    with Checkpoint(one).shards as source:
        assert source.read(SINKS).dtype == np.float32


def test_links_beside_the_index_are_followed(many, tmp_path):
    """A hub cache keeps links to files with other names elsewhere."""
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(many.glob("*.safetensors"))):
        shutil.move(file, tmp_path / "blobs" / str(i))
        file.symlink_to(tmp_path / "blobs" / str(i))
    with Checkpoint(many).shards as source:
        assert source.read(SINKS).shape == (14,)


def test_files_below_the_directory_are_not_its_own(one):
    for below in ("original", "metal"):
        (one / below).mkdir()
        shutil.copy(one / "model.safetensors", one / below / "model.safetensors")
    assert Checkpoint(one).layout is layouts.HF_MXFP4


# --- a directory that is no checkpoint --------------------------------------------------------------------------


def test_nothing_and_a_file(tmp_path):
    missing = tmp_path / "missing"
    assert faults(missing) == [f"{missing}: expected a directory of safetensors files, found nothing"]
    missing.write_text("")
    assert faults(missing) == [f"{missing}: expected a directory of safetensors files, found a file"]


def test_an_empty_directory(tmp_path):
    assert faults(tmp_path) == [f"{tmp_path}: expected *.safetensors files, found none; it is empty"]


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert faults(tmp_path) == [
        f"{tmp_path}: expected *.safetensors files, found none; give the directory that config.json and the shards are in"
    ]


def test_a_directory_above_checkpoints(one, tmp_path):
    shutil.copytree(one, tmp_path / "another")
    assert faults(tmp_path) == [
        f"{tmp_path}: expected *.safetensors files, found none; there are some in another, one: give that directory"
    ]


@pytest.mark.parametrize("name", ["metal", "renamed"])
def test_metal(tmp_path, name):
    directory = tmp_path / name
    directory.mkdir()
    (directory / "model.bin").write_bytes(b"GPT-OSS v1.0\0\0\0\0")
    assert faults(directory) == [
        f"{directory}: expected *.safetensors files, found none; model.bin is in OpenAI's Metal format, which is not read:"
        " give the directory above metal/, or original/"
    ]


def test_a_checkpoint_may_lie_in_a_directory_called_metal(one, tmp_path):
    assert Checkpoint(one.rename(tmp_path / "metal")).cfg == CFG


def test_an_orbax_checkpoint_is_one_already(checkpoints):
    directory = checkpoints["bfloat16"]
    assert faults(directory) == [f"{directory}: expected *.safetensors files, found none; it is an Orbax checkpoint already"]


def test_another_model(tmp_path):
    save_file({"wte.weight": np.zeros((3, 2), np.float32), "h.0.ln": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert faults(tmp_path) == [
        f"{tmp_path}: expected the tensors of a gpt-oss checkpoint, found h.0.ln, wte.weight; is this another model?",
        f"{tmp_path / 'config.json'}: model_type: expected 'gpt_oss', found 'gpt2'; this is another model",
    ]


def test_another_model_with_names_like_ours(tmp_path):
    save_file({"model.layers.0.self_attn.q_proj.weight": np.zeros((3, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert faults(tmp_path) == [
        f"{tmp_path / 'config.json'}: model_type: expected 'gpt_oss', found 'llama'; this is another model"
    ]


def test_no_config(one):
    (one / "config.json").unlink()
    assert faults(one) == [f"{one / 'config.json'}: expected a gpt-oss config.json, found no file"]


# --- files ------------------------------------------------------------------------------------------------------


def test_a_missing_shard(many):
    first, *_, last = sorted(many.glob("*.safetensors"))
    for file in (first, last):
        file.unlink()
    assert faults(many) == [f"{file}: missing; {INDEX} names it. Download it again" for file in (first, last)]


def test_a_missing_shard_without_an_index(many):
    (many / INDEX).unlink()
    file = sorted(many.glob("*.safetensors"))[1]
    lost = list(load_file(file))
    file.unlink()
    assert sorted(faults(many)) == sorted(f"{many}: {name}: missing; Hugging Face, MXFP4 needs it" for name in lost)


def damage(file: Path, change) -> None:
    file.write_bytes(change(file.read_bytes()))


DAMAGE = {
    "last byte lost": (lambda data: data[:-1], "incomplete metadata, file not fully covered"),
    "header only": (lambda data: data[: 8 + int.from_bytes(data[:8], "little")], "incomplete metadata, file not fully covered"),
    "half the header": (lambda data: data[:100], "invalid header length"),
    "nothing": (lambda data: b"", "header too small"),
    "a byte too many": (lambda data: data + b"\0", "incomplete metadata, file not fully covered"),
    "a web page": (lambda data: b"<!DOCTYPE html><html>not found</html>", "header too large"),
    "header that is no JSON": (lambda data: data[:8] + b"}" + data[9:], "invalid JSON in header"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file(one, kind):
    change, reason = DAMAGE[kind]
    file = one / "model.safetensors"
    damage(file, change)
    [fault] = faults(one)
    assert fault.startswith(f"{file}: expected a whole safetensors file, found a truncated or damaged one (")
    assert reason in fault.lower().replace("json", "JSON")
    assert fault.endswith("). Download it again")


@SETTINGS
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(kept, share, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cut")
    data = (kept["one"] / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    cut = int(2 * share * header) if share < 0.5 else int((2 * share - 1) * len(data))  # as often in the header
    (directory / "model.safetensors").write_bytes(data[:cut])
    shutil.copy(kept["one"] / "config.json", directory)
    [fault] = faults(directory)
    assert "found a truncated or damaged one" in fault


@SETTINGS
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_header_with_any_byte_changed_never_ends_in_a_traceback(kept, place, byte, tmp_path_factory):
    directory = tmp_path_factory.mktemp("changed")
    data = bytearray((kept["one"] / "model.safetensors").read_bytes())
    at = int(place * (8 + int.from_bytes(data[:8], "little")))
    changed = data[at] != byte
    data[at] = byte
    (directory / "model.safetensors").write_bytes(data)
    shutil.copy(kept["one"] / "config.json", directory)
    try:
        checkpoint = Checkpoint(directory)
    except InputError:
        assert changed
    else:
        assert checkpoint.shards.tensors == {
            name: dataclasses.replace(tensor, file=directory / "model.safetensors")
            for name, tensor in Checkpoint(kept["one"]).shards.tensors.items()
        }


def test_a_tensor_in_a_shard_but_not_in_the_index(many):
    before = edit_index(many, lambda weight_map: weight_map.pop(SINKS))
    assert faults(many) == [f"{many / before[SINKS]}: {SINKS}: in the shard but not in {INDEX}; rebuild the index"]


def test_a_tensor_in_the_index_but_not_in_its_shard(many):
    file = many / index_of(many)["weight_map"][SINKS]
    edit_file(file, lambda tensors: tensors.pop(SINKS))
    assert faults(many) == [f"{file}: {SINKS}: missing; {INDEX} says it is here"]


def test_a_shard_that_has_lost_every_tensor(many):
    weight_map = index_of(many)["weight_map"]
    file = weight_map[SINKS]
    save_file({}, many / file)
    assert faults(many) == [
        f"{many / file}: {name}: missing; {INDEX} says it is here" for name, shard in weight_map.items() if shard == file
    ]


def test_a_tensor_in_another_shard_than_the_index_says(many):
    last = sorted(many.glob("*.safetensors"))[-1].name
    before = edit_index(many, lambda weight_map: weight_map.update({SINKS: last}))
    assert faults(many) == [f"{many / before[SINKS]}: {SINKS}: found here, but {INDEX} says {last}"]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_shards(many, indexed):
    weight_map = index_of(many)["weight_map"]
    last = sorted(many.glob("*.safetensors"))[-1]
    edit_file(last, lambda tensors: tensors.update({SINKS: np.zeros(14, ml_dtypes.bfloat16)}))
    if not indexed:
        (many / INDEX).unlink()
    assert faults(many) == [f"{last}: {SINKS}: duplicate; {weight_map[SINKS]} has it too"]


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "./x.safetensors"])
def test_an_index_that_names_a_file_outside_the_directory(many, name):
    before = edit_index(many, lambda weight_map: weight_map.update({SINKS: name}))
    shutil.copy(many / before[SINKS], many.parent / "other.safetensors")  # there, whole, and not to be opened
    assert faults(many) == [
        f"{many / INDEX}: names {name!r}, outside its own directory; an index may only name files beside it",
        f"{many / before[SINKS]}: {SINKS}: found here, but {INDEX} says {name}",
    ]


def test_a_shard_that_the_index_does_not_name(many):
    shutil.copy(many / index_of(many)["weight_map"][SINKS], many / "stray.safetensors")
    assert faults(many) == [f"{many / 'stray.safetensors'}: not named by {INDEX}; move it away, or rebuild the index"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError('weight_map')"),
        ('{"weight_map": ["a"]}', "AttributeError"),
        ('{"weight_map": null}', "AttributeError"),
    ],
)
def test_an_index_that_is_none(many, text, reason):
    (many / INDEX).write_text(text)
    [fault] = faults(many)
    assert fault.startswith(f"{many / INDEX}: expected an index with a weight_map object, found something else ({reason}")


def test_an_empty_index_leaves_every_file_unnamed(many):
    (many / INDEX).write_text('{"weight_map": {}}')
    assert faults(many) == [
        f"{file}: not named by {INDEX}; move it away, or rebuild the index" for file in sorted(many.glob("*.safetensors"))
    ]


# --- tensors against config.json --------------------------------------------------------------------------------


def test_a_config_that_contradicts_the_tensors(one):
    edit_config(one, head_dim=26)
    part = "expected shape [{}] by config.json, found [{}]"
    shapes = {
        "self_attn.q_proj.weight": part.format("364, 96", "336, 96"),
        "self_attn.q_proj.bias": part.format("364", "336"),
        "self_attn.k_proj.weight": part.format("182, 96", "168, 96"),
        "self_attn.k_proj.bias": part.format("182", "168"),
        "self_attn.v_proj.weight": part.format("182, 96", "168, 96"),
        "self_attn.v_proj.bias": part.format("182", "168"),
        "self_attn.o_proj.weight": part.format("96, 364", "96, 336"),
    }
    expected = [f"{one}: model.layers.{n}.{name}: {text}" for n in range(2) for name, text in shapes.items()]
    assert sorted(faults(one)) == sorted(expected)


def test_a_config_of_fewer_layers(one):
    edit_config(one, num_hidden_layers=1, layer_types=["sliding_attention"])
    found = faults(one)
    assert len(found) == 19
    assert all(
        fault.startswith(f"{one}: model.layers.1.")
        and fault.endswith(": unexpected; config.json and the layout (Hugging Face, MXFP4) have no such tensor")
        for fault in found
    )


def test_every_fault_of_the_tensors_at_once(one):
    def change(tensors):
        tensors["model.layers.0.extra"] = np.zeros(3, np.float32)
        tensors[SINKS] = tensors[SINKS][:13]
        tensors["model.norm.weight"] = np.zeros(96, np.float16)
        del tensors["lm_head.weight"]

    edit_file(one / "model.safetensors", change)
    assert sorted(faults(one)) == sorted([
        f"{one}: lm_head.weight: missing; Hugging Face, MXFP4 needs it",
        f"{one}: model.layers.0.extra: unexpected; config.json and the layout (Hugging Face, MXFP4) have no such tensor",
        f"{one}: {SINKS}: expected shape [14] by config.json, found [13]",
        f"{one}: model.norm.weight: expected dtype BF16 or F32, found F16",
    ])  # fmt: skip


def test_every_fault_of_the_files_and_the_config_at_once(many):
    weight_map = index_of(many)["weight_map"]
    first, second, third, *_, last = sorted({many / file for file in weight_map.values()})
    first.unlink()
    damage(second, lambda data: data[:-1])
    shutil.copy(third, many / "stray.safetensors")
    edit_file(last, lambda tensors: tensors.update({"extra": np.zeros(1, np.float32)}))
    edit_config(many, vocab_size="509", attention_bias=False)
    found = faults(many)
    damaged = found.pop(2)
    assert damaged.startswith(f"{second}: expected a whole safetensors file, found a truncated or damaged one (")
    assert found == [
        f"{first}: missing; {INDEX} names it. Download it again",
        f"{many / 'stray.safetensors'}: not named by {INDEX}; move it away, or rebuild the index",
        f"{last}: extra: in the shard but not in {INDEX}; rebuild the index",
        f"{many / 'config.json'}: vocab_size: expected an integer, found '509'",
        f"{many / 'config.json'}: attention_bias: only True is implemented, found False",
    ]


# --- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_shard_we_write_is_read_by_safetensors(tmp_path, pieces):
    arrays = {
        "a": np.arange(7, dtype=np.uint8),
        "ünïcode": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.arange(6).astype(ml_dtypes.bfloat16).reshape(1, 2, 3),
    }
    spelt = {np.dtype(np.uint8): "U8", np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}
    tensors = {name: (array.shape, spelt[array.dtype]) for name, array in arrays.items()}
    stream = (piece for array in arrays.values() for piece in np.array_split(array.reshape(-1), pieces))
    write_shard(tmp_path / "x.safetensors", tensors, stream)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape, read[name].tobytes()) == (array.dtype, array.shape, array.tobytes())
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as theirs:
        assert theirs.metadata() == {"format": "pt"}  # transformers asks for it


@pytest.mark.parametrize("length", range(1, 9))
def test_data_begins_at_a_multiple_of_eight_bytes(tmp_path, length):
    """Whatever the header's length: others map the file, and read it as it lies."""
    write_shard(tmp_path / "x.safetensors", {"a" * length: ((3,), "U8")}, [np.arange(3, dtype=np.uint8)])
    data = (tmp_path / "x.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert load_file(tmp_path / "x.safetensors")["a" * length].tolist() == [0, 1, 2]


def test_pieces_that_do_not_fill_the_header_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="the pieces hold 3 bytes, the header 4"):
        write_shard(tmp_path / "x.safetensors", {"a": ((2, 2), "U8")}, [np.zeros(3, np.uint8)])
