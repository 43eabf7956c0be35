"""Known mistakes of how the model is put together, loaded, compiled, cached and trained: put into our code, for the self-test.

A plain call shows some of these at its taps. The others are wrong only where the model is compiled, cached, cut over a mesh,
trained or made to generate, so it has to be run so (`parity.forms`). Each row says what is patched, and which of the forms must
find it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from oss_model import (
    Transformer,
    TransformerBlock,
    attention,
    cache,
    expert_paths,
    experts,
    generation,
    layers,
    modeling,
    params,
    scanned,
    taps,
)

Make = Callable[[Any], Any]


class RunInjection(NamedTuple):
    """
    Attributes:
      where: the part of the house: "model", "loading", "rows", "jit", "path", "mesh", "cache", "generate", "LoRA", "remat".
      says: what is done wrong.
      patches: (owner, attribute, what becomes of it).
      forms: forms that must find it; the first is of the default ones, where one of them can.
      named: what it must be called (`parity.mistakes.run_catalogue`, or the catalogue).
      place: (layer, tap) where the first form must be said to part from the reference; None where it gives no logits.
      equivalent: why it changes nothing; empty if it does. Those must pass.
    """

    where: str
    says: str
    patches: tuple[tuple[Any, str, Make], ...]
    forms: tuple[str, ...]
    place: tuple[int | None, str] | None = None
    named: str = ""
    equivalent: str = ""

    @contextlib.contextmanager
    def injected(self) -> Iterator[None]:
        """What was compiled before is forgotten, and so is what was compiled with the mistake."""
        jax.clear_caches()
        with contextlib.ExitStack() as stack:
            for owner, name, make in self.patches:
                stack.enter_context(mock.patch.object(owner, name, make(owner.__dict__[name])))
            yield
        jax.clear_caches()


def _loaded(change: Callable[[TransformerBlock], None]) -> tuple[tuple[Any, str, Make], ...]:
    """In each block that was just loaded, from either kind of checkpoint."""

    def make(right):
        def load(self, parts, nbytes=None):
            right(self, parts, nbytes)
            for module in parts.values():
                if isinstance(module, TransformerBlock):
                    change(module)

        return load

    return ((params.Loader, "load", make),)


def _without_sinks(block: TransformerBlock) -> None:
    block.attn.sinks.set_value(jnp.zeros_like(block.attn.sinks[...]))


def _without_window(block: TransformerBlock) -> None:
    block.attn.window = None


def _skipping(right):
    def rematerialized(module, again):
        if isinstance(module, TransformerBlock) and taps._layer.get() == LAST:
            return lambda x, positions, rope, cache: (x, cache)
        return right(module, again)

    return rematerialized


LAST = 4  # of the small model


def _exchanged(right):
    def stream(self, *given, **named):
        layers = self.layers
        self.layers = nnx.List([layers[1], layers[0], *layers[2:]])
        try:
            return right(self, *given, **named)
        finally:
            self.layers = layers

    return stream


def _before(right):
    def call(self, *given, **named):
        out = right(self, *given, **named)
        return jnp.roll(out, 1, axis=1) if not isinstance(out, tuple) else (jnp.roll(out[0], 1, axis=1), out[1])

    return call


def _attention(change: Callable[..., jax.Array]) -> tuple[tuple[Any, str, Make], ...]:
    return ((attention, "sink_attention", lambda right: lambda *given: change(right, *given)),)


def _first_rows_keys(right, q, k, v, sinks, visible):
    return right(q, jnp.broadcast_to(k[:1], k.shape), v, sinks, visible)


def _nan_where_nothing_is_seen(right, q, k, v, sinks, visible):
    out = right(q, k, v, sinks, visible)
    return jnp.where(visible.any(-1)[..., None, None], out, jnp.nan)


def _seen_padding(right):
    return lambda queries, keys, window: right(queries, jnp.abs(keys), window)


def _forgetting(right):
    def visibility(queries, keys, window):
        seen = right(queries, keys, window)
        cached = keys.shape[1] != queries.shape[1]
        return seen & (queries[:, :, None] - keys[:, None, :] < 32) if cached else seen

    return visibility


def _store(change: Callable[..., Any]) -> tuple[tuple[Any, str, Make], ...]:
    return ((cache.LayerCache, "store", lambda right: lambda self, *new: change(right, self, *new)),)


def _keeping_the_first(right, self, keys, values, positions):
    size = self.positions.shape[1]
    if positions.shape[1] > size:
        start = jnp.argmax(positions >= 0, axis=1)[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        columns = jnp.minimum(start, positions.shape[1] - 1)
        positions = jnp.take_along_axis(positions, columns, axis=1)
        keys, values = (jnp.take_along_axis(a, columns[..., None, None], axis=1) for a in (keys, values))
    return right(self, keys, values, positions)


def _nothing_of_a_prefill(right, self, keys, values, positions):
    after = right(self, keys, values, positions)
    return self._replace(positions=after.positions) if positions.shape[1] > 1 else after


def _alone(right):
    def followed_by(self, keys, values, positions):
        if positions.shape[1] == 1:
            return right(self, keys, values, positions)
        return cache.LayerCache(keys.astype(self.keys.dtype), values.astype(self.values.dtype), positions)

    return followed_by


def _compiled_only(right, q, *rest):
    return right(q, *rest) * jnp.asarray(1.01 if isinstance(q, Tracer) else 1, q.dtype)


def _other_than_compiled(right):
    """Of an update: twice as much where it is merged, which is not compiled."""

    def stored(self):
        found = right(self)
        return found if isinstance(self.a[...], Tracer) else {name: value * 2 for name, value in found.items()}

    return stored


def _left_out(right):
    return lambda self: {name: jnp.zeros_like(value) for name, value in right(self).items()}


def _of_the_longest(positions: jax.Array) -> jax.Array:
    return jnp.broadcast_to(positions.max(axis=0, keepdims=True), positions.shape)


def _attending_otherwise(right):
    def walk(self, *given):
        attend = attention.sink_attention
        with mock.patch.object(attention, "sink_attention", lambda q, *rest: attend(q, *rest) * jnp.asarray(1.01, q.dtype)):
            return right(self, *given)

    return walk


def _slot_off(right, self, keys, values, positions):
    after = right(self, keys, values, positions)
    return after._replace(values=jnp.roll(after.values, 1, axis=1)) if positions.shape[1] > 1 else after


def _rotated_more(right):
    """By the turn from the place before the last to the last."""

    def tap(name, compute, *inputs):
        if name != "q_rope":
            return right(name, compute, *inputs)
        x, (cos, sin) = inputs
        (c0, c1), (s0, s1), size = cos[1, -2:], sin[1, -2:], cos[1, 0] ** 2 + sin[1, 0] ** 2
        turned, lifted = ((c1 * c0 + s1 * s0) / size)[None], ((s1 * c0 - c1 * s0) / size)[None]
        rope = cos.at[1].set(cos[1] * turned - sin[1] * lifted), sin.at[1].set(sin[1] * turned + cos[1] * lifted)
        return right(name, compute, x, rope)

    return tap


def _one_short(right, self, *new):
    """In a ring; a cache of everything has more slots than the small model's window."""
    if self.positions.shape[1] != WINDOW:
        return right(self, *new)
    after = right(cache.LayerCache(*(a[:, :-1] for a in self)), *new)
    return cache.LayerCache(*(jnp.concatenate([a, old[:, -1:]], axis=1) for a, old in zip(after, self, strict=True)))


