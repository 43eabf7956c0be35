"""gs:// where a path is read, against a server that speaks the service's JSON API: by us, by plain Orbax, and by parity."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from buckets import fill
from flax import nnx

from converter import convert
from converter.adapters import convert_adapter
from converter.cli import inspect_main, main
from oss_model import InputError, ModelConfig, add_lora, buckets, create_model_from_checkpoint, eos_tokens, save_lora
from oss_model.buckets import Conflict, GsPath, path_of
from oss_model.errors import Incomplete
from oss_model.files import OpenFile
from oss_model.shards import Checkpoint, Shards
from oss_model.zarr import open_arrays

# Each thread has connections of its own, which are closed when nobody refers to them any more.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


# --- the path -----------------------------------------------------------------------------------------------------


def test_what_a_path_is():
    path = path_of("gs://bucket/run/model")
    assert isinstance(path, GsPath)
    assert path == path_of(Path("gs://bucket/run/model"))  # as click hands it over
    assert (str(path), os.fspath(path), f"{path}", path.as_posix()) == ("gs://bucket/run/model",) * 4
    assert (path.bucket, path.key, path.name, path.suffix) == ("bucket", "run/model", "model", "")
    assert str(path / "c" / "0") == "gs://bucket/run/model/c/0"
    assert [str(above) for above in path.parents][:2] == ["gs://bucket/run", "gs://bucket"]
    assert (path / "c/0").relative_to(path).as_posix() == "c/0"
    assert path.resolve() == path.absolute() == pickle.loads(pickle.dumps(path)) == path
    assert str(path.with_name("other")) == "gs://bucket/run/other"
    assert not isinstance(path_of("run/model"), GsPath)


def test_what_is_in_a_bucket(gcs):
    for name in ("a/x.json", "a/y.txt", "a/b/x.json", "a/b/c/z", "ab/x.json"):
        gcs.put(name, name.encode())
    top = path_of("gs://bucket/a")

    def names(found) -> list[str]:
        return [str(path).removeprefix("gs://bucket/") for path in found]

    assert names(top.iterdir()) == ["a/b", "a/x.json", "a/y.txt"]
    assert names(top.glob("*.json")) == ["a/x.json"]
    assert names(top.glob("*/x.json")) == ["a/b/x.json"]
    assert names(top.glob("*/*")) == ["a/b/c", "a/b/x.json"]
    assert names(top.rglob("*.json")) == ["a/b/x.json", "a/x.json"]
    assert names(top.rglob("*")) == ["a/b/c/z", "a/b/x.json", "a/x.json", "a/y.txt"]
    assert names(path_of("gs://bucket").iterdir()) == ["a", "ab"]
    assert (top.is_dir(), top.is_file(), top.exists()) == (True, False, True)
    file = top / "x.json"
    assert (file.is_dir(), file.is_file(), file.exists(), file.read_text()) == (False, True, True, "a/x.json")
    assert not (top / "none").exists()
    before = file.stat()
    gcs.put("a/x.json", b"other")
    assert (before.st_size, file.stat().st_size) == (8, 5)
    assert before.st_mtime_ns != file.stat().st_mtime_ns
    for ask in (GsPath.read_bytes, GsPath.stat):
        with pytest.raises(FileNotFoundError) as caught:
            ask(top / "none")
        assert caught.value.filename == "gs://bucket/a/none"


def test_more_objects_than_one_list_has(gcs):
    for number in range(2100):
        gcs.put(f"a/{number:04d}/c", b"x")
    assert len(buckets.listed(path_of("gs://bucket/a"))) == 2100
    assert len(list(path_of("gs://bucket/a").iterdir())) == 2100


def test_nothing_is_written_but_under_a_precondition(gcs):
    path = path_of("gs://bucket/x")
    one = buckets.write(path, b"one", metadata={"of": "me"})
    assert buckets.write(path, b"one", metadata={"of": "me"}) == one  # as good as written: its answer may have been lost
    for data, metadata in ((b"two", {"of": "me"}), (b"one", {"of": "you"})):
        with pytest.raises(Conflict):
            buckets.write(path, data, metadata=metadata)
    two = buckets.write(path, b"two", generation=one.generation)
    with pytest.raises(Conflict):
        buckets.write(path, b"three", generation=one.generation)
    buckets.delete(path, one.generation)  # not what is there
    assert buckets.found(path) == two
    buckets.delete(path, two.generation)
    buckets.delete(path, two.generation)
    assert buckets.found(path) is None


def test_what_is_replaced_while_it_is_read_is_no_part_of_both(gcs):
    gcs.put("x", bytes(1000))
    opened, out = OpenFile(path_of("gs://bucket/x")), np.ones(10, np.uint8)
    opened.fill(out, 990)
    assert not out.any()
    with pytest.raises(EOFError, match="ended at byte 1000, 5 bytes early"):
        opened.fill(out, 995)
    gcs.put("x", b"x" * 1000)
    with pytest.raises(EOFError, match="is gone, or is another now"):
        opened.fill(out, 0)


@pytest.mark.parametrize("size", [1 << 20, 9 << 20])  # in one request, and resumable
def test_what_arrives_wrong_is_never_stored(gcs, size):
    data = bytes(size)
    gcs.spoilt_uploads = 2
    buckets.write(path_of("gs://bucket/x"), data)
    assert gcs.objects["x"].data == data
    assert gcs.wrote["x"] == 1
    assert not gcs.asked["DELETE api"]


@pytest.mark.parametrize("fault", ["cut_uploads", "fails", "lost_answers"])
def test_a_large_upload_that_breaks_off_is_taken_up(gcs, fault):
    data = os.urandom(9 << 20)
    setattr(gcs, fault, [503, 429] if fault == "fails" else 1)
    buckets.write(path_of("gs://bucket/x"), data)
    assert not getattr(gcs, fault)
    assert gcs.objects["x"].data == data


@pytest.mark.parametrize("fault", ["cut_downloads", "fails"])
def test_a_download_that_breaks_off_is_taken_up(gcs, fault):
    data = os.urandom(1 << 20)
    gcs.put("x", data)
    setattr(gcs, fault, [503, 429] if fault == "fails" else 2)
    assert path_of("gs://bucket/x").read_bytes() == data
    assert not getattr(gcs, fault)


def test_a_download_that_arrives_wrong_is_told(gcs):
    gcs.put("x", os.urandom(1000))
    gcs.spoilt_downloads = 100
    with pytest.raises(Incomplete, match="gs://bucket/x: arrived 3 times as something else than what is stored"):
        path_of("gs://bucket/x").read_bytes()
    gcs.spoilt_downloads = 2
    assert path_of("gs://bucket/x").read_bytes() == gcs.objects["x"].data


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cfg(small):
    return ModelConfig.from_json(small)


def values(model) -> dict:
    return {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model))}


def same(one, other) -> bool:
    one, other = values(one), values(other)
    return one.keys() == other.keys() and all(a.tobytes() == other[path].tobytes() for path, a in one.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "mxfp4"])
def test_a_checkpoint_is_loaded(gcs, small, tmp_path, cfg, dtype):
    convert(small, tmp_path / "out", dtype, verify=False)
    there = fill(gcs, "out", tmp_path / "out")
    loaded = create_model_from_checkpoint(there, ModelConfig.from_json(there))
    assert same(loaded, create_model_from_checkpoint(tmp_path / "out", cfg))
    assert gcs.asked["GET download"] < 2 * len(gcs.objects)  # a chunk in one request


def test_safetensors_are_loaded_and_converted(gcs, small, tmp_path, cfg):
    there = fill(gcs, "source", small)
    assert same(create_model_from_checkpoint(there, cfg), create_model_from_checkpoint(small, cfg))
    result = convert(there, tmp_path / "out")
    assert (result.source, result.source_layout) == (there, "hf")
    assert json.loads((tmp_path / "out/conversion.json").read_text())["source"]["path"] == there
    assert convert(there, tmp_path / "out").status == "already-complete"
    held = dataclasses.replace(cfg, param_dtype="bfloat16")
    assert same(create_model_from_checkpoint(tmp_path / "out", cfg), create_model_from_checkpoint(small, held))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda data: data[:-1], "truncated or damaged"),
        (lambda data: data[:4], "truncated or damaged"),
        (lambda data: b"\xff" * 8 + data[8:], "truncated or damaged"),
    ],
)
def test_safetensors_that_are_damaged_are_told_as_on_a_disk(gcs, small, change, found):
    there = fill(gcs, "source", small)
    gcs.put("source/model.safetensors", change((small / "model.safetensors").read_bytes()))
    with pytest.raises(
        InputError, match=f"gs://bucket/source/model.safetensors: expected a whole safetensors file, found a {found}"
    ):
        Shards(there)


def test_a_source_that_is_replaced_while_it_is_read_is_told(gcs, small, tmp_path):
    there = fill(gcs, "source", small)
    data = gcs.objects["source/model.safetensors"].data

    def replace(progress) -> None:
        gcs.put("source/model.safetensors", data)

    with pytest.raises(InputError, match="is gone, or is another now; it changed while it was read"):
        convert(there, tmp_path / "out", progress=replace)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_what_was_converted_there_is_exported_and_inspected(gcs, small, tmp_path, capsys):
    assert main([str(small), "gs://bucket/out", "--dtype", "mxfp4", "-q"]) == 0
    assert main(["gs://bucket/out", str(tmp_path / "back"), "--to", "hf", "-q"]) == 0
    with Checkpoint(small).shards as before, Checkpoint(tmp_path / "back").shards as after:
        assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.tensors)
    assert inspect_main(["gs://bucket/out"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("gs://bucket/out: Orbax")
    assert "  verify-oss gs://bucket/out\n" in out
    assert eos_tokens("gs://bucket/out") == eos_tokens(small)


def test_a_prefix_with_nothing_in_it(gcs, cfg):
    with pytest.raises(InputError, match=r"gs://bucket/none: expected an Orbax checkpoint or safetensors .*, found nothing"):
        create_model_from_checkpoint("gs://bucket/none", cfg)
    assert inspect_main(["gs://bucket/none"]) == 2


def test_what_may_not_be_read_is_not_taken_for_damaged(gcs, small, tmp_path, cfg, capsys):
    convert(small, "gs://bucket/out")
    gcs.forbidden = True
    with pytest.raises(InputError, match="permission denied"):
        open_arrays(path_of("gs://bucket/out"))
    with pytest.raises(InputError, match=r"^gs://bucket/out/_METADATA: permission denied \(403 nobody"):
        create_model_from_checkpoint("gs://bucket/out", cfg)
    for arguments in (["gs://bucket/out", str(tmp_path / "back"), "--to", "hf-bf16"], [str(small), "gs://bucket/out"]):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert ("permission denied (403" in err, err.count("\n")) == (True, 1)


def test_a_chunk_is_read_where_a_mesh_wants_it(gcs, even_checkpoints, even_cfg):
    there = fill(gcs, "even", even_checkpoints["float32"])
    mesh = jax.make_mesh((2, 2), ("fsdp", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    sharded = create_model_from_checkpoint(there, even_cfg, mesh)
    assert same(sharded, create_model_from_checkpoint(even_checkpoints["float32"], even_cfg))


# --- others -------------------------------------------------------------------------------------------------------

UPDATES = """
import sys
from pathlib import Path

