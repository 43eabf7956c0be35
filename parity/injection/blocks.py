"""Known mistakes put into the side that is judged: into our model's code and configuration. For `check-parity --self-test`.

Names are those of `parity.mistakes.catalogue`; what goes into files is in `parity.injection.files`. None of this runs in
a comparison.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from oss_model import Transformer, TransformerBlock, attention, expert_paths, layers, modeling


class Injection(NamedTuple):
    """A mistake: in one block once it is loaded, in code, in the configuration, or in the whole model once it is loaded."""

    block: Callable[[TransformerBlock], None] | None = None
    patch: tuple[Any, str, Callable[[Any], Any]] | None = None
    config: Callable[[Any], dict[str, Any]] | None = None
    model: Callable[[Transformer], None] | None = None

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            # Jitted, the sum over experts would remember what was right.
            add = getattr(expert_paths._add_expert, "__wrapped__", expert_paths._add_expert)
            stack.enter_context(mock.patch.object(expert_paths, "_add_expert", add))
            if self.patch is not None:
                owner, name, make = self.patch
                stack.enter_context(mock.patch.object(owner, name, make(owner.__dict__[name])))
            yield


# --- how a mistake is made --------------------------------------------------------------------------------------


def _find(block: TransformerBlock, path: str) -> tuple[Any, str]:
    *branches, leaf = path.split(".")
    node: Any = block
    for branch in branches:
        node = getattr(node, branch)
    return node, leaf


def _attribute(path: str, change: Callable[[Any, TransformerBlock], Any]) -> Injection:
    def apply(block: TransformerBlock) -> None:
        node, leaf = _find(block, path)
        setattr(node, leaf, change(getattr(node, leaf), block))

    return Injection(block=apply)


def _parameters(change: Callable[[jax.Array, Any], jax.Array], *paths: str) -> Injection:
    def apply(block: TransformerBlock) -> None:
        for path in paths:
            node, leaf = _find(block, path)
            variable = getattr(node, leaf)
            variable.set_value(change(variable[...], block.mlp.cfg))

    return Injection(block=apply)


def _zeroed(*paths: str) -> Injection:
    return _parameters(lambda value, cfg: jnp.zeros_like(value), *paths)


def _exchanged(*pairs: tuple[str, str]) -> Injection:
    def apply(block: TransformerBlock) -> None:
        for pair in pairs:
            a, b = (getattr(*_find(block, path)) for path in pair)
            first, second = a[...], b[...]
            a.set_value(second)
            b.set_value(first)

    return Injection(block=apply)


def _code(owner: Any, name: str, make: Callable[[Any], Any]) -> Injection:
    return Injection(patch=(owner, name, make))


def _config(**changes: Any) -> Injection:
    return Injection(config=lambda cfg: {name: v(cfg) if callable(v) else v for name, v in changes.items()})


def _norm(compute: Callable[[Any, jax.Array], jax.Array]) -> Injection:
    return _code(layers.RMSNorm, "__call__", lambda right: lambda self, x: compute(self, x))


def _rms(self: Any, x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale[...].astype(x.dtype)[None, None]


def _cast_first(self: Any, x: jax.Array) -> jax.Array:
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
    return f.astype(x.dtype) * self.scale[...].astype(x.dtype)[None, None]


def _attention(change: Callable[..., tuple]) -> Injection:
    """`change(q, k, v, sinks, visible)` gives what attention is computed from instead."""
    return _code(attention, "sink_attention", lambda right: lambda *given: right(*change(*given)))


def _sinks(change: Callable[[jax.Array, jax.Array], jax.Array]) -> Injection:
    return _attention(lambda q, k, v, sinks, visible: (q, k, v, change(sinks, k), visible))


def _visible(change: Callable[[Any, jax.Array, jax.Array, int | None], jax.Array]) -> Injection:
    return _code(attention, "visibility", lambda right: lambda queries, keys, window: change(right, queries, keys, window))


def _rotated(change: Callable[..., jax.Array]) -> Injection:
    return _code(modeling, "rotate", lambda right: lambda x, rope: change(right, x, rope))


def _neighbours(right, x, rope):
    cos, sin = (table[:, :, None] for table in rope)
    x1, x2 = x[..., ::2], x[..., 1::2]
    return jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(x.shape)


def _one_late(right, x, rope):
    """Turned by one position more: by the angles between the first two."""
    cos, sin = rope
    size = jnp.hypot(cos[:, :1], sin[:, :1])  # YaRN's concentration
    near, far = ((cos[:, n : n + 1] / size, sin[:, n : n + 1] / size) for n in (0, 1))
    step = near[0] * far[0] + near[1] * far[1], near[0] * far[1] - near[1] * far[0]
    return right(x, (cos * step[0] - sin * step[1], sin * step[0] + cos * step[1]))


def _half_of_head(right, x, rope):
    cos, sin = rope
    half = x.shape[-1] // 2
    turned = right(x[..., :half], (cos[..., : half // 2], sin[..., : half // 2]))
    return jnp.concatenate([turned, x[..., half:]], axis=-1)


def _tiled(q, k, v, sinks, visible):
    copies = q.shape[2] // k.shape[2]
    return q, jnp.tile(k, (1, 1, copies, 1)), jnp.tile(v, (1, 1, copies, 1)), sinks, visible


def _kv_major(sinks: jax.Array, k: jax.Array) -> jax.Array:
    return sinks.reshape(k.shape[2], -1).T.reshape(-1)


def _heads_last(value: jax.Array, first: int) -> jax.Array:
    """[heads, head_dim] at axis `first`, filled from rows meant as [head_dim, heads]."""
    heads, dim = value.shape[first : first + 2]
    flat = value.reshape(*value.shape[:first], dim, heads, *value.shape[first + 2 :])
    return jnp.swapaxes(flat, first, first + 1)


def _gate(compute: Callable[..., jax.Array]) -> Injection:
    return _code(expert_paths, "swiglu", lambda right: lambda gate, up, cfg: compute(right, gate, up, cfg))


def _glu(gate, up, alpha):
    return (up + 1) * gate * jax.nn.sigmoid(gate * alpha)


def _clip(up, cfg):
    return jnp.clip(up, -cfg.swiglu_limit, cfg.swiglu_limit)


def _halves(right, gate, up, cfg):
    both = jnp.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1)
    return right(*jnp.split(both, 2, axis=-1), cfg)


def _experts(compute: Callable[..., jax.Array]) -> Injection:
    """`compute(right, x, choice, weights, bias)`: `right(x, choice, weights)` is our own sum, bias that of down."""
    return _code(expert_paths, "PATHS", lambda right: {name: _path(compute, path) for name, path in right.items()})


def _path(compute, path):
    def experts(x, choice, weights, gate_up, down, cfg):
        return compute(lambda *args: path(*args, gate_up, down, cfg), x, choice, weights, down["bias"])

    return experts


def _weights_before(right, x, choice, weights, bias):
    total = jnp.zeros_like(x)
    for slot in range(choice.shape[1]):
        one = weights[:, slot : slot + 1]
        total += right(x * one, choice[:, slot : slot + 1], jnp.ones_like(one))
    return total


def _down_bias_unweighted(right, x, choice, weights, bias):
    return right(x, choice, weights) + jnp.sum((1 - weights)[..., None] * bias[choice].astype(x.dtype), axis=1)


def _weigh(compute: Callable[..., jax.Array]) -> Injection:
    return _code(
        modeling,
        "weigh",
        lambda right: lambda logits, choice: compute(logits, jnp.take_along_axis(logits, choice, axis=-1), choice),
    )


def _choose(compute: Callable[[jax.Array, int], jax.Array]) -> Injection:
    return _code(modeling, "choose", lambda right: lambda logits, k: compute(logits, k))


def _parallel(right):
    def block(self, x, at, rope, cache=None):
        after, cache = self.attn(x, at, rope, cache)
        return modeling.tap("layer_out", lambda: after + self.mlp(x) - x), cache

    return block


def _early_residual(right):
    def block(self, x, at, rope, cache=None):
        after, cache = self.attn(x, at, rope, cache)
        return modeling.tap("layer_out", lambda: x + self.mlp(after) - after), cache

    return block


def _only_q(right):
    turn = iter(range(1 << 30))  # q is rotated, then k
    return lambda x, rope: right(x, rope) if next(turn) % 2 == 0 else x


def _other_k(turned):
    """Of what is rotated, k alone otherwise: `turned(rope)` is what it is rotated by."""

    def make(right):
        turn = iter(range(1 << 30))
        return lambda x, rope: right(x, rope if next(turn) % 2 == 0 else turned(rope))

    return make


def _unconcentrated(rope):
    size = jnp.hypot(*rope)
    return rope[0] / size, rope[1] / size


def _normalised(right, x, rope):
    return right(x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6), rope)


def _within(change: Callable[..., tuple]) -> Injection:
    """Attention of what `change(x, rope, q, k, v, ...)` gives: x is the block's input."""

    def make(right):
        def block(self, x, at, rope, cache=None):
            attend = attention.sink_attention
            with mock.patch.object(attention, "sink_attention", lambda *given: attend(*change(x, rope, *given))):
                return right(self, x, at, rope, cache)

        return block

    return _code(modeling.AttentionBlock, "__call__", make)


