"""Known mistakes, made in transformers' own layer: which one does what a port does?

Names are those of `parity.faults`. Nothing here is shared with the side that is judged; see `parity.reference`.
"""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.nn.functional import gelu
from transformers import GptOssConfig
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from parity.sides import Arrays
from parity.torch_layer import Taps, TorchLayer, to_numpy, to_torch


class Trial(NamedTuple):
    """A mistake: in the configuration, in a layer's tensors, or in code, as an attribute put in another's place."""

    config: Callable[[GptOssConfig], None] | None = None
    state: Callable[[Taps, GptOssConfig], Taps] | None = None
    patch: tuple[Any, str, Callable[[Any], Any]] | None = None

    def patched(self) -> contextlib.AbstractContextManager:
        if self.patch is None:
            return contextlib.nullcontext()
        owner, name, make = self.patch
        return mock.patch.object(owner, name, make(getattr(owner, name)))


def run_with(fault: str, layer: TorchLayer, x: np.ndarray, forced: Arrays, tap: str) -> np.ndarray | None:
    """What `tap` of the layer is with this mistake in it, everything before it forced; None if it has no trial."""
    if fault not in TRIALS:
        return None
    trial, wrong = TRIALS[fault], copy.copy(layer)
    if trial.config is not None:
        wrong.config = copy.deepcopy(layer.config)
        trial.config(wrong.config)
        wrong.rotary = gpt_oss.GptOssRotaryEmbedding(wrong.config)
    if trial.state is not None:
        wrong.decoded = layer.decoded | trial.state(layer.decoded, layer.config)
    # The reference's own choice, found again from its logits: forced, it would hide weights made before the choice.
    given = {name: value for name, value in forced.items() if name != "expert_choice" or tap == "mlp_out"}
    with trial.patched():
        return wrong.run(x, given, until=tap)[tap]


