"""convert-oss as a command: exit codes, what goes to which stream, and a quick --help."""

import json
import subprocess
import sys
import time

import pytest

from converter.cli import main
from oss_model.config import ModelConfig
from oss_model.synthetic import write_checkpoint


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "hf", ModelConfig.tiny())


def test_help_loads_nothing_heavy():
    code = """
import sys
from converter.cli import main
assert main(["--help"]) == 0
heavy = {"jax", "torch", "numpy", "orbax", "rich", "transformers", "flax"} & {name.split(".")[0] for name in sys.modules}
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--dtype [bfloat16|float32|mxfp4]" in done.stdout


def test_json_is_one_object_on_standard_output(hf, tmp_path, capsys):
    start = time.perf_counter()
    assert main([str(hf), str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report.items() >= {"status": "complete", "source_layout": "hf", "tensors": 88, "verified": True}.items()
    assert 0 < report["seconds"] <= time.perf_counter() - start
    assert report["peak_rss_bytes"] > 1 << 20
    assert report["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*/c/**/*") if path.is_file())
    assert report["bytes_read"] == sum(t[1] for t in _sizes(hf))
    assert "converting: " in err
    assert "verifying: " in err


def _sizes(path):
    from oss_model.shards import Shards

    with Shards(path) as shards:
        return [(name, tensor.nbytes) for name, tensor in shards.tensors.items()]


def test_quiet_is_quiet(hf, tmp_path, capsys):
    assert main([str(hf), str(tmp_path / "out"), "-q", "--no-verify"]) == 0
    assert capsys.readouterr() == ("", "")


def test_bad_input_is_a_line_a_fault_and_2(hf, tmp_path, capsys):
    missing = tmp_path / "nowhere"
    assert main([str(missing), str(tmp_path / "out"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert err == f"error: {missing}: expected a directory of safetensors files, found nothing\n"
    assert json.loads(out) == {"status": "failed", "exit_code": 2, "errors": [err.removeprefix("error: ").rstrip()]}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [[], ["a"], ["a", "b", "--dtype", "int4"], ["a", "b", "--nonsense"]])
def test_bad_usage_is_2_without_a_traceback(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