def _chunked(right, queries, keys, window):
    return right(queries, keys, None) & (queries[:, :, None] // window == keys[:, None] // window)


def _first_kept(right, queries, keys, window):
    return right(queries, keys, window) | (right(queries, keys, None) & (keys < 4)[:, None])


def _crowded_out(right, x, choice, weights, bias):
    flat, room = choice.reshape(-1), -(-choice.size // bias.shape[0])
    before = jnp.take_along_axis(jnp.cumsum(jax.nn.one_hot(flat, bias.shape[0]), axis=0), flat[:, None], axis=1)
    return right(x, choice, jnp.where((before > room).reshape(choice.shape), 0, weights))


def _rotary(name: str, compute: Callable[[Any], Any]) -> Injection:
    return _code(layers.RotaryEmbedding, name, lambda right: property(compute))


def _interpolated(right):
    """Every frequency divided by the factor, and no concentration."""

    def tables(self, positions):
        cfg = self.cfg
        inv_freq = 1 / (cfg.rope_factor * cfg.rope_theta ** (np.arange(cfg.head_dim // 2) * 2 / cfg.head_dim))
        angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(inv_freq, jnp.float32)[None, None]
        return jnp.cos(angle).astype(cfg.dtype), jnp.sin(angle).astype(cfg.dtype)

    return tables


def _tied(model: Transformer) -> None:
    model.lm_head.weight.set_value(model.embedding.weight[...])


def _softcapped(right):
    return lambda self, x: 30 * jnp.tanh(right(self, x) / 30) if self.spec == "blh,vh->blv" else right(self, x)


def _renormalised(logits, chosen, choice):
    weights = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), choice, axis=-1)
    return weights / weights.sum(-1, keepdims=True)


def _rescaled(right):
    """A softmax without the sink, times what the sink leaves: sigmoid(log-sum-exp - sink)."""

    def attend(q, k, v, sinks, visible):
        groups = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(a, groups, axis=2) for a in (k, v))
        logits = jnp.einsum("blnd,bmnd->bnlm", q, k, precision="highest") * q.shape[-1] ** -0.5
        logits = jnp.where(visible[:, None], logits, -jnp.inf)
        left = jax.nn.sigmoid(jax.nn.logsumexp(logits, axis=-1) - sinks.astype(jnp.float32)[None, :, None])
        seen = visible.any(axis=-1)[:, None, :, None]  # padding sees nothing, and would become NaN
        weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, 0), axis=-1), 0)
        core = jnp.einsum("bnlm,bmnd->blnd", weights, v, precision="highest")
        return core * jnp.swapaxes(left, 1, 2)[..., None]

    return attend


