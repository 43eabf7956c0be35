"""Judge a gpt-oss of your own, in any framework, by the same harness.

    python scripts/examples/compare_own_model.py SRC CHECKPOINT

`OwnModel` stands for your port: plain functions on dictionaries of arrays, none of `oss_model`'s layers. What the harness
asks of it is in `parity/protocols.py`: sizes, the embedding, each layer's taps, the logits, and the RoPE tables. Wherever a
value is a tap, hand it through `seen(name, value)`, which keeps it and gives back the value to go on with. A port that
also decodes on a cache, or differentiates, has `decode` and `gradients` as described there; this one does neither, so
that `compare(..., gradients=True)` ends incomplete and says so.
"""

import argparse
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from oss_model import ModelConfig
from parity import compare
from parity.protocols import Arrays, LayerCan, PortCan, Sizes


class OwnLayer:
    def __init__(self, cfg: ModelConfig, n: int, parameters: dict):
        self.cfg, self.n, self.p = cfg, n, parameters
        self.can = LayerCan()

    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        taps: Arrays = {}

        def seen(name: str, value: jax.typing.ArrayLike) -> jax.Array:
            value = jnp.asarray(value)
            taps[name] = np.asarray(value)
            return jnp.asarray(value if not forced or name not in forced else forced[name]).reshape(value.shape)

        p, cfg, length = self.p, self.cfg, x.shape[1]
        h = seen("attn_norm", norm(jnp.asarray(x), p["attn"]["norm"]["scale"], cfg))
        q, k, v = (
            seen(name, jnp.einsum("blh,ndh->blnd", h, w(p["attn"][f"{name}_proj"])) + b(p["attn"][f"{name}_proj"]))
            for name in ("q", "k", "v")
        )
        cos, sin = (table[:length] for table in rope(cfg, np.arange(length)))
        q, k = seen("q_rope", rotate(q, cos, sin)), seen("k_rope", rotate(k, cos, sin))
        ahead = np.arange(length)[:, None] - np.arange(length)[None]
        window = cfg.sliding_window if cfg.layer_types[self.n] == "sliding_attention" else length
        visible = (ahead >= 0) & (ahead < window)
        group = cfg.num_attention_heads // cfg.num_key_value_heads
        logits = jnp.einsum("blnd,bmnd->bnlm", q, jnp.repeat(k, group, axis=2)) / math.sqrt(cfg.head_dim)
        sinks = jnp.broadcast_to(f32(p["attn"]["sinks"])[None, :, None, None], (*logits.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([jnp.where(visible, logits, -jnp.inf), sinks], axis=-1), axis=-1)[..., :-1]
        core = seen("attn_core", jnp.einsum("bnlm,bmnd->blnd", weights, jnp.repeat(v, group, axis=2)))
        out = jnp.einsum("blnd,hnd->blh", core, w(p["attn"]["o_proj"])) + b(p["attn"]["o_proj"])
        after = jnp.asarray(x) + seen("attn_out", out)

        h = seen("mlp_norm", norm(after, p["mlp"]["norm"]["scale"], cfg)).reshape(-1, x.shape[-1])
        logits = seen("router_logits", h @ w(p["mlp"]["router"]).T + b(p["mlp"]["router"]))
        choice = seen("expert_choice", jax.lax.top_k(logits, cfg.num_experts_per_tok)[1])
        weights = seen("expert_weights", jax.nn.softmax(jnp.take_along_axis(logits, choice, -1), axis=-1))
        out = self.experts(np.asarray(h), np.asarray(choice), np.asarray(weights)).reshape(x.shape)
        seen("layer_out", after + seen("mlp_out", jnp.asarray(out)))
        return taps

    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        total = np.zeros_like(x)
        for e in np.unique(choice):
            token, slot = np.nonzero(choice == e)
            first, second = ({k: v["value"][e] for k, v in self.p["mlp"][name].items()} for name in ("gate_up", "down"))
            gate, up = jnp.einsum("th,sih->sti", x[token], f32(first["weight"])) + f32(first["bias"])[:, None]
            gate, up = jnp.minimum(gate, self.cfg.swiglu_limit), jnp.clip(up, -self.cfg.swiglu_limit, self.cfg.swiglu_limit)
            hidden = (up + 1) * gate * jax.nn.sigmoid(self.cfg.swiglu_alpha * gate)
            total[token] += (hidden @ f32(second["weight"]).T + f32(second["bias"])) * weights[token, slot, None]
        return total


class OwnModel:
    """Float32 only. With `stored` empty the parameters are not compared, and a run that passes is incomplete."""

    def __init__(self, checkpoint: Path):
        self.path, self.cfg = checkpoint, ModelConfig.from_json(checkpoint / "config.json")
        with ocp.PyTreeCheckpointer() as plain:
            self.tree = plain.restore(checkpoint.absolute())
        leaves = jax.tree_util.tree_flatten_with_path(self.tree)[0]
        self.arrays = {".".join(str(key.key) for key in keys[:-1]): np.asarray(leaf) for keys, leaf in leaves}
        self.can = PortCan()
        self.stored = {name: (array.shape, array.dtype) for name, array in self.arrays.items()}

    def __str__(self) -> str:
        return f"OwnModel of {self.path}"

    @property
    def sizes(self) -> Sizes:
        c = self.cfg
        return Sizes(c.num_hidden_layers, c.num_experts, c.vocab_size, c.sliding_window, c.max_position_embeddings)

    def restore(self, names) -> Arrays:
        return {name: self.arrays[name] for name in names}

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return self.arrays["embedding.weight"][tokens].astype(dtype)

    def layer(self, n: int) -> OwnLayer:
        return OwnLayer(self.cfg, n, self.tree["layers"][str(n)])

    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        normed = norm(jnp.asarray(x), self.tree["norm"]["scale"], self.cfg)
        given = normed if not forced else jnp.asarray(forced["final_norm"])
        return {"final_norm": np.asarray(normed), "logits": np.asarray(given @ w(self.tree["lm_head"]).T)}

    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return rope(self.cfg, positions)


def f32(array) -> jax.Array:
    return jnp.asarray(array.get("value") if isinstance(array, dict) else array).astype(jnp.float32)


def w(linear: dict) -> jax.Array:
    return f32(linear["weight"])


def b(linear: dict) -> jax.Array:
    return f32(linear["bias"])


def norm(x, scale, cfg: ModelConfig):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + cfg.rms_norm_eps) * f32(scale)


