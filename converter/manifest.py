"""conversion.json: what was converted, and a hash of everything in the checkpoint, itself included.

With it a copy can be verified years later, with or without the source. docs/conversion.md describes the format.
"""

import json
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash

from converter.journal import Hashes
from converter.plan import Plan, Target
from converter.source import companions
from converter.store import MANIFEST, METADATA
from oss_model.layouts import BFLOAT16
from oss_model.shards import Checkpoint

FORMAT = 1  # of conversion.json
GRID = 2  # of how tensors are cut into chunks: an unfinished conversion with another one is not taken up
HASH = "xxh3_128"


def fingerprint(checkpoint: Checkpoint, dtype: str) -> dict:
    """What an unfinished conversion must agree in to be taken up: source, dtype, version."""
    files = sorted({tensor.file for tensor in checkpoint.shards.tensors.values()} | set(companions(checkpoint.directory)))
    return {
        "source": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        "layout": checkpoint.layout.name,
        "dtype": dtype,
        "version": [version("convert-oss"), FORMAT, GRID],
    }


def make_manifest(checkpoint: Checkpoint, plan: Plan, hashes: Mapping[str, Hashes], directory: Path) -> bytes:
    """The text of conversion.json.

    Args:
      hashes: of every chunk, by path.
      directory: where everything else that is in the checkpoint is already.
    """
    tensors = {}
    for target in plan.targets:
        of_chunks = [hashes[chunk.path] for chunk in target.chunks()]
        tensors[target.name] = {
            "shape": list(target.shape),
            "dtype": target.dtype.name,
            "chunk_rows": target.rows,
            "hash": tree_hash(found.stored for found in of_chunks),
            "sources": [
                {"name": entry.checkpoint, "hash": tree_hash(found.read[number] for found in of_chunks)}
                for number, entry in enumerate(target.sources)
            ],
        }
    data = {
        "format": FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "source": {"path": str(checkpoint.directory.resolve()), "layout": checkpoint.layout.name},
        "dtype": plan.dtype,
        "versions": {name: version(name) for name in ("convert-oss", "orbax-checkpoint", "numpy")},
        "fingerprint": fingerprint(checkpoint, plan.dtype),
        "hash": HASH,
        "tensors": tensors,
        "files": {name: file_hash((directory / name).read_bytes()) for name in other_files(directory, plan)},
    }
    data["self"] = _self_hash(data)
    return _text(data)


def other_files(directory: Path, plan: Plan) -> list[str]:
    """Everything in the checkpoint but the chunks and conversion.json: relative paths."""
    top = [path.name for path in directory.iterdir() if path.is_file() and path.name != MANIFEST]
    return sorted(top) + [f"{target.directory}/zarr.json" for target in plan.targets]


def read_manifest(directory: Path) -> dict | None:
    """conversion.json as it was written; None if it is missing, or damaged in any way."""
    try:
        text = (directory / MANIFEST).read_bytes()
        data = json.loads(text)
        return data if data["self"] == _self_hash(data) and text == _text(data) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_finished(directory: Path) -> dict | None:
    """The manifest of a checkpoint that this package has finished; None where there is no such checkpoint."""
    return read_manifest(directory) if all((directory / name).is_file() for name in METADATA) else None


def manifest_hash(directory: Path) -> str | None:
    """Tells one finished checkpoint from another: its manifest's own hash; None where there is no such checkpoint."""
    return (read_finished(directory) or {}).get("self")


def known_files(manifest: dict) -> set[str]:
    """Every file of the checkpoint, conversion.json included: relative paths."""
    chunks = (chunk.path for name, entry in manifest["tensors"].items() for chunk in stored_target(name, entry).chunks())
    return {MANIFEST, *manifest["files"], *chunks}


def stored_target(name: str, entry: dict) -> Target:
    """A tensor of the manifest, without its sources."""
    dtype = BFLOAT16 if entry["dtype"] == "bfloat16" else np.dtype(entry["dtype"])
    return Target(name, tuple(entry["shape"]), dtype, entry["chunk_rows"], ())


def tree_hash(digests) -> str:
    """A tensor's hash: xxh3_128 over the xxh3_128 digests of its chunks, in order.

    Chunks can then be hashed in any order, and again one by one.
    """
    return xxhash.xxh3_128(b"".join(digests)).hexdigest()


def file_hash(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def _text(data: dict) -> bytes:
    return json.dumps(data, indent=1).encode() + b"\n"


def _self_hash(data: dict) -> str:
    rest = {key: value for key, value in data.items() if key != "self"}
    return file_hash(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