def rope_with(fault: str, config: GptOssConfig, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin with this mistake in the configuration."""
    wrong, trial = copy.deepcopy(config), TRIALS[fault]
    if trial.config is not None:
        trial.config(wrong)
    with trial.patched():
        cos, sin = gpt_oss.GptOssRotaryEmbedding(wrong)(torch.zeros(1), torch.from_numpy(positions)[None])
    return cos[0].numpy(), sin[0].numpy()


# --- how a mistake is made --------------------------------------------------------------------------------------


def _set(**values: Any) -> Trial:
    return Trial(config=lambda c: [setattr(c, name, value(c) if callable(value) else value) for name, value in values.items()])  # type: ignore


def _rope(**values: Any) -> Trial:
    def change(c: GptOssConfig) -> None:
        c.rope_parameters = dict(c.rope_parameters) | {k: v(c) if callable(v) else v for k, v in values.items()}  # type: ignore

    return Trial(config=change)


def _tensors(change: Callable[[torch.Tensor, GptOssConfig], torch.Tensor], *names: str) -> Trial:
    return Trial(state=lambda state, c: {name: change(state[name], c) for name in names})


def _zeroed(*names: str) -> Trial:
    return _tensors(lambda t, c: torch.zeros_like(t), *names)


def _exchanged(a: str, b: str) -> Trial:
    return Trial(state=lambda state, c: {a: state[b], b: state[a]})


def _code(owner: Any, name: str, make: Callable[[Any], Any]) -> Trial:
    return Trial(patch=(owner, name, make))


def _norm(compute: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]) -> Trial:
    return _code(gpt_oss.GptOssRMSNorm, "forward", lambda right: lambda self, x: compute(x, self.weight, self.variance_epsilon))


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rotary(rotate: Callable[..., torch.Tensor]) -> Trial:
    return _code(gpt_oss, "_apply_rotary_emb", lambda right: lambda x, cos, sin: rotate(right, x, cos, sin))


def _neighbours(right, x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _half_rotated(right, x, cos, sin):
    half = x.shape[-1] // 2
    return torch.cat([right(x[..., :half], cos[..., : half // 2], sin[..., : half // 2]), x[..., half:]], dim=-1)


def _only_q(right):
    return lambda q, k, cos, sin, unsqueeze_dim=1: (right(q, k, cos, sin, unsqueeze_dim)[0], k)


def _attention(change: Callable[[dict[str, Any]], None]) -> Trial:
    """`change` gets the arguments of eager_attention_forward, sinks as one of them, by name."""

    def make(right):
        def attend(module, query, key, value, attention_mask, scaling, **kwargs):
            given = {"query": query, "key": key, "value": value, "mask": attention_mask, "scaling": scaling}
            given |= {"sinks": module.sinks, "config": module.config, "groups": module.num_key_value_groups}
            change(given)
            other = copy.copy(module)
            other._parameters = dict(module._parameters) | {"sinks": torch.nn.Parameter(given["sinks"])}
            other.num_key_value_groups = given["groups"]
            query, key, value = given["query"], given["key"], given["value"]
            return right(other, query, key, value, given["mask"], given["scaling"], **kwargs)

        return attend

    return _code(gpt_oss, "eager_attention_forward", make)


def _mask(visible: Callable[[torch.Tensor], torch.Tensor]) -> Trial:
    """`visible` tells from how far a key lies behind its query whether it is seen."""

    def change(given: dict[str, Any]) -> None:
        place = torch.arange(given["query"].shape[2])
        seen = visible(place[:, None] - place[None])
        given["mask"] = torch.where(seen, 0.0, torch.finfo(given["query"].dtype).min)[None, None].to(given["query"].dtype)

    return _attention(change)


def _windowed(given: dict[str, Any]) -> None:
    length, window = given["query"].shape[2], given["config"].sliding_window
    behind = torch.arange(length)[:, None] - torch.arange(length)[None]
    given["mask"] = given["mask"].masked_fill(behind >= window, torch.finfo(given["query"].dtype).min)


def _given(name: str, change: Callable[[dict[str, Any]], Any]) -> Trial:
    return _attention(lambda given: given.__setitem__(name, change(given)))


def _tiled(given: dict[str, Any]) -> None:
    """Query head h reads key-value head h % kv."""
    for name in ("key", "value"):
        given[name] = given[name].repeat(1, given["groups"], 1, 1)
    given["groups"] = 1


def _kv_major(sinks: torch.Tensor, c: GptOssConfig) -> torch.Tensor:
    return sinks.view(c.num_key_value_heads, -1).T.reshape(-1)


def _heads_last(weight: torch.Tensor, heads: int, axis: int) -> torch.Tensor:
    """Rows (or columns) meant as [heads, head_dim], read as [head_dim, heads]."""
    return weight.unflatten(axis, (-1, heads)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def _gate(compute: Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]) -> Trial:
    """`compute` gets gate and up, unclamped, alpha and the limit."""
    return _code(
        gpt_oss.GptOssExperts,
        "_apply_gate",
        lambda right: lambda self, both: compute(both[..., ::2], both[..., 1::2], self.alpha, self.limit),
    )


def _glu(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(gate * alpha)


def _no_plus_one(gate, up, alpha, limit):
    gate = gate.clamp(max=limit)
    return up.clamp(-limit, limit) * gate * torch.sigmoid(gate * alpha)


def _halves(gate, up, alpha, limit):
    both = torch.stack([gate, up], dim=-1).flatten(-2)
    gate, up = both.chunk(2, dim=-1)
    return _glu(gate, up, alpha, limit)


def _experts(compute: Callable[..., torch.Tensor]) -> Trial:
    """`compute(right, experts, x, choice, weights)`: `right` is transformers' own sum."""
    return _code(
        gpt_oss.GptOssExperts,
        "forward",
        lambda right: (
            lambda self, x, router_indices=None, routing_weights=None: compute(
                lambda *args: right(self, *args), self, x, router_indices, routing_weights
            )
        ),
    )


def _bias_of(experts, choice):
    return experts.down_proj_bias[choice].to(torch.float32)


def _weights_before(right, experts, x, choice, weights):
    """The expert's input is weighed, not its output."""
    total = torch.zeros_like(x)
    for slot in range(choice.shape[1]):
        one = weights[:, slot : slot + 1]
        total += right(x * one, choice[:, slot : slot + 1], torch.ones_like(one))
    return total


def _router(compute: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]) -> Trial:
    """`compute(logits, k)` gives weights and choice."""

    def make(right):
        def forward(self, x):
            logits = torch.nn.functional.linear(x, self.weight, self.bias)
            weights, choice = compute(logits, self.top_k)
            return logits, weights, choice

        return forward

    return _code(gpt_oss.GptOssTopKRouter, "forward", make)


def _weighed(weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Trial:
    def compute(logits, k):
        choice = logits.topk(k, dim=-1)[1]
        return weigh(logits, choice), choice

    return _router(compute)


def _block(forward: Callable[..., torch.Tensor]) -> Trial:
    """The wiring of a block: `forward(x, attention, norm, mlp)`."""

    def make(right):
        def run(self, hidden_states, **kwargs):
            kwargs.pop("attention_mask_dict", None)

            def attention(x):
                return self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]

            return forward(hidden_states, attention, self.post_attention_layernorm, lambda y: self.mlp(y)[0])

        return run

    return _code(gpt_oss.GptOssDecoderLayer, "forward", make)


