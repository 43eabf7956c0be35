"""The parts the blocks are made of: linear maps, RMSNorm, rotary embedding (YaRN).

Letters in einsum strings: b batch, l length (queries), m length (keys), h hidden, n heads, k kv heads,
g query heads per kv head, d head_dim, e experts, v vocab. Parameters keep their stored dtype and are cast where
they are used; x decides the dtype computed in. Sums run in float32.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from oss_model.config import ModelConfig
from oss_model.sharding import constrain, cut_rows, joined_rows, mesh_shape, slices

AT_ONCE = 32768  # tokens that are looked up at a time where the embedding is cut

Rope = tuple[Float[Array, "b l half"], Float[Array, "b l half"]]


def param_dtype(cfg: ModelConfig) -> np.dtype:
    """The dtype floating-point parameters are created in."""
    return jnp.dtype("float32" if cfg.param_dtype == "float32" else "bfloat16")


def contract(spec: str, x: Array, y: Array) -> Array:
    """einsum with float32 sums and result. float32 operands are multiplied as such on every backend (no TF32)."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    once = functools.partial(jnp.einsum, spec, precision=precision, preferred_element_type=jnp.float32)
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        left, right, result = re.split(",|->", spec)
        rows = [letter for letter in left if letter not in right]
        if rows and all(x.shape[left.index(letter)] == 1 for letter in rows):
            # XLA on CPU multiplies one row of bfloat16 a hundred times slower than two.
            axis = left.index(rows[-1])
            return jax.lax.slice_in_dim(once(jnp.concatenate([x, x], axis), y), 0, 1, axis=result.index(rows[-1]))
    return once(x, y)


class LowRank(nnx.Module):
    """An update of a linear map, alpha / rank · B·A (arXiv:2106.09685), in float32.

    a [rank, *in] and b [*out, rank]; of experts [experts, rank, in] and [experts, *out, rank]. In a model without values, their
    shapes.
    """

    def __init__(self, a: Any, b: Any, alpha: float):
        self.a, self.b, self.alpha = nnx.LoRAParam(a), nnx.LoRAParam(b), alpha

    @property
    def rank(self) -> int:
        return self.b.shape[-1]

    def stored(self) -> dict[str, Array]:
        """A and alpha / rank · B, named as `delta` takes them."""
        return {"lora_a": self.a[...], "lora_b": self.b[...] * (self.alpha / self.rank)}


def delta(
    x: Array, stored: Mapping[str, Array], down: Callable[[Array, Array], Array], up: Callable[[Array, Array], Array]
) -> Array:
    """What a low-rank update adds to W·x, in float32: up(down(x, A), B), A·x rounded to the dtype of x.

    Args:
      x: what the map is of.
      stored: `LowRank.stored`, or one expert's part of it.
      down, up: the products, of what comes first with a matrix.
    """
    low = down(x, stored["lora_a"].astype(x.dtype)).astype(x.dtype)
    return up(low, stored["lora_b"].astype(x.dtype))


class Linear(nnx.Module):
    """W·x + b along the axes that `spec` names; weights keep the checkpoint's [out, in] order.

    Attributes:
      lora: what is added to W, where `oss_model.lora` has put one.
    """

    lora: LowRank | None = None

    def __init__(self, spec: str, weight: tuple[int, ...], bias: tuple[int, ...] | None, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.spec = spec
        self.source, self.matrix, self.result = re.split(",|->", spec)
        self.inputs = sum(letter not in self.result for letter in self.matrix)  # trailing axes of the weight
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), weight, param_dtype(cfg)))
        self.bias = None if bias is None else nnx.Param(jnp.zeros(bias, param_dtype(cfg)))

    def __call__(self, x: Float[Array, "b l *i"]) -> Float[Array, "b l *o"]:
        y = contract(self.spec, x, self.weight[...].astype(x.dtype))
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)[None, None]
        if self.lora is not None:
            outputs, inputs = self.matrix[: -self.inputs], self.matrix[-self.inputs :]
            products = (f"{self.source},r{inputs}->blr", f"blr,{outputs}r->{self.result}")
            y += delta(x, self.lora.stored(), *(functools.partial(contract, spec) for spec in products))
        return constrain(self.result, y.astype(x.dtype))


