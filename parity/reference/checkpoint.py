"""The reference: PyTorch, one layer at a time, transformers' own code from bytes to activations.

Nothing here is shared with the side that is judged: not the reader, not the layouts' table, not the MXFP4 decoder,
not the configuration. What transformers lacks (OpenAI's original layout) has its own small mapping below. One layer
at a time is bitwise equal to the whole model.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import GenerationConfig, GptOssConfig
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from parity.nudging import moved
from parity.prompts import Prompt
from parity.protocols import (
    Answers,
    Arrays,
    Asked,
    Expected,
    Moved,
    Port,
    Question,
    Settings,
    Sizes,
    SupportsReferenceGradients,
    Updates,
)
from parity.protocols import Taps as TapRows
from parity.reference import gradients
from parity.reference.bits import difference
from parity.reference.layer import Taps, TorchLayer, gate_and_up, to_numpy, to_torch

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
# Of a configuration, what has the same name there and in `parity.configs`.
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_experts_per_tok", "sliding_window", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip


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

    def __str__(self) -> str:
        return str(self.source)

    @property
    def sizes(self) -> Sizes:
        c = self.config
        window, positions = int(c.sliding_window or 0), c.max_position_embeddings
        return Sizes(c.num_hidden_layers, c.num_local_experts, c.vocab_size, window, positions)

    @property
    def settings(self) -> Settings:
        """As transformers understands config.json, its defaults where that is silent; see `parity.configs`."""
        return self._settings

    @functools.cached_property
    def _settings(self) -> Settings:
        c: Any = self.config
        rope = c.rope_parameters
        with torch.device("meta"):
            experts = gpt_oss.GptOssExperts(c)
        found = {name: getattr(c, name) for name in _SAME} | {
            "num_experts": c.num_local_experts,
            "layer_types": list(c.layer_types),
            "swiglu_alpha": float(experts.alpha),
            "swiglu_limit": float(experts.limit),
            "rope_theta": float(rope["rope_theta"]),
            "rope_factor": float(rope.get("factor", 1.0)),
            "rope_beta_fast": float(rope.get("beta_fast") or 32.0),
            "rope_beta_slow": float(rope.get("beta_slow") or 1.0),
            "rope_original_max_position_embeddings": rope.get("original_max_position_embeddings", c.max_position_embeddings),
            "rope_truncate": bool(rope.get("truncate", True)),
        }
        written = self.source / "generation_config.json"
        eos = GenerationConfig.from_pretrained(self.source).eos_token_id if written.exists() else c.eos_token_id
        if eos is not None and not self.original:
            found["eos_token_id"] = [eos] if isinstance(eos, int) else list(eos)
        return found

    prompt: Prompt | None = None

    @property
    def differentiates(self) -> SupportsReferenceGradients:
        return self

    def faults(self, port: Port, asked: Asked) -> list[str]:
        return []

    @property
    def rope_positions(self) -> np.ndarray:
        """Every position the model may see, not only the prompt's."""
        return np.arange(self.config.max_position_embeddings)

    # --- tensors, as transformers names and stores them --------------------------------------------------------

    def _get(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as f:
            return f.get_tensor(name)

    def _stored_name(self, name: str) -> str:
        """Of a tensor outside the layers."""
        return {hf: openai for openai, hf in _OPENAI_MODEL.items()}[name] if self.original else name

    def _model_tensor(self, name: str) -> torch.Tensor:
        return self._get(self._stored_name(name))

    def stored_layer(self, n: int) -> Taps:
        """Layer n's tensors as stored, named as in a Hugging Face checkpoint without the prefix."""
        if not self.original:
            prefix = f"model.layers.{n}."
            tensors = {name.removeprefix(prefix): self._get(name) for name in self._files if name.startswith(prefix)}
            # transformers 5.5.2 to 5.23 can write bfloat16 experts under the names of packed ones.
            return {
                name.removesuffix("_blocks") if t.dim() == 3 and t.is_floating_point() else name: t
                for name, t in tensors.items()
            }
        fused = (f"self_attn.{part}_proj.{leaf}" for part in "qkv" for leaf in ("weight", "bias"))
        return {name: self._original_tensor(n, name) for name in (*_OPENAI_LAYER.values(), *fused)}

    def _original_tensor(self, n: int, name: str) -> torch.Tensor:
        """A tensor of layer n of OpenAI's original, by transformers' name; q, k and v out of the fused one."""
        _, projection, *leaf = name.split(".")
        if projection not in ("q_proj", "k_proj", "v_proj"):
            theirs = {hf: openai for openai, hf in _OPENAI_LAYER.items()}
            return self._get(f"block.{n}.{theirs[name]}")
        q, kv = (self.config.head_dim * h for h in (self.config.num_attention_heads, self.config.num_key_value_heads))
        return self._get(f"block.{n}.attn.qkv.{leaf[0]}").split([q, kv, kv])["qkv".index(projection[0])]

    def outer_state(self) -> Taps:
        """What lies outside the layers, as stored, by transformers' names."""
        return {name: self._model_tensor(name) for name in _OPENAI_MODEL.values()}

    def first_parameters(self) -> Iterator[Expected]:
        """Parameters before the layers, as an Orbax checkpoint of ours names and lays them out."""
        yield self._outside("embedding.weight", "model.embed_tokens.weight")

    def last_parameters(self) -> Iterator[Expected]:
        """Parameters after the layers."""
        yield self._outside("norm.scale", "model.norm.weight")
        yield self._outside("lm_head.weight", "lm_head.weight")

    def elsewhere(self, n: int, name: str) -> Iterator[Expected]:
        """A parameter of layer n that is no expert's, in all other layers, one at a time."""
        read = self._original_tensor if self.original else lambda m, key: self._get(f"model.layers.{m}.{key}")
        for m in (m for m in range(self.sizes.layers) if m != n):
            tensors = as_in_orbax(self.config, m, _Lazily(lambda key, m=m: read(m, key)))
            yield _expected(*next(pair for pair in tensors if pair[0] == f"layers.{m}.{name}"))

    def _outside(self, name: str, theirs: str) -> Expected:
        """Read when it is asked for, and once."""
        read = functools.cache(lambda: self._model_tensor(theirs))
        with safe_open(self._files[self._stored_name(theirs)], framework="pt") as f:
            shape = tuple(f.get_slice(self._stored_name(theirs)).get_shape())
        return Expected(name, shape, lambda got: difference(read(), got), lambda: to_numpy(read()))

    # --- activations --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """int [batch, length] -> [batch, length, hidden] in `dtype`."""
        return to_numpy(self.lookup(torch.from_numpy(tokens)).to(getattr(torch, np.dtype(dtype).name)))

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(tokens.long(), self._model_tensor("model.embed_tokens.weight"))

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
        return {"final_norm": to_numpy(normed), "logits": to_numpy(self.project(given, "lm_head.weight"))}

    def project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x times the transpose of a tensor, a run of rows at a time: the whole matrix in float32 is 2.3 GB."""
        rows = self._model_tensor(name).split(16384)
        return torch.cat([torch.nn.functional.linear(x, some.to(x.dtype)) for some in rows], dim=-1)

    def gradients(self, tokens: np.ndarray) -> tuple[Arrays, list[np.ndarray]]:
        """Of every parameter as values, and the routing they are for: see `SupportsReferenceGradients`."""
        return gradients.gradients(self, tokens)

    def answers(self, question: Question) -> Answers:
        """What run forms are compared with, by transformers' whole model."""
        from parity.reference.whole import Whole

        return Whole(self.of(question.replica)).answer(question)

    def of(self, replica: Path | None) -> "Reference":
        return self if replica is None else Reference(replica)

    def updated(self, rows: list[np.ndarray], updates: Updates, alpha: float) -> list[np.ndarray] | None:
        from parity.reference.whole import Whole

        return Whole(self).updated(rows, updates, alpha)

    def twice(self, part: str, row: np.ndarray) -> Arrays:
        return gradients.gradients(self, row[None], part)[0]

    def moved(self, tokens: np.ndarray) -> Moved:
        return moved(self, [tokens])[0]

    def moved_gradients(self, tokens: np.ndarray) -> dict[str, float]:
        return gradients.moved(self, tokens)

    def taps(self, replica: Path | None, rows: list[np.ndarray]) -> Iterator[TapRows]:
        """Of each row run alone: see `parity.protocols.Oracle.taps`."""
        if replica is not None:
            yield from self.of(replica).taps(None, rows)
            return

        def named(n: int | None, runs: list[Arrays]) -> TapRows:
            pairs = list(zip(runs, rows, strict=True))
            return {(n, name): [run[name].reshape(len(row), -1) for run, row in pairs] for name in runs[0]}

        streams = [self.embed(row[None], np.dtype(np.float32)) for row in rows]
        yield named(None, [{"embedding": x} for x in streams])
        for n in range(self.sizes.layers):
            layer = self.layer(n)
            runs = [layer.run(x) for x in streams]
            streams = [run["layer_out"] for run in runs]
            yield named(n, runs)
        yield named(None, [self.unembed(x) for x in streams])

    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 frequencies [head_dim / 2] and cos, sin [positions, head_dim / 2]."""
        cos, sin = self.rotary(torch.zeros(1), torch.from_numpy(positions)[None])
        return self.rotary.inv_freq.numpy(), cos[0].numpy(), sin[0].numpy()


class _Lazily(dict):
    """Tensors that are read when they are asked for."""

    def __init__(self, read: Callable[[str], torch.Tensor]):
        self.read = read

    def __missing__(self, name: str) -> torch.Tensor:
        return self.read(name)


class ReferenceLayer(TorchLayer):
    """One decoder layer, with its parameters as a checkpoint of ours has them."""

    def __init__(self, reference: Reference, n: int):
        super().__init__(reference.config, reference.rotary, n, reference.stored_layer(n))
        self.reference = reference

    def parameters(self, packed: bool) -> Iterator[Expected]:
        """The layer's parameters as an Orbax checkpoint of ours names and lays them out; experts packed if asked."""
        # The packed bytes are read again where they are asked for, rather than kept beside the decoded ones.
        tensors = self.reference.stored_layer(self.n) if packed else self.decoded
        for name, tensor in as_in_orbax(self.config, self.n, tensors):
            yield _expected(name, tensor)


def _expected(name: str, tensor: torch.Tensor) -> Expected:
    value = lambda: to_numpy(tensor) if tensor.is_contiguous() else _Rows(tensor)  # noqa: E731
    return Expected(name, tuple(tensor.shape), lambda got: difference(tensor, got), value)


class _Rows:
    """A tensor whose first axis becomes NumPy's as it is asked for: experts lie otherwise in memory than they are named."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), to_numpy(tensor[:0]).dtype

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        return to_numpy(self.tensor[rows])


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
    yield f"{p}.mlp.gate_up.bias", gate_and_up(tensors["mlp.experts.gate_up_proj_bias"])
    yield f"{p}.mlp.down.bias", tensors["mlp.experts.down_proj_bias"]
    if "mlp.experts.gate_up_proj_blocks" in tensors:
        for kind in ("blocks", "scales"):
            yield f"{p}.mlp.gate_up.{kind}", gate_and_up(tensors[f"mlp.experts.gate_up_proj_{kind}"])
            yield f"{p}.mlp.down.{kind}", tensors[f"mlp.experts.down_proj_{kind}"]
    else:
        yield f"{p}.mlp.gate_up.weight", gate_and_up(tensors["mlp.experts.gate_up_proj"].transpose(1, 2))
        yield f"{p}.mlp.down.weight", tensors["mlp.experts.down_proj"].transpose(1, 2)


# --- OpenAI's configuration --------------------------------------------------------------------------------------


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
