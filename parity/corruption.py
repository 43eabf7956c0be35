"""Known mistakes put into files: a copy of the source before it is converted, or of the Orbax checkpoint. For the self-test.

Names are those of `parity.faults`. Orbax directories are rewritten by plain Orbax, sources by plain safetensors.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file, save_file

from oss_model import mxfp4

Tree = dict[str, np.ndarray]  # parameter name -> value, of a whole checkpoint


def corrupt_checkpoint(fault: str, checkpoint: Path, out: Path, n: int, packed: Path) -> list[str]:
    """A copy of an Orbax checkpoint with this mistake in layer n; returns the names of the parameters that differ.

    `packed` is the same checkpoint with its experts as MXFP4, for mistakes in decoding.
    """
    with ocp.PyTreeCheckpointer() as plain:
        tree, bytes_ = plain.restore(checkpoint), plain.restore(packed)
    leaves = dict(_walk(tree, ()))
    values = {name: np.asarray(node["value"]) for each in (bytes_, tree) for name, node in _walk(each, ())}
    changed = {
        name: np.ascontiguousarray(value)
        for name, value in CHECKPOINT[fault](values, n).items()
        if name in leaves and value.tobytes() != values[name].tobytes()
    }
    for name, value in changed.items():
        leaves[name]["value"] = value
    with ocp.PyTreeCheckpointer() as plain:
        plain.save(out, tree)
    shutil.copy(checkpoint / "config.json", out)
    return sorted(changed)


def corrupt_source(fault: str, source: Path, out: Path, n: int) -> list[str]:
    """A copy of an MXFP4 source with this mistake in layer n's experts; returns the parameters that will differ."""
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name in ("gate_up", "down"):
            pair = [f"model.layers.{n}.mlp.experts.{name}_proj_{kind}" for kind in ("blocks", "scales")]
            if pair[0] in tensors:
                changed = SOURCE[fault](*(tensors[key] for key in pair))
                tensors |= {key: np.ascontiguousarray(value) for key, value in zip(pair, changed, strict=True)}
        save_file(tensors, file, {"format": "pt"})
    return [f"layers.{n}.mlp.{name}.weight" for name in ("down", "gate_up")]


def _walk(node: Any, path: tuple[str, ...]):
    if "value" in node and not isinstance(node["value"], dict):
        yield ".".join(path), node
        return
    for key, child in node.items():
        yield from _walk(child, (*path, str(key)))


# --- in the Orbax checkpoint ------------------------------------------------------------------------------------


def _layer(change: Callable[[np.ndarray], np.ndarray], *names: str) -> Callable[[Tree, int], Tree]:
    def apply(tree: Tree, n: int) -> Tree:
        full = (f"layers.{n}.{name}" for name in names)
        return {name: change(tree[name]) for name in full if name in tree}

    return apply


def _exchanged(*pairs: tuple[str, str]) -> Callable[[Tree, int], Tree]:
    """Names with {n} for the layer."""

    def change(tree: Tree, n: int) -> Tree:
        found = {}
        for a, b in ((a.format(n=n), b.format(n=n)) for a, b in pairs):
            found |= {a: tree[b], b: tree[a]}
        return found

    return change


def _layers_exchanged(tree: Tree, n: int) -> Tree:
    other = n + 1 if f"layers.{n + 1}.attn.norm.scale" in tree else n - 1
    mine = [name.removeprefix(f"layers.{n}.") for name in tree if name.startswith(f"layers.{n}.")]
    pairs = [(f"layers.{n}.{name}", f"layers.{other}.{name}") for name in mine]
    return _exchanged(*pairs)(tree, n)


def _transposed(value: np.ndarray) -> np.ndarray:
    """The bytes of the transposed matrix (the last axis against the rest of a vector's), in the shape of the right one."""
    return np.ascontiguousarray(np.swapaxes(value, -1, -2)).reshape(value.shape)


def _one_block(value: np.ndarray) -> np.ndarray:
    value = value.copy()
    value.reshape(-1, 32)[7] *= np.asarray(2, value.dtype)
    return value


def _split_by_group(tree: Tree, n: int) -> Tree:
    """Rows of a fused qkv taken as [kv, groups q + k + v], as in GPT-NeoX and Megatron; they are all q, all k, all v."""
    found = {}
    for leaf in ("weight", "bias"):
        q, k, v = (tree[f"layers.{n}.attn.{p}_proj.{leaf}"] for p in "qkv")
        kv, groups = len(k), len(q) // len(k)
        fused = np.concatenate([q, k, v]).reshape(kv, groups + 2, *q.shape[1:])
        parts = fused[:, :groups].reshape(q.shape), fused[:, groups], fused[:, groups + 1]
        found |= {f"layers.{n}.attn.{p}_proj.{leaf}": part for p, part in zip("qkv", parts, strict=True)}
    return found