def _without_first_residual(x, attention, norm, mlp):
    a = attention(x)
    return a + mlp(norm(a))


def _parallel(x, attention, norm, mlp):
    a = attention(x)
    return x + a + mlp(norm(x))


def _without_second_residual(x, attention, norm, mlp):
    return mlp(norm(x + attention(x)))


def _early_residual(x, attention, norm, mlp):
    return x + mlp(norm(x + attention(x)))


_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

TRIALS: dict[str, Trial] = {
    "norm-eps": _set(rms_norm_eps=1e-6),
    "norm-one-plus-scale": _tensors(lambda t, c: t.float() + 1, *_NORMS),
    "norm-unscaled": _tensors(lambda t, c: torch.ones_like(t), *_NORMS),
    "norm-mean-subtracted": _norm(lambda x, w, eps: w * _rms(x - x.mean(-1, keepdim=True), eps)),
    "norm-missing": _norm(lambda x, w, eps: x),
    "norm-scales-exchanged": _exchanged(*_NORMS),
    "norm-sum-of-squares": _norm(lambda x, w, eps: w * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps)),
    "q-bias-missing": _zeroed("self_attn.q_proj.bias"),
    "k-bias-missing": _zeroed("self_attn.k_proj.bias"),
    "v-bias-missing": _zeroed("self_attn.v_proj.bias"),
    "k-v-exchanged": Trial(
        state=lambda state, c: {
            f"self_attn.{a}_proj.{leaf}": state[f"self_attn.{b}_proj.{leaf}"]
            for a, b in ("kv", "vk")
            for leaf in ("weight", "bias")
        }
    ),
    "q-heads-transposed": _tensors(
        lambda t, c: _heads_last(t, c.num_attention_heads, 0), "self_attn.q_proj.weight", "self_attn.q_proj.bias"
    ),
    "o-bias-missing": _zeroed("self_attn.o_proj.bias"),
    "o-heads-transposed": _tensors(lambda t, c: _heads_last(t, c.num_attention_heads, 1), "self_attn.o_proj.weight"),
    "rope-neighbours": _rotary(_neighbours),
    "rope-missing": _rotary(lambda right, x, cos, sin: x),
    "rope-backwards": _rotary(lambda right, x, cos, sin: right(x, cos, -sin)),
    "rope-half-of-head": _rotary(_half_rotated),
    "rope-not-on-k": _code(gpt_oss, "apply_rotary_pos_emb", _only_q),
    "rope-one-late": _code(
        gpt_oss.GptOssRotaryEmbedding, "forward", lambda right: lambda self, x, positions: right(self, x, positions + 1)
    ),
    "yarn-truncated": _rope(truncate=True),
    "yarn-missing": _rope(rope_type="default"),
    "yarn-linear": _rope(rope_type="linear"),
    "rope-theta": _rope(rope_theta=1e4),
    "yarn-concentration-missing": _rope(attention_factor=1.0),
    "yarn-original-length": _rope(original_max_position_embeddings=lambda c: c.max_position_embeddings),
    "yarn-betas-exchanged": _rope(
        beta_fast=lambda c: c.rope_parameters.get("beta_slow", 1.0),
        beta_slow=lambda c: c.rope_parameters.get("beta_fast", 32.0),
    ),
    "yarn-concentration-squared": _rope(attention_factor=lambda c: (0.1 * math.log(c.rope_parameters["factor"]) + 1) ** 2),
    "window-one-long": _set(sliding_window=lambda c: c.sliding_window + 1),
    "window-one-short": _set(sliding_window=lambda c: c.sliding_window - 1),
    "window-half": _set(sliding_window=lambda c: c.sliding_window // 2),
    "window-missing": _mask(lambda behind: behind >= 0),
    "window-on-full-layer": _attention(_windowed),
    "causal-mask-missing": _mask(lambda behind: behind == behind),
    "self-not-seen": _mask(lambda behind: behind > 0),
    "sinks-dropped": _given("sinks", lambda given: torch.full_like(given["sinks"], -1e30)),
    "sinks-zeroed": _given("sinks", lambda given: torch.zeros_like(given["sinks"])),
    "sinks-negated": _given("sinks", lambda given: -given["sinks"]),
    "sinks-head-order": _given("sinks", lambda given: _kv_major(given["sinks"], given["config"])),
    "sinks-scaled": _given("sinks", lambda given: given["sinks"] * given["scaling"]),
    "attention-unscaled": _given("scaling", lambda given: 1.0),
    "attention-scale-head-dim": _given("scaling", lambda given: given["scaling"] ** 2),
    "kv-heads-tiled": _attention(_tiled),
    "attention-residual-missing": _block(_without_first_residual),
    "block-parallel": _block(_parallel),
    "router-bias-missing": _zeroed("mlp.router.bias"),
    "router-top-k-less": _set(num_experts_per_tok=lambda c: c.num_experts_per_tok - 1),
    "router-top-k-more": _set(num_experts_per_tok=lambda c: c.num_experts_per_tok + 1),
    "router-lowest": _router(lambda logits, k: (logits.topk(k).values.softmax(-1), (-logits).topk(k)[1])),
    "router-softmax-over-all": _weighed(lambda logits, choice: logits.softmax(-1).gather(1, choice)),
    "router-sigmoid": _weighed(lambda logits, choice: logits.gather(1, choice).sigmoid()),
    "router-uniform": _weighed(lambda logits, choice: torch.full(choice.shape, 1 / choice.shape[1])),
    "router-weights-reversed": _weighed(lambda logits, choice: logits.gather(1, choice).softmax(-1).flip(-1)),
    "gate-up-exchanged": _gate(lambda gate, up, alpha, limit: _glu(up, gate, alpha, limit)),
    "gate-up-halves": _gate(_halves),
    "swiglu-alpha-one": _gate(lambda gate, up, alpha, limit: _glu(gate, up, 1.0, limit)),
    "swiglu-no-plus-one": _gate(_no_plus_one),
    "swiglu-no-clamp": _gate(lambda gate, up, alpha, limit: _glu(gate, up, alpha, math.inf)),
    "swiglu-up-unclamped": _gate(lambda gate, up, alpha, limit: _glu(gate.clamp(max=limit), up, alpha, math.inf)),
    "swiglu-gate-unclamped": _gate(lambda gate, up, alpha, limit: _glu(gate, up.clamp(-limit, limit), alpha, math.inf)),
    "swiglu-limit-ten": _gate(lambda gate, up, alpha, limit: _glu(gate, up, alpha, 10.0)),
    "swiglu-gelu": _gate(lambda gate, up, alpha, limit: (up.clamp(-limit, limit) + 1) * gelu(gate.clamp(max=limit))),
    "gate-up-bias-missing": _zeroed("mlp.experts.gate_up_proj_bias"),
    "down-bias-missing": _zeroed("mlp.experts.down_proj_bias"),
    "down-bias-unweighted": _experts(
        lambda right, self, x, choice, weights: (
            right(x, choice, weights) + ((1 - weights)[..., None] * _bias_of(self, choice)).sum(1)
        )
    ),
    "weights-before-experts": _experts(_weights_before),
    "weights-ignored": _experts(lambda right, self, x, choice, weights: right(x, choice, torch.ones_like(weights))),
    "weights-averaged": _experts(lambda right, self, x, choice, weights: right(x, choice, weights) / choice.shape[1]),
    "experts-off-by-one": _experts(lambda right, self, x, choice, weights: right(x, (choice + 1) % self.num_experts, weights)),
    "mlp-residual-missing": _block(_without_second_residual),
    "mlp-residual-early": _block(_early_residual),
}


