"""What is told of a checkpoint that cannot be read: that there is none, that memory ran out, or what is damaged."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jaxlib
import numpy as np
import orbax.checkpoint as ocp
import pytest

from oss_model import InputError, ModelConfig, create_model_from_checkpoint, memory, params
from oss_model.errors import OutOfMemory
from oss_model.params import stored_parameters
from oss_model.restoring import restoring
from oss_model.zarr import StoredArray
from parity.candidate import Candidate

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."
OUT_OF_MEMORY = {
    "host": MemoryError("Unable to allocate 110. MiB for an array"),
    "device": jaxlib._jax.JaxRuntimeError(EXHAUSTED),
    "tensorstore": ValueError(EXHAUSTED),
    "threads": RuntimeError("can't start new thread"),
}


@pytest.fixture(params=["our loader", "check-parity"])
def restore(request):
    """A function that reads a checkpoint, either way."""

    def load(path: Path) -> None:
        if request.param == "our loader":
            create_model_from_checkpoint(path, ModelConfig.tiny())
        else:
            candidate = Candidate(path)
            candidate.restore([name for name in candidate.stored if name.startswith("layers.1.")])

    return load


@pytest.mark.parametrize(("reader", "wrapped"), [("Orbax", False), ("Orbax", True), ("ours", False)])
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_is_not_damage(checkpoints, monkeypatch, restore, kind, reader, wrapped):
    def fails(self, *arguments, **options):
        if not wrapped:
            raise OUT_OF_MEMORY[kind]
        raise Exception("Encountered error while reading array index: (slice(0, 9, 1)). See full") from OUT_OF_MEMORY[kind]

    path = checkpoints["bfloat16"]
    if reader == "Orbax":
        monkeypatch.setattr(params, "open_arrays", lambda path: None)
        monkeypatch.setattr(ocp.Checkpointer, "restore", fails)
    else:
        monkeypatch.setattr(StoredArray, "read", fails)
    with pytest.raises(OutOfMemory) as caught:
        restore(path)
    (line,) = caught.value.faults
    said = re.escape(str(OUT_OF_MEMORY[kind]))
    pattern = (
        rf"{path}: out of memory while it was read \({said}\): what is read takes [\d.]+ MB, [\d.]+ GB are free; end other .*"
    )
    assert re.fullmatch(pattern, line), line
    assert "verify-oss" not in line


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ValueError("RESOURCE_EXHAUSTED: Too many open files [os_error_code='24']"), 3, ": too many open files; allow more"),
        (ValueError("UNKNOWN: Input/output error [os_error_code='5']"), 3, ": reading or writing failed (input/output error)"),
        (ValueError("PERMISSION_DENIED: Permission denied [os_error_code='13']"), 2, ": permission denied; "),
        (
            ValueError("DATA_LOSS: Digest mismatch"),
            2,
            ": expected a whole checkpoint, found one that cannot be read (DATA_LOSS",
        ),
        (
            KeyError("tree_metadata"),
            2,
            ": expected a whole checkpoint, found one that cannot be read (KeyError 'tree_metadata')",
        ),
    ],
)
def test_nor_is_what_the_system_refuses(error, kind, said):
    with pytest.raises(Exception, match=re.escape(f"/dst{said}")) as caught, restoring(Path("/dst")):
        raise Exception("Encountered error") from error
    assert caught.value.exit_code == kind


STARVED = """
import resource, sys
import jax
from oss_model import ModelConfig, create_model_from_checkpoint
from oss_model.exits import run_command
from oss_model.memory import free_memory
from parity.candidate import Candidate
import psutil

path = sys.argv[1]
jax.devices()
limit = psutil.Process().memory_info().vms + (4 << 30)  # enough for everything but the embedding
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert free_memory() <= 4 << 30
cfg = ModelConfig.from_json(path + "/config.json")
for load in (lambda: create_model_from_checkpoint(path, cfg), lambda: Candidate(path).restore(["embedding.weight"])):
    print(run_command(lambda: load() and None), flush=True)
