"""The reference: PyTorch, one layer at a time, transformers' own code from bytes to activations.

Nothing here is shared with the side that is judged: not the reader, not the layouts' table, not the MXFP4 decoder,
not the configuration. What transformers lacks (OpenAI's original layout) has its own small mapping below. One layer
at a time is bitwise equal to the whole model.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
from safetensors import safe_open
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from parity.sides import Arrays, Expected, Sizes

Taps = dict[str, torch.Tensor]

_EXPERTS = ("gate_up_proj", "down_proj")
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
    """A gpt-oss checkpoint in PyTorch.

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

    @property
    def sizes(self) -> Sizes:
        c = self.config
        window, positions = int(c.sliding_window or 0), c.max_position_embeddings
        return Sizes(c.num_hidden_layers, c.num_local_experts, c.vocab_size, window, positions)

    @property
    def rope_positions(self) -> np.ndarray:
        """Every position the model may see, not only the prompt's."""
        return np.arange(self.config.max_position_embeddings)

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
            return {
                name.removesuffix("_blocks") if t.dim() == 3 and t.is_floating_point() else name: t
                for name, t in tensors.items()
            }
        prefix = f"block.{n}."
        tensors = {new: self._get(prefix + old) for old, new in _OPENAI_LAYER.items()}
        rows = self.config.head_dim * torch.tensor([self.config.num_attention_heads] + [self.config.num_key_value_heads] * 2)
        for leaf in ("weight", "bias"):
            parts = self._get(f"{prefix}attn.qkv.{leaf}").split(rows.tolist())
            tensors |= {f"self_attn.{p}_proj.{leaf}": part for p, part in zip("qkv", parts, strict=True)}
        return tensors

    def first_parameters(self) -> Iterator[Expected]:
        """Parameters before the layers, as an Orbax checkpoint of ours names and lays them out."""
        yield _expected("embedding.weight", self._model_tensor("model.embed_tokens.weight"))

    def last_parameters(self) -> Iterator[Expected]:
        """Parameters after the layers."""
        yield _expected("norm.scale", self._model_tensor("model.norm.weight"))
        yield _expected("lm_head.weight", self._model_tensor("lm_head.weight"))

    # --- activations --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """int [batch, length] -> [batch, length, hidden] in `dtype`."""
        rows = torch.nn.functional.embedding(torch.from_numpy(tokens).long(), self._model_tensor("model.embed_tokens.weight"))
        return to_numpy(rows.to(getattr(torch, np.dtype(dtype).name)))

    def layer(self, n: int) -> "ReferenceLayer":
        return ReferenceLayer(self, n)

    @torch.no_grad()
    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        """The residual stream after the last layer -> `final_norm`, `logits`, in the dtype of x."""
        stream = to_torch(x)
        norm = gpt_oss.GptOssRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight.data = self._model_tensor("model.norm.weight").to(stream.dtype)
        normed = norm(stream)
        given = to_torch(forced["final_norm"]).to(stream.dtype) if forced else normed
        # A run of rows at a time: the whole matrix in float32 is 2.3 GB.
        rows = self._model_tensor("lm_head.weight").split(16384)
        logits = torch.cat([torch.nn.functional.linear(given, some.to(given.dtype)) for some in rows], dim=-1)
        return {"final_norm": to_numpy(normed), "logits": to_numpy(logits)}

    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 frequencies [head_dim / 2] and cos, sin [positions, head_dim / 2]."""
        cos, sin = self.rotary(torch.zeros(1), torch.from_numpy(positions)[None])
        return self.rotary.inv_freq.numpy(), cos[0].numpy(), sin[0].numpy()


class ReferenceLayer:
    """One decoder layer. MXFP4 is decoded once, for the weights and for every run in whichever dtype."""

    def __init__(self, reference: Reference, n: int):
        self.n, self.config, self.rotary = n, reference.config, reference.rotary
        self.reference = reference
        self.decoded = _decode(reference.stored_layer(n))

    def parameters(self, packed: bool) -> Iterator[Expected]:
        """The layer's parameters as an Orbax checkpoint of ours names and lays them out; experts packed if asked."""
        # The packed bytes are read again where they are asked for, rather than kept beside the decoded ones.
        tensors = self.reference.stored_layer(self.n) if packed else self.decoded
        for name, tensor in as_in_orbax(self.config, self.n, tensors):
            yield _expected(name, tensor)

    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        """Every tap of the layer, in the dtype of x. Prompts are whole: positions 0, 1, 2, …

        Args:
          x: [batch, length, hidden].
          forced: tap -> value to go on with in place of the layer's own.
        """
        given = {name: to_torch(value) for name, value in (forced or {}).items()}
        return {name: to_numpy(value) for name, value in self._run(to_torch(x), given).items()}

    @torch.no_grad()
    def _run(self, x: torch.Tensor, forced: Taps) -> Taps:
        seen: Taps = {}
        module = self._module(x.dtype)
        attn, mlp = module.self_attn, module.mlp
        parts = {
            "attn_norm": module.input_layernorm,
            "q": attn.q_proj,
            "k": attn.k_proj,
            "v": attn.v_proj,
            "attn_out": attn.o_proj,
            "mlp_norm": module.post_attention_layernorm,
            "mlp_out": mlp.experts,
        }
        for name, part in parts.items():
            part.register_forward_hook(_watch(seen, name, forced))
        mlp.router.register_forward_hook(_watch_router(seen, forced))
        positions = torch.arange(x.shape[1])[None]
        sliding = list(self.config.layer_types or [])[self.n] == "sliding_attention"
        make_mask = create_sliding_window_causal_mask if sliding else create_causal_mask
        mask = make_mask(config=self.config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions)
        with mock.patch.object(gpt_oss, "eager_attention_forward", _watch_attention(seen, forced)):
            out = module(x, attention_mask=mask, position_ids=positions, position_embeddings=self.rotary(x, positions))
        heads = {name: seen[name].unflatten(-1, (-1, self.config.head_dim)) for name in "qkv"}
        return seen | heads | {"mlp_out": seen["mlp_out"].reshape(x.shape), "layer_out": out}

    @torch.no_grad()
    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The experts alone, on a routing of one's own: x [tokens, hidden], choice and weights [tokens, k]."""
        rows = to_torch(x)
        return to_numpy(self._module(rows.dtype).mlp.experts(rows, to_torch(choice).long(), to_torch(weights)))

    def _module(self, dtype: torch.dtype) -> gpt_oss.GptOssDecoderLayer:
        with torch.device("meta"):
            module = gpt_oss.GptOssDecoderLayer(self.config, self.n)
        experts: Any = module.mlp.experts
        for name in _EXPERTS:  # not parameters: one expert at a time is brought to `dtype`, when it is asked for
            delattr(experts, name)
            setattr(experts, name, _Experts(self.decoded[f"mlp.experts.{name}"], dtype))
        others = {name: t.to(dtype) for name, t in self.decoded.items() if name.removeprefix("mlp.experts.") not in _EXPERTS}
        module.load_state_dict(others, assign=True)
        return module.eval()


