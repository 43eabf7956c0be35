"""The two ends of the street: what a conversion asks of where parameters come from, and of where they go.

Between them `converter.conversion` does what is the same for all: it cuts the work into shares and chunks, keeps threads at
it, remembers what is written, goes on after a cut, and verifies. Today one source is there, safetensors (`converter.chunks`),
and one sink, an Orbax directory (`converter.store`).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from converter.chunks import Pieces
from converter.plan import Chunk, Plan


class Source(Protocol):
    """A thread's own reader of a source."""

    bytes_read: int  # of the source, so far

    def pieces(self, chunk: Chunk) -> Pieces:
        """The values of one chunk as they will be stored, in order and a piece at a time; afterwards, hashes of what was
        read for it."""
        ...


class Sink(Protocol):
    """Where chunks go until the checkpoint is complete. Any thread may call what is about one chunk."""

    def write_chunk(self, chunk: Chunk, pieces: Iterable[np.ndarray]) -> bytes:
        """Write one chunk, in place of what may be there; returns the xxh3_128 of its values."""
        ...

    def is_whole(self, chunk: Chunk) -> bool:
        """Whether it is there in its full size. What is in it is for `check` to say."""
        ...

    def settle(self, chunk: Chunk) -> None:
        """Wait until nothing can take this chunk away any more."""
        ...

    def settle_names(self, chunks: Iterable[Chunk]) -> None:
        """The same for what these chunks are found by."""
        ...

    def check(self, chunk: Chunk, pieces: Pieces | None, buffer: np.ndarray) -> tuple[bytes, str | None]:
        """Read it back: the xxh3_128 of its values, and a line if it is damaged, or not what `pieces` say."""
        ...

    def ahead(self, chunks: list[Chunk]) -> Iterable[Chunk]:
        """The chunks in order, each announced to the disk somewhat before it is checked."""
        ...

    def discard(self, chunk: Chunk) -> None:
        """Take a chunk away that is not what it should be, so that whoever finishes next writes it."""
        ...

    def describe(self, plan: Plan, companions: Iterable[Path]) -> None:
        """Write what lies beside the chunks, and does not yet make the checkpoint complete."""
        ...

    def complete(self, plan: Plan, manifest: Callable[[], bytes]) -> None:
        """Write what makes readers take it for a checkpoint, then the manifest, made of all that is there, and settle all."""
        ...