def _finite_mask(right):
    """-1e9 where a key is masked: by way of keys that are not, since the mask is inside."""

    def attend(q, k, v, sinks, visible):
        groups = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(a, groups, axis=2) for a in (k, v))
        logits = jnp.einsum("blnd,bmnd->bnlm", q, k, precision="highest") * q.shape[-1] ** -0.5
        logits = jnp.where(visible[:, None], logits, -1e9)
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (*logits.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([logits, sink], axis=-1), axis=-1)[..., :-1]
        return jnp.einsum("bnlm,bmnd->blnd", weights, v, precision="highest")

    return attend


_SCALES = ("attn.norm.scale", "mlp.norm.scale")

INJECTIONS: dict[str, Injection] = {
    # Numerically equivalent: see `parity.mistakes.catalogue.EQUIVALENT`.
    "norm-cast-first": _norm(_cast_first),
    "router-softmax-renormalised": _weigh(_renormalised),
    "sinks-softmax-rescaled": _code(attention, "sink_attention", _rescaled),
    "mask-finite": _code(attention, "sink_attention", _finite_mask),
    "norm-eps": Injection(block=lambda block: [setattr(part.norm, "eps", 1e-6) for part in (block.attn, block.mlp)]),  # type: ignore
    "norm-one-plus-scale": _parameters(lambda v, cfg: v.astype(jnp.float32) + 1, *_SCALES),
    "norm-unscaled": _parameters(lambda v, cfg: jnp.ones_like(v), *_SCALES),
    "norm-mean-subtracted": _norm(lambda self, x: _rms(self, x - x.mean(-1, keepdims=True))),
    "norm-missing": _norm(lambda self, x: x),
    "norm-scales-exchanged": _exchanged(_SCALES),
    "norm-sum-of-squares": _norm(
        lambda self, x: (
            x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + self.eps) * self.scale[...].astype(x.dtype)[None, None]
        )
    ),
    "q-bias-missing": _zeroed("attn.q_proj.bias"),
    "k-bias-missing": _zeroed("attn.k_proj.bias"),
    "v-bias-missing": _zeroed("attn.v_proj.bias"),
    "k-v-exchanged": _exchanged(("attn.k_proj.weight", "attn.v_proj.weight"), ("attn.k_proj.bias", "attn.v_proj.bias")),
    "q-heads-transposed": _parameters(lambda v, cfg: _heads_last(v, 0), "attn.q_proj.weight", "attn.q_proj.bias"),
    "o-bias-missing": _zeroed("attn.o_proj.bias"),
    "o-heads-transposed": _parameters(lambda v, cfg: _heads_last(v, 1), "attn.o_proj.weight"),
    "rope-neighbours": _rotated(_neighbours),
    "rope-missing": _rotated(lambda right, x, rope: x),
    "rope-backwards": _rotated(lambda right, x, rope: right(x, (rope[0], -rope[1]))),
    "rope-half-of-head": _rotated(_half_of_head),
    "rope-not-on-k": _code(modeling, "rotate", _only_q),
    "rope-one-late": _rotated(_one_late),
    "heads-normalised": _rotated(_normalised),
    "yarn-concentration-not-on-k": _code(modeling, "rotate", _other_k(_unconcentrated)),
    "rope-on-values": _within(lambda x, rope, q, k, v, *rest: (q, k, layers.rotate(v, rope), *rest)),
    "attention-scale-hidden": _within(lambda x, rope, q, *rest: (q * (q.shape[-1] / x.shape[-1]) ** 0.5, *rest)),
    "window-chunked": _visible(_chunked),
    "window-and-first-tokens": _visible(_first_kept),
    "experts-full": _experts(_crowded_out),
    "yarn-truncated": _config(rope_truncate=True),
    "yarn-missing": _config(rope_factor=1.0),
    "yarn-linear": _code(layers.RotaryEmbedding, "__call__", _interpolated),
    "rope-theta": _config(rope_theta=1e4),
    "yarn-concentration-missing": _rotary("concentration", lambda self: 1.0),
    "yarn-original-length": _config(rope_original_max_position_embeddings=lambda cfg: cfg.max_position_embeddings),
    "yarn-betas-exchanged": _config(
        rope_beta_fast=lambda cfg: cfg.rope_beta_slow, rope_beta_slow=lambda cfg: cfg.rope_beta_fast
    ),
    "yarn-concentration-squared": _rotary("concentration", lambda self: (0.1 * math.log(self.cfg.rope_factor) + 1) ** 2),
    "window-one-long": _attribute("attn.window", lambda window, block: window + 1),
    "window-one-short": _attribute("attn.window", lambda window, block: window - 1),
    "window-half": _attribute("attn.window", lambda window, block: window // 2),
    "window-missing": _attribute("attn.window", lambda window, block: None),
    "window-on-full-layer": _attribute("attn.window", lambda window, block: block.mlp.cfg.sliding_window),
    "causal-mask-missing": _visible(lambda right, queries, keys, window: jnp.ones((*queries.shape, keys.shape[1]), bool)),
    "self-not-seen": _visible(
        lambda right, queries, keys, window: (queries[:, :, None] > keys[:, None]) & (keys >= 0)[:, None]
    ),
    "sinks-dropped": _sinks(lambda sinks, k: jnp.full_like(sinks, -1e30)),
    "sinks-zeroed": _sinks(lambda sinks, k: jnp.zeros_like(sinks)),
    "sinks-negated": _sinks(lambda sinks, k: -sinks),
    "sinks-head-order": _sinks(_kv_major),
    "sinks-scaled": _sinks(lambda sinks, k: sinks.astype(jnp.float32) * k.shape[-1] ** -0.5),
    "attention-unscaled": _attention(lambda q, *rest: (q * q.shape[-1] ** 0.5, *rest)),
    "attention-scale-head-dim": _attention(lambda q, *rest: (q * q.shape[-1] ** -0.5, *rest)),
    "kv-heads-tiled": _attention(_tiled),
    "attention-residual-missing": _code(
        modeling.AttentionBlock,
        "__call__",
        lambda right: lambda self, x, *rest: (lambda out, cache: (out - x, cache))(*right(self, x, *rest)),
    ),
    "block-parallel": _code(modeling.TransformerBlock, "__call__", _parallel),
    "router-bias-missing": _zeroed("mlp.router.bias"),
    "router-top-k-less": _choose(lambda logits, k: jax.lax.top_k(logits, k - 1)[1]),
    "router-top-k-more": _choose(lambda logits, k: jax.lax.top_k(logits, k + 1)[1]),
    "router-lowest": _choose(lambda logits, k: jax.lax.top_k(-logits, k)[1]),
    "router-softmax-over-all": _weigh(
        lambda logits, chosen, choice: jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), choice, axis=-1)
    ),
    "router-sigmoid": _weigh(lambda logits, chosen, choice: jax.nn.sigmoid(chosen)),
    "router-uniform": _weigh(lambda logits, chosen, choice: jnp.full_like(chosen, 1 / chosen.shape[-1])),
    "router-weights-reversed": _weigh(lambda logits, chosen, choice: jax.nn.softmax(chosen, axis=-1)[:, ::-1]),
    "gate-up-exchanged": _gate(lambda right, gate, up, cfg: right(up, gate, cfg)),
    "gate-up-halves": _gate(_halves),
    "swiglu-alpha-rounded": _gate(lambda right, gate, up, cfg: _glu(jnp.minimum(gate, cfg.swiglu_limit), _clip(up, cfg), 1.7)),
    "swiglu-alpha-one": _gate(lambda right, gate, up, cfg: _glu(jnp.minimum(gate, cfg.swiglu_limit), _clip(up, cfg), 1.0)),
    "swiglu-no-plus-one": _gate(
        lambda right, gate, up, cfg: _glu(jnp.minimum(gate, cfg.swiglu_limit), _clip(up, cfg) - 1, cfg.swiglu_alpha)
    ),
    "swiglu-no-clamp": _gate(lambda right, gate, up, cfg: _glu(gate, up, cfg.swiglu_alpha)),
    "swiglu-up-unclamped": _gate(lambda right, gate, up, cfg: _glu(jnp.minimum(gate, cfg.swiglu_limit), up, cfg.swiglu_alpha)),
    "swiglu-gate-unclamped": _gate(lambda right, gate, up, cfg: _glu(gate, _clip(up, cfg), cfg.swiglu_alpha)),
    "swiglu-limit-ten": _gate(
        lambda right, gate, up, cfg: _glu(jnp.minimum(gate, 10.0), jnp.clip(up, -10.0, 10.0), cfg.swiglu_alpha)
    ),
    "swiglu-gelu": _gate(
        lambda right, gate, up, cfg: (_clip(up, cfg) + 1) * jax.nn.gelu(jnp.minimum(gate, cfg.swiglu_limit), approximate=False)
    ),
    "gate-up-bias-missing": _zeroed("mlp.gate_up.bias"),
    "down-bias-missing": _zeroed("mlp.down.bias"),
    "down-bias-unweighted": _experts(_down_bias_unweighted),
    "weights-before-experts": _experts(_weights_before),
    "weights-ignored": _experts(lambda right, x, choice, weights, bias: right(x, choice, jnp.ones_like(weights))),
    "weights-averaged": _experts(lambda right, x, choice, weights, bias: right(x, choice, weights) / choice.shape[1]),
    "experts-off-by-one": _experts(lambda right, x, choice, weights, bias: right(x, (choice + 1) % bias.shape[0], weights)),
    "mlp-residual-missing": _code(modeling.MLPBlock, "__call__", lambda right: lambda self, x: right(self, x) - x),
    "mlp-residual-early": _code(modeling.TransformerBlock, "__call__", _early_residual),
    "embedding-scaled": _code(
        layers.Embedding, "__call__", lambda right: lambda self, tokens: right(self, tokens) * self.weight.shape[1] ** 0.5
    ),
    "embedding-one-off": _code(
        layers.Embedding, "__call__", lambda right: lambda self, tokens: right(self, (tokens + 1) % self.weight.shape[0])
    ),
    "final-norm-missing": _norm(lambda self, x: x),
    "final-norm-one-plus-scale": _norm(
        lambda self, x: (
            _rms(self, x) / self.scale[...].astype(x.dtype)[None, None] * (self.scale[...].astype(x.dtype) + 1)[None, None]
        )
    ),
    "final-norm-unscaled": _norm(lambda self, x: _rms(self, x) / self.scale[...].astype(x.dtype)[None, None]),
    "lm-head-tied": Injection(model=_tied),
    "logits-softcapped": _code(layers.Linear, "__call__", _softcapped),
}