class Embedding(nnx.Module):
    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.dtype = cfg.dtype
        shape = (cfg.vocab_size, cfg.hidden_size)
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, param_dtype(cfg)))

    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l h"]:
        """A token outside the vocabulary, a negative one too, gives NaN rather than somebody else's embedding."""
        weight, (batch, length) = jnp.asarray(self.weight[...]), tokens.shape

        def rows(tokens):
            found = weight.at[tokens].get(mode="fill", wrap_negative_indices=False)
            return constrain("blh", found.astype(self.dtype))

        # On a mesh that cuts the vocabulary each device looks all tokens up in its part, before the sums are shared out.
        chunk = max(AT_ONCE // batch // slices(), 1)
        if not mesh_shape() or batch * length <= AT_ONCE or length % slices():
            return rows(tokens)
        _, found = jax.lax.scan(lambda none, part: (none, rows(part)), None, cut_rows(tokens, chunk))
        return joined_rows(found, length)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, all in float32, then cast: not Llama's order, which casts before it multiplies."""

    def __init__(self, cfg: ModelConfig):
        self.eps = cfg.rms_norm_eps
        self.scale = nnx.Param(jnp.ones(cfg.hidden_size, param_dtype(cfg)))

    def __call__(self, x: Float[Array, "b l h"]) -> Float[Array, "b l h"]:
        f = x.astype(jnp.float32)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        return (f * self.scale[...].astype(jnp.float32)[None, None]).astype(x.dtype)


class RotaryEmbedding(nnx.Module):
    """Rotary position embedding (arXiv:2104.09864) with YaRN's frequencies (arXiv:2309.00071, §3.2 and §3.4)."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg  # tables are computed where they are used: an array here would become part of the checkpoint

    @property
    def inv_freq(self) -> np.ndarray:
        """float32 [head_dim / 2]: radians a position. Operations and their order are the reference's, in float32."""
        cfg, half = self.cfg, self.cfg.head_dim // 2
        pos = np.float32(cfg.rope_theta ** (np.arange(half) * 2 / cfg.head_dim))
        low, high = (self._dim_of(turns) for turns in (cfg.rope_beta_fast, cfg.rope_beta_slow))
        if cfg.rope_truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, cfg.head_dim - 1)
        high += 0.001 * (low == high)
        ramp = np.clip((np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
        keep = 1 - ramp  # the share of each frequency that is not interpolated
        return 1 / (np.float32(cfg.rope_factor) * pos) * (1 - keep) + 1 / pos * keep

    def _dim_of(self, turns: float) -> float:
        """The pair of dimensions that makes this many full turns over the original context."""
        cfg = self.cfg
        ratio = cfg.rope_original_max_position_embeddings / (turns * 2 * math.pi)
        return cfg.head_dim / 2 * math.log(ratio) / math.log(cfg.rope_theta)

    @property
    def concentration(self) -> float:
        """YaRN's attention temperature, multiplied into cos and sin."""
        return 0.1 * math.log(self.cfg.rope_factor) + 1.0 if self.cfg.rope_factor > 1 else 1.0

    def __call__(self, positions: Int[Array, "b l"]) -> Rope:
        """cos and sin of every position's angles, in the dtype computed in; the angles themselves are float32."""
        angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(self.inv_freq)[None, None]
        cos, sin = ((f(angle) * self.concentration).astype(self.cfg.dtype) for f in (jnp.cos, jnp.sin))
        return cos, sin


def rotate(x: Float[Array, "b l n d"], rope: Rope) -> Float[Array, "b l n d"]:
    """Rotate pairs (i, i + head_dim/2): halves, not neighbours."""
    cos, sin = (table[:, :, None] for table in rope)
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
