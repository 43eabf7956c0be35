"""Several processes, as hosts of a cluster: each reads its share, they train together, and plain Orbax saves the result."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from oss_model import ModelConfig, create_model_from_checkpoint, layouts

BENCH = Path(__file__).parent.parent / "scripts/bench/processes.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Large enough for its parameters to outweigh its metadata, and cut into chunks as a model of full size is: 78 MB."""
    from converter import convert
    from oss_model.synthetic import write_checkpoint

    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 256, "num_attention_heads": 64, "num_experts": 8}
    cfg = dataclasses.replace(
        ModelConfig.tiny(), num_hidden_layers=1, layer_types=(), num_key_value_heads=8, head_dim=32, **sizes
    )
    root = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "BLOCK_BYTES", 1 << 20)
        patch.setattr(layouts, "WHOLE_BYTES", 1 << 18)
        convert(write_checkpoint(root / "source", cfg), root / "orbax", dtype="float32", verify=False)
    return root / "orbax"


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory) -> tuple[dict[str, list[dict]], Path]:
    out = tmp_path_factory.mktemp("steps")
    command = [sys.executable, BENCH, checkpoint, "--processes", "1", "2", "4", "--step", out, "--json"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout), out


@pytest.mark.long
@pytest.mark.parametrize("count", ["2", "4"])
def test_each_process_reads_its_share(runs, count):
    """Embeddings, experts and attention alike: what is above is the metadata and the small parameters."""
    whole = runs[0]["1"][0]["share"]
    assert len(runs[0][count]) == int(count)
    for found in runs[0][count]:
        assert found["share"] < 1.01 * whole / int(count)
        assert found["read"] <= 1.05 * found["share"]


@pytest.mark.long
@pytest.mark.parametrize("count", ["2", "4"])
def test_a_step_together_is_a_step_alone(runs, count, checkpoint):
    """The loss, and every parameter after it: read back from what the processes saved together, by one process."""
    found, out = runs
    assert all(run["text"] == found[count][0]["text"] and len(run["text"][1]) == 4 for run in found[count])
    cfg = ModelConfig.from_json(checkpoint / "config.json")
    assert {run["loss"] for run in found[count]} == {found[count][0]["loss"]}
    assert found[count][0]["loss"] == pytest.approx(found["1"][0]["loss"], abs=2e-2)  # bfloat16
    before, alone, together = (
        nnx.to_flat_state(nnx.state(create_model_from_checkpoint(path, cfg)))
        for path in (checkpoint, out / "by-1", out / f"by-{count}")
    )
    for (name, a), (_, b), (_, c) in zip(before, alone, together, strict=True):
        a, b, c = (np.asarray(v.get_value()) for v in (a, b, c))
        assert not np.array_equal(a, b), name  # every parameter was trained
        assert np.linalg.norm(b - c) <= 0.05 * np.linalg.norm(b - a) + 1e-6 * np.linalg.norm(a), name  # bfloat16's noise
