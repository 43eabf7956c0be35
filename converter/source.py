"""A checkpoint, opened and checked to the last value that could not be converted as the form wants it."""

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from converter.ends import Source
from converter.form import Form
from converter.orbax_source import OrbaxSource, find
from oss_model import mxfp4
from oss_model.buckets import path_of
from oss_model.errors import InputError, raise_all
from oss_model.layouts import FLOAT32, Entry
from oss_model.shards import Checkpoint

# What belongs to a model besides its tensors, and is copied as found. Never recursive: the hub's repositories have
# whole other checkpoints in subdirectories.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "*.tiktoken", "chat_template*", "LICENSE*", "USAGE_POLICY*",
)  # fmt: skip
SCAN_BYTES = 32 << 20


def open_source(path: str | os.PathLike, form: Form) -> Source:
    """Open the checkpoint at `path` and check that all of it can be stored in this form.

    Raises:
      InputError: naming every fault: of files, config.json, names, shapes, dtypes; and every tensor whose values
        have no exact counterpart (MXFP4 scales 253..255, float32 that bfloat16 cannot hold).
    """
    source: Source = open_checkpoint(path, form.ignore)
    with closed_on_error(source):
        raise_all(_faults(source, form))
        if form.merge is not None:
            from converter.merging import Merged

            source = Merged(source, form.merge)
    return source


def open_checkpoint(path: str | os.PathLike, ignore: Collection[str] = ()) -> Source:
    """Whatever is there: safetensors or Orbax.

    Args:
      ignore: see `ModelConfig.from_json`.
    """
    arrays = find(path_of(path))
    return Checkpoint(path, ignore) if arrays is None else OrbaxSource(arrays, ignore)


def open_base(form: Form, source: Source) -> Source | None:
    """The checkpoint that unchanged blocks keep the bytes of.

    Raises:
      InputError: if it has none, or is of another model.
    """
    if form.like is None:
        return None
    base = open_checkpoint(form.like)
    with closed_on_error(base):
        found, wanted = ({e.model: e.model_shape for e in side.entries()} for side in (base, source))
        faults = (
            [] if base.layout.packed else [f"{form.like}: expected packed experts, found {base.layout.title}; give another"]
        )
        faults += [
            f"{form.like}: {name}: expected shape {list(wanted[name])} as in {source.directory}, found {list(shape)}"
            for name, shape in found.items()
            if name in wanted and wanted[name] != shape
        ]
        if base.cfg.axes | {"n": base.cfg.num_hidden_layers} != source.cfg.axes | {"n": source.cfg.num_hidden_layers}:
            faults.append(f"{form.like}: expected a model of the same sizes as {source.directory}, found another")
        raise_all(faults)
    return base


@contextlib.contextmanager
def closed_on_error(source: Source) -> Iterator[None]:
    try:
        yield
    except BaseException:
        source.close()
        raise


def _faults(source: Source, form: Form) -> list[str]:
    faults = []
    for entry in source.entries():
        if entry.packed and entry.model.endswith("scales"):
            faults += mxfp4.scale_faults(source.read(entry), where(source, entry))
        elif source.dtype(entry) == FLOAT32 and form.dtype != "float32" and not form.may_round:
            faults += _inexact(source, entry)
    return faults


def where(source: Source, entry: Entry) -> str:
    """How a fault of a tensor begins."""
    file = source.files_of(entry)[0]
    return f"{file if file.suffix == '.safetensors' else source.directory}: {entry.checkpoint}"


def _inexact(source: Source, entry: Entry) -> list[str]:
    """Count the float32 values that bfloat16 cannot hold: those with a bit set in their lower half."""
    rows = entry.model_shape[0]
    each = entry.checkpoint_shape[0] // rows
    step = max(1, SCAN_BYTES * rows // (int(np.prod(entry.checkpoint_shape)) * 4))
    count, first = 0, ()
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        bits = source.read(entry, slice(start * each, stop * each)).view(np.uint32)
        bad = (bits & 0xFFFF) != 0
        found = int(np.count_nonzero(bad))
        if found and not count:
            row, *rest = (int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
            first = [entry.start + start * each + row, *rest]
        count += found
    if not count:
        return []
    return [
        f"{where(source, entry)}: expected float32 values that bfloat16 holds exactly, found {count} that it "
        f"does not, the first at {first}; store them whole with --dtype float32"
    ]


def companions(source: Source, tokenizer: Path | None = None) -> list[Path]:
    """The files that are copied to the converted checkpoint: the source's, but for those that `tokenizer`, a directory, has.

    Raises:
      InputError: if there is no tokenizer in `tokenizer`.
    """

    def found(directory: Path) -> dict[str, Path]:
        return {file.name: file for pattern in COMPANIONS for file in directory.glob(pattern) if file.is_file()}

    files = found(source.home)
    if tokenizer is not None:
        others = found(tokenizer)
        if not any(name.startswith("tokenizer") for name in others):
            raise InputError(f"{tokenizer}: expected a directory with a tokenizer (tokenizer*), found none")
        others.pop("config.json", None)
        files |= others
    return sorted(files.values(), key=lambda file: file.name)
