"""A mistake in a parameter is an edit: what it makes of the right values. NumPy; names are those of the catalogue.

Written once, for both who tests and who names: `parity.injection.files` puts edits into files, `explain` looks which
one makes of the right values what a checkpoint holds. Where only the hash of the right values is known, an edit is
undone and the hash compared (`undone`).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from parity.equations import Array, mxfp4
from parity.protocols import Expected, Rows

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Look(NamedTuple):
    """What an edit may look at beside the parameter itself: always as it should be.

    Attributes:
      name: of the parameter, without the layer.
      of: another parameter of the same layer, or outside the layers.
      elsewhere: this parameter in the other layers.
      packed: blocks and scales of the same experts; None where there are none.
    """

    name: str
    of: Callable[[str], Array]
    elsewhere: Callable[[], Iterable[Expected]] = lambda: ()
    packed: Callable[[], tuple[Array, Array] | None] = lambda: None


class Edit(NamedTuple):
    """
    Attributes:
      on: which parameters it may happen to, a pattern of the name without the layer.
      make: of the right values, what they may have become.
      undo: of those, what they may have been; None where that is lost.
      plain: whether values show it that need no comparison with the right ones.
      swaps: the name of the parameter that it exchanges one with; None if none.
    """

    on: str
    make: Callable[[Array, Look], Iterable[Array]]
    undo: Callable[[Array], Iterable[Array]] | None = None
    plain: Callable[[Array], bool] = lambda got: False
    swaps: Callable[[str], str] | None = None


# --- edits of values --------------------------------------------------------------------------------------------


def transposed(value: Array) -> Array:
    """The bytes of the transposed matrix in the shape of the right one."""
    return np.ascontiguousarray(np.swapaxes(value, -1, -2)).reshape(value.shape)


def _untransposed(value: Array) -> Array:
    *rest, rows, columns = value.shape
    return np.swapaxes(value.reshape(*rest, columns, rows), -1, -2)


def halved(value: Array) -> Array:
    """[experts, 2, intermediate, ...]: gate and up taken as the first and the second half of the source's rows."""
    return np.swapaxes(value, 1, 2).reshape(value.shape)


def _unhalved(value: Array) -> Array:
    experts, two, rows, *rest = value.shape
    return np.swapaxes(value.reshape(experts, rows, two, *rest), 1, 2)