# --- outside the layers -----------------------------------------------------------------------------------------


def _scaled_norm(reference: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    norm = gpt_oss.GptOssRMSNorm(reference.config.hidden_size, reference.config.rms_norm_eps)
    norm.weight.data = change(reference._model_tensor("model.norm.weight").float())
    return norm


# fault -> what (reference, input of the tap) becomes; the embedding's input is tokens.
MODEL_TRIALS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "embedding-scaled": lambda reference, tokens: reference.lookup(tokens).float() * reference.config.hidden_size**0.5,
    "embedding-one-off": lambda reference, tokens: reference.lookup((tokens + 1) % reference.config.vocab_size).float(),
    "final-norm-missing": lambda reference, x: x,
    "final-norm-one-plus-scale": lambda reference, x: _scaled_norm(reference, lambda scale: scale + 1)(x),
    "final-norm-unscaled": lambda reference, x: _scaled_norm(reference, torch.ones_like)(x),
    "lm-head-tied": lambda reference, x: reference.project(x, "model.embed_tokens.weight"),
    "logits-softcapped": lambda reference, x: 30 * torch.tanh(reference.project(x, "lm_head.weight") / 30),
}


@torch.no_grad()
def model_with(fault: str, reference: Any, given: np.ndarray) -> np.ndarray:
    """What lies outside the layers with this mistake, of a tap's own input; see `parity.sides.Oracle.run_with`."""
    if fault not in MODEL_TRIALS:
        return np.stack(rope_with(fault, reference.config, given))
    return to_numpy(MODEL_TRIALS[fault](reference, to_torch(given)))
