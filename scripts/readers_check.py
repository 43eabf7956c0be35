"""Do others' own programs read our exports? Logits of a small model, in float32, beside ours and beside the source's.

OpenAI's torch model (gpt-oss) reads the OpenAI exports, mlx-lm those for Hugging Face. A quantized export is compared with our
model that trains for it (`cfg.experts_qat`). mlx-lm always rounds the ends of YaRN's range, as `rope_truncate` does, and is
held against that; gpt-oss does not, so how far its logits are from the published model's is shown too. Last, the harness is
asked about mlx-lm itself (scripts/examples/compare_mlx_lm.py): it has to name that, and to find nothing where it is right.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import torch
from compare_mlx_lm import MlxModel
from gpt_oss.torch.model import Transformer as OpenAI
from mlx_lm.utils import load_model

from converter import convert
from oss_model import ModelConfig
from oss_model.params import create_model_from_checkpoint
from oss_model.synthetic import write_checkpoint
from parity import compare

GATE = 1e-5  # relative L2: both compute in float32, five layers


def by_openai(path: Path, tokens: np.ndarray) -> np.ndarray:
    model = OpenAI.from_checkpoint(str(path), device="cpu").float()
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).numpy()


def by_mlx(path: Path, tokens: np.ndarray) -> np.ndarray:
    model, _ = load_model(path)  # strict: a missing or unexpected tensor is an error
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(tokens[None])))[0]


def by_us(path: Path, tokens: np.ndarray, **changes) -> np.ndarray:
    cfg = dataclasses.replace(ModelConfig.from_json(path / "config.json"), dtype=np.float32, **changes)
    return np.asarray(create_model_from_checkpoint(path, cfg)(jnp.asarray(tokens[None]))[0])


def found_in_mlx(path: Path) -> str:
    report = compare(path, MlxModel(path))
    return report.verdict if report.diagnosis is None else report.diagnosis["name"]


def rounding_its_range(path: Path) -> Path:
    """The same model, of a configuration that asks for what mlx-lm does."""
    config = json.loads((path / "config.json").read_text())
    config["rope_scaling"]["truncate"] = True
    (path / "config.json").write_text(json.dumps(config))
    return path


def main() -> None:
    cfg = ModelConfig.tiny()
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 40, dtype=np.int32)
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        write_checkpoint(root / "openai", cfg, "openai")
        convert(root / "openai", root / "packed", "mxfp4")
        convert(root / "openai", root / "values")
        convert(root / "packed", root / "served-openai", to="openai")
        convert(root / "packed", root / "served-hf", to="hf")
        convert(root / "values", root / "quantized-openai", to="openai", quantizer="best")
        convert(root / "values", root / "quantized-hf", to="hf", quantizer="best")
        published = by_openai(root / "openai", tokens)
        rounded = by_us(root / "packed", tokens, rope_truncate=True)
        trained, trained_rounded = (
            by_us(root / "values", tokens, rope_truncate=truncate, experts_qat="best") for truncate in (False, True)
        )
        rows = [
            ("gpt-oss", "packed --to openai", by_openai(root / "served-openai", tokens), published, 0.0),
            ("ours", "packed", by_us(root / "packed", tokens), published, GATE),
            ("mlx-lm", "packed --to hf", by_mlx(root / "served-hf", tokens), rounded, GATE),
            ("gpt-oss", "bfloat16 --to openai, quantized", by_openai(root / "quantized-openai", tokens), trained, GATE),
            ("mlx-lm", "bfloat16 --to hf, quantized", by_mlx(root / "quantized-hf", tokens), trained_rounded, GATE),
        ]
        named = [found_in_mlx(root / "served-hf"), found_in_mlx(rounding_its_range(root / "served-hf"))]
    wrong = 0
    print(f"{'reader':8}  {'export':38}  {'relative L2':>11}  same top token")
    for reader, export, got, want, gate in rows:
        off = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        same = float((got.argmax(-1) == want.argmax(-1)).mean())
        wrong += not (off <= gate and same == 1)
        print(f"{reader:8}  {export:38}  {off:11.1e}  {same:.0%}{'' if off <= gate and same == 1 else '   <- wrong'}")
    off = float(np.linalg.norm(rounded - published) / np.linalg.norm(published))
    print(f"mlx-lm's rounded YaRN range alone moves the logits by {off:.1%} (40 tokens)")
    print(f"mlx-lm before check-parity: {named[0]}; where the configuration rounds it too: {named[1]}")
    if wrong:
        raise SystemExit(f"{wrong} of {len(rows)} are not as they should be")
    if named != ["yarn-truncated", "pass"]:
        raise SystemExit("of mlx-lm it should say yarn-truncated, then pass")


if __name__ == "__main__":
    main()
