"""gpt-oss, read top to bottom: attention, mixture of experts, block, model.

Each block owns its norm and its residual, so the whole forward pass is a loop over blocks. `tap` marks the values
that can be watched from outside (`oss_model.taps`); it changes nothing.

b batch, l length, h hidden, n heads, k kv heads, d head_dim, e experts, i intermediate, v vocab.
"""

import dataclasses
from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from oss_model import attention, context_parallel, sharding
from oss_model.attention import Tokens, in_order
from oss_model.cache import EMPTY, Cache, LayerCache, capacity, next_positions
from oss_model.config import SLIDING, ModelConfig
from oss_model.errors import InputError
from oss_model.experts import ExpertLinear, choose, experts, weigh
from oss_model.layers import (
    Embedding,
    Linear,
    RMSNorm,
    Rope,
    RotaryEmbedding,
    param_dtype,
    rotate,
)
from oss_model.taps import in_layer, tap, watched


class AttentionBlock(nnx.Module):
    """x + attention(norm(x)): grouped queries, a sink a head, and in sliding layers a window."""

    def __init__(self, cfg: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        heads, kv, dim, hidden = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.hidden_size
        self.block = cfg.attention_block
        self.window = cfg.sliding_window if cfg.layer_types[layer] == SLIDING else None
        self.norm = RMSNorm(cfg)
        self.q_proj = Linear("blh,ndh->blnd", (heads, dim, hidden), (heads, dim), cfg, rngs=rngs)
        self.k_proj = Linear("blh,kdh->blkd", (kv, dim, hidden), (kv, dim), cfg, rngs=rngs)
        self.v_proj = Linear("blh,kdh->blkd", (kv, dim, hidden), (kv, dim), cfg, rngs=rngs)
        self.o_proj = Linear("blnd,hnd->blh", (hidden, heads, dim), (hidden,), cfg, rngs=rngs)
        self.sinks = nnx.Param(jnp.zeros(heads, param_dtype(cfg)))

    def __call__(
        self, x: Float[Array, "b l h"], at: Tokens, rope: Rope, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "b l h"], LayerCache | None]:
        y = tap("attn_norm", self.norm, x)
        q, k, v = tap("q", self.q_proj, y), tap("k", self.k_proj, y), tap("v", self.v_proj, y)
        q, k = tap("q_rope", rotate, q, rope), tap("k_rope", rotate, k, rope)
        how = self.window, self.block
        if cache is None:
            core, after = tap("attn_core", context_parallel.attend, q, k, v, self.sinks[...], at, *how), None
        else:
            seen, after = cache.seen_and_stored(k, v, at.positions)
            keys = at._replace(positions=seen.positions)
            core = tap("attn_core", attention.attend, q, seen.keys, seen.values, self.sinks[...], at, keys, *how)
        return x + tap("attn_out", self.o_proj, core), after