from converter import convert
from converter.adapters import convert_adapter
from converter.cli import main
from oss_model.shards import Checkpoint

small, peft, work = sys.argv[1:]


def tensors(directory):
    with Checkpoint(directory).shards as shards:
        return {name: shards.read(name).tobytes() for name in shards.tensors}


assert main([peft, f"{work}/lora", "--to", "orbax-lora", "--base", "gs://bucket/small", "-q"]) == 0  # the base alone is there
convert(small, f"{work}/merged", to="hf", merge=f"{work}/lora")
wanted = tensors(f"{work}/merged")
assert wanted != tensors(small)
for number, lora in enumerate(["gs://bucket/lora", "gs://bucket/peft"]):  # of Orbax, and of PEFT
    again = [small, f"{work}/merged-{number}", "--to", "hf", "--merge", lora]
    assert main([*again, "-q"]) == main([*again, "-q"]) == 0
    assert tensors(f"{work}/merged-{number}") == wanted
    assert lora in Path(f"{work}/merged-{number}/conversion.json").read_text()
    assert main([lora, f"{work}/adapter-{number}", "--to", "peft", "--base", small, "-q"]) == 0
    made = Path(f"{work}/adapter-{number}/adapter_model.safetensors").read_bytes()
    assert made == Path(f"{peft}/adapter_model.safetensors").read_bytes()
