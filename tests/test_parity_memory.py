"""What a comparison takes: refused with the least that works, and kept to."""

import dataclasses
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from flax import nnx

from oss_model import ModelConfig, Transformer
from oss_model.layouts import parameter_name
from parity import memory


@pytest.mark.long
def test_max_memory_is_refused_with_the_least_that_works_and_kept_at_it(sources, checkpoints):
    """In processes of their own, since a peak is a process's."""
    command = [
        sys.executable,
        "-c",
        "from parity.cli import main; main()",
        sources["hf"],
        checkpoints["bfloat16"],
        "--layers",
        "--max-memory",
    ]
    refused = subprocess.run([*command, "1M"], capture_output=True, text=True)
    assert refused.returncode == 2
    found = re.fullmatch(r"error: --max-memory: expected at least (\d+)M for this checkpoint .*, found 1M.*\n", refused.stderr)
    assert found, refused.stderr
    least = int(found[1]) + 8  # imports vary a little
    done = subprocess.run([*command, f"{least}M"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("peak memory ")[1].split(" GiB")[0]) <= least / 1024 + 0.05


@pytest.mark.parametrize(("size", "layers", "most"), [("20b", 24, 8), ("120b", 36, 16)])
def test_the_least_memory_of_the_real_models(monkeypatch, size, layers, most):
    """20b in 8 GiB and 120b in 16: measured 6.0 and 14.6 (docs/benchmarks.md)."""
    monkeypatch.setattr(memory, "rss", lambda: 600 << 20)
    cfg = getattr(ModelConfig, f"gpt_oss_{size}")()
    model = nnx.eval_shape(lambda: Transformer(dataclasses.replace(cfg, num_hidden_layers=1, layer_types=()), rngs=nnx.Rngs(0)))
    stored = {parameter_name(path): (v.shape, v.dtype) for path, v in nnx.to_flat_state(nnx.state(model))}
    blank = SimpleNamespace(cfg=cfg, stored=stored)
    assert memory.least_memory(blank, 1, 320) < most << 30
    assert memory.least_memory(blank, 1, 4096) > memory.least_memory(blank, 1, 320) + (2 << 30)
