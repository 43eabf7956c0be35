"""gpt-oss as equations, in NumPy: the whole model, one function a tap.

Each takes the taps before it, the parameters and the settings, and gives the tap:

    attn_norm(t, p, s) = t["x"] / rms(t["x"]) * p["attn.norm.scale"]

It is computed in the dtype of its taps, float64 unless one asks otherwise (`tap`). Nothing is shared with `oss_model`,
which is judged, nor with transformers, which judges: this is the third witness.

Taps `t`: those of `oss_model.taps`, [batch, length, ...], the router's [batch * length, ...]; before them `tokens` and
`positions`, int [batch, length], and `x`, a layer's input. Parameters `p`: as in an Orbax checkpoint of ours, those of a
layer without `layers.N.`; experts and the rows of lm_head are taken one by one, so that a mapping may read or decode
them as they are asked for. Settings `s`: names and values of `parity.configs`, and for a layer its `window`, which is
None where it sees everything (`of_layer`).

Sources: openai/gpt-oss, gpt_oss/torch/model.py; YaRN, https://arxiv.org/abs/2309.00071; OCP
Microscaling Formats (MX) 1.0, section 5.3.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = np.ndarray
Taps = Mapping[str, Array]
Values = Mapping[str, Any]  # of arrays, or of what gives one for each expert or run of rows
Settings = dict[str, Any]

# --- attention --------------------------------------------------------------------------------------------------


def attn_norm(t: Taps, p: Values, s: Settings) -> Array:
    return rms_norm(t["x"], p["attn.norm.scale"], s)


def q(t: Taps, p: Values, s: Settings) -> Array:
    return linear(t["attn_norm"], p["attn.q_proj.weight"], p["attn.q_proj.bias"])


def k(t: Taps, p: Values, s: Settings) -> Array:
    return linear(t["attn_norm"], p["attn.k_proj.weight"], p["attn.k_proj.bias"])


def v(t: Taps, p: Values, s: Settings) -> Array:
    return linear(t["attn_norm"], p["attn.v_proj.weight"], p["attn.v_proj.bias"])


def q_rope(t: Taps, p: Values, s: Settings) -> Array:
    return rotate(t["q"], *rope(t, p, s))


def k_rope(t: Taps, p: Values, s: Settings) -> Array:
    return rotate(t["k"], *rope(t, p, s))


def attn_core(t: Taps, p: Values, s: Settings) -> Array:
    scale = 1 / math.sqrt(t["q_rope"].shape[-1])
    return attend(t["q_rope"], t["k_rope"], t["v"], p["attn.sinks"], visible(t["positions"], s["window"]), scale)


def attn_out(t: Taps, p: Values, s: Settings) -> Array:
    flat = t["attn_core"].reshape(*t["attn_core"].shape[:2], -1)
    return linear(flat, p["attn.o_proj.weight"].reshape(-1, flat.shape[-1]), p["attn.o_proj.bias"])


# --- experts ----------------------------------------------------------------------------------------------------


def mlp_norm(t: Taps, p: Values, s: Settings) -> Array:
    return rms_norm(t["x"] + t["attn_out"], p["mlp.norm.scale"], s)


def router_logits(t: Taps, p: Values, s: Settings) -> Array:
    return linear(by_token(t["mlp_norm"]), p["mlp.router.weight"], p["mlp.router.bias"])


def expert_choice(t: Taps, p: Values, s: Settings) -> Array:
    """The highest logits first; of equal ones the expert of the lower number."""
    return np.argsort(-t["router_logits"], axis=-1, kind="stable")[:, : s["num_experts_per_tok"]]


def expert_weights(t: Taps, p: Values, s: Settings) -> Array:
    return softmax(np.take_along_axis(t["router_logits"], t["expert_choice"], axis=-1))


def mlp_out(t: Taps, p: Values, s: Settings) -> Array:
    return experts(by_token(t["mlp_norm"]), t["expert_choice"], t["expert_weights"], p, s).reshape(t["mlp_norm"].shape)


def layer_out(t: Taps, p: Values, s: Settings) -> Array:
    return t["x"] + t["attn_out"] + t["mlp_out"]


# --- before and after the layers --------------------------------------------------------------------------------


def embedding(t: Taps, p: Values, s: Settings) -> Array:
    return p["embedding.weight"][t["tokens"]]


def rope(t: Taps, p: Values, s: Settings) -> tuple[Array, Array]:
    """cos and sin, [..., head_dim / 2], of positions [...].

    Frequencies and angles are float32 by definition: at position 131,071 a float32 has an ulp of 0.0078, and the model
    was trained with it.
    """
    angle = t["positions"][..., None].astype(np.float32) * frequencies(s)
    turned = angle.astype(np.float64)
    return np.cos(turned) * concentration(s), np.sin(turned) * concentration(s)


def final_norm(t: Taps, p: Values, s: Settings) -> Array:
    return rms_norm(t["x"], p["norm.scale"], s)


def logits(t: Taps, p: Values, s: Settings) -> Array:
    """A run of rows at a time: the matrix of a published model is 4.6 GB in float64."""
    x, weight = t["final_norm"], p["lm_head.weight"]
    return np.concatenate([linear(x, weight[start : start + ROWS]) for start in range(0, len(weight), ROWS)], axis=-1)


# --- what they are made of --------------------------------------------------------------------------------------

ROWS = 8192


def rms_norm(x: Array, scale: Array, s: Settings) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + s["rms_norm_eps"]) * scale.astype(x.dtype)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """[..., in] times the transpose of [..., in]; heads stay apart."""
    y = np.tensordot(x, weight.astype(x.dtype), axes=(-1, -1))
    return y if bias is None else y + bias.astype(x.dtype)


def frequencies(s: Settings) -> Array:
    """float32 [head_dim / 2]: YaRN, where there is a factor."""
    half = s["head_dim"] // 2
    inverse = (1 / s["rope_theta"] ** (np.arange(half) / half)).astype(np.float32)
    if s["rope_factor"] == 1:
        return inverse
    low, high = (
        half * math.log(s["rope_original_max_position_embeddings"] / (turns * 2 * math.pi)) / math.log(s["rope_theta"])
        for turns in (s["rope_beta_fast"], s["rope_beta_slow"])
    )
    if s["rope_truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0, 1)
    return (inverse / s["rope_factor"] * ramp + inverse * (1 - ramp)).astype(np.float32)


def concentration(s: Settings) -> float:
    """What YaRN multiplies cos and sin by."""
    return 0.1 * math.log(s["rope_factor"]) + 1 if s["rope_factor"] > 1 else 1.0


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """The two halves of each head, [batch, length, heads, head_dim]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = (table.astype(x.dtype)[:, :, None] for table in (cos, sin))
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def visible(positions: Array, window: int | None) -> Array:
    """bool [batch, queries, keys]: those before a query, itself included, at most `window` of them."""
    behind = positions[:, :, None] - positions[:, None]
    return (behind >= 0) & (behind < (window or math.inf))


