"""Known mistakes, made in transformers' own layer: which one does what a port does?

Names are those of `parity.faults`. Nothing here is shared with the side that is judged; see `parity.reference`.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.nn.functional import gelu
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from parity.sides import Arrays
from parity.torch_layer import Taps, TorchLayer, gate_and_up, to_numpy, to_torch


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


# --- in a parameter ---------------------------------------------------------------------------------------------


def explain(
    reference: Any, n: int | None, name: str, want: torch.Tensor, got: torch.Tensor
) -> Iterator[tuple[str, float, float]]:
    """Which mistakes would explain that a parameter is not what it should be; see `parity.sides.Expected.suspects`.

    Args:
      reference: to look at other parameters.
      n: the layer; None outside the layers.
      name: as in an Orbax checkpoint of ours, without the layer.
      want, got: as it should be, and as it is.
    """
    if got.dtype not in _BITS or (got.dtype != want.dtype and torch.equal(got.to(want.dtype).to(got.dtype), got)):
        got = got.to(want.dtype)
    order, e = None, 0
    if name.startswith(("mlp.gate_up", "mlp.down")):
        order = _order(want, got)
        e = next(i for i in range(len(want)) if _share(want[i], got[i]) > 0)
        if order is not None:
            yield "experts-permuted", _share(want[e], got[e]), _share(want[order[e]], got[e])
        want, got = want[e : e + 1], got[e : e + 1]  # the rest is tried on one expert: a layer's are gigabytes
    before = _share(want, got)
    for fault, wrong in _suspects(reference, n, name, want, got, e):
        yield fault, before, _share(wrong, got)


_BITS = {torch.uint8: torch.uint8, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def _share(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of values that differ, in bits."""
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    kind = _BITS[a.dtype]
    return int(torch.count_nonzero(a.contiguous().view(kind) != b.contiguous().view(kind))) / a.numel()


def _suspects(
    reference: Any, n: int | None, name: str, want: torch.Tensor, got: torch.Tensor, e: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """What the parameter would be with each mistake that may have happened to it."""
    matrix, expert = want.dim() > 1, name.startswith(("mlp.gate_up", "mlp.down"))
    yield ("bias-dropped" if name.endswith("bias") else "weight-zeroed"), torch.zeros_like(want)
    if n is None:
        other = {"embedding.weight": "lm_head.weight", "lm_head.weight": "model.embed_tokens.weight"}
        if name in other:
            yield "embedding-lm-head-swapped", reference._model_tensor(other[name])
        if name == "embedding.weight":
            yield from (("embedding-rows-shifted", want.roll(by, 0)) for by in (1, -1))
        return
    layer = reference.parameter_of
    if name.endswith("norm.scale"):
        yield "norm-scales-swapped", layer(n, "mlp.norm.scale" if name == "attn.norm.scale" else "attn.norm.scale")
    if name == "attn.norm.scale":
        yield from (("layers-exchanged", layer(m, name)) for m in range(reference.sizes.layers) if m != n)
    if name == "attn.sinks":
        yield from (("sinks-shifted", want.roll(by)) for by in (1, -1))
    if want.dtype == torch.bfloat16:
        yield (
            "weight-bytes-swapped",
            want.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)).flip(-1).flatten(-2).view(want.dtype),
        )
        yield "weight-through-fp8", want.to(torch.float8_e4m3fn).to(want.dtype)
    if expert:
        yield from _expert_suspects(reference, n, name, want, e)
    elif name.startswith("attn.") and name.split(".")[1] in ("q_proj", "k_proj", "v_proj"):
        yield from _qkv_suspects(reference, n, name, want)
    if matrix:
        yield "weight-transposed", want.transpose(-1, -2).reshape(want.shape)
        yield from (("weight-rows-shifted", want.roll(by, -2)) for by in (1, -1))
        block = _one_block(want, got)
        if block is not None:
            yield "weight-one-block", block


