"""The bytes of a chunk, read from the source and converted, a cache-sized piece at a time."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from converter.ends import Source
from converter.plan import Chunk, Part
from converter.threads import still_wanted
from oss_model import mxfp4
from oss_model.config import MXFP4_BLOCK
from oss_model.errors import InputError
from oss_model.layouts import BFLOAT16, FLOAT32, Entry
from oss_model.quantization import quantize

PIECE_BYTES = 1 << 19  # of output: decoded, hashed and written while it is in the cache
TILE = 64  # columns that are transposed at a time


class Packed(NamedTuple):
    """Values that were quantized: blocks and scales, in the order in which they are stored.

    Attributes:
      error, square: see `oss_model.quantization.Quantized`.
      read: xxh3_128 of the values read.
    """

    blocks: np.ndarray
    scales: np.ndarray
    error: float
    square: float
    read: bytes


class Reader:
    """Makes chunks out of a checkpoint. Its buffers are reused from chunk to chunk, so each thread has its own.

    Args:
      quantizer: the rule by which values become MXFP4, where they do.
      like: blocks whose values are the same there keep its bytes.
    """

    def __init__(self, source: Source, quantizer: str | None = None, like: Source | None = None):
        self.source, self.quantizer, self.like = source, quantizer, like
        self.bytes_read = 0
        self._buffers: dict[str, np.ndarray] = {}
        self._base = {entry.model: entry for entry in like.entries()} if like else {}
        self._quantized: dict[tuple[str, int], Packed] = {}  # the last one: its blocks and scales are asked for in turn

    def pieces(self, chunk: Chunk) -> "Pieces":
        return Pieces(self, chunk)

    def read(self, entry: Entry, rows: slice, use: str) -> np.ndarray:
        """Rows of the checkpoint's tensor, in the buffer for this `use`: valid until the next time."""
        still_wanted()
        row = math.prod(entry.checkpoint_shape[1:]) * (1 if entry.packed else 4)
        part = self.source.read(entry, rows, self.buffer(use, (rows.stop - rows.start) * row))
        self.bytes_read += part.nbytes
        return part

    def buffer(self, use: str, nbytes: int) -> np.ndarray:
        """uint8 [nbytes]"""
        if use not in self._buffers or len(self._buffers[use]) < nbytes:
            self._buffers[use] = np.empty(nbytes, np.uint8)
        return self._buffers[use][:nbytes]

    def array(self, use: str, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        return self.buffer(use, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def quantized(self, part: Part, span: slice) -> Packed:
        """Some rows of the first axis, as blocks and scales."""
        stem = part.to.model.rpartition(".")[0]
        if (stem, span.start) not in self._quantized:
            self._quantized = {(stem, span.start): self._quantize(part, stem, span)}
        return self._quantized[stem, span.start]

    def _quantize(self, part: Part, stem: str, span: slice) -> Packed:
        entry = part.sources[0]
        read = self.read(entry, rows_of(entry, span), "in 0")
        wanted = _of_values(part.to.order)
        values = arranged(entry.split(read), entry.order, wanted)
        if not values.flags.c_contiguous:
            values = _copy(values, self.array("contiguous", values.shape, values.dtype))
        try:
            blocks, scales, error, square = quantize(values, self.quantizer or "")
        except InputError as e:
            raise InputError(*(f"{self.source.directory}: {entry.checkpoint}: {fault}" for fault in e.faults)) from None
        if self.like is not None:
            base = [
                np.ascontiguousarray(
                    arranged(e.split(self.like.read(e, rows_of(e, span))), e.order, (*wanted[:-1], *e.order[len(wanted) - 1 :]))
                )
                for e in (self._base[f"{stem}.blocks"], self._base[f"{stem}.scales"])
            ]
            _keep(values, blocks, scales, *base)
        return Packed(blocks, scales, error, square, xxhash.xxh3_128(read.reshape(-1).view(np.uint8).data).digest())


def _keep(values: np.ndarray, blocks: np.ndarray, scales: np.ndarray, base_blocks: np.ndarray, base_scales: np.ndarray) -> None:
    """Put the base's bytes, in place, where a block's values are what the base's bytes say."""
    for n in range(len(values)):
        decoded, kind = mxfp4.decode(base_blocks[n], base_scales[n], values.dtype), f"u{values.itemsize}"
        same = (decoded.view(kind) == values[n].view(kind)).reshape(*scales[n].shape, MXFP4_BLOCK).all(-1)
        blocks[n][same], scales[n][same] = base_blocks[n][same], base_scales[n][same]


class Pieces:
    """The values of one chunk: iterate, once, for contiguous arrays in C order. Each is valid until the next one."""

    def __init__(self, reader: Reader, chunk: Chunk):
        self._reader, self._chunk, self._dtype = reader, chunk, chunk.target.dtype
        self._hashes = [xxhash.xxh3_128() for _ in chunk.target.sources]
        self._whole: bytes | None = None
        self.lost: tuple[float, float] | None = None  # of a chunk of blocks, made of values: see `Packed`

    @property
    def digests(self) -> tuple[bytes, ...]:
        """xxh3_128 of the bytes read, one a source, once all pieces have been taken."""
        return tuple(found.digest() for found in self._hashes) if self._whole is None else (self._whole,)

    def read_only(self) -> tuple[bytes, ...]:
        """`digests`, without converting anything."""
        for first, part, span in self._parts():
            for number, entry in enumerate(part.sources, first):
                step = PIECE_BYTES // (math.prod(entry.checkpoint_shape[1:]) * (1 if entry.packed else 4))
                step = max(1, step, self._reader.source.together(entry))
                rows = rows_of(entry, span)
                for start in range(rows.start, rows.stop, step):
                    self._read(number, slice(start, min(start + step, rows.stop)))
        return self.digests

    def _parts(self) -> Iterator[tuple[int, Part, slice]]:
        """Each part: the number of its first source, and the rows of its parameter's first axis."""
        number, parts = 0, self._chunk.target.parts
        for part in parts:
            yield number, part, self._chunk.span if len(parts) == 1 else slice(0, part.to.model_shape[0])
            number += len(part.sources)

    def __iter__(self) -> Iterator[np.ndarray]:
        for number, part, span in self._parts():
            if part.is_quantized:
                yield from self._packed(part, span)
            elif len(part.sources) == 2:
                yield from self._decoded(number, part, span)
            elif part.keeps_order:
                yield from self._in_order(number, part.sources[0], span)
            else:
                yield from self._rearranged(number, part, span)
        if not self._chunk.target.place:
            for _ in range(self._chunk.target.rows - (self._chunk.span.stop - self._chunk.span.start)):
                yield np.zeros(self._chunk.target.shape[1:], self._dtype)

    def _in_order(self, number: int, entry: Entry, span: slice) -> Iterator[np.ndarray]:
        """What is stored as it was read: a piece is still in the cache when it is written."""
        rows = rows_of(entry, span)
        step = max(1, PIECE_BYTES // (math.prod(entry.checkpoint_shape[1:]) * self._dtype.itemsize))
        together = max(step, self._reader.source.together(entry))
        for start in range(rows.start, rows.stop, together):
            part = self._read(number, slice(start, min(start + together, rows.stop)))
            for first in range(0, len(part), step):
                yield self._stored(part[first : first + step])

    def _rearranged(self, number: int, part: Part, span: slice) -> Iterator[np.ndarray]:
        entry = part.sources[0]
        values = entry.split(self._read(number, rows_of(entry, span)))
        yield from self._ordered(values, entry.order, part.to.order)

    def _decoded(self, number: int, part: Part, span: slice) -> Iterator[np.ndarray]:
        read = [e.split(self._read(number + n, rows_of(e, span))) for n, e in enumerate(part.sources)]
        order, wanted = _of_values(part.sources[0].order), part.to.order
        if order[-1] == wanted[-1]:
            blocks, scales = (
                arranged(array, e.order, (*wanted[:-1], *e.order[len(wanted) - 1 :]))
                for array, e in zip(read, part.sources, strict=True)
            )
            for index in runs(scales.shape[:-1], scales.shape[-1] * MXFP4_BLOCK * self._dtype.itemsize):
                out = self._reader.array("decoded", (blocks[index].size * 2,), BFLOAT16)
                yield self._stored(mxfp4.decode(blocks[index], scales[index], out=out))
            return
        blocks, scales = read
        out = self._reader.array("decoded", (*scales.shape[:-1], scales.shape[-1] * MXFP4_BLOCK), BFLOAT16)
        yield from self._ordered(mxfp4.decode(blocks, scales, out=out), order, wanted)

    def _packed(self, part: Part, span: slice) -> Iterator[np.ndarray]:
        packed = self._reader.quantized(part, span)
        self._whole = packed.read
        if part.to.model.endswith("blocks"):
            self.lost = packed.error, packed.square
            yield packed.blocks
        else:
            yield packed.scales

    def _ordered(self, values: np.ndarray, order: Sequence[str], wanted: Sequence[str]) -> Iterator[np.ndarray]:
        """`values`, whose axes are named by `order`, as they are stored."""
        if wanted[-1] != order[-1] and wanted[1] == order[-1]:
            # For x @ W: the rows in their order first, which is cheap, and then a plain transposition.
            rows = arranged(values, order, (wanted[0], *wanted[2:], wanted[1]))
            if not rows.flags.c_contiguous:
                rows = _copy(rows, self._reader.array("rows", rows.shape, rows.dtype))
            found = rows.reshape(len(rows), -1, rows.shape[-1]).swapaxes(1, 2)
        else:
            found = arranged(values, order, wanted)
        for index in runs(found.shape[:-1], found.shape[-1] * self._dtype.itemsize):
            yield self._stored(found[index])

    def _read(self, number: int, rows: slice) -> np.ndarray:
        part = self._reader.read(self._chunk.target.sources[number], rows, f"in {number}")
        self._hashes[number].update(part.reshape(-1).view(np.uint8).data)
        return part

    def _stored(self, values: np.ndarray) -> np.ndarray:
        """`values` as contiguous `target.dtype`. Exact, but in a form that may round: `open_source` has refused others."""
        still_wanted()
        if not values.flags.c_contiguous:
            values = _copy(values, self._reader.array("contiguous", values.shape, values.dtype))
        if values.dtype == self._dtype:
            return values
        out = self._reader.array("stored", values.shape, self._dtype)
        if self._dtype == FLOAT32:
            mxfp4.widen_into(values, out)
        else:
            _narrow(values, out)
        return out


def _narrow(values: np.ndarray, out: np.ndarray) -> None:
    """float32 -> bfloat16, the nearest, of two the even; what bfloat16 holds stays, where a cast may quiet a NaN."""
    bits = values.view(np.uint32)
    if (bits & 0xFFFF).any():
        out[...] = values.astype(BFLOAT16)
    else:
        np.right_shift(bits, 16, out=out.view(np.uint16), casting="unsafe")


def rows_of(entry: Entry, span: slice) -> slice:
    """Rows of the parameter's first axis, as those of the checkpoint's tensor, where it may be split: (heads dim)."""
    each = entry.checkpoint_shape[0] // entry.model_shape[0]
    return slice(span.start * each, span.stop * each)


def arranged(values: np.ndarray, order: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """A view whose axes, named by `order`, are in the order that is `wanted`."""
    return values.transpose([order.index(axis) for axis in wanted])


def _of_values(order: tuple[str, ...]) -> tuple[str, ...]:
    """The order of the values that blocks, or scales, in this order are of."""
    lead = tuple(axis for axis in order if axis != "bytes")
    return (*lead[:-1], lead[-1].removesuffix("_groups"))


def _copy(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Copy to `out`, which is contiguous. Transposed values go in columns, each cache line being read once: 5 times as fast."""
    step = values.shape[-1] if values.strides[-1] == values.itemsize else TILE
    for start in range(0, values.shape[-1], step):
        out[..., start : start + step] = values[..., start : start + step]
    return out


def runs(lead: tuple[int, ...], row_bytes: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that walk an array of shape [*lead, row] in C order, about PIECE_BYTES at a time."""
    if not lead:
        yield (slice(None),)
        return
    count, *inner = lead
    below = math.prod(inner) * row_bytes
    if below > PIECE_BYTES and inner:
        for i in range(count):
            for rest in runs(tuple(inner), row_bytes):
                yield (i, *rest)
        return
    step = max(1, PIECE_BYTES // below)
    for start in range(0, count, step):
        yield (slice(start, start + step),)
