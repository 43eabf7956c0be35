"""Seeded gpt-oss checkpoints in every layout and size: for the demo, the tests and the benchmarks.

    python -m oss_model.synthetic OUT --size tiny --layout hf --seed 0

The weights are random, but every part of the model matters in them: gates and ups reach the SwiGLU clamp, sinks
take a good share of the attention, the router prefers some experts without starving any, and the residual stream
keeps its size over depth. The same seed gives the same model in every layout, value for value.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from oss_model import dialects, layouts, mxfp4
from oss_model.config import ModelConfig
from oss_model.errors import Incomplete, InputError, place_faults, raise_all, system_error
from oss_model.exits import run_command
from oss_model.shards import INDEX, write_shard

SHARD_BYTES = 4_900_000_000  # as in the published 20b: three shards
PIECE_BYTES = 32 << 20
SIZES = {"tiny": ModelConfig.tiny, "20b": ModelConfig.gpt_oss_20b, "120b": ModelConfig.gpt_oss_120b}


def write_checkpoint(out: str | os.PathLike, cfg: ModelConfig, layout: str = "hf", seed: int = 0) -> Path:
    """Write a checkpoint of `cfg` in `layout` ("hf", "hf-bf16", "openai"), one piece of a tensor in memory at a time.

    Raises:
      InputError: if `out` exists and is not an empty directory, or `layout` cannot hold `cfg`.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a new or empty directory, found something; give another name")
    table = layouts.LAYOUTS[layout]
    dataclasses.replace(cfg, param_dtype="mxfp4")  # which needs whole blocks
    config = dialects.write(cfg, "openai") if layout == "openai" else hf_config(cfg, table.packed)
    out.mkdir(parents=True, exist_ok=True)
    entries: dict[str, list[layouts.Entry]] = {}
    for entry in layouts.entries(table, cfg):
        entries.setdefault(entry.checkpoint, []).append(entry)
    shapes = layouts.checkpoint_shapes(table, cfg)
    tensors = {name: (shapes[name], "U8" if parts[0].packed else "BF16") for name, parts in entries.items()}
    shards = _split(tensors)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards) - 1:05d}.safetensors" for i in range(len(shards))  # zero-based, as published
    ]  # fmt: skip
    for file, shard in zip(names, shards, strict=True):
        pieces = (piece for name in shard for entry in entries[name] for piece in _pieces(entry, cfg, seed))
        write_shard(out / file, shard, pieces)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(out / INDEX, {"metadata": {"total_size": sum(map(_nbytes, tensors.values()))}, "weight_map": weight_map})
    _write_json(out / "config.json", config)
    if layout != "openai":
        eos = [token for token in (200002, 199999, 200012) if token < cfg.vocab_size] or [cfg.vocab_size - 1]
        _write_json(out / "generation_config.json", {"do_sample": True, "eos_token_id": eos})
    return out


# --- configurations, as their authors write them ----------------------------------------------------------------


def hf_config(cfg: ModelConfig, quantized: bool) -> dict:
    """config.json as published on the hub, with all that it says besides: written by transformers 4."""
    config = dialects.write(cfg, "transformers4") | {
        "eos_token_id": min(200002, cfg.vocab_size - 1),
        "experts_per_token": cfg.num_experts_per_tok,
        "hidden_act": "silu",
        "initial_context_length": cfg.rope_original_max_position_embeddings,
        "initializer_range": 0.02,
        "output_router_logits": False,
        "pad_token_id": min(199999, cfg.vocab_size - 2),
        "router_aux_loss_coef": 0.9,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
    }
    if quantized:
        modules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        config["quantization_config"] = {"modules_to_not_convert": modules, "quant_method": "mxfp4"}
    return dict(sorted(config.items()))


# --- values -----------------------------------------------------------------------------------------------------


