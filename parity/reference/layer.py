"""One layer of the reference: transformers' own decoder layer, watched and fed at every tap.

Nothing here is shared with the side that is judged; see `parity.reference`.
"""

from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from parity.protocols import Arrays

Taps = dict[str, torch.Tensor]

_EXPERTS = ("gate_up_proj", "down_proj")
_ROWS = 1 << 16  # of 32 values, decoded at a time: in cache, a quarter faster than an expert at once
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class TorchLayer:
    """One decoder layer. MXFP4 is decoded once, for the weights and for every run in whichever dtype."""

    def __init__(self, config: GptOssConfig, rotary: gpt_oss.GptOssRotaryEmbedding, n: int, stored: Taps):
        self.n, self.config, self.rotary = n, config, rotary
        self.decoded = decode(stored)

    def run(self, x: np.ndarray, forced: Arrays | None = None, until: str | None = None) -> Arrays:
        """Every tap of the layer, in the dtype of x. Prompts are whole: positions 0, 1, 2, …

        Args:
          x: [batch, length, hidden].
          forced: tap -> value to go on with in place of the layer's own.
          until: a tap; nothing after it is computed.
        """
        given = {name: to_torch(value) for name, value in (forced or {}).items()}
        return {name: to_numpy(value) for name, value in self._run(to_torch(x), given, until).items()}

    @torch.no_grad()
    def _run(self, x: torch.Tensor, forced: Taps, until: str | None) -> Taps:
        seen = _Seen(until)
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
        mlp.router.register_forward_hook(watch_router(seen, forced))
        positions = torch.arange(x.shape[1])[None]
        sliding = list(self.config.layer_types or [])[self.n] == "sliding_attention"
        make_mask = create_sliding_window_causal_mask if sliding else create_causal_mask
        # By place, without an attention mask and a cache: the latter's keyword is another one from transformers 5.24 on.
        mask = make_mask(self.config, x, None, None, positions)
        try:
            with mock.patch.object(gpt_oss, "eager_attention_forward", _watch_attention(seen, forced)):
                out = module(x, attention_mask=mask, position_ids=positions, position_embeddings=self.rotary(x, positions))
        except _EnoughError:
            return seen
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


class _EnoughError(Exception):
    pass


class _Seen(Taps):
    """Taps, up to one that stops the forward pass."""

    def __init__(self, until: str | None):
        self.until = until

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        super().__setitem__(name, value)
        if name == self.until:
            raise _EnoughError


class _Experts:
    """Stands where GptOssExperts has a parameter: `weights[e]` is expert e, [in, out], in the dtype computed in."""

    def __init__(self, values: torch.Tensor, dtype: torch.dtype):
        self.values, self.dtype = values, dtype

    def __getitem__(self, expert: torch.Tensor) -> torch.Tensor:
        one = self.values[expert].to(self.dtype)
        # [in, out] contiguous, as transformers keeps it: in float32 that decides the last bit. In bfloat16 on a CPU it
        # multiplies 40 times slower than the same matrix seen through a transposition.
        return one.T.contiguous().T if self.dtype == torch.bfloat16 else one


def decode(stored: Taps) -> Taps:
    """The layer's state dict, packed experts decoded by transformers, one at a time to bound the memory."""
    state = {name: t for name, t in stored.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (f"mlp.experts.{name}" for name in _EXPERTS):
        if f"{name}_blocks" in stored:
            blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
            state[name] = torch.empty(len(blocks), blocks.shape[2] * 32, blocks.shape[1], dtype=torch.bfloat16)
            for e in range(len(blocks)):
                one = convert_moe_packed_tensors(blocks[e : e + 1], scales[e : e + 1], rows_per_chunk=_ROWS)
                state[name][e] = one[0]
    return state


# --- layouts ----------------------------------------------------------------------------------------------------


def gate_and_up(rows: torch.Tensor) -> torch.Tensor:
    """[experts, 2·intermediate, …] with gate and up in turn -> [experts, 2, intermediate, …]."""
    return rows.unflatten(1, (-1, 2)).transpose(1, 2)


# --- NumPy at the border ---------------------------------------------------------------------------------------


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == _BFLOAT16:
        return to_torch(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # torch has no read-only tensors


def to_numpy(t: torch.Tensor) -> np.ndarray:
    t = t.contiguous()
    return t.view(torch.int16).numpy().view(_BFLOAT16) if t.dtype == torch.bfloat16 else t.numpy()


# --- a layer, watched and fed -----------------------------------------------------------------------------------


def _watch(seen: Taps, name: str, forced: Taps):
    """A forward hook: keeps the output, and puts the forced value in its place."""

    def hook(module, args, output: torch.Tensor) -> torch.Tensor | None:
        seen[name] = output
        return forced[name].reshape(output.shape).to(output.dtype) if name in forced else None

    return hook


def watch_router(seen: Taps, forced: Taps):
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
