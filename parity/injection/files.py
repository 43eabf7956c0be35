"""Known mistakes put into files: a copy of the source before it is converted, or of the Orbax checkpoint. For the self-test.

What is put there are the edits of `parity.mistakes.edits`. Orbax directories are rewritten by plain Orbax, sources by plain
safetensors.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file, save_file

from parity.mistakes.edits import EDITS, PACKED, Look

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
                changed = PACKED[fault](*(tensors[key] for key in pair))
                tensors |= {key: np.ascontiguousarray(value) for key, value in zip(pair, changed, strict=True)}
        save_file(tensors, file, {"format": "pt"})
    return [f"layers.{n}.mlp.{name}.weight" for name in ("down", "gate_up")]


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if "value" in node and not isinstance(node["value"], dict):
        yield ".".join(path), node
        return
    for key, child in node.items():
        yield from _walk(child, (*path, str(key)))


# --- where each is put ------------------------------------------------------------------------------------------


def _edited(fault: str, *names: str) -> Callable[[Tree, int], Tree]:
    """These parameters of a layer, or outside the layers, as the edit makes them."""

    def change(tree: Tree, n: int) -> Tree:
        found = {}
        for name in names:
            full = name if name in tree else f"layers.{n}.{name}"
            if full in tree:
                prefix = full.removesuffix(name)
                experts = name.rsplit(".", 1)[0]
                look = Look(name, lambda other, prefix=prefix: tree[prefix + other], packed=lambda e=experts: _pair(tree, n, e))
                found[full] = next(iter(EDITS[fault].make(tree[full], look)))
        return found

    return change


def _pair(tree: Tree, n: int, experts: str) -> tuple[np.ndarray, np.ndarray]:
    return tree[f"layers.{n}.{experts}.blocks"], tree[f"layers.{n}.{experts}.scales"]


def _layers_exchanged(tree: Tree, n: int) -> Tree:
    other = n + 1 if f"layers.{n + 1}.attn.norm.scale" in tree else n - 1
    mine = [name.removeprefix(f"layers.{n}.") for name in tree if name.startswith(f"layers.{n}.")]
    return {f"layers.{a}.{name}": tree[f"layers.{b}.{name}"] for name in mine for a, b in ((n, other), (other, n))}


def _one_block(tree: Tree, n: int) -> Tree:
    value = tree[f"layers.{n}.mlp.down.weight"].copy()
    value.reshape(-1, 32)[7] *= np.asarray(2, value.dtype)
    return {f"layers.{n}.mlp.down.weight": value}


def _two_experts(tree: Tree, n: int) -> Tree:
    found = {}
    for name in (f"layers.{n}.mlp.{part}.{leaf}" for part in ("gate_up", "down") for leaf in _LEAVES):
        if name in tree:
            found[name] = tree[name].copy()
            found[name][[1, 4]] = tree[name][[4, 1]]
    return found


_LEAVES = ("weight", "blocks", "scales", "bias")
_QKV = tuple(f"attn.{part}_proj.{leaf}" for part in "qkv" for leaf in ("weight", "bias"))
_PUT = {
    "weight-transposed": ("mlp.down.weight",),
    "weight-zeroed": ("attn.o_proj.weight",),
    "weight-rows-shifted": ("mlp.gate_up.weight",),
    "weight-bytes-swapped": ("attn.k_proj.weight",),
    "weight-through-fp8": ("attn.v_proj.weight",),
    "bias-dropped": ("mlp.down.bias",),
    "sinks-shifted": ("attn.sinks",),
    "weight-gate-up-halves": ("mlp.gate_up.weight", "mlp.gate_up.bias"),
    "weight-gate-up-exchanged": ("mlp.gate_up.weight", "mlp.gate_up.bias"),
    "qkv-split-by-group": _QKV,
    "qkv-k-v-exchanged": _QKV[2:],
    "q-k-for-neighbours": _QKV[:4],
    "norm-scales-swapped": ("attn.norm.scale", "mlp.norm.scale"),
    "scale-linear": ("mlp.gate_up.weight", "mlp.down.weight"),
    "lm-head-is-embedding": ("lm_head.weight",),
    "embedding-is-lm-head": ("embedding.weight",),
    "heads-transposed": ("attn.q_proj.weight", "attn.q_proj.bias"),
    "embedding-rows-shifted": ("embedding.weight",),
}
CHECKPOINT: dict[str, Callable[[Tree, int], Tree]] = {
    **{fault: _edited(fault, *names) for fault, names in _PUT.items()},
    "weight-one-block": _one_block,
    "experts-permuted": _two_experts,
    "layers-exchanged": _layers_exchanged,
    "embedding-lm-head-swapped": lambda tree, n: {
        "embedding.weight": tree["lm_head.weight"],
        "lm_head.weight": tree["embedding.weight"],
    },
}
SOURCE = PACKED  # put into the packed source, before it is converted
