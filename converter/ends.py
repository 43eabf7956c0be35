"""The two ends of the street: what a conversion asks of where parameters come from, and of where they go.

Between them `converter.conversion` does what is the same for all: it cuts the work into shares and chunks, keeps threads at
it, makes of what is read what is stored (`converter.chunks`), remembers what is written, goes on after a cut, and verifies.
Sources are safetensors (`oss_model.shards`), Orbax (`converter.orbax_source`), and either with LoRA updates added
(`converter.merging`). Sinks are an Orbax directory (`converter.store`) and one of safetensors (`converter.shard_store`).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from oss_model.config import ModelConfig
from oss_model.layouts import Entry, Layout

if TYPE_CHECKING:
    from converter.chunks import Pieces
    from converter.plan import Chunk, Plan


class Source(Protocol):
    """A checkpoint that is known to be a complete model. Any thread may read."""

    directory: Path
    layout: Layout
    cfg: ModelConfig

    @property
    def home(self) -> Path:
        """The directory of config.json, and of what else belongs to the model."""
        ...

    def entries(self) -> list[Entry]:
        """Every parameter that it has, once."""
        ...

    def dtype(self, entry: Entry) -> np.dtype:
        """As it is stored."""
        ...

    def read(self, entry: Entry, rows: slice = ..., buffer: np.ndarray | None = None) -> np.ndarray:
        """The parameter of `entry`, or a run along the first axis of its tensor, in that tensor's order and dtype.

        Args:
          buffer: uint8, flat, large enough: may be read into.
        """
        ...

    def together(self, entry: Entry) -> int:
        """How many rows of its tensor's first axis are read at once, whether they are asked for or not."""
        ...

    def files_of(self, entry: Entry) -> list[Path]:
        """The files that it is read from."""
        ...

    @property
    def files(self) -> list[Path]:
        """Those of all of them."""
        ...

    def close(self) -> None: ...


class Sink(Protocol):
    """Where chunks go until the checkpoint is complete. Any thread may call what is about one chunk."""

    def load(self) -> None:
        """Import what completing takes, before memory is measured."""
        ...

    def write_chunk(self, chunk: "Chunk", pieces: Iterable[np.ndarray]) -> bytes:
        """Write one chunk, in place of what may be there; returns the xxh3_128 of its values."""
        ...

    def is_whole(self, chunk: "Chunk") -> bool:
        """Whether it is there in its full size. What is in it is for `check` to say."""
        ...

    def present(self, chunks: "Iterable[Chunk]") -> int:
        """Bytes of them that take room on the disk already."""
        ...

    def settle(self, chunk: "Chunk") -> None:
        """Wait until nothing can take this chunk away any more."""
        ...

    def settle_names(self, chunks: "Iterable[Chunk]") -> None:
        """The same for what these chunks are found by."""
        ...

    def check(self, chunk: "Chunk", pieces: "Pieces | None", buffer: np.ndarray) -> tuple[bytes, str | None]:
        """Read it back: the xxh3_128 of its values, and a line if it is damaged, or not what `pieces` say."""
        ...

    def ahead(self, chunks: "list[Chunk]") -> "Iterable[Chunk]":
        """The chunks in order, each announced to the disk somewhat before it is checked."""
        ...

    def discard(self, chunk: "Chunk") -> None:
        """Take a chunk away that is not what it should be, so that whoever finishes next writes it."""
        ...

    def describe(self, plan: "Plan", companions: Iterable[Path], config: bytes | None) -> None:
        """Write what lies beside the chunks, and does not yet make the checkpoint complete.

        Args:
          config: the text of config.json, where it is not a companion.
        """
        ...

    def complete(self, plan: "Plan", manifest: Callable[[], bytes]) -> None:
        """Write what makes readers take it for a checkpoint, then the manifest, made of all that is there, and settle all."""
        ...
