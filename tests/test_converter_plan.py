"""Plans, preflight and --dry-run; and the chunks they are cut into."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from converter import convert, preflight
from converter.chunks import PIECE_BYTES, runs
from converter.cli import main
from converter.form import Form
from converter.plan import make_plan
from converter.preview import preview
from converter.store import Store
from oss_model import layouts
from oss_model.config import ModelConfig
from oss_model.errors import InputError
from oss_model.shards import Checkpoint


@pytest.mark.parametrize(
    "shape", [(3,), (1, 2, 160, 96), (7, 5, 11), (2, 300_000), (1, 2, 2880, 2880), (6284, 2880), (5, PIECE_BYTES)]
)
def test_runs_walk_in_c_order(shape):
    array = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    parts = [array[index].reshape(-1) for index in runs(shape[:-1], shape[-1] * 4)]
    np.testing.assert_array_equal(np.concatenate(parts), array.reshape(-1))
    assert all(part.nbytes <= max(PIECE_BYTES, shape[-1] * 4) for part in parts)


@pytest.mark.parametrize(("layers", "make"), [(24, ModelConfig.gpt_oss_20b), (36, ModelConfig.gpt_oss_120b)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "mxfp4"])
def test_the_published_models_are_cut_into_chunks_of_good_size(layers, make, dtype):
    cfg = make()
    checkpoint = SimpleNamespace(entries=lambda: layouts.entries(layouts.HF_MXFP4, cfg), layout=layouts.HF_MXFP4, cfg=cfg)
    found = make_plan(checkpoint, Form(dtype=dtype))  # type: ignore[arg-type]
    wanted = layouts.parameters(dataclasses.replace(cfg, param_dtype=dtype))
    assert {target.name: (target.shape, target.dtype) for target in found.targets} == wanted
    for target in found.targets:
        part = target.name.split(".")[-2]
        if part in ("gate_up", "down") and not target.name.endswith("bias"):
            assert target.rows == 1
        elif part in ("embedding", "lm_head"):
            assert target.shape[0] % target.rows == 0
            assert 16 << 20 <= target.chunks()[0].values_nbytes <= 48 << 20
        elif part in ("q_proj", "o_proj") and target.name.endswith("weight"):
            assert target.rows == target.shape[0] // 8
        else:
            assert target.rows == target.shape[0]
            assert target.chunks()[0].values_nbytes <= 8 << 20


@pytest.mark.parametrize("layout", ["hf", "hf-bf16", "openai"])
def test_a_cut_matrix_is_the_same_matrix(layout, sources, checkpoints, tmp_path, monkeypatch):
    """q, k and v have their first two axes as one in the source, and in OpenAI's layout lie in one tensor."""
    monkeypatch.setattr(layouts, "WHOLE_BYTES", 1)
    monkeypatch.setattr(layouts, "PARTS", 7)  # 14 heads, 7 kv heads
    convert(sources[layout], tmp_path / "out")
    assert len(list((tmp_path / "out" / "layers.1.attn.q_proj.weight.value" / "c").rglob("0"))) > 7
    import orbax.checkpoint as ocp

    found, whole = (ocp.PyTreeCheckpointer().restore(path) for path in (tmp_path / "out", checkpoints["bfloat16"]))
    for (name, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(whole), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def test_a_last_chunk_that_is_not_full_is_filled_up(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "BLOCK_BYTES", 96 * 2 * 100)  # 509 rows in blocks of 100: prime, so no divisor fits
    convert(sources["hf"], tmp_path / "out")
    files = sorted((tmp_path / "out" / "embedding.weight.value" / "c").rglob("0"))
    assert sum(path.is_file() for path in files) == 6
    import orbax.checkpoint as ocp

    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "out")
    with Checkpoint(sources["hf"]).shards as shards:
        np.testing.assert_array_equal(
            tree["embedding"]["weight"]["value"].view(np.uint16), shards.read("model.embed_tokens.weight").view(np.uint16)
        )


def test_too_little_space_is_found_before_the_first_byte(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1000, f_frsize=4096))
    with pytest.raises(InputError) as caught:
        convert(sources["hf"], tmp_path / "out")
    needed = int(str(caught.value).split("expected ")[1].split(" bytes")[0].replace(",", ""))
    assert needed > make_plan(Checkpoint(sources["hf"]), Form()).nbytes
    assert str(caught.value) == (
        f"{tmp_path}: expected {needed:,} bytes of free space, found 4,096,000; "
        f"make room for {needed - 4_096_000:,} more, or give another disk"
    )
    assert list(tmp_path.iterdir()) == []


