"""`verify-oss`: a finished checkpoint against its own hashes, and against its source where there is one."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from converter.destinations import destination_of
from converter.form import noted_form
from converter.job import Job, open_job
from converter.manifest import FORMAT, file_hash, read_manifest, stored_target, tree_hash
from converter.plan import Chunk, Plan
from converter.progress import Counter, Progress
from converter.store import MANIFEST, METADATA
from converter.threads import in_threads, interruptible, stop_here
from converter.verify import a_line_a_tensor, check_buffer, check_chunk, from_disk
from oss_model.buckets import path_of
from oss_model.errors import InputError, nothing_at
from oss_model.files import hashed_each


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
    start, directory = time.perf_counter(), path_of(dst)
    if not any((directory / name).exists() for name in (MANIFEST, *METADATA)):
        found = "another directory" if directory.is_dir() else nothing_at(directory)
        if src is not None and (path_of(src) / MANIFEST).is_file():
            found += f", and {src} is one: DST comes first"
        raise InputError(f"{directory}: expected a checkpoint written by convert-oss, found {found}")
    manifest = read_manifest(directory)
    if manifest is None:
        found = "damaged: it does not match its own hash" if (directory / MANIFEST).exists() else "missing"
        line = f"{directory}: {MANIFEST}: {found}; without it nothing can be checked. Copy it again, or convert again"
        return Audit("fail", str(directory), str(src) if src else None, 0, 0, [line], time.perf_counter() - start)
    if manifest["format"] != FORMAT:
        raise InputError(f"{directory}: {MANIFEST}: expected format {FORMAT}, found {manifest['format']}; use a newer version")
    form = noted_form(manifest)
    plan = Plan(form, tuple(stored_target(name, entry) for name, entry in manifest["tensors"].items()))
    differences = _files(directory, manifest)
    if src is None:
        differences += _chunks(directory, manifest, plan, None, progress)
    else:
        with open_job(src, form) as job:
            differences += _companions(directory, job) + _shapes(directory, plan, job.plan)
            plan = _with_sources(plan, job.plan)
            differences += _chunks(directory, manifest, plan, job, progress)
    return Audit(
        status="fail" if differences else "pass",
        checkpoint=str(directory.resolve()),
        source=str(path_of(src).resolve()) if src is not None else None,
        tensors=len(plan.targets),
        bytes_checked=plan.nbytes,
        differences=differences,
        seconds=round(time.perf_counter() - start, 3),
    )


def _with_sources(plan: Plan, anew: Plan) -> Plan:
    """`plan`, its tensors with the sources they have in `anew`, where they have the same shape there.

    Cut into chunks as they are stored: an older version may have cut them otherwise.
    """
    parts = {(target.name, target.shape): target.parts for target in anew.targets}
    return Plan(plan.form, tuple(dataclasses.replace(t, parts=parts.get((t.name, t.shape), ())) for t in plan.targets))


def _files(directory: Path, manifest: dict) -> list[str]:
    """Files that are missing, changed, or should not be there; chunks are looked into by `_chunks`."""
    differences = []
    found = hashed_each(directory / name for name in manifest["files"])
    for (name, expected), there in zip(manifest["files"].items(), found, strict=True):
        if there is None:
            differences.append(f"{directory}: {name}: missing; copy it again")
        elif there != expected:
            differences.append(f"{directory}: {name}: its bytes do not match their hash in {MANIFEST}; copy it again")
    for name, expected in manifest.get("shards", {}).items():
        path = directory / name
        if path.is_file() and _header_hash(path) != expected:  # a missing one is told with each of its tensors
            differences.append(f"{directory}: {name}: its header does not match its hash in {MANIFEST}; copy it again")
    unknown = destination_of(directory).unknown_files(manifest)
    return differences + [f"{directory}: {name}: not in {MANIFEST}; move it away" for name in unknown]


def _header_hash(path: Path) -> str | None:
    """Of what comes before the tensors in a file of safetensors."""
    with open(path, "rb") as file:
        length = file.read(8)
        rest = int.from_bytes(length, "little")
        return file_hash(length + file.read(rest)) if rest <= path.stat().st_size else None


def _companions(directory: Path, job: Job) -> list[str]:
    differences = []
    for file in job.companions:
        path = directory / file.name
        made_anew = job.config is not None and file.name == "config.json"
        if path.is_file() and not made_anew and path.read_bytes() != file.read_bytes():
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


def _chunks(directory: Path, manifest: dict, plan: Plan, job: Job | None, progress: Callable[[Progress], None]) -> list[str]:
    """Read every chunk; compare with the source, for the tensors that have one, and with the tensor's hash."""

    def checker():
        buffer, reader = check_buffer(), job.reader() if job else None

        def check(unit: tuple[Chunk, ...]) -> list[tuple[Chunk, bytes, str | None]]:
            found = []
            for chunk in unit:
                pieces = reader.pieces(chunk) if reader and chunk.target.parts else None
                found.append((chunk, *check_chunk(directory, chunk, pieces, buffer)))
            return found

        return check

    wrong, digests, show = [], {}, Counter("verifying", plan.chunks, progress)
    with interruptible() as stop:
        for unit in in_threads(checker, _units(directory, plan), stop=stop):
            for chunk, digest, line in unit:
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


def _units(directory: Path, plan: Plan) -> Iterator[tuple[Chunk, ...]]:
    """`plan.units`, each announced to the disk somewhat before it is read."""
    ahead = from_disk(directory, [chunk for unit in plan.units for chunk in unit])
    for unit in plan.units:
        yield tuple(next(ahead) for _ in unit)