def _for_neighbours(value: np.ndarray) -> np.ndarray:
    """Rows of each head put where an interleaved RoPE wants them, as conversion scripts of Llama do."""
    heads, dim, *rest = value.shape
    return np.swapaxes(value.reshape(heads, 2, dim // 2, *rest), 1, 2).reshape(value.shape)


def _halved(value: np.ndarray) -> np.ndarray:
    """Gate and up taken as the first and the second half of the source's rows."""
    rows = np.stack([value[:, 0], value[:, 1]], axis=2)  # [experts, intermediate, 2, ...]: the source's order
    return rows.reshape(value.shape)


def _two_experts(value: np.ndarray) -> np.ndarray:
    value = value.copy()
    value[[1, 4]] = value[[4, 1]]
    return value


def _bytes_swapped(value: np.ndarray) -> np.ndarray:
    return value.view(np.uint16).byteswap().view(value.dtype)


def _through_fp8(value: np.ndarray) -> np.ndarray:
    return value.astype(ml_dtypes.float8_e4m3fn).astype(value.dtype)


def _scales_as_numbers(tree: Tree, n: int) -> Tree:
    found = {}
    for name in ("gate_up", "down"):
        blocks, scales = (tree[f"layers.{n}.mlp.{name}.{kind}"] for kind in ("blocks", "scales"))
        codes = mxfp4.decode(blocks, np.full_like(scales, 127)).astype(np.float32)
        numbers = np.repeat(scales.astype(np.float32), 32, axis=-1)
        found[f"layers.{n}.mlp.{name}.weight"] = (codes * numbers).astype(ml_dtypes.bfloat16)
    return found


_EXPERTS = tuple(f"mlp.{name}.{leaf}" for name in ("gate_up", "down") for leaf in ("weight", "blocks", "scales", "bias"))
_GATE_UP = ("mlp.gate_up.weight", "mlp.gate_up.bias")

CHECKPOINT: dict[str, Callable[[Tree, int], Tree]] = {
    "weight-transposed": _layer(_transposed, "mlp.down.weight"),
    "weight-one-block": _layer(_one_block, "mlp.down.weight"),
    "weight-zeroed": _layer(np.zeros_like, "attn.o_proj.weight"),
    "weight-rows-shifted": _layer(lambda v: np.roll(v, 1, axis=-2), "mlp.gate_up.weight"),
    "weight-bytes-swapped": _layer(_bytes_swapped, "attn.k_proj.weight"),
    "weight-through-fp8": _layer(_through_fp8, "attn.v_proj.weight"),
    "bias-dropped": _layer(np.zeros_like, "mlp.down.bias"),
    "sinks-shifted": _layer(lambda v: np.roll(v, 1), "attn.sinks"),
    "experts-permuted": _layer(_two_experts, *_EXPERTS),
    "weight-gate-up-halves": _layer(_halved, *_GATE_UP),
    "weight-gate-up-exchanged": _layer(lambda v: v[:, ::-1], *_GATE_UP),
    "qkv-split-by-group": _split_by_group,
    "qkv-k-v-exchanged": _exchanged(
        *((f"layers.{{n}}.attn.k_proj.{leaf}", f"layers.{{n}}.attn.v_proj.{leaf}") for leaf in ("weight", "bias"))
    ),
    "q-k-for-neighbours": _layer(_for_neighbours, *(f"attn.{p}_proj.{leaf}" for p in "qk" for leaf in ("weight", "bias"))),
    "norm-scales-swapped": _exchanged(("layers.{n}.attn.norm.scale", "layers.{n}.mlp.norm.scale")),
    "layers-exchanged": _layers_exchanged,
    "embedding-lm-head-swapped": _exchanged(("embedding.weight", "lm_head.weight")),
    "scale-linear": _scales_as_numbers,
    "lm-head-is-embedding": lambda tree, n: {"lm_head.weight": tree["embedding.weight"]},
    "embedding-is-lm-head": lambda tree, n: {"embedding.weight": tree["lm_head.weight"]},
    "heads-transposed": _layer(lambda v: np.swapaxes(v, 0, 1).reshape(v.shape), "attn.q_proj.weight", "attn.q_proj.bias"),
    "embedding-rows-shifted": lambda tree, n: {"embedding.weight": np.roll(tree["embedding.weight"], 1, axis=0)},
}


# --- in the packed source ---------------------------------------------------------------------------------------

SOURCE: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "nibbles-swapped": lambda blocks, scales: ((blocks << 4) | (blocks >> 4), scales),
    "scale-off-by-one": lambda blocks, scales: (blocks, scales + np.uint8(1)),
    "scale-ignored": lambda blocks, scales: (blocks, np.full_like(scales, 127)),
    "scales-shifted": lambda blocks, scales: (blocks, np.roll(scales, 1, axis=-1)),
    "sign-lost": lambda blocks, scales: (blocks & 0x77, scales),
    "minus-zero-lost": lambda blocks, scales: (_without_minus_zero(blocks), scales),
}


def _without_minus_zero(blocks: np.ndarray) -> np.ndarray:
    """Code 8, -0.0, becomes code 0 in both nibbles."""
    low, high = blocks & 0x0F, blocks >> 4
    return np.where(low == 8, 0, low).astype(np.uint8) | (np.where(high == 8, 0, high).astype(np.uint8) << 4)