"""


def test_a_process_with_too_little_memory_says_so(checkpoints, tmp_path):
    """Under a limit of the system's, not an injected error. The embedding is said to have 10^8 rows: 19 GB."""
    path = Path(shutil.copytree(checkpoints["bfloat16"], tmp_path / "dst"))
    rows = 10**8
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    for name in ("embedding.weight", "lm_head.weight"):
        file = path / f"{name}.value" / "zarr.json"
        array = json.loads(file.read_text())
        array["shape"][0] = rows
        file.write_text(json.dumps(array))
    run = subprocess.run([sys.executable, "-c", STARVED, str(path)], capture_output=True, text=True)
    assert run.stdout == "3\n3\n", run.stderr[-2000:]
    lines = run.stderr.splitlines()
    assert len(lines) == 2, run.stderr
    for line, need in zip(lines, ("38.4 GB", "19.2 GB"), strict=True):
        assert f"{path}: out of memory while it was read (" in line
        assert f"what is read takes {need}, " in line


# --- nothing to read --------------------------------------------------------------------------------------------


def test_what_is_no_orbax_checkpoint_is_one_line_that_says_what_is_there(checkpoints, sources, tmp_path, caplog):
    places = {name: tmp_path / name for name in ("nothing", "file", "empty", "others", "above", "new", "volume")}
    places["file"].write_text("")
    for name in ("empty", "others", "above", "new.partial", "volume/convert-oss.partial"):
        (tmp_path / name).mkdir(parents=True)
    for name in "abcd":
        (places["others"] / name).touch()
    (places["above"] / "default").symlink_to(checkpoints["bfloat16"])
    places["safetensors"] = sources["hf"]
    said = {
        "nothing": f"nothing; convert-oss SRC {places['nothing']} makes one",
        "file": "a file; give a directory",
        "empty": "an empty directory; give another, or make one with convert-oss",
        "others": "other files (a, b, c and 1 more); give another, or make one with convert-oss",
        "above": f"some in directories of it; give one: {places['above']}/default",
        "new": f"nothing, and an unfinished conversion in {tmp_path}/new.partial: run the same convert-oss again",
        "volume": f"an unfinished conversion in {tmp_path}/volume/convert-oss.partial: run the same convert-oss again",
        "safetensors": f"safetensors; convert them first: convert-oss {sources['hf']} DST",
    }
    for name, path in places.items():
        with pytest.raises(InputError) as caught:
            stored_parameters(path)
        assert caught.value.faults == [f"{path}: expected an Orbax checkpoint (_METADATA), found {said[name]}"]
        line = f"{path}: expected an Orbax checkpoint or safetensors (_METADATA, *.safetensors), found {said[name]}"
        for read in (Candidate, lambda path: create_model_from_checkpoint(path, ModelConfig.tiny())):
            if name != "safetensors":
                with pytest.raises(InputError) as caught:
                    read(path)
                assert caught.value.faults == [line]
    assert caplog.records == []


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("_METADATA", "{]", "Expecting property name"),
        ("_METADATA", "{}", "KeyError 'tree_metadata'"),
        ("norm.scale.value/zarr.json", None, 'NOT_FOUND: Error opening "zarr3" driver: Metadata at local file '),
    ],
)
def test_damaged_metadata_is_named(checkpoints, tmp_path, file, content, said, caplog):
    path = tmp_path / "dst"
    shutil.copytree(checkpoints["bfloat16"], path)
    if content is None:
        (path / file).unlink()
    else:
        (path / file).write_text(content)
    with pytest.raises(InputError) as caught:
        stored_parameters(path)
    (line,) = caught.value.faults
    assert line.startswith(f"{path}: expected a whole checkpoint, found one that cannot be read ({said}")
    assert line.endswith("): try verify-oss")
    assert caplog.records == []


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1 << 10)])
def test_the_peak_is_in_bytes_where_there_is_no_proc(monkeypatch, platform, unit):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=1_000_000))
    assert memory.peak_rss() == 1_000_000 * unit


def test_sizes_and_limits_are_told():
    from oss_model.memory import free_memory, size

    assert [size(n) for n in (812, 3_400_000, 13.8e9, 2e12)] == ["812 bytes", "3.4 MB", "13.8 GB", "2.0 TB"]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert 0 < free_memory() < np.inf