def for_neighbours(value: Array) -> Array:
    """Rows of each head put where a RoPE of neighbours wants them, as conversion scripts of Llama do."""
    heads, dim, *rest = value.shape
    return np.swapaxes(value.reshape(heads, 2, dim // 2, *rest), 1, 2).reshape(value.shape)


def _not_for_neighbours(value: Array) -> Array:
    heads, dim, *rest = value.shape
    return np.swapaxes(value.reshape(heads, dim // 2, 2, *rest), 1, 2).reshape(value.shape)


def heads_transposed(value: Array) -> Array:
    return np.swapaxes(value, 0, 1).reshape(value.shape)


def _heads_back(value: Array) -> Array:
    heads, dim, *rest = value.shape
    return np.swapaxes(value.reshape(dim, heads, *rest), 0, 1)


def bytes_swapped(value: Array) -> Array:
    return value.view(np.uint16).byteswap().view(value.dtype)


def through_fp8(value: Array) -> Array:
    return value.astype(ml_dtypes.float8_e4m3fn).astype(value.dtype)


def split_by_group(value: Array, look: Look) -> Iterator[Array]:
    """Rows of a fused qkv taken as [kv, groups q + k + v], as in GPT-NeoX and Megatron; they are all q, all k, all v."""
    _, projection, leaf = look.name.split(".")
    q, k, v = (value if part == projection[0] else look.of(f"attn.{part}_proj.{leaf}") for part in "qkv")
    groups = len(q) // len(k)
    fused = np.concatenate([q, k, v]).reshape(len(k), groups + 2, *q.shape[1:])
    parts = {"q": fused[:, :groups].reshape(q.shape), "k": fused[:, groups], "v": fused[:, groups + 1]}
    yield parts[projection[0]]


# --- edits of packed experts ------------------------------------------------------------------------------------

PACKED: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "nibbles-swapped": lambda blocks, scales: ((blocks << 4) | (blocks >> 4), scales),
    "scale-off-by-one": lambda blocks, scales: (blocks, scales + np.uint8(1)),
    "scale-ignored": lambda blocks, scales: (blocks, np.full_like(scales, 127)),
    "scales-shifted": lambda blocks, scales: (blocks, np.roll(scales, 1, axis=-1)),
    "sign-lost": lambda blocks, scales: (blocks & 0x77, scales),
    "minus-zero-lost": lambda blocks, scales: (_plus_zero(blocks & 15) | (_plus_zero(blocks >> 4) << 4), scales),
}


def _plus_zero(code: Array) -> Array:
    return np.where(code == 8, 0, code).astype(np.uint8)


def _packed(change: Callable[[Array, Array], tuple[Array, Array]]) -> Callable[[Array, Look], Iterator[Array]]:
    def make(value: Array, look: Look) -> Iterator[Array]:
        pair = look.packed()
        if pair is not None:
            blocks, scales = change(*pair)
            kind = look.name.rsplit(".", 1)[1]
            yield mxfp4(blocks, scales) if kind == "weight" else {"blocks": blocks, "scales": scales}[kind]

    return make


def scales_as_numbers(value: Array, look: Look) -> Iterator[Array]:
    pair = look.packed()
    if pair is not None:
        blocks, scales = pair
        codes = mxfp4(blocks, np.full_like(scales, 127)).astype(np.float32)
        yield (codes * np.repeat(scales.astype(np.float32), 32, axis=-1)).astype(BFLOAT16)


# --- the table --------------------------------------------------------------------------------------------------


def _each(*changes: Callable[[Array], Array], dtype: np.dtype | None = None) -> Callable[[Array, Look], Iterator[Array]]:
    return lambda value, look: (change(value) for change in changes if dtype in (None, value.dtype))


def _undo(*changes: Callable[[Array], Array], dtype: np.dtype | None = None) -> Callable[[Array], Iterator[Array]]:
    return lambda value: (change(value) for change in changes if dtype in (None, value.dtype))


def _swap(on: str, other: Callable[[str], str]) -> Edit:
    return Edit(on, lambda value, look: [look.of(other(look.name))], swaps=other)


def _rolled(axis: int) -> tuple[Callable[[Array], Array], ...]:
    return (lambda v: np.roll(v, 1, axis)), (lambda v: np.roll(v, -1, axis))


def _zeros(got: Array) -> bool:
    return not np.ascontiguousarray(got).view(f"u{got.dtype.itemsize}").any()


def _of_other_layers(value: Array, look: Look) -> Iterator[Array]:
    return (one.value()[:] for one in look.elsewhere() if one.value is not None)


def _between(a: str, b: str) -> Callable[[str], str]:
    return lambda name: name.replace(a, b) if a in name else name.replace(b, a)


_MATRIX = r".*weight|.*blocks|.*scales|mlp\.(gate_up|down)\.bias|attn\.[qkv]_proj\.bias"
_EXPERTS = r"mlp\.(gate_up|down)\.(weight|blocks|scales)"
_LAYER = r"(attn|mlp)\..*"

EDITS: dict[str, Edit] = {
    "weight-zeroed": Edit(r".*(?<!bias)", _each(np.zeros_like), plain=_zeros),
    "bias-dropped": Edit(r".*bias", _each(np.zeros_like), plain=_zeros),
    "lm-head-is-embedding": _swap(r"lm_head\.weight", lambda name: "embedding.weight"),
    "embedding-is-lm-head": _swap(r"embedding\.weight", lambda name: "lm_head.weight"),
    "embedding-rows-shifted": Edit(r"embedding\.weight", _each(*_rolled(0)), _undo(*_rolled(0))),
    "norm-scales-swapped": _swap(r"(attn|mlp)\.norm\.scale", _between("attn.norm", "mlp.norm")),
    "layers-exchanged": Edit(r"attn\.norm\.scale", _of_other_layers),
    "sinks-shifted": Edit(r"attn\.sinks", _each(*_rolled(0)), _undo(*_rolled(0))),
    "weight-bytes-swapped": Edit(_LAYER, _each(bytes_swapped, dtype=BFLOAT16), _undo(bytes_swapped, dtype=BFLOAT16)),
    "weight-through-fp8": Edit(_LAYER, _each(through_fp8, dtype=BFLOAT16)),
    "weight-gate-up-exchanged": Edit(r"mlp\.gate_up\..*", _each(lambda v: v[:, ::-1]), _undo(lambda v: v[:, ::-1])),
    "weight-gate-up-halves": Edit(r"mlp\.gate_up\..*", _each(halved), _undo(_unhalved)),
    "scale-linear": Edit(r"mlp\.(gate_up|down)\.weight", scales_as_numbers),
    **{name: Edit(_EXPERTS, _packed(change)) for name, change in PACKED.items()},
    "heads-transposed": Edit(r"attn\.[qkv]_proj\..*", _each(heads_transposed), _undo(_heads_back)),
    "qkv-split-by-group": Edit(r"attn\.[qkv]_proj\..*", split_by_group),
    "qkv-k-v-exchanged": _swap(r"attn\.[kv]_proj\..*", _between("k_proj", "v_proj")),
    "q-k-for-neighbours": Edit(r"attn\.[qk]_proj\..*", _each(for_neighbours), _undo(_not_for_neighbours)),
    "weight-transposed": Edit(_MATRIX, _each(transposed), _undo(_untransposed)),
    "weight-rows-shifted": Edit(_MATRIX, _each(*_rolled(-2)), _undo(*_rolled(-2))),
}
# The values alone, of packed experts: where a checkpoint holds these and only a hash says what they were.
EDITS["nibbles-swapped"] = EDITS["nibbles-swapped"]._replace(
    undo=_undo(lambda v: v.reshape(*v.shape[:-1], -1, 2)[..., ::-1].reshape(v.shape), dtype=BFLOAT16)
)
EDITS["scale-off-by-one"] = EDITS["scale-off-by-one"]._replace(undo=_undo(lambda v: v / v.dtype.type(2), dtype=BFLOAT16))


def fitting(name: str) -> Iterator[tuple[str, Edit]]:
    return ((fault, edit) for fault, edit in EDITS.items() if re.fullmatch(edit.on, name))


# --- which one it was -------------------------------------------------------------------------------------------

Found = tuple[str, float, float, str]  # mistake, share of values that differ, share that it leaves, which experts


def explain(want: Array | Rows, got: Array, look: Look) -> Iterator[Found]:
    """Which edits would explain that a parameter is not what it should be; of experts, one at a time."""
    if got.dtype.itemsize != want.dtype.itemsize and np.array_equal(got.astype(want.dtype).astype(got.dtype), got):
        got = got.astype(want.dtype)
    if not look.name.startswith(("mlp.gate_up", "mlp.down")):
        before = share(want[:], got)
        for fault, made in _made(want[:], got, look):
            yield fault, before, share(made, got), ""
        return
    experts = range(len(want))
    differing = [e for e in experts if share(want[e], got[e]) > 0]
    e, *others = differing
    if (order := _order(want, got)) is not None:
        yield "experts-permuted", share(want[e], got[e]), share(want[order[e]], got[e]), ""
    where = "" if len(differing) == len(want) else f"expert{'s' * bool(others)} {', '.join(map(str, differing[:6]))}"
    where += f"{', …' if len(differing) > 6 else ''} of {len(want)}" if where else ""

    def left(e: int, fault: str | None = None) -> Iterator[tuple[str, float]]:
        one = slice(e, e + 1)
        pair = look.packed()
        mine = look._replace(packed=lambda: None if pair is None else (pair[0][one], pair[1][one]))
        return ((name, share(made, got[one])) for name, made in _made(want[one], got[one], mine, fault))

    before = share(want[e], got[e])
    for fault, after in left(e):
        if after < before and others:  # tried on one expert, a layer's are gigabytes; said of all only if it is all of theirs
            after = max(after, *(min((rest for _, rest in left(other, fault)), default=1.0) for other in others))
        yield fault, before, after, where


def undone(
    expected: Expected, got: Array, name: str, others: dict[str, Expected], elsewhere: Iterable[Expected]
) -> Iterator[str]:
    """Which edits, undone, give values of the right hash.

    Args:
      name: without the layer; `others` are the layer's parameters by such names, `elsewhere` is this one in other layers.
    """
    if name == "attn.norm.scale" and any(not one.differs(got) for one in elsewhere):
        yield "layers-exchanged"
    for fault, edit in fitting(name):
        partner = others.get(edit.swaps(name)) if edit.swaps is not None else None
        swapped = partner is not None and partner.shape == expected.shape and not partner.differs(got)
        before = edit.undo(got) if edit.undo is not None else ()
        if swapped or edit.plain(got) or any(not expected.differs(np.ascontiguousarray(one)) for one in before):
            yield fault


def _made(want: Array, got: Array, look: Look, only: str | None = None) -> Iterator[tuple[str, Array]]:
    for fault, edit in fitting(look.name):
        if only in (None, fault) and (want.ndim > 1 or fault not in ("weight-transposed", "weight-rows-shifted")):
            yield from ((fault, made) for made in edit.make(want, look))
    if only in (None, "weight-one-block") and (block := _one_block(want, got)) is not None:
        yield "weight-one-block", block


def share(a: Array, b: Array) -> float:
    """Of values that differ, in bits."""
    if a.dtype != b.dtype:
        a, b = a.astype(np.float32), b.astype(np.float32)
    kind = f"u{a.dtype.itemsize}"
    a, b = (np.ascontiguousarray(one).view(kind) for one in (a, b.reshape(a.shape)))
    return int(np.count_nonzero(a != b)) / a.size


def _one_block(want: Array, got: Array) -> Array | None:
    """`want` with one block of 32 as it is in `got`, if several of its values differ and none outside it."""
    if want.ndim < 2 or want.shape[-1] % 32 or want.dtype != got.dtype:
        return None
    kind = f"u{want.dtype.itemsize}"
    unequal = (np.ascontiguousarray(want).view(kind) != np.ascontiguousarray(got).view(kind)).reshape(-1, 32)
    places = np.flatnonzero(unequal.any(-1))
    if len(places) != 1 or unequal.sum() == 1:
        return None
    fixed = np.array(want)
    fixed.reshape(-1, 32)[places] = got.reshape(-1, 32)[places]
    return fixed


def _order(want: Array | Rows, got: Array) -> Array | None:
    """Which expert of `want` stands at each place of `got`, by the first values; None if they are no permutation."""
    a = np.stack([np.ascontiguousarray(want[e]).reshape(-1)[:4096] for e in range(len(want))]).astype(np.float32)
    b = got.reshape(len(got), -1)[:, :4096].astype(np.float32)
    same = np.stack([(a == one).all(-1) for one in b])
    order = same.argmax(-1)
    permuted = same.any(-1).all() and len(set(order.tolist())) == len(order) and (order != np.arange(len(order))).any()
    return order if permuted else None
