"""Ways to compute the experts' sum, all of one meaning: which is best goes by the backend and the number of tokens.

Letters in einsum strings: t tokens (batch and length flattened), e experts, h hidden, i intermediate, s the two halves of the
gated unit (0 gate, 1 up). Parameters come as a dict an expert map (`oss_model.experts.ExpertLinear.stored`), the expert first.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from oss_model.config import MXFP4_BLOCK, ModelConfig
from oss_model.errors import InputError
from oss_model.layers import contract, delta
from oss_model.mxfp4 import dequantize
from oss_model.quantization import straight_through


def add_up(x, choice, weights, gate_up: dict[str, Array], down: dict[str, Array], cfg: ModelConfig):
    """float32 [t, h]: the sum of weight · expert(x) over those of the chosen experts that are in these arrays."""
    if cfg.experts_qat:
        gate_up, down = (_as_exported(stored, cfg.experts_qat) for stored in (gate_up, down))
    packed = any("blocks" in stored for stored in (gate_up, down))
    return PATHS[_path(x, packed, cfg)](x, choice, weights, gate_up, down, cfg)


def _path(x: Array, packed: bool, cfg: ModelConfig) -> str:
    """What "auto" is: pairs for very few, groups else; on TPUs, of values, the kernel that they have (docs/benchmarks.md)."""
    path = cfg.expert_path
    if path == "auto":
        backend, few = jax.default_backend(), UNROLLED
        if backend == "cpu" and x.dtype == jnp.float32 and not packed:
            few = 0  # to cut experts out costs more there than to read all of them
        if x.shape[0] * cfg.num_experts_per_tok <= few:
            return "pairs"
        path = "ragged" if backend == "tpu" else "grouped"
    return "grouped" if path == "ragged" and packed else path  # ragged's product wants the values of all experts at once


def swiglu(gate: Float[Array, "*s"], up: Float[Array, "*s"], cfg: ModelConfig) -> Float[Array, "*s"]:
    """(up + 1) · gate · sigmoid(alpha · gate), both clamped: the gate only from above (gpt_oss/torch/model.py).

    In bfloat16 the sigmoid's argument and result are rounded where torch rounds them.
    """
    gate = jnp.minimum(gate, cfg.swiglu_limit)
    up = jnp.clip(up, -cfg.swiglu_limit, cfg.swiglu_limit)
    scaled = (gate.astype(jnp.float32) * cfg.swiglu_alpha).astype(gate.dtype)
    return (up + 1) * (gate * jax.nn.sigmoid(scaled.astype(jnp.float32)).astype(gate.dtype))


def _weight(stored: dict[str, Array], dtype) -> Array:
    """The matrix, or matrices, of one expert or several, in the dtype computed in."""
    if "blocks" in stored:
        return dequantize(stored["blocks"], stored["scales"], dtype)
    return stored["weight"].astype(dtype)


def _as_exported(stored: dict[str, Array], rule: str) -> dict[str, Array]:
    """The values that an export to MXFP4 has: of the weight, its update added in float32 where it has one, an expert at a time.

    Raises:
      InputError: if a device has a part of a block.
    """
    if stored.keys() == {"blocks", "scales", "bias"}:
        return stored
    packed = stored["blocks"].shape[-2] * MXFP4_BLOCK if "blocks" in stored else stored["weight"].shape[-1]
    if packed % MXFP4_BLOCK:
        raise InputError(f"experts_qat: expected each device to have whole blocks of {MXFP4_BLOCK} inputs, found {packed}")

    def exported(one: dict[str, Array]) -> Array:
        if "lora_a" not in one:
            return straight_through(one["weight"], rule)
        a, b = one["lora_a"], one["lora_b"]
        update = contract("or,ri->oi", b.reshape(-1, b.shape[-1]), a)
        weight = _weight(one, jnp.float32)
        return straight_through(weight + update.reshape(weight.shape), rule)

    bias = stored["bias"]
    return {"weight": jax.lax.map(exported, {name: array for name, array in stored.items() if name != "bias"}), "bias": bias}


def _linear(x: Float[Array, "t in"], stored: dict[str, Array]) -> Float[Array, "t *out"]:
    """W·x + b of one expert, and its update where it has one."""

    def product(x, weight):
        return contract("ti,oi->to", x, weight.reshape(-1, weight.shape[-1])).reshape(-1, *weight.shape[:-1])

    out = product(x, _weight(stored, x.dtype)) + stored["bias"].astype(jnp.float32)[None]
    if "lora_a" in stored:
        out += delta(x, stored, product, product)
    return out.astype(x.dtype)


def _expert(x: Float[Array, "t h"], gate_up: dict[str, Array], down: dict[str, Array], cfg: ModelConfig) -> Float[Array, "t h"]:
    """One expert on every row of x: W2 · swiglu(W1 · x + b1) + b2."""
    both = _linear(x, gate_up)
    return _linear(swiglu(both[:, 0], both[:, 1], cfg), down)


def _loop(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Each expert in turn on its own tokens alone: for values at hand, so it is taken only where it is asked for.

    One expert's values in memory at a time, and experts / k times less work than `_scan`. Experts are cut out by NumPy,
    on the same bytes: XLA on CPU slices bfloat16 by way of the whole array in float32.

    Raises:
      InputError: under jit or grad, with respect to anything, and where an array is on several devices.
    """
    arrays = (x, choice, weights, *gate_up.values(), *down.values())
    if any(isinstance(a, Tracer) or (isinstance(a, jax.Array) and len(a.sharding.device_set) > 1) for a in arrays):
        raise InputError(
            "expert_path: expected values on one device for 'loop', found some that are traced (jit, grad) or on several;"
            " use 'auto'"
        )
    chosen, weighed = np.asarray(choice), np.asarray(weights)
    gate_up, down = ({name: np.asarray(array) for name, array in stored.items()} for stored in (gate_up, down))
    total = jnp.zeros(x.shape, jnp.float32)
    for e in np.unique(chosen):
        token, slot = np.nonzero(chosen == e)
        room = -len(token) % min(64, x.shape[0])  # a few lengths to compile for; the rest has weight zero
        rows, weight = (jnp.asarray(np.pad(a, (0, room))) for a in (token, weighed[token, slot]))
        # Dequantized apart from the products: compiled together, XLA on CPU takes twice as long.
        w1, w2 = (_as_values({name: array[e] for name, array in stored.items()}, x.dtype) for stored in (gate_up, down))
        total = _add_expert(total, x, rows, weight, w1, w2, cfg)
    return total