def _one_block(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor | None:
    """`want` with one block of 32 as it is in `got`, if no other differs."""
    if want.shape[-1] % 32 or want.dtype != got.dtype:
        return None
    wrong = (want != got).reshape(-1, 32).any(-1).nonzero().flatten()
    if len(wrong) != 1:
        return None
    fixed = want.clone().contiguous()
    fixed.view(-1, 32)[wrong] = got.reshape(-1, 32)[wrong]
    return fixed


def _expert_suspects(reference: Any, n: int, name: str, want: torch.Tensor, e: int):
    """Of one expert, number e."""
    if name.startswith("mlp.gate_up"):
        yield "weight-gate-up-exchanged", want.flip(1)
        yield "weight-gate-up-halves", want.transpose(1, 2).reshape(want.shape)
    kind = name.rsplit(".", 1)[1]
    stored = {} if kind == "bias" else reference.stored_layer(n)
    prefix = f"mlp.experts.{'gate_up' if name.startswith('mlp.gate_up') else 'down'}_proj"
    if f"{prefix}_blocks" in stored:
        arrange = gate_and_up if name.startswith("mlp.gate_up") else lambda t: t
        one = [stored[f"{prefix}_{part}"][e : e + 1] for part in ("blocks", "scales")]
        if kind == "weight":
            yield "scale-linear", arrange(_scales_as_numbers(*one))
        for fault, change in _PACKED.items():
            blocks, scales = change(*one)
            if kind == "weight":
                yield fault, arrange(convert_moe_packed_tensors(blocks, scales).transpose(1, 2))
            else:
                yield fault, arrange({"blocks": blocks, "scales": scales}[kind])


def _order(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor | None:
    """Which expert of `want` stands at each place of `got`, by the first values; None if they are no permutation."""
    a, b = (t.flatten(1)[:, :4096].float() for t in (want, got))
    same = (a[None] == b[:, None]).all(-1)
    found = same.int().argmax(-1)
    wrong = bool((found == torch.arange(len(found))).all()) or len(set(found.tolist())) < len(found) or not same.any(-1).all()
    return None if wrong else found


def _qkv_suspects(reference: Any, n: int, name: str, want: torch.Tensor):
    _, projection, leaf = name.split(".")
    q, k, v = (reference.parameter_of(n, f"attn.{p}_proj.{leaf}") for p in "qkv")
    groups = len(q) // len(k)
    fused = torch.cat([q, k, v]).unflatten(0, (len(k), groups + 2))
    parts = {"q_proj": fused[:, :groups].flatten(0, 1), "k_proj": fused[:, groups], "v_proj": fused[:, groups + 1]}
    yield "qkv-split-by-group", parts[projection]
    if projection != "q_proj":
        yield "qkv-k-v-exchanged", v if projection == "k_proj" else k
    if projection != "v_proj":
        yield "q-k-for-neighbours", want.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _scales_as_numbers(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    codes = convert_moe_packed_tensors(blocks, torch.full_like(scales, 127)).transpose(1, 2)
    return (codes.float() * scales.float().repeat_interleave(32, dim=-1)).to(torch.bfloat16)


# mistakes in reading MXFP4: blocks and scales, changed before transformers decodes them
_PACKED: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "nibbles-swapped": lambda blocks, scales: ((blocks << 4) | (blocks >> 4), scales),
    "scale-off-by-one": lambda blocks, scales: (blocks, scales + 1),
    "scale-ignored": lambda blocks, scales: (blocks, torch.full_like(scales, 127)),
    "scales-shifted": lambda blocks, scales: (blocks, scales.roll(1, -1)),
    "sign-lost": lambda blocks, scales: (blocks & 0x77, scales),
    "minus-zero-lost": lambda blocks, scales: (_plus_zero(blocks & 0x0F) | (_plus_zero(blocks >> 4) << 4), scales),
}


def _plus_zero(code: torch.Tensor) -> torch.Tensor:
    return torch.where(code == 8, 0, code)
