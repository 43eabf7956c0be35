"""A recording says what the reference said, on a machine without PyTorch, and refuses to be used for anything else."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from converter import convert
from oss_model import InputError, ModelConfig
from oss_model.synthetic import write_checkpoint
from parity import compare
from parity.cli import main
from parity.injection import selftest
from parity.recording import DERIVED, Recording, digest


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, sources, checkpoints):
    """The directory, and the report of the run that recorded it."""
    directory = tmp_path_factory.mktemp("recordings") / "recording"
    return directory, compare(sources["hf"], checkpoints["mxfp4"], record=directory, forms="default")


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "mxfp4"])
def test_a_recording_gives_the_same_verdict_and_numbers(recorded, checkpoints, dtype):
    directory, live = recorded
    report = compare(Recording(directory), checkpoints[dtype])
    assert report.verdict == "pass"
    assert len(report.weights) == (98 if dtype == "mxfp4" else 88)
    if dtype == "mxfp4":
        assert [tap for tap in report.taps if tap.tap != "rope"] == [tap for tap in live.taps if tap.tap != "rope"]
        assert report.free_run == live.free_run
        assert report.source == live.source


def test_taps_that_are_not_recorded_are_bitwise_the_references(recorded, sources):
    from parity.reference import Reference

    reference, recording = Reference(sources["hf"]), Recording(recorded[0])
    x = recording.embed(recording.prompt.tokens, np.dtype(np.float32))
    for n in range(5):
        want, got = reference.layer(n).run(x), recording.layer(n).run(x)
        for name in DERIVED:
            np.testing.assert_array_equal(got[name], want[name])
        x = got["layer_out"]


def test_a_flipped_bit_is_named_without_the_source(tmp_path, recorded, checkpoints):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as plain:
        tree = plain.restore(checkpoints["bfloat16"])
        value = np.array(tree["layers"]["2"]["attn"]["sinks"]["value"])
        value.view(np.uint8)[0] ^= 1
        tree["layers"]["2"]["attn"]["sinks"]["value"] = value
        plain.save(tmp_path / "broken", tree)
    shutil.copy(checkpoints["bfloat16"] / "config.json", tmp_path / "broken")
    report = compare(Recording(recorded[0]), tmp_path / "broken", layers=False)
    assert [weight.name for weight in report.weights if weight.note] == ["layers.2.attn.sinks"]
    assert report.exit_code == 1


def test_a_wrong_window_is_found_by_a_recording(tmp_path, recorded, checkpoints):
    shutil.copytree(checkpoints["bfloat16"], tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text()) | {"sliding_window": 12}
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    assert compare(Recording(recorded[0]), tmp_path / "wrong").first_divergence == {"layer": 0, "tap": "attn_core"}


WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch())
"""


