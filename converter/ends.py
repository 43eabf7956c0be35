"""The two ends of the street: what a conversion asks of where parameters come from, and of where they go.

Between them `converter.conversion` does what is the same for all: it cuts the work into shares and chunks, keeps threads at
it, makes of what is read what is stored (`converter.chunks`), remembers what is written, goes on after a cut, and verifies.
Sources are safetensors (`oss_model.shards`), Orbax (`converter.orbax_source`), and either with LoRA updates added
(`converter.merging`). Sinks are an Orbax directory (`converter.store`), one of safetensors (`converter.shard_store`), and Orbax
in a bucket (`converter.bucket_store`). A destination is DST with what is remembered there until it is whole: a directory
(`converter.directory`), with locks and renames, or a prefix of a bucket (`converter.bucket`), which has neither.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from oss_model.config import ModelConfig
from oss_model.layouts import Entry, Layout

if TYPE_CHECKING:
    from converter.chunks import Pieces
    from converter.journal import Hashes
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
    """Where chunks go until the checkpoint is complete. Any thread may call what is about one chunk.

    Attributes:
      workers: how many threads write at a time, where memory allows.
    """

    workers: int

    def held(self, plan: "Plan") -> int:
        """Bytes of a chunk that a thread holds at the most until it is stored, besides what it is made of."""
        ...

    def load(self) -> None:
        """Import what completing takes, before memory is measured."""
        ...

    def write_chunk(self, chunk: "Chunk", pieces: "Pieces") -> bytes:
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


class Noted(Protocol):
    """Where it is noted which chunks are written."""

    def add(self, chunk: str, hashes: "Hashes") -> None:
        """Note that the chunk of this path is written. Any thread may call this."""
        ...

    def sync(self) -> None:
        """Wait until nothing can take away what is noted."""
        ...

    def close(self) -> None: ...


class Destination(Protocol):
    """DST, and what is remembered there of a conversion until it is whole: who is at work, at what, and how far it is.

    Attributes:
      path: DST.
      work: where things are until they are whole.
      checkpoint: the same, of the checkpoint's own files.
      process: (I, N): this is the I-th of N that write shares.
      notes: what whoever asked for it should know.
    """

    process: tuple[int, int]
    notes: list[str]

    @property
    def path(self) -> Path: ...

    @property
    def work(self) -> Path: ...

    @property
    def checkpoint(self) -> Path: ...

    def sink(self, plan: "Plan") -> Sink:
        """Where the chunks of `plan` go."""
        ...

    def is_under_way(self) -> bool:
        """Whether an earlier run was cut off while it put its checkpoint in its place."""
        ...

    def take_up(self) -> bool:
        """End what an earlier run was cut off at while it put its checkpoint in its place. Returns whether it is there now.

        Raises:
          InputError: if something else is in the way; everything is left as it is.
        """
        ...

    def check(self, source: Path, overwrite: bool) -> None:
        """
        Raises:
          InputError: if writing here would lose something, or write into the source.
        """
        ...

    def lock(self, before: dict) -> None:
        """Be the one at work here: alone, or one of several.

        Args:
          before: the fingerprint of the source.

        Raises:
          InputError: if somebody else is.
        """
        ...

    def begin(self, before: dict, restart: bool) -> None:
        """Begin the conversion that the fingerprint `before` describes, or take it up.

        Args:
          restart: throw away an unfinished conversion of something else instead of refusing.

        Raises:
          InputError: if what was begun is not what is wanted now.
        """
        ...

    def journal(self) -> Noted: ...

    def journaled(self) -> "Mapping[str, Hashes]":
        """Path of each chunk that is noted as written, by whichever process, in this run or an earlier one."""
        ...

    def reopen_share(self) -> bool:
        """Take back `share_done`, before chunks are written again. Returns whether they are still wanted."""
        ...

    def share_done(self) -> bool:
        """Note that this process's share is written. Returns whether it is to finish the checkpoint."""
        ...

    def finish(self, source: Path, overwrite: bool) -> None:
        """Put the checkpoint, which is whole, in its place, and forget what was remembered of it.

        Raises:
          InputError: as `check`.
        """
        ...

    def is_pending(self) -> bool:
        """Whether the checkpoint is not in its place yet, by this process or another."""
        ...

    def leave(self) -> None:
        """Let others at it, whatever has happened."""
        ...

    def kept_in(self) -> Path | None:
        """Where an unfinished conversion is kept; None where nothing is written yet."""
        ...

    def unknown_files(self, manifest: dict) -> list[str]:
        """Every file in the checkpoint at DST that its manifest does not name: relative paths."""
        ...
