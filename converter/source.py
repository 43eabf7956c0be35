"""A safetensors directory, opened and checked to the last value that could not be converted exactly."""

import os
from pathlib import Path

import numpy as np

from oss_model import mxfp4
from oss_model.errors import raise_all
from oss_model.layouts import Entry
from oss_model.shards import Checkpoint

# What belongs to a model besides its tensors, and is copied as found. Never recursive: the hub's repositories have
# whole other checkpoints in subdirectories.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "*.tiktoken", "chat_template*", "LICENSE*", "USAGE_POLICY*",
)  # fmt: skip
SCAN_BYTES = 32 << 20


def open_source(path: str | os.PathLike, dtype: str) -> Checkpoint:
    """Open the checkpoint at `path` and check that all of it can be stored as `dtype`.

    Raises:
      InputError: naming every fault: of files, config.json, names, shapes, dtypes; and every tensor whose values
        have no exact counterpart (MXFP4 scales 253..255, float32 that bfloat16 cannot hold).
    """
    checkpoint = Checkpoint(path)
    try:
        faults = []
        for entry in checkpoint.entries():
            kind = checkpoint.shards.tensors[entry.checkpoint].dtype
            if entry.packed and entry.model.endswith("scales"):
                where = f"{checkpoint.shards.tensors[entry.checkpoint].file}: {entry.checkpoint}"
                faults += mxfp4.scale_faults(checkpoint.read(entry), where)
            elif kind == "F32" and dtype != "float32":
                faults += _inexact(checkpoint, entry)
        raise_all(faults)
    except BaseException:
        checkpoint.shards.close()
        raise
    return checkpoint


def _inexact(checkpoint: Checkpoint, entry: Entry) -> list[str]:
    """Count the float32 values that bfloat16 cannot hold: those with a bit set in their lower half."""
    rows = entry.checkpoint_shape[0]
    step = max(1, SCAN_BYTES * rows // (checkpoint.shards.tensors[entry.checkpoint].nbytes))
    count, first = 0, ()
    for start in range(0, rows, step):
        bits = checkpoint.read(entry, slice(start, start + step)).view(np.uint32)
        bad = (bits & 0xFFFF) != 0
        found = int(np.count_nonzero(bad))
        if found and not count:
            row, *rest = (int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
            first = [entry.start + start + row, *rest]
        count += found
    if not count:
        return []
    tensor = checkpoint.shards.tensors[entry.checkpoint]
    return [
        f"{tensor.file}: {entry.checkpoint}: expected float32 values that bfloat16 holds exactly, found {count} that it "
        f"does not, the first at {first}; store them whole with --dtype float32"
    ]


def companions(directory: Path) -> list[Path]:
    """The files of `directory` that are copied to the converted checkpoint."""
    return sorted({file for pattern in COMPANIONS for file in directory.glob(pattern) if file.is_file()})