assert main([small, f"{work}/none", "--to", "hf", "--merge", "gs://bucket/none"]) == 2
assert main([peft, "gs://bucket/out", "--to", "orbax-lora", "--base", small]) == 2
"""


@pytest.mark.long
def test_updates_are_read_there_and_the_model_they_are_of(gcs, small, cfg, tmp_path):
    """In a process of its own: tensorstore reads its environment once."""
    model = create_model_from_checkpoint(small, cfg)
    add_lora(model, r".*attn\.(q|o)_proj", 2, rngs=nnx.Rngs(0))
    keys = nnx.Rngs(7)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        variable.set_value(jax.random.normal(keys(), variable.get_value().shape))
    save_lora(model, tmp_path / "ours")
    convert_adapter(tmp_path / "ours", tmp_path / "peft", "peft", small)
    for name, directory in (("small", small), ("lora", tmp_path / "ours"), ("peft", tmp_path / "peft")):
        fill(gcs, name, directory)
    called = [sys.executable, "-c", UPDATES, str(small), str(tmp_path / "peft"), str(tmp_path)]
    result = subprocess.run(called, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines[0].startswith(
        "error: gs://bucket/none/lora.json: expected the ranks and alphas that save_lora notes, found no"
    )
    assert lines[1].startswith("error: gs://bucket/out: expected a path on a disk, found an address; here none is taken")


OTHERS = """
import sys
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1

