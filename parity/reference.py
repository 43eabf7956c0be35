"""The reference: PyTorch, one layer at a time, transformers' own code from bytes to activations.

Nothing here is shared with the side that is judged: not the reader, not the layouts' table, not the MXFP4 decoder,
not the configuration. What transformers lacks (OpenAI's original layout) has its own small mapping below. One layer
at a time is bitwise equal to the whole model.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

Taps = dict[str, torch.Tensor]

# OpenAI original -> transformers, within a layer (`block.N.` -> `model.layers.N.`) and outside.
_OPENAI_LAYER = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
    "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
    "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
}
_OPENAI_MODEL = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}


class Reference:
    """A gpt-oss checkpoint in PyTorch, in float32.

    Args:
      source: a safetensors directory: Hugging Face MXFP4 or bfloat16, or OpenAI's original.
    """

    def __init__(self, source: str | Path):
        self.source = Path(source)
        self._files: dict[str, Path] = {}
        for file in sorted(self.source.glob("*.safetensors")):
            with safe_open(file, framework="pt") as f:
                self._files |= dict.fromkeys(f.keys(), file)
        self.original = any(name.startswith("block.") for name in self._files)
        self.config = _openai_config(self.source) if self.original else GptOssConfig.from_pretrained(self.source)
        self.config._attn_implementation = "eager"
        self.config._experts_implementation = "eager"
        self.rotary = gpt_oss.GptOssRotaryEmbedding(self.config)  # off the meta device: its buffers are in no file

    # --- tensors, as transformers names and stores them --------------------------------------------------------

    def _get(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as f:
            return f.get_tensor(name)

    def _model_tensor(self, name: str) -> torch.Tensor:
        theirs = {hf: openai for openai, hf in _OPENAI_MODEL.items()}
        return self._get(theirs[name] if self.original else name)

    def stored_layer(self, n: int) -> Taps:
        """Layer n's tensors as stored, named as in a Hugging Face checkpoint without the prefix."""
        if not self.original:
            prefix = f"model.layers.{n}."
            tensors = {name.removeprefix(prefix): self._get(name) for name in self._files if name.startswith(prefix)}
            # transformers 5.23 can write bfloat16 experts under the names of packed ones.
            return {name.removesuffix("_blocks") if t.dim() == 3 and t.is_floating_point() else name: t
                    for name, t in tensors.items()}  # fmt: skip
        prefix = f"block.{n}."
        tensors = {new: self._get(prefix + old) for old, new in _OPENAI_LAYER.items()}
        rows = self.config.head_dim * torch.tensor([self.config.num_attention_heads] + [self.config.num_key_value_heads] * 2)
        for leaf in ("weight", "bias"):
            parts = self._get(f"{prefix}attn.qkv.{leaf}").split(rows.tolist())
            tensors |= {f"self_attn.{p}_proj.{leaf}": part for p, part in zip("qkv", parts, strict=True)}
        return tensors

    # --- activations --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [batch, length] -> float32 [batch, length, hidden]."""
        return torch.nn.functional.embedding(tokens, self._model_tensor("model.embed_tokens.weight")).float()

    @torch.no_grad()
    def unembed(self, x: torch.Tensor) -> Taps:
        """The residual stream after the last layer -> `final_norm`, `logits`."""
        norm = gpt_oss.GptOssRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight.data = self._model_tensor("model.norm.weight").float()
        normed = norm(x)
        weight = self._model_tensor("lm_head.weight")
        # A run of rows at a time: the whole matrix in float32 is 2.3 GB.
        logits = [torch.nn.functional.linear(normed, rows.float()) for rows in weight.split(16384)]
        return {"final_norm": normed, "logits": torch.cat(logits, dim=-1)}

    def layer(self, n: int) -> "ReferenceLayer":
        return ReferenceLayer(self, n)

    def model_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters outside the layers, as an Orbax checkpoint of ours names and lays them out."""
        yield "embedding.weight", self._model_tensor("model.embed_tokens.weight")
        yield "norm.scale", self._model_tensor("model.norm.weight")
        yield "lm_head.weight", self._model_tensor("lm_head.weight")


class ReferenceLayer:
    """One decoder layer, its weights decoded once."""

    def __init__(self, reference: Reference, n: int):
        self.n, self.config, self.rotary = n, reference.config, reference.rotary
        self.stored = reference.stored_layer(n)
        self.decoded = _decode(self.stored)
        with torch.device("meta"):
            self.module = gpt_oss.GptOssDecoderLayer(self.config, n)
        self.module.load_state_dict({name: t.float() for name, t in self.decoded.items()}, assign=True)
        self.module.eval()

    @torch.no_grad()
    def run(self, x: torch.Tensor) -> Taps:
        """float32 [batch, length, hidden] -> every tap of the layer. Prompts are whole: positions 0, 1, 2, …"""
        seen: Taps = {}
        attn, mlp = self.module.self_attn, self.module.mlp
        heads = {"q": attn.q_proj, "k": attn.k_proj, "v": attn.v_proj}
        whole = {
            "attn_norm": self.module.input_layernorm,
            "attn_out": attn.o_proj,
            "mlp_norm": self.module.post_attention_layernorm,
        }
        hooks = [m.register_forward_hook(_keep(seen, name, (-1, self.config.head_dim))) for name, m in heads.items()]
        hooks += [m.register_forward_hook(_keep(seen, name)) for name, m in whole.items()]
        hooks += [
            mlp.router.register_forward_hook(_keep_router(seen)),
            mlp.experts.register_forward_hook(_keep(seen, "mlp_out")),
        ]
        positions = torch.arange(x.shape[1])[None]
        sliding = list(self.config.layer_types or [])[self.n] == "sliding_attention"
        make_mask = create_sliding_window_causal_mask if sliding else create_causal_mask
        mask = make_mask(config=self.config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions)
        try:
            with mock.patch.object(gpt_oss, "eager_attention_forward", _watched(seen)):
                out = self.module(x, attention_mask=mask, position_ids=positions, position_embeddings=self.rotary(x, positions))
        finally:
            for hook in hooks:
                hook.remove()
        return seen | {"mlp_out": seen["mlp_out"].reshape(x.shape), "layer_out": out}

    @torch.no_grad()
    def experts(self, x: torch.Tensor, choice: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts alone, on a routing of one's own: x [tokens, hidden], choice and weights [tokens, k]."""
        return self.module.mlp.experts(x, choice, weights)

    def parameters(self, packed: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """The layer's parameters as an Orbax checkpoint of ours names and lays them out; experts packed if asked."""
        c, p = self.config, f"layers.{self.n}"
        tensors = self.stored if packed else self.decoded
        yield f"{p}.attn.norm.scale", tensors["input_layernorm.weight"]
        yield f"{p}.attn.sinks", tensors["self_attn.sinks"]
        for name, n in (("q", c.num_attention_heads), ("k", c.num_key_value_heads), ("v", c.num_key_value_heads)):
            yield f"{p}.attn.{name}_proj.weight", tensors[f"self_attn.{name}_proj.weight"].view(n, c.head_dim, -1)
            yield f"{p}.attn.{name}_proj.bias", tensors[f"self_attn.{name}_proj.bias"].view(n, c.head_dim)
        yield f"{p}.attn.o_proj.weight", tensors["self_attn.o_proj.weight"].view(-1, c.num_attention_heads, c.head_dim)
        yield f"{p}.attn.o_proj.bias", tensors["self_attn.o_proj.bias"]
        yield f"{p}.mlp.norm.scale", tensors["post_attention_layernorm.weight"]
        yield f"{p}.mlp.router.weight", tensors["mlp.router.weight"]
        yield f"{p}.mlp.router.bias", tensors["mlp.router.bias"]
        yield f"{p}.mlp.gate_up.bias", _gate_and_up(tensors["mlp.experts.gate_up_proj_bias"])
        yield f"{p}.mlp.down.bias", tensors["mlp.experts.down_proj_bias"]
        if packed:
            for kind in ("blocks", "scales"):
                yield f"{p}.mlp.gate_up.{kind}", _gate_and_up(tensors[f"mlp.experts.gate_up_proj_{kind}"])
                yield f"{p}.mlp.down.{kind}", tensors[f"mlp.experts.down_proj_{kind}"]
        else:
            yield f"{p}.mlp.gate_up.weight", _gate_and_up(tensors["mlp.experts.gate_up_proj"].transpose(1, 2))
            yield f"{p}.mlp.down.weight", tensors["mlp.experts.down_proj"].transpose(1, 2)


def _gate_and_up(rows: torch.Tensor) -> torch.Tensor:
    """[experts, 2·intermediate, …] with gate and up in turn -> [experts, 2, intermediate, …]."""
    return rows.unflatten(1, (-1, 2)).transpose(1, 2)


def _decode(stored: Taps) -> Taps:
    """The layer's state dict: packed experts decoded by transformers, one expert at a time to bound the memory."""
    state = {name: t for name, t in stored.items() if not name.endswith(("_blocks", "_scales"))}
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        if f"{name}_blocks" in stored:
            packed = zip(stored[f"{name}_blocks"].split(1), stored[f"{name}_scales"].split(1), strict=True)
            state[name] = torch.cat([convert_moe_packed_tensors(b, s, dtype=torch.bfloat16) for b, s in packed])
    return state


def _keep(seen: Taps, name: str, unflatten: tuple[int, ...] | None = None):
    def hook(module, args, output) -> None:
        seen[name] = output if unflatten is None else output.unflatten(-1, unflatten)

    return hook


def _keep_router(seen: Taps):
    def hook(module, args, output) -> None:
        seen["router_logits"], seen["expert_weights"], seen["expert_choice"] = output

    return hook


def _watched(seen: Taps):
    """transformers' eager attention, its inputs (rotated q and k) and its output kept."""
    attend = gpt_oss.eager_attention_forward

    def attention(module, query, key, value, *args, **kwargs):
        core, weights = attend(module, query, key, value, *args, **kwargs)
        seen["q_rope"], seen["k_rope"], seen["attn_core"] = query.transpose(1, 2), key.transpose(1, 2), core
        return core, weights

    return attention


def _openai_config(source: Path) -> GptOssConfig:
    c = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return GptOssConfig(
        num_hidden_layers=c["num_hidden_layers"],
        num_local_experts=c["num_experts"],
        num_experts_per_tok=c["experts_per_token"],
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        head_dim=c["head_dim"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"],
        sliding_window=c["sliding_window"],
        swiglu_limit=float(c["swiglu_limit"]),
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": float(c["rope_theta"]),
            "factor": float(c["rope_scaling_factor"]),
            "beta_fast": float(c["rope_ntk_beta"]),
            "beta_slow": float(c["rope_ntk_alpha"]),
            "original_max_position_embeddings": c["initial_context_length"],
            "truncate": False,
        },
    )