WINDOW = 11  # of the small model


def _rotated_slots(right, self, *new):
    after = right(cache.LayerCache(*(jnp.roll(a, -3, axis=1) for a in self)), *new)
    return cache.LayerCache(*(jnp.roll(a, 3, axis=1) for a in after))


def _from_one(right):
    def place(self, shape, positions, cache, segment_ids):
        at = right(self, shape, positions, cache, segment_ids)
        return at._replace(positions=jnp.where(at.positions >= 0, at.positions + 1, at.positions))

    return place


def _looked_at_first(right):
    return lambda self, *new: (self.followed_by(*new), self.store(*new))


def _path(name: str) -> tuple[tuple[Any, str, Make], ...]:
    def make(right):
        return right | {name: lambda x, *rest: right[name](x, *rest) * jnp.asarray(1.01, x.dtype).astype(jnp.float32)}

    return ((expert_paths, "PATHS", make),)


def _twice(right):
    def rematerialized(module, again):
        once = right(module, again)
        if not again:
            return once
        if isinstance(module, TransformerBlock):
            return lambda x, *rest: once(once(x, *rest)[0], *rest)
        return lambda x: once(once(x))

    return rematerialized


ANY = ("jit", "eager", "packed", "cache", "mesh fsdp × tensor")
CACHED = ("cache", "cache, padding on the right", "cache, in pieces", "cache, token by token")

