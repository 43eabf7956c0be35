"""Conversions to gs://, against a server that speaks the service's JSON API: whatever happens on the way, they end right."""

import json
import os
import signal
import sys
import threading

import numpy as np
import pytest
from buckets import begin, fill, stored
from converting import contents, tree

from converter import convert
from converter.audit import verify_checkpoint
from converter.bucket import CLAIM
from converter.bucket_store import COMMIT, WHOLE, BucketStore
from converter.cli import main, verify_main
from converter.errors import Different
from oss_model import buckets, create_model_from_checkpoint
from oss_model.errors import Incomplete, InputError
from oss_model.files import crc32c

# Each thread has connections of its own, which are closed when nobody refers to them any more.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

DST = "gs://bucket/run/model"
CHUNKS = "/c/"


def chunks_of(names) -> set[str]:
    return {name for name in names if CHUNKS in name}


# --- what is there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "mxfp4"])
def test_a_prefix_gets_what_a_directory_gets(gcs, small, tmp_path, dtype):
    result = convert(small, DST, dtype)
    assert (result.status, result.verified, result.destination) == ("complete", True, DST)
    convert(small, tmp_path / "out", dtype)
    expected = {name: data for name, data in contents(tmp_path / "out").items() if name != "hashes"}
    assert stored(gcs, "run/model") == expected
    assert json.loads(gcs.files("run/model")["conversion.json"])["files"].keys() >= {COMMIT, "_METADATA", "config.json"}
    assert max(gcs.wrote.values()) == 1
    assert verify_checkpoint(DST, small).status == "pass"


def test_what_completes_it_comes_last(gcs, small):
    convert(small, DST)
    names = [name.removeprefix("run/model/") for name in gcs.wrote]  # in the order of their first time
    assert names[0] == CLAIM
    assert names[-4:] == ["_METADATA", "_CHECKPOINT_METADATA", COMMIT, "conversion.json"]


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_of_every_whole_chunk_the_service_makes_the_same_checksum(size):
    values = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    chunk = values.tobytes() + crc32c(0, values).to_bytes(4, "little")
    assert crc32c(0, np.frombuffer(chunk, np.uint8)) == WHOLE
    assert crc32c(0, np.frombuffer(bytes([chunk[0] ^ 1]) + chunk[1:], np.uint8)) != WHOLE


def test_the_same_again_is_already_complete(gcs, small, tmp_path, capsys):
    convert(small, DST)
    wrote = dict(gcs.wrote)
    assert convert(small, DST).status == "already-complete"
    assert {**gcs.wrote} == wrote
    assert main([str(small), DST, "--dry-run"]) == 0
    assert "already complete" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(gcs, small, capsys):
    assert main([str(small), DST, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["space_free"], found["work_directory"]) == ("planned", None, DST)
    assert found["space_needed"] == found["bytes_written"]
    assert not gcs.objects


def test_shares_of_several_processes(gcs, small, small_whole):
    assert convert(small, DST, process=(1, 2)).status == "share-written"
    assert COMMIT not in gcs.files("run/model")
    assert convert(small, DST, process=(2, 2)).status == "complete"
    assert stored(gcs, "run/model") == {name: data for name, data in small_whole.items() if name != "hashes"}
    assert convert(small, DST, process=(1, 2)).status == "already-complete"


# --- what goes wrong on the way -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("fails", [429, 503, 500, 502, 503, 429]),
        ("cut_uploads", 5),
        ("cut_downloads", 3),
        ("spoilt_uploads", 2),
        ("lost_answers", 9),
    ],
)
def test_what_passes_is_gone_over(gcs, small, small_whole, attribute, value):
    setattr(gcs, attribute, value)
    assert convert(small, DST).status == "complete"
    assert getattr(gcs, attribute) in (0, [])
    assert stored(gcs, "run/model") == {name: data for name, data in small_whole.items() if name != "hashes"}


def test_what_arrives_wrong_again_and_again_is_incomplete(gcs, small):
    gcs.spoilt_uploads = 1000
    with pytest.raises(Incomplete, match=r"arrived 3 times as something else than what was sent, by its CRC-32C"):
        convert(small, DST)
    gcs.spoilt_uploads = 0
    assert convert(small, DST).status in ("complete", "resumed")


