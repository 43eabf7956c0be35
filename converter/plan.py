"""What will be written: every parameter or tensor, what it is made of, and how it is cut into chunks."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from converter.ends import Source
from converter.form import Form
from oss_model import layouts
from oss_model.errors import raise_all
from oss_model.layouts import BFLOAT16, FLOAT32, UINT8, Entry
from oss_model.shards import shard_header
from oss_model.zarr import CHECKSUM_BYTES

SHARD_BYTES = 4_900_000_000  # of safetensors; others ask for 5 GB at the most
_KINDS = {UINT8: "U8", BFLOAT16: "BF16", FLOAT32: "F32"}  # as safetensors spells them


class Part(NamedTuple):
    """A parameter on its way.

    Attributes:
      sources: the parameter itself; its MXFP4 blocks and scales, which are decoded; or, for one of these, the values.
      to: where it goes, and in which order of axes.
    """

    sources: tuple[Entry, ...]
    to: Entry

    @property
    def is_quantized(self) -> bool:
        return self.to.packed and not self.sources[0].packed

    @property
    def keeps_order(self) -> bool:
        """Whether the source's bytes, as they come, are what is stored, but for their dtype."""
        return len(self.sources) == 1 and self.sources[0].order == self.to.order


class Place(NamedTuple):
    """Where a tensor lies in a directory of safetensors.

    Attributes:
      offset: of its first byte, from the start of the file.
      length: of the model's first axis, along which it is cut; 1: it is not cut.
    """

    file: str
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class Target:
    """What is stored under a name of its own, cut along its first axis only: a zarr array, or a tensor of safetensors."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int  # of the first axis, in one chunk
    parts: tuple[Part, ...]  # one; or those of a fused tensor
    place: Place | None = None  # None: a zarr array

    @property
    def sources(self) -> tuple[Entry, ...]:
        return tuple(entry for part in self.parts for entry in part.sources)

    @property
    def directory(self) -> str:
        return f"{self.name}.value"  # `value` is the leaf key of `nnx.state`

    @property
    def key_path(self) -> tuple[str, ...]:
        return (*self.name.split("."), "value")

    @property
    def length(self) -> int:
        """Of the axis that is cut."""
        return self.place.length if self.place else self.shape[0]

    @property
    def values_nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """On the disk."""
        return sum(chunk.nbytes for chunk in self.chunks())

    def without_sources(self) -> "Target":
        return dataclasses.replace(self, parts=())

    def chunks(self) -> "list[Chunk]":
        return [Chunk(self, index) for index in range(math.ceil(self.length / self.rows))]


@dataclasses.dataclass(frozen=True)
class Chunk:
    target: Target
    index: int  # along the first axis

    @property
    def values_nbytes(self) -> int:
        """Of its values. A zarr array's last chunk may have fewer rows than the others; it is filled up with zeros."""
        each = self.target.values_nbytes // self.target.length
        return each * (self.span.stop - self.span.start if self.target.place else self.target.rows)

    @property
    def nbytes(self) -> int:
        """On the disk."""
        return self.values_nbytes + (0 if self.target.place else CHECKSUM_BYTES)

    @property
    def path(self) -> str:
        """What the journal calls it: its file in the checkpoint's directory, by zarr's default key encoding, or a name."""
        if self.target.place:
            return f"{self.target.name}#{self.index}"
        return "/".join((self.target.directory, "c", str(self.index), *("0" for _ in self.target.shape[1:])))

    @property
    def file(self) -> str:
        """That it is in, in the checkpoint's directory."""
        return self.target.place.file if self.target.place else self.path

    @property
    def offset(self) -> int | None:
        """In its file; None: it is all of the file, with a checksum."""
        if not self.target.place:
            return None
        return self.target.place.offset + self.span.start * (self.target.values_nbytes // self.target.length)

    @property
    def span(self) -> slice:
        """Its rows."""
        start = self.index * self.target.rows
        return slice(start, min(start + self.target.rows, self.target.length))


@dataclasses.dataclass(frozen=True)
class Plan:
    form: Form
    targets: tuple[Target, ...]

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for target in self.targets for chunk in target.chunks()]

    @property
    def units(self) -> list[tuple[Chunk, ...]]:
        """The chunks, those together that are made in one go: blocks and scales of the same values."""
        found: dict[tuple, list[Chunk]] = {}
        for chunk in self.chunks:
            parts = chunk.target.parts
            together = parts and parts[0].is_quantized
            stem = parts[0].to.model.rpartition(".")[0] if together else chunk.target.name
            found.setdefault((stem, chunk.index, together), []).append(chunk)
        return [tuple(unit) for unit in found.values()]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)

    def shards(self) -> dict[str, tuple[bytes, int]]:
        """File of safetensors -> its header, and its size."""
        tensors: dict[str, dict] = {}
        for target in self.targets:
            if target.place:
                tensors.setdefault(target.place.file, {})[target.name] = (target.shape, _KINDS[target.dtype])
        headers = {file: shard_header(found) for file, found in tensors.items()}
        sizes = {target.place.file: target.place.offset + target.values_nbytes for target in self.targets if target.place}
        return {file: (header, sizes[file]) for file, header in headers.items()}