def without_torch(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH + code, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.long
def test_it_runs_where_there_is_no_torch(recorded, checkpoints):
    code = "from parity.cli import main\nmain()"
    run = without_torch(code, checkpoints["mxfp4"], "--golden", recorded[0], "--layers")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("PASS")


@pytest.mark.long
def test_mistakes_are_named_where_there_is_no_torch(recorded, checkpoints):
    """Those of the code from what the port's own right parameters give, values or packed."""
    code = """
from parity import compare
from parity.injection.candidate import Faulty
from parity.recording import Recording
for fault in ("window-one-long", "swiglu-alpha-one", "yarn-missing", "lm-head-tied"):
    n = 0 if fault in ("window-one-long", "swiglu-alpha-one") else None
    print(compare(Recording(sys.argv[1]), Faulty(sys.argv[2], fault, n)).diagnosis["name"])
"""
    for dtype in ("bfloat16", "mxfp4"):
        run = without_torch(code, recorded[0], checkpoints[dtype])
        assert run.stdout.split() == ["window-one-long", "swiglu-alpha-one", "yarn-missing", "lm-head-tied"], run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{dst}", "--golden", "{tmp}"], "error: {tmp}: expected a finished recording, found none"),
        (["{src}", "{dst}", "--golden", "{rec}"], "error: --golden {rec}: expected DST alone beside it, found 2 directories"),
        (
            ["{dst}", "--golden", "{rec}", "--dtype", "bfloat16"],
            "error: {rec}: recorded in float32; --dtype bfloat16 needs",
        ),
        (["{dst}", "--golden", "{rec}", "--tokens", "30"], "error: {rec}: recorded for another prompt"),
        (["{src}", "{dst}", "--record", "{rec}"], "error: {rec}: expected a new or empty directory for a recording"),
    ],
)
def test_what_a_recording_is_not_for(tmp_path, recorded, sources, checkpoints, arguments, message):
    places = {"tmp": tmp_path, "src": sources["hf"], "dst": checkpoints["bfloat16"], "rec": recorded[0]}
    result = CliRunner().invoke(main, [argument.format(**places) for argument in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(message.format(**places)), result.stderr


@pytest.mark.long
def test_a_recording_of_a_run_with_the_precision_arm_is_of_float32(tmp_path, sources, checkpoints):
    compare(sources["hf"], checkpoints["bfloat16"], dtype="bfloat16", record=tmp_path / "recording")
    assert compare(Recording(tmp_path / "recording"), checkpoints["bfloat16"]).verdict == "pass"


def test_a_recording_without_layers_is_refused_for_them(tmp_path, sources, checkpoints):
    compare(sources["hf"], checkpoints["bfloat16"], layers=False, record=tmp_path / "recording")
    with pytest.raises(InputError, match="recorded without --layers"):
        compare(Recording(tmp_path / "recording"), checkpoints["bfloat16"])
    assert compare(Recording(tmp_path / "recording"), checkpoints["bfloat16"], layers=False).verdict == "pass"


def test_a_recording_of_another_model_is_refused(tmp_path, recorded, cfg):
    convert(write_checkpoint(tmp_path / "s", dataclasses.replace(cfg, num_hidden_layers=3, layer_types=())), tmp_path / "d")
    with pytest.raises(InputError, match="recorded of another model"):
        compare(Recording(recorded[0]), tmp_path / "d")


def test_a_recording_of_another_checkpoint_is_refused(tmp_path, recorded, cfg):
    convert(write_checkpoint(tmp_path / "s", cfg, seed=1), tmp_path / "d")
    with pytest.raises(InputError, match="recorded of another checkpoint"):
        compare(Recording(recorded[0]), tmp_path / "d")


def test_a_digest_does_not_care_how_a_bfloat16_is_held():
    import ml_dtypes

    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest(values) == digest(values.astype(ml_dtypes.bfloat16))
    assert digest(values + np.float32(1e-5)) != digest(values)
    assert digest(-np.zeros((2, 2), np.float32)) != digest(np.zeros((2, 2), np.float32))


@pytest.mark.long
def test_of_mistakes_in_parameters_a_recording_names_what_can_be_undone(tmp_path, monkeypatch):
    """The rest of those in parameters is found and located, and needs the source to be named."""
    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=2, layer_types=())
    monkeypatch.setattr(selftest, "HEALTHY", ({},))
    of_parameters = lambda fault: fault.tap == "weights"  # noqa: E731
    result = selftest.self_test(tmp_path, convert, cfg=cfg, seeds=1, depths=1, golden=True, only=of_parameters)
    assert all(outcome.found and outcome.located for outcome in result.outcomes), result.table()
    assert not result.alarms
    assert {outcome.fault for outcome in result.outcomes if not outcome.named} == {
        "weight-one-block", "weight-through-fp8", "experts-permuted", "qkv-split-by-group", "scale-ignored", "scale-linear",
        "scales-shifted", "sign-lost", "minus-zero-lost",
    }  # fmt: skip
    assert len(result.outcomes) == 28