def test_a_service_that_fails_for_good_is_3_and_the_rerun_goes_on(gcs, small, small_whole, monkeypatch, capsys):
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 0.05)
    left = [20]

    def fail(name: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            gcs.fails = [503] * 100_000

    gcs.after = fail
    assert main([str(small), DST, "-q"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {DST}/")
    assert lines[0].endswith("(503 try again); what is written is kept: run the same command again")
    gcs.fails, before = [], dict(gcs.wrote)
    assert convert(small, DST).status == "resumed"
    again = {name for name in before if gcs.wrote[name] > before[name]}
    assert not chunks_of(again)
    assert stored(gcs, "run/model") == {name: data for name, data in small_whole.items() if name != "hashes"}


MOMENTS = {
    "the claim": lambda name, count: name.endswith(CLAIM),
    "a chunk": lambda name, count: CHUNKS in name and count == 9,
    "the last chunk": lambda name, count: name.endswith("zarr.json"),
    "zarr.json": lambda name, count: name.endswith("lm_head.weight.value/zarr.json"),
    "metadata": lambda name, count: name.endswith("/_METADATA"),
    "commit": lambda name, count: name.endswith(COMMIT),
    "the manifest": lambda name, count: name.endswith("conversion.json"),
}


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_the_rerun_ends_right(gcs, small, small_whole, moment, when):
    killed = threading.Event()

    def kill(name: str) -> None:
        if not killed.is_set() and MOMENTS[moment](name, len(gcs.wrote)):
            killed.set()
            os.kill(process.pid, signal.SIGKILL)

    setattr(gcs, when, kill)
    process = begin(gcs, small, DST, verify=False)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process.close()
    whole = {name: data for name, data in small_whole.items() if name != "hashes"}
    there = gcs.files("run/model")
    if COMMIT in there:  # Orbax takes it for complete: then all that Orbax reads is there
        assert not {name for name in whole if "value/" in name or name == "_METADATA"} - there.keys()
    assert ("conversion.json" in there) == (moment == "the manifest")  # what is on its way when its sender dies, arrives
    before = dict(gcs.wrote)
    result = convert(small, DST)
    assert result.status == ("complete" if not chunks_of(before) else "resumed")
    assert stored(gcs, "run/model") == whole
    assert not {name for name in before if CHUNKS in name and gcs.wrote[name] > before[name]}  # sent once


def test_two_at_once_write_one_checkpoint(gcs, small, small_whole, tmp_path):
    both = [begin(gcs, small, DST, said=str(tmp_path / f"said-{n}")) for n in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert stored(gcs, "run/model") == {name: data for name, data in small_whole.items() if name != "hashes"}
    assert max(gcs.wrote.values()) == 1  # whoever came second was refused, and found what it would have written
    said = [(tmp_path / f"said-{n}").read_text() for n in range(2)]
    assert sum("begun by process" in one for one in said) == 1, said
    assert verify_checkpoint(DST, small).status == "pass"


def test_two_that_want_different_things_one_is_told_by_whom(gcs, small, tmp_path):
    said = tmp_path / "said"
    gate, entered = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if CHUNKS in name:
            entered.set()
            gate.wait()

    gcs.before = hold
    first = begin(gcs, small, DST, said=str(said))
    assert entered.wait(60)
    gcs.before = lambda name: None
    try:
        with pytest.raises(InputError) as caught:
            convert(small, DST, "float32")
    finally:
        gate.set()
    assert str(caught.value).startswith(
        f"{DST}: an unfinished conversion with another dtype (process {first.pid} on {os.uname().nodename}, since 20"
    )
    assert '): expected "bfloat16", found "float32"; give another name, or `gcloud storage rm -r' in str(caught.value)
    first.join()
    assert first.exitcode == 0, said.read_text()


def test_what_somebody_else_puts_there_meanwhile_is_left_alone(gcs, small):
    name = "run/model/lm_head.weight.value/c/0/0"

    def intrude(_: str) -> None:
        gcs.before = lambda name: None
        gcs.put(name, b"years of work")

    gcs.before = intrude
    with pytest.raises(InputError, match=r"lm_head.weight.value/c/0/0: expected nothing but what this conversion writes"):
        convert(small, DST)
    assert gcs.objects[name].data == b"years of work"
    assert COMMIT not in gcs.files("run/model")


def leave_incomplete(source, monkeypatch) -> None:
    """All chunks are there, and nothing completes them."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(BucketStore, "complete", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, DST, verify=False)


def test_a_chunk_that_is_wrong_is_written_again_in_place_of_what_was_seen(gcs, small, small_whole, monkeypatch):
    leave_incomplete(small, monkeypatch)
    names = sorted(chunks_of(gcs.objects))[:2]
    for name, data in zip(names, (b"", gcs.objects[names[1]].data[:-1] + b"x"), strict=True):
        gcs.put(name, data, gcs.objects[name].metadata)
    before = dict(gcs.wrote)
    assert convert(small, DST).status == "resumed"
    assert {name for name in before if gcs.wrote[name] > before[name]} == set(names)
    assert stored(gcs, "run/model") == {name: data for name, data in small_whole.items() if name != "hashes"}


def test_values_that_differ_from_the_source_are_found_before_it_is_complete(gcs, small, monkeypatch):
    """The hash noted with a chunk is of what was converted: verification decodes the source anew, and compares."""
    leave_incomplete(small, monkeypatch)
    one, other = [name for name in sorted(chunks_of(gcs.objects)) if "down.weight" in name][:2]
    gcs.put(one, gcs.objects[other].data, gcs.objects[other].metadata)  # a whole chunk, of other values
    with pytest.raises(Different, match=r"layers.0.mlp.down.weight: .*/c/0/0/0: differs from the source; convert again"):
        convert(small, DST)
    assert one not in gcs.objects
    assert convert(small, DST).status == "resumed"
    assert verify_checkpoint(DST, small).status == "pass"


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dst", "options", "line"),
    [
        (DST, ["--overwrite"], f"{DST}: --overwrite: expected a directory, found a bucket, where nothing is replaced; give a"),
        (DST, ["--to", "hf"], f"{DST}: --to hf: in a bucket only Orbax checkpoints are written, found hf; write it to a disk"),
        ("gs://bucket", [], "gs://bucket: expected a name in the bucket, found none; give gs://bucket/NAME"),
        ("gs://", [], "gs://: expected gs://BUCKET/NAME, found no bucket in it"),
        ("gs://nobody/x", [], "gs://nobody/x/conversion.json: expected a bucket, found none called nobody: is the name right?"),
        ("s3://bucket/x", [], "s3://bucket/x: expected a path on a disk, found an address; Orbax does not read s3://: mount"),
    ],
)  # fmt: skip
def test_what_a_bucket_cannot_have_is_a_line(gcs, small, capsys, dst, options, line):
    assert main([str(small), dst, *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
    assert not gcs.objects


def test_a_prefix_that_is_taken_is_refused(gcs, small, small_out):
    gcs.put("run/model/thesis.tex", b"years of work")
    with pytest.raises(InputError, match=r"model: expected a new or empty prefix, found other objects \(thesis.tex\)"):
        convert(small, DST)
    there = fill(gcs, "out", small_out)
    with pytest.raises(InputError, match="expected a new or empty prefix, found a finished checkpoint; give another name"):
        convert(small, there, "bfloat16")
    assert not gcs.wrote
    source = fill(gcs, "source", small)
    with pytest.raises(InputError, match="expected a place apart from the source, found one in gs://bucket/source"):
        convert(source, f"{source}/out")


def test_what_is_finished_between_two_looks_is_neither_replaced_nor_claimed(gcs, small, small_out):
    """Another conversion ends, and takes its claim back, just before this one makes its own."""

    def end(name: str) -> None:
        if name.endswith(CLAIM):
            gcs.before = lambda name: None
            fill(gcs, "run/model", small_out)

    gcs.before = end
    with pytest.raises(InputError, match="expected a new or empty prefix, found a finished checkpoint"):
        convert(small, DST)
    assert gcs.files("run/model") == tree(small_out)


def test_a_claim_that_is_not_ours_is_refused(gcs, small):
    gcs.put(f"run/model/{CLAIM}", b"mine")
    with pytest.raises(InputError, match=r"state.json: expected a claim of convert-oss, found something else; remove it"):
        convert(small, DST)
    assert gcs.files("run/model") == {CLAIM: b"mine"}


def test_nobody_may(gcs, small, capsys):
    gcs.forbidden = True
    assert main([str(small), DST]) == verify_main([DST]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("permission denied (403 nobody does not have storage.objects.get access" in line for line in lines)


def test_no_credentials_are_a_line(gcs, small, monkeypatch, capsys):
    from google.auth import exceptions
    from google.cloud import storage

    def refuse(*_, **__):
        raise exceptions.DefaultCredentialsError("Your default credentials were not found.")

    monkeypatch.setattr(storage, "Client", refuse)
    assert main([str(small), DST]) == 2
    assert capsys.readouterr().err.endswith(
        "expected credentials for Google Cloud, found none that are good (Your default credentials were not found.);"
        " `gcloud auth application-default login`\n"
    )


def test_without_the_package_a_line_says_what_to_install(gcs, small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    assert main([str(small), DST]) == 2
    assert "gs:// takes google-cloud-storage, which is not installed (`pip install '.[gs]'`)" in capsys.readouterr().err


# --- afterwards ---------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found(gcs, small, capsys):
    from oss_model import ModelConfig

    convert(small, DST)
    name = "layers.0.attn.q_proj.weight.value"
    data = gcs.objects[f"run/model/{name}/c/0/0/0"].data
    gcs.put(f"run/model/{name}/c/0/0/0", bytes([data[0] ^ 1]) + data[1:])
    gcs.put("run/model/notes.md", b"mine")
    del gcs.objects["run/model/norm.scale.value/c/0"]
    assert verify_main([DST, "-q"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        f"error: {DST}: notes.md: not in conversion.json",
        f"error: {DST}: {name.removesuffix('.value')}: {name}/c/0/0/0: its bytes and its checksum disagree",
        f"error: {DST}: norm.scale: norm.scale.value/c/0: missing",
    ]
    with pytest.raises(InputError, match=r"norm.scale.value/c/0: missing"):
        convert(small, DST)
    with pytest.raises(InputError, match=r"q_proj.weight.value/c/0/0/0: its bytes and its checksum disagree"):
        create_model_from_checkpoint(DST, ModelConfig.from_json(DST))


def test_a_claim_left_by_a_kill_is_taken_back(gcs, small):
    convert(small, DST)
    gcs.put(f"run/model/{CLAIM}", b"{}")
    assert convert(small, DST).status == "resumed"
    stored(gcs, "run/model")
