"""The bytes of a chunk, read from the source and converted, a cache-sized piece at a time."""

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import xxhash

from converter.plan import Chunk
from converter.threads import still_wanted
from oss_model import mxfp4
from oss_model.layouts import Entry
from oss_model.shards import Checkpoint

PIECE_BYTES = 1 << 19  # of output: decoded, hashed and written while it is in the cache
TILE = 64  # columns that are transposed at a time

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Reader:
    """Makes chunks out of a checkpoint. Its buffers are reused from chunk to chunk, so each thread has its own."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self._buffers: dict[str, np.ndarray] = {}

    def pieces(self, chunk: Chunk) -> "Pieces":
        return Pieces(self, chunk)

    def read(self, entry: Entry, rows: slice, use: str) -> np.ndarray:
        """Rows of the checkpoint's tensor, in the buffer for this `use`: valid until the next time."""
        still_wanted()
        row = math.prod(entry.checkpoint_shape[1:]) * (1 if entry.packed else 4)
        part = self.checkpoint.read(entry, rows, self.buffer(use, (rows.stop - rows.start) * row))
        self.bytes_read += part.nbytes
        return part

    def buffer(self, use: str, nbytes: int) -> np.ndarray:
        """uint8 [nbytes]"""
        if use not in self._buffers or len(self._buffers[use]) < nbytes:
            self._buffers[use] = np.empty(nbytes, np.uint8)
        return self._buffers[use][:nbytes]


class Pieces:
    """The values of one chunk: iterate, once, for contiguous arrays in C order. Each is valid until the next one."""

    def __init__(self, reader: Reader, chunk: Chunk):
        self._reader, self._chunk, self._dtype = reader, chunk, chunk.target.dtype
        self._hashes = [xxhash.xxh3_128() for _ in chunk.target.sources]

    @property
    def digests(self) -> tuple[bytes, ...]:
        """xxh3_128 of the bytes read, one a source, once all pieces have been taken."""
        return tuple(found.digest() for found in self._hashes)

    def read_only(self) -> tuple[bytes, ...]:
        """`digests`, without converting anything."""
        span = self._source_span()
        for number, entry in enumerate(self._chunk.target.sources):
            step = max(1, PIECE_BYTES // (math.prod(entry.checkpoint_shape[1:]) * (1 if entry.packed else 4)))
            for start in range(span.start, span.stop, step):
                self._read(number, slice(start, min(start + step, span.stop)))
        return self.digests

    def _source_span(self) -> slice:
        target, span = self._chunk.target, self._chunk.span
        each = target.sources[0].checkpoint_shape[0] // target.shape[0]  # the source's first axis may be split: (heads dim)
        return slice(span.start * each, span.stop * each)

    def __iter__(self) -> Iterator[np.ndarray]:
        target, span = self._chunk.target, self._source_span()
        if len(target.sources) == 2:
            yield from self._decoded(span)
        elif target.sources[0].keeps_order:
            yield from self._in_order(span)
        else:
            yield from self._rearranged(span)
        missing = target.rows - (self._chunk.span.stop - self._chunk.span.start)
        for _ in range(missing):
            yield np.zeros(target.shape[1:], self._dtype)

    def _in_order(self, span: slice) -> Iterator[np.ndarray]:
        """What is stored as it was read: a piece is still in the cache when it is written."""
        entry = self._chunk.target.sources[0]
        step = max(1, PIECE_BYTES // (math.prod(entry.checkpoint_shape[1:]) * self._dtype.itemsize))
        for start in range(span.start, span.stop, step):
            yield self._stored(self._read(0, slice(start, min(start + step, span.stop))))

    def _rearranged(self, span: slice) -> Iterator[np.ndarray]:
        parameter = self._chunk.target.sources[0].to_model(self._read(0, span))  # a view
        for index in runs(parameter.shape[:-1], parameter.shape[-1] * self._dtype.itemsize):
            yield self._stored(parameter[index])

    def _decoded(self, span: slice) -> Iterator[np.ndarray]:
        entries = self._chunk.target.sources
        blocks, scales = (entry.to_model(self._read(number, span)) for number, entry in enumerate(entries))
        for index in runs(scales.shape[:-1], self._chunk.target.shape[-1] * self._dtype.itemsize):
            out = self._out("decoded", (blocks[index].size * 2,), BFLOAT16)
            yield self._stored(mxfp4.decode(blocks[index], scales[index], out=out))

    def _read(self, number: int, rows: slice) -> np.ndarray:
        part = self._reader.read(self._chunk.target.sources[number], rows, f"in {number}")
        self._hashes[number].update(part.reshape(-1).view(np.uint8).data)
        return part

    def _stored(self, values: np.ndarray) -> np.ndarray:
        """`values` as contiguous `target.dtype`. Exact: `open_source` has refused what would not be."""
        still_wanted()
        if not values.flags.c_contiguous:
            values = _copy(values, self._out("contiguous", values.shape, values.dtype))
        if values.dtype == self._dtype:
            return values
        out = self._out("stored", values.shape, self._dtype)
        # Bits, not casts: a cast may quiet a NaN.
        if self._dtype == BFLOAT16:
            np.right_shift(values.view(np.uint32), 16, out=out.view(np.uint16), casting="unsafe")
        else:
            np.left_shift(values.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
        return out

    def _out(self, use: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nbytes = math.prod(shape) * dtype.itemsize
        return self._reader.buffer(use, nbytes).view(dtype).reshape(shape)


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
