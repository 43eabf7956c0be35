"""A mistake in the code is a wrong equation: what `parity.equations` says, with a setting, a parameter or a step changed.

Which mistake a port makes is found by computing each one's wrong tap from what the port was given, and looking which of
them is what the port computed. None of it needs the port's code, nor anybody else's.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from parity import equations as eq
from parity.equations import Array, Equation, Settings, Taps, Values


class Wrong(NamedTuple):
    """What is changed: settings, parameters, or the equation of the tap that shows it."""

    settings: Callable[[Settings], Settings] = lambda s: s
    values: Callable[[Values], Values] = lambda p: p
    equation: Equation | None = None

    def tap(self, name: str, t: Taps, p: Values, s: Settings, dtype: npt.DTypeLike = np.float64) -> Array:
        """`name` with this mistake, as `parity.equations.tap` gives it without."""
        return eq.tap(name, t, self.values(p), self.settings(s), dtype, self.equation)


# --- ways to be wrong -------------------------------------------------------------------------------------------


def setting(**changes: Any) -> Wrong:
    """Each a value, or a function of the right settings."""
    return Wrong(settings=lambda s: {**s, **{key: new(s) if callable(new) else new for key, new in changes.items()}})


def parameter(change: Callable[[Array], Array], *names: str) -> Wrong:
    return Wrong(values=lambda p: _Changed(p, {name: lambda name=name: change(p[name]) for name in names}))


def exchanged(*pairs: tuple[str, str]) -> Wrong:
    """Each parameter holds what the other should."""
    other = {**dict(pairs), **{b: a for a, b in pairs}}
    return Wrong(values=lambda p: _Changed(p, {name: lambda name=name: p[other[name]] for name in other}))


def tied(name: str, other: str) -> Wrong:
    return Wrong(values=lambda p: _Changed(p, {name: lambda: p[other]}))


class _Changed(Mapping[str, Any]):
    """The right values, but for those that are made when they are asked for."""

    def __init__(self, right: Values, made: dict[str, Callable[[], Any]]):
        self.right, self.made = right, made

    def __getitem__(self, name: str) -> Any:
        return self.made[name]() if name in self.made else self.right[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.right)

    def __len__(self) -> int:
        return len(self.right)


def equation(change: Equation) -> Wrong:
    return Wrong(equation=change)


def norm(compute: Callable[[Array, Array, Settings], Array]) -> Wrong:
    """attn_norm as `compute(x, scale, settings)`."""
    return equation(lambda t, p, s: compute(t["x"], p["attn.norm.scale"].astype(t["x"].dtype), s))


def mean_subtracted(x: Array, scale: Array, s: Settings) -> Array:
    return eq.rms_norm(x - x.mean(axis=-1, keepdims=True), scale, s)


def sum_of_squares(x: Array, scale: Array, s: Settings) -> Array:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + s["rms_norm_eps"]) * scale


def rotated(change: Callable[[Array, Array, Array], Array]) -> Wrong:
    """q_rope as `change(q, cos, sin)`."""
    return equation(lambda t, p, s: change(t["q"], *eq.rope(t, p, s)))


def neighbours(x: Array, cos: Array, sin: Array) -> Array:
    halves = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    return np.stack(np.split(eq.rotate(halves, cos, sin), 2, axis=-1), axis=-1).reshape(x.shape)


def half_of_head(x: Array, cos: Array, sin: Array) -> Array:
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    return np.concatenate([eq.rotate(x[..., :half], cos[..., :quarter], sin[..., :quarter]), x[..., half:]], axis=-1)


def one_late(t: Taps, p: Values, s: Settings) -> Array:
    return eq.q_rope({**t, "positions": t["positions"] + 1}, p, s)


def heads_normalised(x: Array, cos: Array, sin: Array) -> Array:
    return eq.rotate(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6), cos, sin)


def unconcentrated(t: Taps, p: Values, s: Settings) -> Array:
    cos, sin = eq.rope(t, p, s)
    return eq.rotate(t["k"], cos / eq.concentration(s), sin / eq.concentration(s))


def tables(change: Callable[[Array, Array, Settings], tuple[Array, Array]]) -> Wrong:
    """cos and sin as `change(cos, sin, settings)`."""
    return equation(lambda t, p, s: np.stack(change(*eq.rope(t, p, s), s)))


def interpolated(t: Taps, p: Values, s: Settings) -> Array:
    slow = eq.frequencies({**s, "rope_factor": 1.0}) / np.float32(s["rope_factor"])
    angle = (t["positions"][..., None].astype(np.float32) * slow).astype(np.float64)
    return np.stack([np.cos(angle), np.sin(angle)])


def attention(change: Callable[..., dict[str, Any]]) -> Wrong:
    """attn_core with what `change(settings, q=, k=, v=, sinks=, seen=, scale=)` puts in place of these."""

    def core(t: Taps, p: Values, s: Settings) -> Array:
        seen, scale = eq.visible(t["positions"], s["window"]), 1 / math.sqrt(s["head_dim"])
        given: dict[str, Any] = {
            "q": t["q_rope"],
            "k": t["k_rope"],
            "v": t["v"],
            "sinks": p["attn.sinks"],
            "seen": seen,
            "scale": scale,
        }
        return eq.attend(**(given | change(s, **given)))

    return equation(core)


def sinks(change: Callable[[Array, Settings], Array]) -> Wrong:
    return attention(lambda s, sinks, **others: {"sinks": change(sinks.astype(np.float64), s)})


def mask(see: Callable[[Array], Array]) -> Wrong:
    """By how far a key lies behind its query."""

    def core(t: Taps, p: Values, s: Settings) -> Array:
        seen = see(t["positions"][:, :, None] - t["positions"][:, None])
        return eq.attend(t["q_rope"], t["k_rope"], t["v"], p["attn.sinks"], seen, 1 / math.sqrt(s["head_dim"]))

    return equation(core)


def values_rotated(t: Taps, p: Values, s: Settings) -> Array:
    return eq.attn_core({**t, "v": eq.rotate(t["v"], *eq.rope(t, p, s))}, p, s)


def sees(see: Callable[[Array, Array, Settings], Array]) -> Wrong:
    """What a query sees besides or in place of the right keys: `see(queries, keys, settings)`, of positions."""

    def core(t: Taps, p: Values, s: Settings) -> Array:
        queries, keys = t["positions"][:, :, None], t["positions"][:, None]
        seen = see(queries, keys, s) & (keys <= queries)
        return eq.attend(t["q_rope"], t["k_rope"], t["v"], p["attn.sinks"], seen, 1 / math.sqrt(s["head_dim"]))

    return equation(core)


def tiled(s: Settings, q: Array, k: Array, v: Array, **others: Any) -> dict[str, Array]:
    copies = (1, 1, q.shape[2] // k.shape[2], 1)
    return {"k": np.tile(k, copies), "v": np.tile(v, copies)}


def kv_major(sinks: Array, s: Settings) -> Array:
    return sinks.reshape(s["num_key_value_heads"], -1).T.reshape(-1)


def heads_last(value: Array, axis: int) -> Array:
    """Rows meant as [head_dim, heads] at `axis`, read as [heads, head_dim]."""
    shape = value.shape
    return np.swapaxes(value.reshape(*shape[:axis], shape[axis + 1], shape[axis], *shape[axis + 2 :]), axis, axis + 1)


def chosen(choose: Callable[[Array, int], Array]) -> Wrong:
    """expert_choice as `choose(order, k)`, `order` being all experts, the best first."""

    def choice(t: Taps, p: Values, s: Settings) -> Array:
        return choose(eq.expert_choice(t, p, {**s, "num_experts_per_tok": s["num_experts"]}), s["num_experts_per_tok"])

    return equation(choice)


def weighed(weigh: Callable[[Array, Array], Array]) -> Wrong:
    """expert_weights as `weigh(logits, choice)`."""
    return equation(lambda t, p, s: weigh(t["router_logits"], t["expert_choice"]))


def of_choice(values: Array, choice: Array) -> Array:
    return np.take_along_axis(values, choice, axis=-1)


def glu(compute: Callable[[Array, Array, Settings], Array]) -> Wrong:
    """The experts' gate as `compute(gate, up, settings)`."""
    return summed(lambda add, x, choice, weights, p, s: eq.experts(x, choice, weights, p, s, glu=compute))


