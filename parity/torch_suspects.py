"""Known mistakes in a parameter: which one makes of the right values what a checkpoint holds?

Names are those of `parity.faults`. Nothing here is shared with the side that is judged; see `parity.reference`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from parity.torch_layer import gate_and_up


def explain(
    reference: Any, n: int | None, name: str, want: torch.Tensor, got: torch.Tensor
) -> Iterator[tuple[str, float, float, str]]:
    """Which mistakes would explain that a parameter is not what it should be; see `parity.sides.Expected.suspects`.

    Args:
      reference: to look at other parameters.
      n: the layer; None outside the layers.
      name: as in an Orbax checkpoint of ours, without the layer.
      want, got: as it should be, and as it is.
    """
    if got.dtype not in _BITS or (got.dtype != want.dtype and torch.equal(got.to(want.dtype).to(got.dtype), got)):
        got = got.to(want.dtype)
    if not name.startswith(("mlp.gate_up", "mlp.down")):
        before = _share(want, got)
        for fault, wrong in _suspects(reference, n, name, want, got, 0):
            yield fault, before, _share(wrong, got), ""
        return
    wrong_ones = [e for e in range(len(want)) if _share(want[e], got[e]) > 0]
    e, *others = wrong_ones
    if (order := _order(want, got)) is not None:
        yield "experts-permuted", _share(want[e], got[e]), _share(want[order[e]], got[e]), ""
    where = "" if len(wrong_ones) == len(want) else f"expert{'s' * bool(others)} {', '.join(map(str, wrong_ones[:6]))}"
    where += f"{', …' if len(wrong_ones) > 6 else ''} of {len(want)}" if where else ""
    before = _share(want[e], got[e])
    for fault, wrong in _suspects(reference, n, name, want[e : e + 1], got[e : e + 1], e):
        after = _share(wrong, got[e : e + 1])
        if after < before and others:  # tried on one expert, a layer's are gigabytes; said of all only if it is all of theirs
            after = max(after, *(_again(reference, n, name, want, got, other, fault) for other in others))
        yield fault, before, after, where


def _again(reference: Any, n: int | None, name: str, want: torch.Tensor, got: torch.Tensor, e: int, fault: str) -> float:
    """The least share of values that this mistake leaves unexplained in expert e."""
    made = _suspects(reference, n, name, want[e : e + 1], got[e : e + 1], e)
    return min((_share(wrong, got[e : e + 1]) for other, wrong in made if other == fault), default=1.0)


_BITS = {torch.uint8: torch.uint8, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def _share(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of values that differ, in bits."""
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    kind = _BITS[a.dtype]
    return int(torch.count_nonzero(a.contiguous().view(kind) != b.contiguous().view(kind))) / a.numel()


def _suspects(
    reference: Any, n: int | None, name: str, want: torch.Tensor, got: torch.Tensor, e: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """What the parameter would be with each mistake that may have happened to it."""
    matrix, expert = want.dim() > 1, name.startswith(("mlp.gate_up", "mlp.down"))
    yield ("bias-dropped" if name.endswith("bias") else "weight-zeroed"), torch.zeros_like(want)
    if n is None:
        if name == "lm_head.weight":
            yield "lm-head-is-embedding", reference._model_tensor("model.embed_tokens.weight")
        if name == "embedding.weight":  # or exchanged, which lm_head tells: `Diagnosis.parameter`
            yield "embedding-is-lm-head", reference._model_tensor("lm_head.weight")
            yield from (("embedding-rows-shifted", want.roll(by, 0)) for by in (1, -1))
        return
    layer = reference.parameter_of
    if name.endswith("norm.scale"):
        yield "norm-scales-swapped", layer(n, "mlp.norm.scale" if name == "attn.norm.scale" else "attn.norm.scale")
    if name == "attn.norm.scale":
        yield from (("layers-exchanged", layer(m, name)) for m in range(reference.sizes.layers) if m != n)
    if name == "attn.sinks":
        yield from (("sinks-shifted", want.roll(by)) for by in (1, -1))
    if want.dtype == torch.bfloat16:
        yield (
            "weight-bytes-swapped",
            want.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)).flip(-1).flatten(-2).view(want.dtype),
        )
        yield "weight-through-fp8", want.to(torch.float8_e4m3fn).to(want.dtype)
    if expert:
        yield from _expert_suspects(reference, n, name, want, e)
    elif name.startswith("attn.") and name.split(".")[1] in ("q_proj", "k_proj", "v_proj"):
        yield "heads-transposed", want.transpose(0, 1).reshape(want.shape)
        yield from _qkv_suspects(reference, n, name, want)
    if matrix:
        yield "weight-transposed", want.transpose(-1, -2).reshape(want.shape)
        yield from (("weight-rows-shifted", want.roll(by, -2)) for by in (1, -1))
        block = _one_block(want, got)
        if block is not None:
            yield "weight-one-block", block


