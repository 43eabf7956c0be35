"""The bytes of a chunk, read from the source and converted, a cache-sized piece at a time."""

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import xxhash

from converter.plan import Chunk
from oss_model import mxfp4
from oss_model.shards import Checkpoint

PIECE_BYTES = 1 << 20  # of output: decoded, hashed and written while it is in the cache

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Reader:
    """Makes chunks out of a checkpoint. Its buffers are reused from chunk to chunk, so each thread has its own."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self._buffers: dict[str, np.ndarray] = {}

    def pieces(self, chunk: Chunk) -> "Pieces":
        """Read what `chunk` is made of."""
        parts, digests = [], []
        for number, entry in enumerate(chunk.target.sources):
            row = math.prod(entry.checkpoint_shape) // entry.checkpoint_shape[0]
            span = chunk.span
            if chunk.target.rows == chunk.target.shape[0]:  # whole, and its first axis may be split: (heads dim)
                span = slice(0, entry.checkpoint_shape[0])
            nbytes = (span.stop - span.start) * row * (1 if entry.packed else 4)
            part = self.checkpoint.read(entry, span, self._buffer(f"in {number}", nbytes))
            self.bytes_read += part.nbytes
            digests.append(xxhash.xxh3_128(part.reshape(-1).view(np.uint8).data).digest())
            parts.append(entry.to_model(part))
        return Pieces(chunk, parts, digests, self._buffer)

    def _buffer(self, use: str, nbytes: int) -> np.ndarray:
        """uint8 [>= nbytes]"""
        if use not in self._buffers or len(self._buffers[use]) < nbytes:
            self._buffers[use] = np.empty(nbytes, np.uint8)
        return self._buffers[use]


class Pieces:
    """The values of one chunk: iterate for contiguous arrays, in C order. Each is valid until the next one."""

    def __init__(self, chunk: Chunk, parts: list[np.ndarray], digests: list[bytes], buffer):
        self.chunk = chunk
        self.digests = digests  # xxh3_128 of the bytes read, one a source
        self._parts = parts  # in the model's orientation: views of what was read
        self._buffer = buffer

    def __iter__(self) -> Iterator[np.ndarray]:
        first, dtype = self._parts[0], self.chunk.target.dtype
        lead = first.shape[: -len(self._parts)]  # [..., groups, 16] with [..., groups], or [..., last]
        row = self.chunk.target.shape[-1] * dtype.itemsize
        for index in runs(lead, row):
            if len(self._parts) == 2:
                yield self._decoded(self._parts[0][index], self._parts[1][index])
            else:
                yield self._stored(first[index])
        missing = self.chunk.target.rows - (self.chunk.span.stop - self.chunk.span.start)
        for _ in range(missing):
            yield np.zeros(self.chunk.target.shape[1:], dtype)

    def _decoded(self, blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
        out = self._out("decoded", (blocks.size * 2,), BFLOAT16)
        return self._stored(mxfp4.decode(blocks, scales, out=out))

    def _stored(self, values: np.ndarray) -> np.ndarray:
        """`values` as contiguous `target.dtype`. Exact: `open_source` has refused what would not be."""
        dtype = self.chunk.target.dtype
        if values.dtype == dtype:
            if values.flags.c_contiguous:
                return values
            out = self._out("stored", values.shape, dtype)
            np.copyto(out, values)
            return out
        out = self._out("stored", values.shape, dtype)
        # Bits, not casts: a cast may quiet a NaN.
        if dtype == BFLOAT16:
            np.right_shift(values.view(np.uint32), 16, out=out.view(np.uint16), casting="unsafe")
        else:
            np.left_shift(values.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
        return out

    def _out(self, use: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nbytes = math.prod(shape) * dtype.itemsize
        return self._buffer(use, nbytes)[:nbytes].view(dtype).reshape(shape)


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