RUN_INJECTIONS: dict[str, RunInjection] = {
    "last-layer-skipped": RunInjection(
        "model",
        "the last layer is not run",
        ((modeling, "rematerialized", _skipping),),
        (*ANY, "generate"),
        (LAST, "attn_norm"),
        named="layer-not-run",
    ),
    "layers-run-in-another-order": RunInjection(
        "model",
        "two layers run in each other's place",
        ((Transformer, "stream", _exchanged),),
        ANY,
        (0, "attn_norm"),
        named="layers-in-another-order",
    ),
    "embedding-scaled-in-embed": RunInjection(
        "model",
        "the embedding is multiplied before the first layer",
        ((Transformer, "embed", lambda right: lambda self, tokens: right(self, tokens) * 2),),
        ANY,
        (0, "mlp_norm"),
        named="stream-scaled",
    ),
    "logits-of-the-token-before": RunInjection(
        "model",
        "the logits are those of the token before",
        ((Transformer, "__call__", _before),),
        ANY,
        (None, "returned"),
        named="logits-of-a-neighbour",
    ),
    "sinks-lost-in-loading": RunInjection(
        "loading", "sinks are zero once loaded", _loaded(_without_sinks), ANY, (0, "attn_core"), named="lost-in-loading"
    ),
    "windows-lost-in-loading": RunInjection(
        "loading",
        "no layer has its window once loaded",
        _loaded(_without_window),
        ANY,
        (0, "attn_core"),
        named="window-missing",
    ),
    "rows-see-the-first": RunInjection(
        "rows", "other rows see the first one's keys", _attention(_first_rows_keys), ANY, (0, "attn_core")
    ),
    "rows-rotated-one-more": RunInjection(
        "rows",
        "queries of the second row are rotated one place more than its keys",
        ((modeling, "tap", _rotated_more),),
        ANY[:2],
        (0, "q_rope"),
        named="rows-rotated-apart",
    ),
    "padding-seen": RunInjection(
        "rows", "queries see padding", ((attention, "visibility", _seen_padding),), ANY, (0, "attn_core")
    ),
    "padding-is-nan": RunInjection(
        "rows",
        "a query that sees nothing becomes NaN, and its value reaches others",
        _attention(_nan_where_nothing_is_seen),
        ANY,
        (1, "attn_core"),
    ),
    "jit-only": RunInjection(
        "jit",
        "wrong only where it is compiled",
        _attention(_compiled_only),
        ("jit", "packed", "cache"),
        (0, "attn_core"),
        named="wrong-when-compiled",
    ),
    "scan-wrong": RunInjection(
        "path", "the path scan is wrong", _path("scan"), ("path scan",), (0, "mlp_out"), named="wrong-on-a-path"
    ),
    "grouped-wrong": RunInjection(
        "path", "the path grouped is wrong", _path("grouped"), ("jit", "path grouped"), (0, "mlp_out"), named="wrong-on-a-path"
    ),
    "pairs-wrong": RunInjection(
        "path", "the path pairs is wrong", _path("pairs"), ("path pairs",), (0, "mlp_out"), named="wrong-on-a-path"
    ),
    "ragged-wrong": RunInjection(
        "path", "the path ragged is wrong", _path("ragged"), ("path ragged",), (0, "mlp_out"), named="wrong-on-a-path"
    ),
    "packed-wrong": RunInjection(
        "path",
        "wrong only where experts are decoded as they are used",
        ((expert_paths, "dequantize", lambda right: lambda *given: right(*given) * jnp.asarray(1.01, given[-1])),),
        ("packed",),
        (0, "mlp_out"),
        named="wrong-when-packed",
    ),
    "scanned-wrong": RunInjection(
        "model",
        "wrong only where layers are one loop: attention",
        ((scanned.ScannedTransformer, "walk", _attending_otherwise),),
        ("scanned",),
        (0, "attn_core"),
        named="wrong-when-scanned",
    ),
    "scanned-stream-doubled": RunInjection(
        "model",
        "wrong only where layers are one loop: the stream is twice what it should be",
        ((scanned.ScannedTransformer, "walk", lambda right: lambda self, x, *rest: right(self, x * 2, *rest)),),
        ("scanned",),
        (0, "mlp_norm"),
        named="stream-scaled",
    ),
    "blocks-wrong": RunInjection(
        "path",
        "attention is wrong where it is computed in blocks",
        ((attention, "in_blocks", lambda right: lambda q, *rest: right(q, *rest) * jnp.asarray(1.01, q.dtype)),),
        ("attention in blocks", "cache, in blocks"),
        (0, "attn_core"),
        named="wrong-in-blocks",
    ),
    "mesh-wrong": RunInjection(
        "mesh",
        "the sum over a mesh is wrong",
        ((experts, "add_up_on_mesh", lambda right: lambda x, *rest: right(x, *rest) * jnp.asarray(1.01, x.dtype)),),
        ("mesh fsdp × tensor", "mesh fsdp", "mesh tensor", "mesh expert"),
        (0, "mlp_out"),
        named="wrong-on-a-mesh",
    ),
    "padding-stored": RunInjection(
        "cache",
        "padding is stored like a token",
        _store(lambda right, self, k, v, at: right(self, k, v, jnp.where(at < 0, at % self.positions.shape[1], at))),
        ("cache", "cache, padding on the right"),
        (0, "q_rope"),
    ),
    "values-a-slot-off": RunInjection(
        "cache", "values lie a slot off their keys", _store(_slot_off), CACHED[:3], (0, "attn_core")
    ),
    "ring-keeps-the-first": RunInjection(
        "cache",
        "a prompt longer than the ring leaves its first keys there",
        _store(_keeping_the_first),
        CACHED[:2],
        (0, "attn_core"),
    ),
    "ring-one-slot-short": RunInjection(
        "cache", "a ring has a slot less than the window", _store(_one_short), CACHED[:2], (0, "attn_core")
    ),
    "prefill-not-stored": RunInjection(
        "cache",
        "a prefill stores nothing",
        _store(_nothing_of_a_prefill),
        ("cache", "generate"),
        (0, "attn_core"),
    ),
    "pieces-do-not-see-the-cache": RunInjection(
        "cache",
        "a later piece of a prompt does not see the cache",
        ((cache.LayerCache, "followed_by", _alone),),
        ("cache, in pieces",),
        (0, "attn_core"),
    ),
    "keys-lost-past-32": RunInjection(
        "cache",
        "keys more than 32 places back are lost",
        ((attention, "visibility", _forgetting),),
        ("generate",),
        (1, "attn_core"),
        named="keys-lost",
    ),
    "next-position-one-too-many": RunInjection(
        "cache",
        "the next token is placed one too far",
        ((modeling, "next_positions", lambda right: lambda cache, length: right(cache, length) + 1),),
        ("cache", "generate"),
        (0, "q_rope"),
    ),
    "padding-counted": RunInjection(
        "cache",
        "every row's next token is placed where the longest row's is",
        ((modeling, "next_positions", lambda right: lambda *given: _of_the_longest(right(*given))),),
        ("cache",),
        (0, "q_rope"),
    ),
    "generate-takes-the-worst": RunInjection(
        "generate",
        "the least likely token is taken",
        ((generation, "_choose", lambda right: lambda logits, *how: right(-logits, *how)),),
        ("generate",),
    ),
    "generate-ignores-eos": RunInjection(
        "generate",
        "a text does not end where it should",
        ((generation, "_generate", lambda right: lambda *given: right(*given[:5], jnp.zeros(0, jnp.int32), *given[6:])),),
        ("generate, eos",),
    ),
    "lora-scale-ignored": RunInjection(
        "LoRA",
        "updates are not scaled by alpha / rank",
        ((layers.LowRank, "stored", lambda right: lambda self: {"lora_a": self.a[...], "lora_b": self.b[...]}),),
        ("lora",),
        named="lora-scale",
    ),
    "lora-not-applied": RunInjection(
        "LoRA", "updates are left out", ((layers.LowRank, "stored", _left_out),), ("lora", "lora merged")
    ),
    "lora-merged-twice": RunInjection(
        "LoRA",
        "what is merged is several times what is computed beside the weight",
        ((layers.LowRank, "stored", _other_than_compiled),),
        ("lora merged",),
        named="lora-merged-otherwise",
    ),
    "remat-applies-a-block-twice": RunInjection(
        "remat",
        "a block is applied twice where it is computed again",
        ((modeling, "rematerialized", _twice),),
        ("remat block",),
        named="block-applied-twice",
    ),
    "remat-applies-experts-twice": RunInjection(
        "remat",
        "experts are applied twice where they are computed again",
        ((modeling, "rematerialized", _twice),),
        ("remat mlp",),
        named="experts-applied-twice",
    ),
}

EQUIVALENT_RUNS: dict[str, RunInjection] = {
    "positions-from-1": RunInjection(
        "model",
        "positions count from 1",
        ((Transformer, "place", _from_one),),
        ("jit", "eager", "mesh fsdp × tensor"),
        equivalent="a rotation tells how far two tokens are apart, and that is the same; the tap q_rope is another, and named",
    ),
    "slots-rotated": RunInjection(
        "cache",
        "slots of the cache lie three places on",
        _store(_rotated_slots),
        CACHED,
        equivalent="keys are found by their position, wherever they lie",
    ),
    "ring-one-slot-short-looked-at-first": RunInjection(
        "cache",
        "a ring has a slot less than the window, and is looked at before the new token is stored",
        (*_store(_one_short), (cache.LayerCache, "seen_and_stored", _looked_at_first)),
        CACHED,
        equivalent="a query sees window - 1 keys before itself, and that many are there",
    ),
    "constraint-dropped": RunInjection(
        "mesh",
        "activations are not told how to lie on the mesh",
        ((layers, "constrain", lambda right: lambda letters, x: x),),
        ("mesh fsdp × tensor", "mesh fsdp"),
        equivalent="where values lie does not change what they are",
    ),
}