def rope(cfg: ModelConfig, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = cfg.head_dim // 2
    base = np.float32(cfg.rope_theta ** (np.arange(half) / half))
    turns = (cfg.rope_beta_fast, cfg.rope_beta_slow)
    low, high = (half * math.log(cfg.rope_original_max_position_embeddings / (t * 2 * math.pi)) / math.log(cfg.rope_theta)
                 for t in turns)  # fmt: skip
    ramp = np.clip((np.arange(half, dtype=np.float32) - max(low, 0)) / (min(high, cfg.head_dim - 1) - max(low, 0)), 0, 1)
    inverse = (ramp / (cfg.rope_factor * base) + (1 - ramp) / base).astype(np.float32)
    angle = positions[:, None].astype(np.float32) * inverse[None]
    concentration = np.float32(0.1 * math.log(cfg.rope_factor) + 1)
    return np.cos(angle) * concentration, np.sin(angle) * concentration


def rotate(x, cos, sin):
    x1, x2 = jnp.split(x, 2, axis=-1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge a model of one's own.")
    parser.add_argument("source", type=Path, metavar="SRC", help="safetensors")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="an Orbax checkpoint with values, not packed")
    args = parser.parse_args()
    report = compare(args.source, OwnModel(args.checkpoint))
    print(report.table())
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