class MLPBlock(nnx.Module):
    """x + experts(norm(x)): every token goes to its k best experts."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.norm = RMSNorm(cfg)
        self.router = Linear("blh,eh->ble", (cfg.num_experts, cfg.hidden_size), (cfg.num_experts,), cfg, rngs=rngs)
        self.gate_up = ExpertLinear(("glu", "inner"), "hidden", cfg, rngs=rngs)
        self.down = ExpertLinear(("hidden",), "inner", cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "b l h"]) -> Float[Array, "b l h"]:
        y = tap("mlp_norm", self.norm, x)
        logits = tap("router_logits", lambda: self.router(y).reshape(-1, self.cfg.num_experts))
        choice = tap("expert_choice", choose, logits, self.cfg.num_experts_per_tok)
        weights = tap("expert_weights", weigh, logits, choice)
        return x + tap("mlp_out", experts, y, choice, weights, self.gate_up, self.down, self.cfg)


class TransformerBlock(nnx.Module):
    def __init__(self, cfg: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        self.attn = AttentionBlock(cfg, layer, rngs=rngs)
        self.mlp = MLPBlock(cfg, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b l h"], at: Tokens, rope: Rope, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "b l h"], LayerCache | None]:
        with jax.named_scope("attn"):
            x, cache = self.attn(x, at, rope, cache)
        with jax.named_scope("mlp"):
            x = rematerialized(self.mlp, self.mlp.cfg.remat == "mlp")(x)
        return tap("layer_out", lambda: x), cache


def rematerialized(module: Callable, again: bool) -> Callable:
    """The module; with `again` computed a second time in the backward pass, so that only its inputs are kept for it.

    Not while taps are watched: a hook would be handed values of the recomputation.
    """
    return jax.checkpoint(lambda *inputs: module(*inputs)) if again and not watched() else module


class Transformer(nnx.Module):
    """gpt-oss: `logits = model(tokens)`. A token id outside the vocabulary makes all logits of its row NaN.

    Made with `rngs`, its parameters are random; `params.create_model_from_checkpoint` makes a trained one.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg = dataclasses.replace(cfg, param_dtype=cfg.param_dtype or "bfloat16")
        self.embedding = Embedding(cfg, rngs=rngs)
        self.rope = RotaryEmbedding(cfg)
        self.layers = nnx.List([TransformerBlock(cfg, n, rngs=rngs) for n in range(cfg.num_hidden_layers)])
        self.norm = RMSNorm(cfg)
        self.lm_head = Linear("blh,vh->blv", (cfg.vocab_size, cfg.hidden_size), None, cfg, rngs=rngs)
        if cfg.use_sharding:
            sharding.annotate(self, cfg)

    @overload
    def __call__(
        self,
        tokens: Int[Array, "b l"],
        positions: Int[Array, "b l"] | None = None,
        cache: None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l v"]: ...
    @overload
    def __call__(
        self, tokens: Int[Array, "b l"], positions: Int[Array, "b l"] | None = None, *, cache: Cache
    ) -> tuple[Float[Array, "b l v"], Cache]: ...
    @overload
    def __call__(
        self, tokens: Int[Array, "b l"], positions: Int[Array, "b l"] | None, cache: Cache
    ) -> tuple[Float[Array, "b l v"], Cache]: ...
    def __call__(
        self,
        tokens: Int[Array, "b l"],
        positions: Int[Array, "b l"] | None = None,
        cache: Cache | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l v"] | tuple[Float[Array, "b l v"], Cache]:
        """Logits of the next token at every place, in `cfg.dtype`; with a cache: logits and the cache after.

        Args:
          tokens: int32 [batch, length].
          positions: int32 [batch, length]; if not given 0, 1, 2, … (of each segment), or on from where the cache ends. A
            negative position marks padding, on either side or in between.
          cache: what came before (`cache.init_cache`), for the whole prompt at once or a token at a time. Positions that
            it has no room for give NaN, and are not stored.
          segment_ids: int32 [batch, length], of documents that are packed into a row one after the other: a token sees its own
            alone. 0 marks padding.

        Raises:
          InputError: if no positions are given and there are more tokens than the cache has room for; if segments are given
            with a cache; if tokens have no two axes.
        """
        x, after = self.stream(tokens, positions, cache, segment_ids)
        return self.unembed(x) if after is None else (self.unembed(x), after)

    def stream(
        self,
        tokens: Int[Array, "b l"],
        positions: Int[Array, "b l"] | None = None,
        cache: Cache | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b l h"], Cache | None]:
        """The residual stream after the last block: `unembed` those places alone whose logits are wanted."""
        if tokens.ndim != 2:
            raise InputError(f"tokens: expected [batch, length], found {list(tokens.shape)}; tokens[None] is a batch of one")
        room = None if cache is None else capacity(cache, self.cfg)
        at = self.place(tokens.shape, positions, cache, segment_ids)
        beyond = None if room is None else at.positions >= room
        if beyond is not None:
            at = at._replace(positions=jnp.where(beyond, EMPTY, at.positions))
        with jax.named_scope("rope"):
            rope = self.rope(at.positions)
        x, after = self.walk(self.embed(tokens), at, rope, cache)
        return x if beyond is None else jnp.where(beyond[..., None], jnp.nan, x), after

    def walk(
        self, x: Float[Array, "b l h"], at: Tokens, rope: Rope, cache: Cache | None
    ) -> tuple[Float[Array, "b l h"], Cache | None]:
        """Through the layers, one after the other."""
        after = []
        for n, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache[n]
            with in_layer(n), jax.named_scope("layer"):
                x, layer_cache = rematerialized(block, self.cfg.remat == "block")(x, at, rope, layer_cache)
            after.append(layer_cache)
        return x, None if cache is None else tuple(after)

    def place(
        self,
        shape: tuple[int, ...],
        positions: Int[Array, "b l"] | None,
        cache: Cache | None,
        segment_ids: Int[Array, "b l"] | None,
    ) -> Tokens:
        """Where these tokens are: as `__call__` says."""
        if cache is not None and segment_ids is not None:
            raise InputError("segment_ids: expected none with a cache, which holds one document a row, found some")
        room = None if cache is None else capacity(cache, self.cfg)
        if positions is not None:
            ordered = in_order(positions, segment_ids)
        elif cache is not None:
            if room is not None and shape[1] > room:
                raise InputError(
                    f"cache: expected at most {room} tokens, as many as it was made for, found {shape[1]};"
                    " init_cache with a larger size"
                )
            positions, ordered = next_positions(cache, shape[1]), True
        else:
            positions, ordered = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape), True
            if segment_ids is not None:
                positions = positions - attention.starts(segment_ids)
        if segment_ids is not None:
            positions = jnp.where(segment_ids == 0, EMPTY, positions)
        return Tokens(positions, segment_ids, ordered)

    def embed(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l h"]:
        return tap("embedding", self.embedding, tokens)

    def unembed(self, x: Float[Array, "b l h"]) -> Float[Array, "b l v"]:
        return tap("logits", self.lm_head, tap("final_norm", self.norm, x))