@functools.partial(jax.jit, static_argnums=1)
def _as_values(stored: dict[str, Array], dtype) -> dict[str, Array]:
    """One expert with its matrix in the dtype computed in."""
    rest = {name: array for name, array in stored.items() if name not in ("blocks", "scales", "weight")}
    return rest | {"weight": _weight(stored, dtype)}


@functools.partial(jax.jit, static_argnames="cfg")
def _add_expert(total, x, rows, weight, w1, w2, cfg: ModelConfig):
    return total.at[rows].add((_expert(x[rows], w1, w2, cfg) * weight[:, None]).astype(jnp.float32))


# Jitted, these three: where the model is called without jit, JAX would compile their loops anew at every call.


@functools.partial(jax.jit, static_argnames="cfg")
def _scan(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Every expert in turn on every token, most with weight zero: one expert's values in memory at a time.

    experts / k times the work, and still faster on a CPU than a grouped product, which is masked there. Recomputed in
    the backward pass, so that dequantized weights are not kept for it.
    """
    count = down["bias"].shape[0]
    by_expert = jnp.zeros((count, x.shape[0]), weights.dtype)
    slot = jnp.where(_here(choice, count), choice, count)
    by_expert = by_expert.at[slot, jnp.arange(x.shape[0])[:, None]].add(weights, mode="drop")

    @jax.checkpoint
    def step(total, one):
        weight, w1, w2 = one
        # Rounded to x's dtype where the reference rounds (GptOssExperts.forward); the sum stays in float32.
        out = (_expert(x, w1, w2, cfg) * weight[:, None]).astype(jnp.float32)
        return total + out, None

    return jax.lax.scan(step, jnp.zeros(x.shape, jnp.float32), (by_expert, gate_up, down))[0]


UNROLLED = 8  # pairs, up to which each is compiled by itself: in a loop XLA on CPU copies all experts for each


@functools.partial(jax.jit, static_argnames="cfg")
def _pairs(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Each (token, expert) pair in turn, reading only the experts that are used: for the few tokens of decoding."""
    k, count = choice.shape[1], down["bias"].shape[0]

    def compute(token, expert, weight):
        w1, w2 = ({name: _one(array, expert) for name, array in stored.items()} for stored in (gate_up, down))
        return (_expert(x[token][None], w1, w2, cfg)[0] * weight).astype(jnp.float32)

    def one(pair):
        token, expert, weight = pair
        if count == cfg.num_experts:  # all are here
            return compute(token, expert, weight)
        elsewhere = functools.partial(jnp.zeros, x.shape[1:], jnp.float32)
        return jax.lax.cond(_here(expert, count), compute, lambda *_: elsewhere(), token, expert, weight)

    tokens = jnp.repeat(jnp.arange(x.shape[0]), k)
    pairs = tokens, choice.reshape(-1), weights.reshape(-1)
    if choice.size <= UNROLLED:
        out = jnp.stack([one(tuple(a[n] for a in pairs)) for n in range(choice.size)])
    else:
        out = jax.lax.map(one, pairs)
    return out.reshape(x.shape[0], k, -1).sum(axis=1)


# --- grouped ----------------------------------------------------------------------------------------------------


class Groups(NamedTuple):
    """Pairs of a token and an expert, sorted by expert; those of no expert here come last.

    Attributes:
      expert: of each pair, in their own order; as many as there are experts here where it is none of these.
      pairs: the pairs in sorted order. place: where each pair has come to.
      starts, sizes: of each expert's run.
    """

    expert: Int[Array, " p"]
    pairs: Int[Array, " p"]
    place: Int[Array, " p"]
    starts: Int[Array, " e"]
    sizes: Int[Array, " e"]


def _groups(choice: Int[Array, "t k"], count: int) -> Groups:
    expert = jnp.where(_here(choice, count), choice, count).reshape(-1)
    pairs = jnp.argsort(expert, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)
    return Groups(expert, pairs, jnp.argsort(pairs).astype(jnp.int32), jnp.cumsum(sizes).astype(jnp.int32) - sizes, sizes)


@functools.partial(jax.jit, static_argnames="cfg")
def _grouped(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Tokens sorted by expert, each expert on its own: for CPUs and GPUs, and packed experts anywhere.

    Of values all experts at once, on as many rows each as a balanced router gives the fullest; what is more goes in blocks
    after. Of packed experts, and in the backward pass, one expert after the other: no more than one's values are in memory.
    """
    moving, packed = ([{n: a for n, a in stored.items() if (n in PACKED) == of} for stored in (gate_up, down)] for of in (0, 1))
    return _sum_of_groups(x, weights, moving, packed, choice, cfg)


PACKED = ("blocks", "scales")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sum_of_groups(x, weights, moving, packed, choice, cfg: ModelConfig):
    k, count, flat = choice.shape[1], moving[1]["bias"].shape[0], weights.reshape(-1)
    groups = _groups(choice, count)
    gate_up, down = ({**a, **b} for a, b in zip(moving, packed, strict=True))

    def weighed(rows, weight, gate_up, down):
        return (_expert(rows, gate_up, down, cfg) * weight[:, None]).astype(jnp.float32)

    def in_blocks(size, skipped):
        """float32 [pairs, hidden], sorted: what is left of each expert after so many of its rows."""
        pairs = jnp.pad(groups.pairs, (0, size))

        def expert(e, out):
            def block(i, out):
                at = groups.starts[e] + skipped + i * size
                some = jax.lax.dynamic_slice_in_dim(pairs, at, size)
                one = ({name: _one(array, e) for name, array in stored.items()} for stored in (gate_up, down))
                return _put(out, at, weighed(x[some // k], flat[some], *one), groups.starts[e] + groups.sizes[e])

            left = jnp.maximum(groups.sizes[e] - skipped, 0)
            return jax.lax.fori_loop(0, (left + size - 1) // size, block, out)

        return jax.lax.fori_loop(0, count, expert, jnp.zeros((choice.size + size, x.shape[1]), jnp.float32))

    rows = _rows(x.shape[0], k, count)
    if any(packed):
        out = in_blocks(rows, 0)[groups.place]
    else:
        offsets = jnp.arange(rows, dtype=jnp.int32)
        some = groups.pairs[jnp.minimum(groups.starts[:, None] + offsets[None], choice.size - 1)]
        first = jax.vmap(weighed)(x[some // k], flat[some], gate_up, down).reshape(count * rows, -1)
        offset = groups.place - groups.starts.at[groups.expert].get(mode="fill", fill_value=0)
        out = first[jnp.minimum(groups.expert * rows + offset, count * rows - 1)]
        more = (groups.sizes > rows).any()
        rest = functools.partial(jnp.zeros, (choice.size + rows, x.shape[1]), jnp.float32)
        out = jnp.where((offset < rows)[:, None], out, jax.lax.cond(more, lambda: in_blocks(rows, rows), rest)[groups.place])
    out = jnp.where((groups.expert < count)[:, None], out, 0)
    return out.reshape(x.shape[0], k, -1).sum(axis=1)


def _rows(tokens: int, k: int, count: int) -> int:
    """How many rows an expert is given: what the fullest has where each token goes anywhere with equal chance."""
    mean = tokens * k / count
    return min(-(-int(mean + 2.5 * mean**0.5 + 1) // 8) * 8, tokens)


def _put(out: Array, at, rows: Array, end) -> Array:
    """`rows` in place of those of `out` from `at` on, as far as `end`."""
    kept = jax.lax.dynamic_slice_in_dim(out, at, rows.shape[0])
    mine = (at + jnp.arange(rows.shape[0]) < end).reshape(-1, *(1,) * (rows.ndim - 1))
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, rows.astype(out.dtype), kept), at, 0)


def _groups_forward(x, weights, moving, packed, choice, cfg: ModelConfig):
    return _sum_of_groups(x, weights, moving, packed, choice, cfg), (x, weights, moving, packed, choice)


def _groups_backward(cfg: ModelConfig, kept, slope):
    """Each expert's blocks once more, and back; its own gradients are summed in float32."""
    x, weights, moving, packed, choice = kept
    k, count, flat = choice.shape[1], moving[1]["bias"].shape[0], weights.reshape(-1)
    groups, size = _groups(choice, count), _rows(x.shape[0], k, count)
    pairs = jnp.pad(groups.pairs, (0, size))

    def expert(carry, one):
        start, number, bits, *bytes_ = one
        mine = _values(bits)

        def weighed(rows, weight, mine):
            gate_up, down = ({**a, **b} for a, b in zip(mine, bytes_, strict=True))
            return (_expert(rows, gate_up, down, cfg) * weight[:, None]).astype(jnp.float32)

        def block(i, carry):
            of_rows, of_weights, total = carry
            at, end = start + i * size, start + number
            some = jax.lax.dynamic_slice_in_dim(pairs, at, size)
            _, back = jax.vjp(weighed, x[some // k], flat[some], mine)
            mask = (at + jnp.arange(size) < end)[:, None]
            rows, weight, more = back(jnp.where(mask, slope[some // k], 0))
            total = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, more)
            return _put(of_rows, at, rows, end), _put(of_weights, at, weight, end), total

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), mine)
        *carry, total = jax.lax.fori_loop(0, (number + size - 1) // size, block, (*carry, zeros))
        return tuple(carry), _bits(jax.tree.map(lambda a, like: a.astype(like.dtype), total, mine))

    start = jnp.zeros((choice.size + size, x.shape[1]), jnp.float32), jnp.zeros(choice.size + size, jnp.float32)
    (of_rows, of_weights), of_moving = jax.lax.scan(expert, start, (groups.starts, groups.sizes, _bits(moving), *packed))
    here = (groups.expert < count)[:, None]
    of_x = jnp.where(here, of_rows[groups.place], 0).reshape(x.shape[0], k, -1).sum(axis=1).astype(x.dtype)
    of_weights = jnp.where(here[:, 0], of_weights[groups.place], 0).reshape(weights.shape).astype(weights.dtype)
    return of_x, of_weights, _values(of_moving), None, None


_sum_of_groups.defvjp(_groups_forward, _groups_backward)


# XLA on CPU cuts bfloat16 out of an array, and puts it in, by way of all of it in float32; integers it just copies.


def _bits(tree: Any) -> Any:
    cast = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
    return jax.tree.map(lambda a: cast(a) if a.dtype == jnp.bfloat16 else a, tree)


def _values(tree: Any) -> Any:
    cast = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.bfloat16)
    return jax.tree.map(lambda a: cast(a) if a.dtype == jnp.uint16 else a, tree)


def _one(array: Array, n) -> Array:
    return _of_bfloat16(array, n) if array.dtype == jnp.bfloat16 else array[n]


@jax.custom_vjp
def _of_bfloat16(array, n):
    return _values(_bits(array)[n])


_of_bfloat16.defvjp(
    lambda array, n: (_of_bfloat16(array, n), (jnp.zeros_like(array), n)),
    lambda kept, slope: (kept[0].at[kept[1]].add(slope), None),
)


@functools.partial(jax.jit, static_argnames="cfg")
def _ragged(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Rows sorted by expert, one grouped matrix product a map: for values on TPUs, which have a kernel for it."""
    k, count = choice.shape[1], down["bias"].shape[0]
    expert = jnp.where(_here(choice, count), choice, count).reshape(-1)  # those of other devices last
    order = jnp.argsort(expert, stable=True)
    expert_of = expert[order]
    sizes = jnp.bincount(expert_of, length=count).astype(jnp.int32)

    def product(rows, weight):
        """rows [t·k, in] by weight [experts, *out, in] -> [t·k, *out]"""
        flat = weight.reshape(count, -1, weight.shape[-1]).swapaxes(1, 2)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        out = jax.lax.ragged_dot(rows, flat, sizes, precision=precision, preferred_element_type=jnp.float32)
        return out.reshape(-1, *weight.shape[1:-1])

    mine = expert_of < count

    def linear(rows, stored):
        out = product(rows, _weight(stored, x.dtype)) + stored["bias"].astype(jnp.float32)[expert_of]
        if "lora_a" in stored:
            out += delta(rows, stored, product, product)
        # A kernel may leave anything in the rows that belong to no expert; here, before NaN can reach a gradient.
        return jnp.where(mine.reshape(-1, *(1,) * (out.ndim - 1)), out, 0).astype(x.dtype)

    both = linear(x[order // k], gate_up)
    out = linear(swiglu(both[:, 0], both[:, 1], cfg), down) * weights.reshape(-1)[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // k].add(out.astype(jnp.float32))


def _here(expert: Int[Array, "*s"], count: int) -> Bool[Array, "*s"]:
    """Whether an expert, counted from this device's first, is among its `count`."""
    return (expert >= 0) & (expert < count)


PATHS = {"loop": _loop, "scan": _scan, "grouped": _grouped, "pairs": _pairs, "ragged": _ragged}
