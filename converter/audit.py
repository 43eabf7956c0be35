"""`verify-oss`: a finished checkpoint against its own hashes, and against its source where there is one."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

from converter.chunks import Reader
from converter.destination import Destination
from converter.manifest import FORMAT, file_hash, read_manifest, stored_target, tree_hash
from converter.plan import Chunk, Plan, make_plan
from converter.progress import Counter, Progress
from converter.source import companions, open_source
from converter.store import MANIFEST, METADATA
from converter.threads import in_threads, interruptible, stop_here
from converter.verify import a_line_a_tensor, check_buffer, check_chunk, from_disk
from oss_model.errors import InputError
from oss_model.shards import Checkpoint


@dataclasses.dataclass
class Audit:
    """What was found; `verify-oss --json` prints these fields."""

    status: str  # "pass" or "fail"
    checkpoint: str
    source: str | None
    tensors: int
    bytes_checked: int
    differences: list[str]  # a line each
    seconds: float


def verify_checkpoint(
    dst: str | os.PathLike,
    src: str | os.PathLike | None = None,
    *,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Audit:
    """Check every byte of the checkpoint at `dst` against the hashes in its conversion.json.

    Args:
      src: the source it was converted from, in any place: decoded anew and compared value by value.

    Raises:
      InputError: if `dst` is no checkpoint of ours, or `src` no source.
    """
    start, directory = time.perf_counter(), Path(dst)
    if not any((directory / name).exists() for name in (MANIFEST, *METADATA)):
        found = "another directory" if directory.is_dir() else "a file" if directory.exists() else "nothing"
        raise InputError(f"{directory}: expected a checkpoint written by convert-oss, found {found}")
    manifest = read_manifest(directory)
    if manifest is None:
        found = "damaged: it does not match its own hash" if (directory / MANIFEST).exists() else "missing"
        line = f"{directory}: {MANIFEST}: {found}; without it nothing can be checked. Copy it again, or convert again"
        return Audit("fail", str(directory), str(src) if src else None, 0, 0, [line], time.perf_counter() - start)
    if manifest["format"] != FORMAT:
        raise InputError(f"{directory}: {MANIFEST}: expected format {FORMAT}, found {manifest['format']}; use a newer version")
    plan = Plan(manifest["dtype"], tuple(stored_target(name, entry) for name, entry in manifest["tensors"].items()))
    differences = _files(directory, manifest)
    if src is None:
        differences += _chunks(directory, manifest, plan, None, progress)
    else:
        checkpoint = open_source(src, manifest["dtype"])
        with checkpoint.shards:
            anew = make_plan(checkpoint, manifest["dtype"])
            differences += _companions(directory, checkpoint) + _shapes(directory, plan, anew)
            plan = _with_sources(plan, anew)
            differences += _chunks(directory, manifest, plan, checkpoint, progress)
    return Audit(
        status="fail" if differences else "pass",
        checkpoint=str(directory.resolve()),
        source=str(Path(src).resolve()) if src is not None else None,
        tensors=len(plan.targets),
        bytes_checked=plan.nbytes,
        differences=differences,
        seconds=round(time.perf_counter() - start, 3),
    )


def _with_sources(plan: Plan, anew: Plan) -> Plan:
    """`plan`, its tensors with the sources they have in `anew`, where they have the same shape there.

    Cut into chunks as they are stored: an older version may have cut them otherwise.
    """
    sources = {(target.name, target.shape): target.sources for target in anew.targets}
    targets = (dataclasses.replace(t, sources=sources.get((t.name, t.shape), ())) for t in plan.targets)
    return Plan(plan.dtype, tuple(targets))


def _files(directory: Path, manifest: dict) -> list[str]:
    """Files that are missing, changed, or should not be there; chunks are looked into by `_chunks`."""
    differences = []
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            differences.append(f"{directory}: {name}: missing; copy it again")
        elif file_hash(path.read_bytes()) != expected:
            differences.append(f"{directory}: {name}: its bytes do not match their hash in {MANIFEST}; copy it again")
    unknown = Destination(directory).unknown_files(manifest)
    return differences + [f"{directory}: {name}: not in {MANIFEST}; move it away" for name in unknown]


def _companions(directory: Path, checkpoint: Checkpoint) -> list[str]:
    differences = []
    for file in companions(checkpoint.directory):
        path = directory / file.name
        if path.is_file() and path.read_bytes() != file.read_bytes():
            differences.append(f"{directory}: {file.name}: differs from {file}")
    return differences


def _shapes(directory: Path, plan: Plan, anew: Plan) -> list[str]:
    """Tensors that one side has and the other has not, or has otherwise."""
    stored, source = ({target.name: target for target in side.targets} for side in (plan, anew))
    differences = [f"{directory}: {name}: not in the source" for name in stored.keys() - source.keys()]
    differences += [f"{directory}: {name}: missing; the source has it" for name in source.keys() - stored.keys()]
    for name in stored.keys() & source.keys():
        if stored[name].shape != source[name].shape:
            found = f"expected shape {list(source[name].shape)} by the source, found {list(stored[name].shape)}"
            differences.append(f"{directory}: {name}: {found}")
    return sorted(differences)


def _chunks(
    directory: Path, manifest: dict, plan: Plan, checkpoint: Checkpoint | None, progress: Callable[[Progress], None]
) -> list[str]:
    """Read every chunk; compare with the source, for the tensors that have one, and with the tensor's hash."""

    def checker():
        buffer, reader = check_buffer(), Reader(checkpoint) if checkpoint else None

        def check(chunk: Chunk) -> tuple[Chunk, bytes, str | None]:
            pieces = reader.pieces(chunk) if reader and chunk.target.sources else None
            return chunk, *check_chunk(directory, chunk, pieces, buffer)

        return check

    wrong, digests, show = [], {}, Counter("verifying", plan.chunks, progress)
    with interruptible() as stop:
        for chunk, digest, line in in_threads(checker, from_disk(directory, plan.chunks), stop=stop):
            digests[chunk.path] = digest
            wrong += [(chunk, line)] if line else []
            show.add(chunk)
        stop_here(stop)
    differences = a_line_a_tensor(directory, wrong)
    for target in plan.targets:
        found = [digests[chunk.path] for chunk in target.chunks()]
        if all(found) and tree_hash(found) != manifest["tensors"][target.name]["hash"]:
            differences.append(f"{directory}: {target.name}: its values do not match their hash in {MANIFEST}; convert again")
    return sorted(differences)