def make_plan(source: Source, form: Form) -> Plan:
    """Plan the conversion of `source` to `form`.

    Raises:
      InputError: if values would have to become MXFP4, and no quantizer is named.
    """
    have = {entry.model: entry for entry in source.entries()}
    layout = layouts.LAYOUTS[form.to] if form.to != "orbax" else layouts.ORBAX_MXFP4 if form.packed else layouts.ORBAX
    tensors: dict[str, list[Part]] = {}
    for entry in layouts.entries(layout, source.cfg):
        tensors.setdefault(entry.checkpoint, []).append(Part(_sources(entry, have), entry))
    lossy = [part for parts in tensors.values() for part in parts if part.is_quantized]
    if lossy and form.quantizer is None:
        raise_all([_needs_a_quantizer(source, form, lossy)])
    values = FLOAT32 if form.dtype == "float32" else BFLOAT16
    targets = [_target(name, tuple(parts), UINT8 if parts[0].to.packed else values) for name, parts in tensors.items()]
    return Plan(form, tuple(targets if form.to == "orbax" else _placed(targets)))


def _sources(entry: Entry, have: Mapping[str, Entry]) -> tuple[Entry, ...]:
    if entry.model in have:
        return (have[entry.model],)
    stem, _, kind = entry.model.rpartition(".")
    if kind == "weight":
        return have[f"{stem}.blocks"], have[f"{stem}.scales"]
    return (have[f"{stem}.weight"],)


def _needs_a_quantizer(source: Source, form: Form, lossy: list[Part]) -> str:
    asked = "--dtype mxfp4" if form.to == "orbax" else f"--to {form.to}"
    names = sorted({part.sources[0].model for part in lossy})
    return (
        f"{source.directory}: {asked} keeps packed experts as they are, but found {source.layout.title}: {names[0]} and "
        f"{len(names) - 1} more are values, which lose something as MXFP4; name the rule: --quantizer best (--like SRC keeps "
        "the bytes of what is as in SRC), or ask for another form"
    )


def _target(name: str, parts: tuple[Part, ...], dtype: np.dtype) -> Target:
    to = parts[0].to
    shape = (sum(part.to.checkpoint_shape[0] for part in parts), *to.checkpoint_shape[1:])
    axes = tuple(axis for axis in to.order if axis in to.axes)
    rows = layouts.chunk_rows(to.model, axes, to.model_shape, dtype)
    return Target(name, shape, dtype, rows if len(parts) == 1 else 1, parts)


def _placed(targets: list[Target]) -> list[Target]:
    """In files of at most SHARD_BYTES, never cut inside a tensor."""
    shards: list[list[Target]] = [[]]
    room = SHARD_BYTES
    for target in targets:
        if shards[-1] and target.values_nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(target)
        room -= target.values_nbytes
    found = []
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        offset = len(shard_header({target.name: (target.shape, _KINDS[target.dtype]) for target in shard}))
        for target in shard:
            length = target.parts[0].to.model_shape[0] if len(target.parts) == 1 else 1
            found.append(dataclasses.replace(target, place=Place(file, offset, length)))
            offset += target.values_nbytes
    return found