def _one_block(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor | None:
    """`want` with one block of 32 as it is in `got`, if several of its values differ and none outside it."""
    if want.shape[-1] % 32 or want.dtype != got.dtype:
        return None
    unequal = (want != got).reshape(-1, 32)
    wrong = unequal.any(-1).nonzero().flatten()
    if len(wrong) != 1 or int(unequal.sum()) == 1:
        return None
    fixed = want.clone().contiguous()
    fixed.view(-1, 32)[wrong] = got.reshape(-1, 32)[wrong]
    return fixed


def _expert_suspects(reference: Any, n: int, name: str, want: torch.Tensor, e: int):
    """Of one expert, number e."""
    if name.startswith("mlp.gate_up"):
        yield "weight-gate-up-exchanged", want.flip(1)
        yield "weight-gate-up-halves", want.transpose(1, 2).reshape(want.shape)
    kind = name.rsplit(".", 1)[1]
    stored = {} if kind == "bias" else reference.stored_layer(n)
    prefix = f"mlp.experts.{'gate_up' if name.startswith('mlp.gate_up') else 'down'}_proj"
    if f"{prefix}_blocks" in stored:
        arrange = gate_and_up if name.startswith("mlp.gate_up") else lambda t: t
        one = [stored[f"{prefix}_{part}"][e : e + 1] for part in ("blocks", "scales")]
        if kind == "weight":
            yield "scale-linear", arrange(_scales_as_numbers(*one))
        for fault, change in _PACKED.items():
            blocks, scales = change(*one)
            if kind == "weight":
                yield fault, arrange(convert_moe_packed_tensors(blocks, scales).transpose(1, 2))
            else:
                yield fault, arrange({"blocks": blocks, "scales": scales}[kind])


def _order(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor | None:
    """Which expert of `want` stands at each place of `got`, by the first values; None if they are no permutation."""
    a, b = (t.flatten(1)[:, :4096].float() for t in (want, got))
    same = (a[None] == b[:, None]).all(-1)
    found = same.int().argmax(-1)
    wrong = bool((found == torch.arange(len(found))).all()) or len(set(found.tolist())) < len(found) or not same.any(-1).all()
    return None if wrong else found


def _qkv_suspects(reference: Any, n: int, name: str, want: torch.Tensor):
    _, projection, leaf = name.split(".")
    q, k, v = (reference.parameter_of(n, f"attn.{p}_proj.{leaf}") for p in "qkv")
    groups = len(q) // len(k)
    fused = torch.cat([q, k, v]).unflatten(0, (len(k), groups + 2))
    parts = {"q_proj": fused[:, :groups].flatten(0, 1), "k_proj": fused[:, groups], "v_proj": fused[:, groups + 1]}
    yield "qkv-split-by-group", parts[projection]
    if projection != "q_proj":
        yield "qkv-k-v-exchanged", v if projection == "k_proj" else k
    if projection != "v_proj":
        yield "q-k-for-neighbours", want.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _scales_as_numbers(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    codes = convert_moe_packed_tensors(blocks, torch.full_like(scales, 127)).transpose(1, 2)
    return (codes.float() * scales.float().repeat_interleave(32, dim=-1)).to(torch.bfloat16)


# mistakes in reading MXFP4: blocks and scales, changed before transformers decodes them
_PACKED: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "nibbles-swapped": lambda blocks, scales: ((blocks << 4) | (blocks >> 4), scales),
    "scale-off-by-one": lambda blocks, scales: (blocks, scales + 1),
    "scale-ignored": lambda blocks, scales: (blocks, torch.full_like(scales, 127)),
    "scales-shifted": lambda blocks, scales: (blocks, scales.roll(1, -1)),
    "sign-lost": lambda blocks, scales: (blocks & 0x77, scales),
    "minus-zero-lost": lambda blocks, scales: (_plus_zero(blocks & 0x0F) | (_plus_zero(blocks >> 4) << 4), scales),
}


def _plus_zero(code: torch.Tensor) -> torch.Tensor:
    return torch.where(code == 8, 0, code)
