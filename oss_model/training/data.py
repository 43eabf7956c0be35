"""What is trained on, by step: windows of a text, or documents packed into rows."""

import datetime
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oss_model.config import ModelConfig
from oss_model.errors import InputError
from oss_model.sharding import activation_spec
from oss_model.training.chat import Document, Tokenizer, read_documents
from oss_model.training.packing import epoch_rows, pack
from oss_model.training.steps import Batch


def tokenize(text: Path, checkpoint: Path) -> np.ndarray:
    """int32 [tokens]: by the checkpoint's tokenizer, or, where it has none, the bytes themselves."""
    if not (checkpoint / "tokenizer.json").exists():
        return np.frombuffer(text.read_bytes(), np.uint8).astype(np.int32)
    try:
        return Tokenizer(checkpoint).encode(text.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{text}: expected UTF-8, found byte {error.object[error.start]:#x} at {error.start}") from None


class Data:
    """`data(step)` is the batch of a step, which the step alone decides, so that a resumed run sees the same.

    Args:
      file: .jsonl, of documents; or else a text.
      batch: rows a step.
      length: tokens a row of which the next is predicted.
    """

    def __init__(self, file: Path, checkpoint: Path, batch: int, length: int, today: datetime.date):
        self.file, self.batch, self.length = file, batch, length
        self.windows = file.suffix != ".jsonl"
        if self.windows:
            self.tokens = tokenize(file, checkpoint)
            pieces = [self.tokens[at : at + length + 1] for at in range(0, len(self.tokens) - 1, length)]
            self.documents = [Document(piece, np.ones(len(piece), bool)) for piece in pieces]
        else:
            self.documents = read_documents(file, checkpoint, today)
            self.tokens = np.concatenate([document.tokens for document in self.documents])

    @functools.cached_property
    def rows(self) -> Batch:
        """All of it, once."""
        return pack(self.documents, self.length + 1)

    def faults(self, cfg: ModelConfig) -> list[str]:
        found = []
        if self.windows and len(self.tokens) <= self.length:
            found.append(f"{self.file}: expected more than {self.length} tokens (--length), found {len(self.tokens)}")
        if len(self.tokens) and self.tokens.max() >= cfg.vocab_size:
            most = f"tokens from 0 to {cfg.vocab_size - 1}, found {self.tokens.max()}"
            found.append(f"{self.file}: expected {most}; is it that tokenizer?")
        if not self.windows and not self.rows.counted[:, 1:].any():
            found.append(f"{self.file}: expected tokens that count within --length {self.length}, found none")
        return found

    def __str__(self) -> str:
        if self.windows:
            return f"{self.file}: {len(self.tokens):,} tokens, of which windows are taken at random"
        full, counted = (self.rows.segment_ids > 0).mean(), self.rows.counted.sum()
        cut = sum(len(document.tokens) > self.length + 1 for document in self.documents)
        end = f"; {cut} longer than --length were cut" if cut else ""
        found = f"{len(self.documents):,} documents in {len(self.rows.tokens):,} rows, {full:.0%} full"
        return f"{self.file}: {found}, {counted:,} of {len(self.tokens):,} tokens count{end}"

    def __call__(self, step: int) -> Batch:
        if not self.windows:
            rows = epoch_rows(len(self.rows.tokens), self.batch, step, seed=0)
            return jax.tree.map(lambda array: array[rows], self.rows)
        starts = np.random.default_rng(step).integers(0, len(self.tokens) - self.length, self.batch)
        return Batch(np.stack([self.tokens[start : start + self.length + 1] for start in starts]))

    def all(self) -> Iterator[Batch]:
        """Every token once, in batches that are filled up with padding: to evaluate on."""
        count = len(self.rows.tokens)
        padded = jax.tree.map(lambda array: np.pad(array, ((0, -count % self.batch), (0, 0))), self.rows)
        for at in range(0, count, self.batch):
            yield jax.tree.map(lambda array: array[at : at + self.batch], padded)  # noqa: B023


def put(batch: Batch, mesh: Mesh, parts: int = 1) -> Batch:
    """On the mesh, cut along the rows; each process gives the rows that its own devices hold.

    Args:
      parts: of a batch that is accumulated: arrays get a first axis of so many.
    """
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}

    def one(array: np.ndarray) -> jax.Array:
        if parts > 1:
            array = array.reshape(parts, -1, array.shape[-1])
        spec = activation_spec("bl", array.shape[-2:], sizes)
        whole = NamedSharding(mesh, PartitionSpec(*(None,) * (array.ndim - 2), *spec))
        return jax.make_array_from_callback(array.shape, whole, lambda index: array[index])

    return jax.tree.map(one, batch)