small, copied, out = sys.argv[1:]
with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore("gs://bucket/out")
    assert np.array_equal(tree["lm_head"]["weight"]["value"], v1.load("gs://bucket/out")["lm_head"]["weight"]["value"])
    try:
        checkpointer.restore(copied)
    except ValueError as error:
        print(error)
    checkpointer.save("gs://bucket/run/7/default", tree)

from converter import convert
from oss_model import ModelConfig, create_model_from_checkpoint
from flax import nnx

cfg = ModelConfig.from_json("gs://bucket/out")
models = [create_model_from_checkpoint(f"gs://bucket/{path}", cfg) for path in ("out", "run/7/default")]
ours, theirs = (nnx.to_flat_state(nnx.state(model)) for model in models)
assert all(np.array_equal(a[1].get_value(), b[1].get_value()) for a, b in zip(ours, theirs, strict=True))
result = convert("gs://bucket/run", out, to="hf-bf16")
print(result.source_layout, result.verified)

from parity.cli import main
sys.exit(main([small, "gs://bucket/out"]))
"""


@pytest.mark.long
def test_plain_orbax_and_parity_read_it(gcs, small, small_out, tmp_path):
    """In a process of its own: tensorstore and gcsfs read their environment once."""
    convert(small, "gs://bucket/out", "float32")
    copied = fill(gcs, "copied", small_out)
    gcs.put("run/config.json", (small / "config.json").read_bytes())
    called = [sys.executable, "-c", OTHERS, str(small), copied, str(tmp_path / "back")]
    result = subprocess.run(called, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "Found incomplete checkpoint at gs://bucket/copied."  # nobody has written commit_success.txt there
    assert lines[1] == "orbax True"
    assert "20/20" in result.stdout
    assert "PASS" in result.stdout
    with Checkpoint(tmp_path / "back").shards as shards:
        assert shards.tensors
