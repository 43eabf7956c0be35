"""conversion.json: what was converted, and a hash of everything in the checkpoint, itself included.

With it a copy can be verified years later, with or without the source. docs/conversion.md describes the format.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash

from converter.ends import Source
from converter.form import Form, noted_form
from converter.journal import Hashes
from converter.plan import Place, Plan, Target
from converter.shard_store import CONFIG, DISCARDED
from converter.source import companions
from converter.store import MANIFEST, METADATA
from oss_model.errors import InputError
from oss_model.files import parse_json, read_each, sizes_and_times
from oss_model.hub import origin
from oss_model.layouts import BFLOAT16

FORMAT = 1  # of conversion.json
GRID = 2  # of how tensors are cut into chunks: an unfinished conversion with another one is not taken up
HASH = "xxh3_128"


def fingerprint(source: Source, form: Form, others: Sequence[Path] = ()) -> dict:
    """What an unfinished conversion must agree in to be taken up: source, form, version.

    Args:
      others: files that the result depends on besides the source's own: a base's.
    """
    files = sorted({*source.files, *companions(source), *others})
    found = {
        "source": {said_of(source, file): list(of) for file, of in sizes_and_times(files, source.directory).items()},
        "layout": source.layout.name,
        "dtype": form.dtype,
        "version": [version("convert-oss"), FORMAT, GRID],
    }
    return found | ({"form": note} if (note := form.note()) else {})


def said_of(source: Source, file: Path) -> str:
    """How the fingerprint calls a file: within the source's directory, wherever that is."""
    for directory in (source.directory, source.home):
        if file.is_relative_to(directory):
            return file.relative_to(directory).as_posix()
    return str(file)


def make_manifest(source: Source, before: dict, plan: Plan, hashes: Mapping[str, Hashes], directory: Path) -> bytes:
    """The text of conversion.json.

    Args:
      before: the fingerprint of the source.
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
        if target.place:
            tensors[target.name]["place"] = list(target.place)
        if (lost := relative_error(of_chunks)) is not None:
            tensors[target.name]["relative_rmse"] = lost
    others = other_files(directory, plan)
    texts = read_each(directory / name for name in others)
    data = {
        "format": FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "source": {"path": str(source.directory.resolve()), "layout": source.layout.name, **_from_hub(source)},
        "dtype": plan.form.dtype,
        "versions": {name: version(name) for name in ("convert-oss", "orbax-checkpoint", "numpy")},
        "fingerprint": before,
        "hash": HASH,
        "tensors": tensors,
        "files": {name: file_hash(text) for name, text in zip(others, texts, strict=True)},
    }
    if (lost := relative_error(hashes[chunk.path] for chunk in plan.chunks)) is not None:
        data["relative_rmse"] = lost
    if note := plan.form.note():
        data["form"] = note
    if shards := plan.shards():
        data["shards"] = {file: file_hash(header) for file, (header, _) in shards.items()}  # of what comes before the tensors
    data["self"] = _self_hash(data)
    return _text(data)


def _from_hub(source: Source) -> dict:
    found = origin(source.directory.resolve())
    return {"hub": found} if found else {}


def other_files(directory: Path, plan: Plan) -> list[str]:
    """Everything in the checkpoint but the chunks and conversion.json: relative paths."""
    tensors = {MANIFEST, DISCARDED, *plan.shards()}
    top = [path.name for path in directory.iterdir() if path.is_file() and path.name not in tensors]
    return sorted(top) + [f"{target.directory}/zarr.json" for target in plan.targets if not target.place]


def relative_error(hashes: Iterable[Hashes]) -> float | None:
    """Of values that became MXFP4: the root of the squared error over the values' squares."""
    lost = [found.lost for found in hashes if found.lost is not None]
    if not lost:
        return None
    error, square = (sum(part) for part in zip(*lost, strict=True))
    return math.sqrt(error / square) if square else 0.0


def read_manifest(directory: Path) -> dict | None:
    """conversion.json as it was written; None if it is missing, or damaged in any way."""
    try:
        text = (directory / MANIFEST).read_bytes()
        data = parse_json(text)
        return data if data["self"] == _self_hash(data) and text == _text(data) else None
    except InputError:  # of a bucket that may not be read
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_finished(directory: Path) -> dict | None:
    """The manifest of a checkpoint that this package has finished; None where there is no such checkpoint."""
    manifest = read_manifest(directory)
    needed = METADATA if manifest is None or noted_form(manifest).to == "orbax" else (CONFIG, *manifest["shards"])
    return manifest if all((directory / name).is_file() for name in needed) else None


def manifest_hash(directory: Path) -> str | None:
    """Tells one finished checkpoint from another: its manifest's own hash; None where there is no such checkpoint."""
    return (read_finished(directory) or {}).get("self")


def known_files(manifest: dict) -> set[str]:
    """Every file of the checkpoint, conversion.json included: relative paths."""
    targets = [stored_target(name, entry) for name, entry in manifest["tensors"].items()]
    chunks = (chunk.path for target in targets if not target.place for chunk in target.chunks())
    return {MANIFEST, *manifest["files"], *manifest.get("shards", ()), *chunks}


def stored_target(name: str, entry: dict) -> Target:
    """A tensor of the manifest, without its sources."""
    dtype = BFLOAT16 if entry["dtype"] == "bfloat16" else np.dtype(entry["dtype"])
    place = Place(*entry["place"]) if "place" in entry else None
    return Target(name, tuple(entry["shape"]), dtype, entry["chunk_rows"], (), place)


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