def test_max_memory_is_refused_with_the_least_that_works(sources, tmp_path, capsys):
    assert main([str(sources["hf"]), str(tmp_path / "out"), "--max-memory", "1M"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --max-memory: expected at least ")
    assert err.endswith("M for this checkpoint, found 1M\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_max_memory_is_kept_at_the_least_that_works(sources, tmp_path):
    command = [sys.executable, "-m", "converter.cli", sources["hf"], tmp_path / "out", "--json", "-q", "--max-memory"]
    refused = subprocess.run([*command, "1M"], capture_output=True, text=True)
    least = int(json.loads(refused.stdout)["errors"][0].split("at least ")[1].split("M")[0]) + 4  # imports vary a little
    done = subprocess.run([*command, f"{least}M"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["peak_rss_bytes"] <= least << 20


def test_max_memory_takes_threads_away(sources, tmp_path, monkeypatch):
    checkpoint = Checkpoint(sources["hf"])
    planned = make_plan(checkpoint, Form())
    each = max(preflight.reader_bytes(target, checkpoint) for target in planned.targets)
    monkeypatch.setattr(preflight, "rss", lambda: 100 << 20)
    base = (100 << 20) + preflight.SLACK_BYTES
    for room, workers in ((1, 1), (1.9, 1), (2, 2), (50, Store.workers)):
        assert preflight.measure(checkpoint, planned, Store(tmp_path), tmp_path, base + int(each * room)).workers == workers


@pytest.mark.parametrize("bad", [" ", "lots", "2X", "-1G"])
def test_sizes_that_are_none_are_usage_errors(bad, capsys):
    assert main(["a", "b", "--max-memory", bad]) == 2
    assert "expected a size like 2G or 900M" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["0/2", "3/2", "2", "1/0", "a/b"])
def test_shares_that_are_none_are_usage_errors(bad, capsys):
    assert main(["a", "b", "--process", bad]) == 2
    assert "expected I/N with I from 1 to N, like 2/3" in capsys.readouterr().err


def test_a_dry_run_tells_all_and_writes_nothing(sources, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(sources["hf"]), str(out), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    result = convert(sources["hf"], out)
    for field in ("tensors", "chunks", "bytes_read", "bytes_written", "source_layout", "dtype"):
        assert found[field] == getattr(result, field)
    assert found["status"] == "planned"
    assert found["space_needed"] >= sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    rows = {row["to"]: row for row in found["plan"]}
    assert rows["layers.0.mlp.gate_up.weight"] == {
        "from": ["model.layers.0.mlp.experts.gate_up_proj_blocks", "model.layers.0.mlp.experts.gate_up_proj_scales"],
        "how": "decoded",
        "pattern": "experts (inner glu) hidden_groups bytes -> experts glu inner hidden_groups bytes",
        "to": "layers.0.mlp.gate_up.weight",
        "shape": [9, 2, 160, 96],
        "dtype": "bfloat16",
        "chunks": 9,
        "bytes": 9 * (2 * 160 * 96 * 2 + 4),
    }
    assert main([str(sources["hf"]), str(tmp_path / "other"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    summary, tensors = text.split("\n\n")
    assert summary.startswith(f"hf -> bfloat16: 88 tensors in 168 chunks\nreads {found['bytes_read']:,} bytes, writes")
    lines = [re.split(" {2,}", line) for line in tensors.splitlines()]
    assert len(lines) == 88
    assert len({line.index("<-") for line in tensors.splitlines()}) == 1
    assert lines[3] == [
        "layers.0.attn.q_proj.weight",
        "bfloat16 [14, 24, 96], 1 chunk, 64,516 bytes",
        "<- model.layers.0.self_attn.q_proj.weight: (heads dim) hidden -> heads dim hidden",
    ]
    for row, (to, what, made_of) in zip(found["plan"], lines, strict=True):  # nothing less than JSON says
        assert (to, what.split(" [")[0]) == (row["to"], row["dtype"])
        assert f"{row['shape']}, {row['chunks']} chunk" in what
        assert what.endswith(f", {row['bytes']:,} bytes")
        how = f"{row['how']}, " if row["how"] else ""
        assert made_of == f"<- {' + '.join(row['from'])}: {how}{row['pattern']}"


def test_a_dry_run_refuses_what_the_run_would_refuse(sources, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="it is not a checkpoint of this command"):
        preview(sources["hf"], tmp_path / "out")
    with pytest.raises(InputError, match="mxfp4 keeps packed experts as they are"):
        preview(sources["hf-bf16"], tmp_path / "new", "mxfp4")


def test_a_plan_does_not_need_the_source_path_to_be_absolute(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(sources["hf"].parent)
    result = convert("hf", tmp_path / "out", verify=False)
    assert Path(result.source) == sources["hf"].resolve()
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["path"] == str(sources["hf"].resolve())
