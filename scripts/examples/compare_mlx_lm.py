"""Judge another library's gpt-oss by the same harness: mlx-lm's own modules, with nothing of ours between its taps.

    ./scripts/readers     # makes an environment with it
    PYTHONPATH=.venv/readers python scripts/examples/compare_mlx_lm.py SRC

SRC is what mlx-lm loads: safetensors for Hugging Face, packed or not. Its layers are called part by part, in float32, and each
value between two parts is shown as a tap and can be replaced. mlx-lm rounds the ends of YaRN's range whatever the
configuration says, and the harness names that: `yarn-truncated`, at `rope`. Where the configuration asks for it ("truncate":
true in rope_scaling) it passes.
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.gpt_oss import mlx_topk
from mlx_lm.utils import load_model

from parity import compare
from parity.protocols import Arrays, LayerCan, PortCan, Sizes

# Our names of its modules; `experts` are taken apart below.
MODULES = {
    "attn.norm": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.o_proj": "self_attn.o_proj",
    "mlp.norm": "post_attention_layernorm",
    "mlp.router": "mlp.router",
}


class MlxLayer:
    def __init__(self, block, window: int | None):
        self.block, self.window, self.can = block, window, LayerCan()

    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        taps: Arrays = {}

        def seen(name: str, value: mx.array) -> mx.array:
            taps[name] = np.array(value)
            return value if not forced or name not in forced else mx.array(forced[name]).reshape(value.shape)

        attn, mlp, stream = self.block.self_attn, self.block.mlp, mx.array(x)
        batch, length, hidden = x.shape
        h = seen("attn_norm", self.block.input_layernorm(stream))
        q, k, v = (
            seen(name, projection(h).reshape(batch, length, -1, attn.head_dim))
            for name, projection in (("q", attn.q_proj), ("k", attn.k_proj), ("v", attn.v_proj))
        )
        q = seen("q_rope", attn.rope(q.swapaxes(1, 2)).swapaxes(1, 2))
        k = seen("k_rope", attn.rope(k.swapaxes(1, 2)).swapaxes(1, 2))
        q, k, v = (one.swapaxes(1, 2) for one in (q, k, v))
        mask = create_attention_mask(stream, window_size=self.window)
        core = scaled_dot_product_attention(q, k, v, None, attn.sm_scale, mask=mask, sinks=attn.sinks)
        core = seen("attn_core", core.swapaxes(1, 2))
        after = stream + seen("attn_out", attn.o_proj(core.reshape(batch, length, -1)))

        h = seen("mlp_norm", self.block.post_attention_layernorm(after)).reshape(-1, hidden)
        logits = seen("router_logits", mlp.router(h))
        choice = seen("expert_choice", mlx_topk(logits, k=mlp.num_experts_per_tok)[1])
        chosen = mx.take_along_axis(logits, choice, axis=-1)
        weights = seen("expert_weights", mx.softmax(chosen, axis=-1, precise=True))
        out = self._sum(h, choice, weights).reshape(x.shape)
        seen("layer_out", after + seen("mlp_out", out))
        return taps

    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.array(self._sum(mx.array(x), mx.array(choice), mx.array(weights)))

    def _sum(self, x: mx.array, choice: mx.array, weights: mx.array) -> mx.array:
        return (self.block.mlp.experts(x, choice) * weights[..., None]).sum(axis=-2)


class MlxModel:
    """mlx-lm's model of SRC, computed in float32."""

    def __init__(self, source: Path):
        self.path, (self.model, self.config) = source, load_model(source)
        self.model.set_dtype(mx.float32)
        self.can = PortCan()
        self.modules = {
            "embedding": self.model.model.embed_tokens,
            "norm": self.model.model.norm,
            "lm_head": self.model.lm_head,
        }
        for n, block in enumerate(self.model.layers):
            self.modules |= {f"layers.{n}.{ours}": at(block, theirs) for ours, theirs in MODULES.items()}
        names = [f"{name}.{leaf}" for name, module in self.modules.items() for leaf in ("weight", "bias") if leaf in module]
        for n in range(self.sizes.layers):
            leaves = ("gate_up.weight", "gate_up.bias", "down.weight", "down.bias")
            names += [f"layers.{n}.attn.sinks", *(f"layers.{n}.mlp.{leaf}" for leaf in leaves)]
        self.names = {name.replace("norm.weight", "norm.scale"): name for name in names}
        arrays = ((name, self.restore([name])[name]) for name in self.names)
        self.stored = {name: (array.shape, array.dtype) for name, array in arrays}

    def __str__(self) -> str:
        return f"mlx-lm's model of {self.path}"

    @property
    def sizes(self) -> Sizes:
        c = self.config
        names = ("num_hidden_layers", "num_local_experts", "vocab_size", "sliding_window", "max_position_embeddings")
        return Sizes(*(c[name] for name in names))

    def restore(self, names) -> Arrays:
        return {name: np.array(self._parameter(self.names[name])) for name in names}

    def _parameter(self, name: str) -> mx.array:
        module, leaf = name.rsplit(".", 1)
        if module in self.modules:
            value, head_dim = self.modules[module][leaf], self.model.layers[0].self_attn.head_dim
            if module.endswith(("q_proj", "k_proj", "v_proj")):
                return value.reshape(-1, head_dim, *value.shape[1:])
            return value.reshape(value.shape[0], -1, head_dim) if name.endswith("o_proj.weight") else value
        block = self.model.layers[int(name.split(".")[1])]
        if leaf == "sinks":
            return block.self_attn.sinks
        experts = block.mlp.experts
        if module.endswith("down"):
            return values(experts.down_proj, leaf)
        return mx.stack([values(experts.gate_proj, leaf), values(experts.up_proj, leaf)], axis=1)

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.array(self.model.model.embed_tokens(mx.array(tokens))).astype(dtype)

    def layer(self, n: int) -> MlxLayer:
        slides = self.model.model.layer_types[n] == "sliding_attention"
        return MlxLayer(self.model.layers[n], self.model.model.window_size if slides else None)

    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        normed = self.model.model.norm(mx.array(x))
        given = normed if not forced else mx.array(forced["final_norm"])
        return {"final_norm": np.array(normed), "logits": np.array(self.model.lm_head(given))}

    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What it makes of (1, 0), at every position up to the last: rotated, that is (cos, sin)."""
        attn = self.model.layers[0].self_attn
        half = attn.head_dim // 2
        unit = mx.concatenate([mx.ones(half), mx.zeros(half)])
        turned = np.array(attn.rope(mx.broadcast_to(unit, (1, 1, int(positions.max()) + 1, 2 * half))))[0, 0]
        return turned[positions, :half], turned[positions, half:]


def at(module, path: str):
    for name in path.split("."):
        module = module[name]
    return module


def values(linear, leaf: str) -> mx.array:
    """A map of all experts; what is packed as mlx-lm decodes it."""
    if leaf != "weight" or "scales" not in linear:
        return linear[leaf]
    packed = mx.dequantize(linear["weight"], linear["scales"], group_size=linear.group_size, bits=linear.bits, mode=linear.mode)
    return packed.astype(mx.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, metavar="SRC", help="safetensors, as for Hugging Face")
    source = parser.parse_args().source
    report = compare(source, MlxModel(source))
    print(report.table())
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