def attend(q: Array, k: Array, v: Array, sinks: Array, seen: Array, scale: float) -> Array:
    """Softmax over what is seen and a sink, which has no value. Query head h reads kv head h // (heads / kv)."""
    q, k, v = (np.moveaxis(a, 2, 1) for a in (q, *(np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))))
    scores = np.where(seen[:, None], q @ np.swapaxes(k, -1, -2) * scale, -np.inf)
    sink = sinks.astype(q.dtype)[None, :, None, None]
    most = np.maximum(scores.max(axis=-1, keepdims=True), sink)
    scores = np.exp(scores - most)
    return np.moveaxis(scores @ v / (scores.sum(axis=-1, keepdims=True) + np.exp(sink - most)), 1, 2)


def by_token(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def softmax(x: Array) -> Array:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def experts(x: Array, choice: Array, weights: Array, p: Values, s: Settings, glu: Callable | None = None) -> Array:
    """The weighted sum of the chosen experts: x [tokens, hidden], choice and weights [tokens, k] -> [tokens, hidden]."""
    total = np.zeros_like(x)
    for e in np.unique(choice):
        token, slot = np.nonzero(choice == e)
        both = linear(x[token], p["mlp.gate_up.weight"][e], p["mlp.gate_up.bias"][e])
        hidden = (glu or swiglu)(both[:, 0], both[:, 1], s)
        out = linear(hidden, p["mlp.down.weight"][e], p["mlp.down.bias"][e])
        total = add_rows(total, token, out * weights[token, slot, None])
    return total


def add_rows(total: Array, rows: Array, values: Array) -> Array:
    np.add.at(total, rows, values)
    return total


def swiglu(gate: Array, up: Array, s: Settings) -> Array:
    gate, up = np.minimum(gate, s["swiglu_limit"]), np.clip(up, -s["swiglu_limit"], s["swiglu_limit"])
    return (up + 1) * gate * sigmoid(s["swiglu_alpha"] * gate)


def sigmoid(x: Array) -> Array:
    """By way of tanh, which overflows nowhere."""
    return 0.5 * (1 + np.tanh(0.5 * x))


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def mxfp4(blocks: Array, scales: Array) -> Array:
    """uint8 [..., n, 16] and [..., n] -> bfloat16 [..., n * 32]: two codes a byte, the low one first, times 2^(scale - 127)."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], -1)
    values = np.ldexp(FP4[codes], scales[..., None].astype(np.int32) - 127)
    return values.reshape(*scales.shape[:-1], -1).astype(ml_dtypes.bfloat16)


RULES = ("best", "ocp", "ceil")


def quantized(values: Array, rule: str) -> Array:
    """What MXFP4 makes of values [..., n * 32], float64: each block's to the nearest code of its scale, ties to even.

    Rules for the scale's exponent, by the largest magnitude: "ocp" floor(log2) - 2 (section 6.3), "ceil" the smallest at which
    none is cut to 6, "best" that of "ocp" or the next, by the squared error of what bfloat16 keeps of the values.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, found {rule!r}")
    blocks = values.astype(np.float64).reshape(-1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    fraction, exponent = np.frexp(largest / 6 if rule == "ceil" else largest)  # largest: fraction * 2^exponent, 1/2 to 1
    exponent = exponent - (fraction == 0.5) if rule == "ceil" else exponent - 3
    exponent = np.clip(exponent, -127, 125)
    if rule == "best":
        kept = (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64).reshape(-1, 32)
        larger = np.minimum(exponent + 1, 125)
        errors = [((kept - _to_codes(kept, one)) / np.ldexp(1.0, exponent)) ** 2 for one in (exponent, larger)]
        less = np.rint((errors[1] - errors[0]) * 2**18).sum(-1, keepdims=True) < 0  # of integers, or of what is no different
        exponent = np.where(less, larger, exponent)
    return _to_codes(blocks, exponent).reshape(values.shape)


def _to_codes(x: Array, exponent: Array) -> Array:
    """To the nearest of 0, 1/2, 1, 3/2, 2, 3, 4, 6 times 2^exponent: every other one is even, as multiples of the step are."""
    unit = np.ldexp(1.0, exponent)
    scaled = np.abs(x / unit)
    step = np.where(scaled < 2, 0.5, np.where(scaled < 4, 1.0, 2.0))
    return np.copysign(np.minimum(np.rint(scaled / step) * step, 6) * unit, x)


# --- all of them ------------------------------------------------------------------------------------------------

Equation = Callable[[Taps, Values, Settings], Array]
LAYER: dict[str, Equation] = {
    one.__name__: one
    for one in (attn_norm, q, k, v, q_rope, k_rope, attn_core, attn_out, mlp_norm, router_logits, expert_choice,
                expert_weights, mlp_out, layer_out)
}  # fmt: skip
EQUATIONS: dict[str, Equation] = LAYER | {
    "embedding": embedding,
    "rope": lambda t, p, s: np.stack(rope(t, p, s)),
    "final_norm": final_norm,
    "logits": logits,
}


def of_layer(s: Settings, n: int) -> Settings:
    """The settings, with layer n's window."""
    return {**s, "window": s["sliding_window"] if s["layer_types"][n] == "sliding_attention" else None}


def tap(
    name: str, t: Taps, p: Values, s: Settings, dtype: npt.DTypeLike = np.float64, equation: Equation | None = None
) -> Array:
    """The tap `name`, of taps brought to `dtype`; by another equation where one is given.

    Raises:
      KeyError: of a parameter, a tap or a setting that is not there.
    """
    given = {key: value if value.dtype.kind in "iub" else value.astype(dtype) for key, value in t.items()}
    with np.errstate(all="ignore"):  # of a model gone wrong
        return (equation or EQUATIONS[name])(given, p, s)


def noise(name: str, t: Taps, p: Values, s: Settings) -> Array:
    """The tap in float32, with frequencies that a float32 pow may have rounded otherwise: against `tap`, what noise is."""
    return tap(name, t, p, {**s, "rope_theta": s["rope_theta"] * (1 + 5e-7)}, np.float32)