def halves(gate: Array, up: Array, s: Settings) -> Array:
    gate, up = np.split(np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1), 2, axis=-1)
    return eq.swiglu(gate, up, s)


def gelu(gate: Array, up: Array, s: Settings) -> Array:
    gate, up = np.minimum(gate, s["swiglu_limit"]), np.clip(up, -s["swiglu_limit"], s["swiglu_limit"])
    return (up + 1) * gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))).astype(gate.dtype)


def unclamped(gate: bool = False, up: bool = False) -> Wrong:
    def compute(g: Array, u: Array, s: Settings) -> Array:
        limit = s["swiglu_limit"]
        g, u = g if gate else np.minimum(g, limit), u if up else np.clip(u, -limit, limit)
        return eq.swiglu(g, u, {**s, "swiglu_limit": math.inf})

    return glu(compute)


def no_plus_one(gate: Array, up: Array, s: Settings) -> Array:
    gate, up = np.minimum(gate, s["swiglu_limit"]), np.clip(up, -s["swiglu_limit"], s["swiglu_limit"])
    return up * gate * eq.sigmoid(s["swiglu_alpha"] * gate)


def summed(compute: Callable[..., Array]) -> Wrong:
    """mlp_out as `compute(add, x, choice, weights, p, s)`, where `add(x, choice, weights)` is the right sum."""

    def out(t: Taps, p: Values, s: Settings) -> Array:
        x = eq.by_token(t["mlp_norm"])
        add = lambda x, choice, weights: eq.experts(x, choice, weights, p, s)  # noqa: E731
        return compute(add, x, t["expert_choice"], t["expert_weights"], p, s).reshape(t["mlp_norm"].shape)

    return equation(out)


def weights_before(add: Callable, x: Array, choice: Array, weights: Array, p: Values, s: Settings) -> Array:
    slots = [(choice[:, [slot]], weights[:, [slot]]) for slot in range(choice.shape[1])]
    return sum((add(x * weight, one, np.ones_like(weight)) for one, weight in slots), np.zeros_like(x))


def crowded_out(add: Callable, x: Array, choice: Array, weights: Array, p: Values, s: Settings) -> Array:
    """An expert takes the first of its tokens, as many as each would have if all had the same."""
    flat, room = choice.reshape(-1), -(-choice.size // s["num_experts"])
    before = np.cumsum(np.eye(s["num_experts"], dtype=int)[flat], axis=0)[np.arange(flat.size), flat]
    return add(x, choice, np.where((before > room).reshape(choice.shape), 0, weights))


def bias_unweighted(add: Callable, x: Array, choice: Array, weights: Array, p: Values, s: Settings) -> Array:
    bias = p["mlp.down.bias"].astype(x.dtype)[choice]
    return add(x, choice, weights) + ((1 - weights)[..., None] * bias).sum(axis=1)