# --- parameters -------------------------------------------------------------------------------------------------


def as_in_orbax(c: GptOssConfig, n: int, tensors: Taps) -> Iterator[tuple[str, torch.Tensor]]:
    """Layer n's state dict with the names and axes of an Orbax checkpoint of ours."""
    p = f"layers.{n}"
    yield f"{p}.attn.norm.scale", tensors["input_layernorm.weight"]
    yield f"{p}.attn.sinks", tensors["self_attn.sinks"]
    for name, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads), ("v", c.num_key_value_heads)):
        yield f"{p}.attn.{name}_proj.weight", tensors[f"self_attn.{name}_proj.weight"].view(heads, c.head_dim, -1)
        yield f"{p}.attn.{name}_proj.bias", tensors[f"self_attn.{name}_proj.bias"].view(heads, c.head_dim)
    yield f"{p}.attn.o_proj.weight", tensors["self_attn.o_proj.weight"].view(-1, c.num_attention_heads, c.head_dim)
    yield f"{p}.attn.o_proj.bias", tensors["self_attn.o_proj.bias"]
    yield f"{p}.mlp.norm.scale", tensors["post_attention_layernorm.weight"]
    yield f"{p}.mlp.router.weight", tensors["mlp.router.weight"]
    yield f"{p}.mlp.router.bias", tensors["mlp.router.bias"]
    yield f"{p}.mlp.gate_up.bias", _gate_and_up(tensors["mlp.experts.gate_up_proj_bias"])
    yield f"{p}.mlp.down.bias", tensors["mlp.experts.down_proj_bias"]
    if "mlp.experts.gate_up_proj_blocks" in tensors:
        for kind in ("blocks", "scales"):
            yield f"{p}.mlp.gate_up.{kind}", _gate_and_up(tensors[f"mlp.experts.gate_up_proj_{kind}"])
            yield f"{p}.mlp.down.{kind}", tensors[f"mlp.experts.down_proj_{kind}"]
    else:
        yield f"{p}.mlp.gate_up.weight", _gate_and_up(tensors["mlp.experts.gate_up_proj"].transpose(1, 2))
        yield f"{p}.mlp.down.weight", tensors["mlp.experts.down_proj"].transpose(1, 2)


def _gate_and_up(rows: torch.Tensor) -> torch.Tensor:
    """[experts, 2·intermediate, …] with gate and up in turn -> [experts, 2, intermediate, …]."""
    return rows.unflatten(1, (-1, 2)).transpose(1, 2)


