"""What will be written: every parameter, what it is made of, and how it is cut into chunks."""

import dataclasses
import math

import numpy as np

from oss_model import layouts
from oss_model.errors import raise_all
from oss_model.layouts import Entry
from oss_model.shards import Checkpoint
from oss_model.zarr import CHECKSUM_BYTES


@dataclasses.dataclass(frozen=True)
class Target:
    """One parameter as it will be stored: a zarr array, cut along its first axis only."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int  # of the first axis, in one chunk
    sources: tuple[Entry, ...]  # the parameter itself; or its MXFP4 blocks and scales, which are decoded

    @property
    def directory(self) -> str:
        return f"{self.name}.value"  # `value` is the leaf key of `nnx.state`

    @property
    def key_path(self) -> tuple[str, ...]:
        return (*self.name.split("."), "value")

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.rows, *self.shape[1:])

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of values in one chunk, without the checksum."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all its chunk files."""
        return sum(chunk.nbytes for chunk in self.chunks())

    def without_sources(self) -> "Target":
        return dataclasses.replace(self, sources=())

    def chunks(self) -> "list[Chunk]":
        return [Chunk(self, index) for index in range(math.ceil(self.shape[0] / self.rows))]


@dataclasses.dataclass(frozen=True)
class Chunk:
    target: Target
    index: int  # along the first axis

    @property
    def nbytes(self) -> int:
        """Of its file."""
        return self.target.chunk_nbytes + CHECKSUM_BYTES

    @property
    def path(self) -> str:
        """Of its file in the checkpoint's directory, by zarr's default key encoding."""
        return "/".join((self.target.directory, "c", str(self.index), *("0" for _ in self.target.shape[1:])))

    @property
    def span(self) -> slice:
        """Its rows. The last chunk may have fewer than the others; its file is filled up with zeros."""
        start = self.index * self.target.rows
        return slice(start, min(start + self.target.rows, self.target.shape[0]))


@dataclasses.dataclass(frozen=True)
class Plan:
    dtype: str  # as `--dtype` says it
    targets: tuple[Target, ...]

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for target in self.targets for chunk in target.chunks()]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)


def make_plan(checkpoint: Checkpoint, dtype: str) -> Plan:
    """Plan the conversion of `checkpoint` to parameters stored as `dtype` ("bfloat16", "float32", "mxfp4").

    Raises:
      InputError: if `dtype` is mxfp4 and the source's experts are not.
    """
    entries = {entry.model: entry for entry in checkpoint.entries()}
    targets, faults = [], []
    if dtype == "mxfp4" and not checkpoint.layout.packed:
        faults.append(
            f"{checkpoint.directory}: --dtype mxfp4 keeps packed experts as they are, but found {checkpoint.layout.title}; "
            "give an MXFP4 source, or --dtype bfloat16"
        )
    raise_all(faults)
    cfg = dataclasses.replace(checkpoint.cfg, param_dtype=dtype)
    axes = layouts.parameter_axes(cfg)
    for name, (shape, stored) in layouts.parameters(cfg).items():
        stem = name.removesuffix("weight")
        sources = (entries[name],) if name in entries else (entries[stem + "blocks"], entries[stem + "scales"])
        targets.append(Target(name, shape, stored, layouts.chunk_rows(name, axes[name], shape, stored), sources))
    return Plan(dtype, tuple(targets))
