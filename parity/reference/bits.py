"""How a stored parameter differs from the reference's, bit by bit."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from parity.reference.layer import to_torch

_PIECE = 1 << 24  # values compared at a time: parameters are up to 4 GB


def difference(want: torch.Tensor, got: np.ndarray) -> str:
    """How a stored parameter differs from the reference's, bit by bit; empty if it does not.

    bfloat16 against float32 is compared as float32, which holds every bfloat16 exactly.
    """
    differing, first, largest, only = 0, None, 0.0, ""
    for start, a, b in _pieces(want, got):
        unequal = _bits(a) != _bits(b)
        if unequal.any():
            differing += int(unequal.sum())
            row, *rest = unequal.nonzero()[0].tolist()
            first = first or [start + row, *rest]
            largest = max(largest, float((a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max()))
            x, y = a[unequal][:1], b[unequal][:1]
            what = "one bit of one value differs" if _one_bit(_bits(x), _bits(y)) else "one value differs"
            only = f"{what}, at {first}: {float(y):.4g}, should be {float(x):.4g}"
    if differing <= 1:
        return only
    share = f"{differing} of {want.numel()} values differ ({differing / want.numel():.2%})"
    share = f"{share}, first at {first}, by at most {largest:.3g}"
    return share if want.dtype == torch.uint8 else f"{share}{_relation(want, got)}"


def _relation(want: torch.Tensor, got: np.ndarray) -> str:
    """How large the difference of two parameters is by the size of the right one, and whether it is a plain multiple of it."""
    aa = ab = bb = 0.0
    low, high = float("inf"), -float("inf")
    for _, a, b in _pieces(want, got):
        a, b = a.double(), b.double()
        aa, ab, bb = aa + float((a * a).sum()), ab + float((a * b).sum()), bb + float((b * b).sum())
        low, high = min(low, float(b.min())), max(high, float(b.max()))
    if not all(map(math.isfinite, (aa, ab, bb))):
        return ", some of it not finite"
    if low == high:
        return f": every value is {low:.4g}"
    relative = f", {math.sqrt(max(aa - 2 * ab + bb, 0.0) / aa):.1e} relative" if aa else ""
    times = ab / aa if aa else 1.0
    # Within what a bfloat16 rounds; a difference that small itself is no multiple.
    multiple = aa and bb - times * ab <= 1e-5 * bb and abs(times - 1) > 0.01
    return f"{relative}: it is {times:.4g} times what it should be" if multiple else relative


def _pieces(want: torch.Tensor, got: np.ndarray) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first row, rows of one, rows of the other), in one dtype."""
    step = max(1, _PIECE * len(want) // want.numel())
    for start in range(0, len(want), step):
        a, b = want[start : start + step], to_torch(got[start : start + step])
        yield (start, a, b) if a.dtype == b.dtype else (start, a.float(), b.float())


def _one_bit(a: torch.Tensor, b: torch.Tensor) -> bool:
    differ = (int(a) ^ int(b)) & ((1 << 8 * a.element_size()) - 1)  # without the sign that Python would count by
    return differ.bit_count() == 1


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])