def _pieces(entry: layouts.Entry, cfg: ModelConfig, seed: int) -> Iterator[np.ndarray]:
    """The values of one parameter, in the checkpoint's orientation, a run of its first axis at a time."""
    shape: tuple[int, ...] = entry.model_shape
    if entry.pattern.startswith("experts") and shape[2:]:
        step = 1
    elif entry.checkpoint_shape == shape:
        step = max(1, PIECE_BYTES // (math.prod(shape[1:]) * 2))
    else:  # an attention matrix: its first axis is cut in two, so it comes whole
        step = shape[0]
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        yield entry.to_checkpoint(_values(entry.model, start, (stop - start, *shape[1:]), cfg, seed))


def _values(name: str, start: int, shape: tuple[int, ...], cfg: ModelConfig, seed: int) -> np.ndarray:
    """Rows [start, start + shape[0]) of the parameter `name`, in the model's orientation."""
    part = ".".join(name.split(".")[2:]) or name
    if part in ("mlp.gate_up.weight", "mlp.down.weight"):  # the same values the packed layouts hold
        stem, width = name.removesuffix("weight"), shape[-1] // 32
        blocks = _values(stem + "blocks", start, (*shape[:-1], width, 16), cfg, seed)
        return mxfp4.decode(blocks, _values(stem + "scales", start, (*shape[:-1], width), cfg, seed))
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), start])
    if part.endswith("blocks"):
        return np.frombuffer(rng.bytes(math.prod(shape)), np.uint8).reshape(shape)
    if part.endswith("scales"):
        # A random E2M1 code has a standard deviation of 2.9; gates should have 3, so that the clamp at 7 is reached.
        fan_in, std = (cfg.hidden_size, 3.0) if "gate_up" in part else (cfg.intermediate_size, 0.6)
        middle = 127 + round(math.log2(std / (2.9 * math.sqrt(fan_in))))
        return (middle - 1 + rng.integers(0, 3, shape, np.uint8)).astype(np.uint8)
    mean, std = _STATISTICS[part](cfg) if part in _STATISTICS else (0.0, 0.1)
    values = rng.standard_normal(shape, np.float32)
    values *= std
    values += mean
    return values.astype(layouts.BFLOAT16)


# Name within a layer, or of the whole model -> (mean, standard deviation).
_STATISTICS = {
    "embedding.weight": lambda cfg: (0.0, 1.0),
    "attn.norm.scale": lambda cfg: (1.0, 0.1),
    "mlp.norm.scale": lambda cfg: (1.0, 0.1),
    "norm.scale": lambda cfg: (1.0, 0.1),
    "attn.sinks": lambda cfg: (1.0, 1.0),
    "attn.q_proj.weight": lambda cfg: (0.0, 1.0 / math.sqrt(cfg.hidden_size)),
    "attn.k_proj.weight": lambda cfg: (0.0, 1.0 / math.sqrt(cfg.hidden_size)),
    "attn.v_proj.weight": lambda cfg: (0.0, 1.0 / math.sqrt(cfg.hidden_size)),
    "attn.o_proj.weight": lambda cfg: (0.0, 1.0 / math.sqrt(cfg.num_attention_heads * cfg.head_dim)),
    "mlp.router.weight": lambda cfg: (0.0, 1.0 / math.sqrt(cfg.hidden_size)),
    "lm_head.weight": lambda cfg: (0.0, 1.0 / math.sqrt(cfg.hidden_size)),
}


# --- files ------------------------------------------------------------------------------------------------------


def _nbytes(tensor: tuple[tuple[int, ...], str]) -> int:
    return math.prod(tensor[0]) * (1 if tensor[1] == "U8" else 2)


def _split(tensors: dict[str, tuple[tuple[int, ...], str]]) -> list[dict[str, tuple[tuple[int, ...], str]]]:
    """Cut into shards of at most SHARD_BYTES, never inside a tensor."""
    shards: list[dict[str, tuple[tuple[int, ...], str]]] = [{}]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        if shards[-1] and _nbytes(tensor) > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= _nbytes(tensor)
    return shards


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _run(argv))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As our other commands say it; click is not of this package."""
        raise InputError(f"{message} (try {self.prog} --help)")


def _run(argv: list[str] | None) -> None:
    parser = _Parser(prog="python -m oss_model.synthetic", description="Write a seeded gpt-oss checkpoint.")
    parser.add_argument("out", metavar="OUT", help="a new or empty directory")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="sizes of the model (default: tiny)")
    parser.add_argument("--layers", type=int, metavar="N", help="number of layers, if not the size's own")
    parser.add_argument("--experts", type=int, metavar="N", help="number of experts, if not the size's own")
    parser.add_argument("--layout", choices=("hf", "hf-bf16", "openai"), default="hf", help="(default: hf, packed MXFP4)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="0 or more (default: 0)")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"argument --seed: expected 0 or more, found {args.seed}")
    changes = {"num_hidden_layers": args.layers, "num_experts": args.experts}
    changes = {field: n for field, n in changes.items() if n is not None}
    cfg = dataclasses.replace(SIZES[args.size](), layer_types=(), **changes)
    raise_all(place_faults(args.out))
    again = f"remove {args.out}, which is not whole, and run this again"
    try:
        write_checkpoint(args.out, cfg, args.layout, args.seed)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again) from None
    except OSError as error:
        found = system_error(error, args.out)
        raise (Incomplete(f"{found}, {again}") if isinstance(found, Incomplete) else found or error) from error


if __name__ == "__main__":
    sys.exit(main())