class _Experts:
    """Stands where GptOssExperts has a parameter: `weights[e]` is expert e, [in, out], in the dtype computed in."""

    def __init__(self, values: torch.Tensor, dtype: torch.dtype):
        self.values, self.dtype = values, dtype

    def __getitem__(self, expert: torch.Tensor) -> torch.Tensor:
        one = self.values[expert].to(self.dtype)
        # transformers keeps [in, out] contiguous. In bfloat16 on a CPU that multiplies 40 times slower than the same
        # matrix seen through a transposition; in float32 it decides the last bit.
        return one if self.dtype == torch.bfloat16 else one.contiguous()


def _decode(stored: Taps) -> Taps:
    """The layer's state dict, packed experts decoded by transformers, one at a time to bound the memory.

    Experts are [experts, in, out] views of [experts, out, in] memory: see `_Experts`.
    """
    state = {name: t for name, t in stored.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (f"mlp.experts.{name}" for name in _EXPERTS):
        if f"{name}_blocks" in stored:
            blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
            values = torch.empty(*blocks.shape[:2], blocks.shape[2] * 32, dtype=torch.bfloat16)
            for e in range(len(blocks)):
                values[e] = convert_moe_packed_tensors(blocks[e : e + 1], scales[e : e + 1])[0].T
        else:
            values = state[name].transpose(1, 2).contiguous()
        state[name] = values.transpose(1, 2)
    return state


# --- NumPy at the border, and bits ------------------------------------------------------------------------------

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PIECE = 1 << 24  # values compared at a time: parameters are up to 4 GB


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == _BFLOAT16:
        return to_torch(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # torch has no read-only tensors


def to_numpy(t: torch.Tensor) -> np.ndarray:
    t = t.contiguous()
    return t.view(torch.int16).numpy().view(_BFLOAT16) if t.dtype == torch.bfloat16 else t.numpy()


def _expected(name: str, want: torch.Tensor) -> Expected:
    return Expected(name, tuple(want.shape), lambda got: _difference(want, got), lambda: to_numpy(want))


def _difference(want: torch.Tensor, got: np.ndarray) -> str:
    """How a stored parameter differs from the reference's, bit by bit; empty if it does not.

    bfloat16 against float32 is compared as float32, which holds every bfloat16 exactly.
    """
    differing, first, largest = 0, None, 0.0
    step = max(1, _PIECE * len(want) // want.numel())
    for start in range(0, len(want), step):
        a, b = want[start : start + step], to_torch(got[start : start + step])
        if a.dtype != b.dtype:
            a, b = a.float(), b.float()
        unequal = _bits(a) != _bits(b)
        if unequal.any():
            differing += int(unequal.sum())
            row, *rest = unequal.nonzero()[0].tolist()
            first = first or [start + row, *rest]
            largest = max(largest, float((a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max()))
    if not differing:
        return ""
    return f"{differing} of {want.numel()} values differ, first at {first}, by at most {largest:.3g}"


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


# --- a layer, watched and fed -----------------------------------------------------------------------------------


def _watch(seen: Taps, name: str, forced: Taps):
    """A forward hook: keeps the output, and puts the forced value in its place."""

    def hook(module, args, output: torch.Tensor) -> torch.Tensor | None:
        seen[name] = output
        return forced[name].reshape(output.shape).to(output.dtype) if name in forced else None

    return hook


def _watch_router(seen: Taps, forced: Taps):
    """The router's three outputs. On forced logits or experts it routes again, with its own code."""

    def hook(module, args, output):
        logits, weights, choice = output
        seen["router_logits"] = logits
        if "router_logits" in forced:
            logits = forced["router_logits"].to(logits.dtype)
            weights, choice = _route(module, logits)
        seen["expert_choice"] = choice
        if "expert_choice" in forced:
            chosen = forced["expert_choice"].long()
            weights, choice = _route(module, torch.full_like(logits, -1e30).scatter(1, chosen, logits.gather(1, chosen)))
        seen["expert_weights"] = weights
        return logits, forced.get("expert_weights", weights).to(logits.dtype), choice

    return hook


def _route(router: gpt_oss.GptOssTopKRouter, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' router from given logits on, as a router whose matrix is the identity: weights and choice."""
    same = gpt_oss.GptOssTopKRouter.__new__(gpt_oss.GptOssTopKRouter)
    torch.nn.Module.__init__(same)
    same.top_k, same.weight, same.bias = router.top_k, torch.eye(logits.shape[-1]).to(logits.dtype), None  # type: ignore
    _, weights, choice = same(logits)
    return weights, choice


def _watch_attention(seen: Taps, forced: Taps):
    """transformers' eager attention, its inputs (rotated q and k) and its output kept, and forced."""
    attend = gpt_oss.eager_attention_forward

    def attention(module, query, key, value, *args, **kwargs):
        seen["q_rope"], seen["k_rope"] = query.transpose(1, 2), key.transpose(1, 2)
        if "q_rope" in forced:
            query, key, value = (forced[name].to(query.dtype).transpose(1, 2) for name in ("q_rope", "k_rope", "v"))
        core, weights = attend(module, query, key, value, *args, **kwargs)
        seen["attn_core"] = core
        return forced.get("attn_core", core).to(core.dtype), weights

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
