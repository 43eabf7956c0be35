"""The key-value cache: what attention has seen so far, a layer at a time, as a value that is passed along.

Keys are found by their position, not by their place in the buffer, so a sliding layer keeps its window as a ring and
nothing else has to know.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oss_model.config import SLIDING, ModelConfig

EMPTY = -1  # the position of a slot that holds nothing, and of padding: nobody sees it


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer. s slots; a position is EMPTY where a slot is."""

    keys: Float[Array, "b s k d"]
    values: Float[Array, "b s k d"]
    positions: Int[Array, "b s"]

    def store(self, keys: Array, values: Array, positions: Int[Array, "b l"]) -> "LayerCache":
        """With new keys in place of the oldest: of each row the last s that are real, wherever its padding is.

        Padding (a negative position) is not stored. New positions come after those that are there.
        """
        size = self.positions.shape[1]
        if positions.shape[1] > size:
            positions, columns = jax.lax.top_k(positions, size)
            keys, values = (jnp.take_along_axis(a, columns[..., None, None], axis=1) for a in (keys, values))
        slots = jnp.where(positions >= 0, positions % size, size)  # `size` is outside, and dropped
        rows = jnp.arange(slots.shape[0])[:, None]
        return LayerCache(
            self.keys.at[rows, slots].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[rows, slots].set(values.astype(self.values.dtype), mode="drop"),
            self.positions.at[rows, slots].set(positions, mode="drop"),
        )

    def seen_and_stored(self, keys: Array, values: Array, positions: Int[Array, "b l"]) -> tuple["LayerCache", "LayerCache"]:
        """What queries among the new keys may look at, and the cache after.

        One token is stored first: the slot it takes held what is out of its window by now, and nothing is copied.
        """
        after = self.store(keys, values, positions)
        return (after if positions.shape[1] == 1 else self.followed_by(keys, values, positions)), after

    def followed_by(self, keys: Array, values: Array, positions: Int[Array, "b l"]) -> "LayerCache":
        """What a query among the new keys may look at: the cache and all of them.

        A prompt can be longer than a sliding layer's ring, so the new keys are looked at before they are stored.
        """
        old = self.keys.dtype, self.values.dtype
        return LayerCache(
            jnp.concatenate([self.keys, keys.astype(old[0])], axis=1),
            jnp.concatenate([self.values, values.astype(old[1])], axis=1),
            jnp.concatenate([self.positions, positions], axis=1),
        )


Cache = tuple[LayerCache, ...]


def init_cache(cfg: ModelConfig, batch: int, size: int, dtype: Any = None) -> Cache:
    """An empty cache, one `LayerCache` a layer.

    Args:
      cfg: the model.
      batch: rows.
      size: the largest number of positions, prompt and generated together. Sliding layers keep `cfg.sliding_window`
        of them at most. A query at a position from `size` on gives NaN, and is not stored.
      dtype: of keys and values; `cfg.dtype` if None.
    """
    dtype = cfg.dtype if dtype is None else dtype

    def layer(kind: str) -> LayerCache:
        slots = min(size, cfg.sliding_window) if kind == SLIDING else size
        shape = (batch, slots, cfg.num_key_value_heads, cfg.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch, slots), EMPTY, jnp.int32))

    return tuple(layer(kind) for kind in cfg.layer_types)


def grown(cache: Cache, cfg: ModelConfig, size: int) -> Cache:
    """With room for so many positions, where there was room for fewer: places stay, since positions count from 0."""

    def more(layer: LayerCache, kind: str) -> LayerCache:
        slots = (min(size, cfg.sliding_window) if kind == SLIDING else size) - layer.positions.shape[1]
        room = ((0, 0), (0, slots), (0, 0), (0, 0))
        keys, values = (jnp.pad(a, room) for a in (layer.keys, layer.values))
        return LayerCache(keys, values, jnp.pad(layer.positions, room[:2], constant_values=EMPTY))

    return tuple(more(*one) for one in zip(cache, cfg.layer_types, strict=True))


def capacity(cache: Cache, cfg: ModelConfig) -> int | None:
    """How many positions it has room for; None where all layers are sliding ones that keep a whole window: any number."""
    slots = [layer.positions.shape[1] for layer in cache]
    kinds = zip(slots, cfg.layer_types, strict=True)
    return min((count for count, kind in kinds if kind != SLIDING or count < cfg.sliding_window), default=None)


def next_positions(cache: Cache, length: int) -> Int[Array, "b l"]:
    """The positions of the next `length` tokens of each row."""
    last = jnp.max(jnp.stack([layer.positions.max(axis=1) for layer in cache]), axis=0)
    return (last + 1)[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
