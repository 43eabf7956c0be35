"""A finished checkpoint at DST: is it what is asked for already?"""

import threading
from collections.abc import Callable
from pathlib import Path

from converter.chunks import Reader
from converter.ends import Sink, Source
from converter.manifest import FORMAT, file_hash, read_finished, said_of, stored_target, tree_hash
from converter.plan import Chunk, Plan, Target
from converter.progress import Counter, Progress
from converter.sinks import sink_of
from converter.source import companions, where
from converter.store import MANIFEST
from converter.threads import in_threads, stop_here
from oss_model.errors import raise_all
from oss_model.files import hashed_each

REPLACE = "give another name, or --overwrite to replace it when the new one is whole"


def is_complete(
    directory: Path,
    source: Source,
    plan: Plan,
    fingerprint: dict,
    progress: Callable[[Progress], None],
    stop: threading.Event,
) -> bool:
    """Whether `directory` holds what converting `source` by `plan` would write, every chunk in its place.

    The source is taken for the same where names, sizes and times are those in the manifest. Where only times differ, as
    after a copy, its tensors are hashed.

    Args:
      fingerprint: of the source as it is now.
      stop: once it is set, KeyboardInterrupt is raised.

    Raises:
      InputError: if it was made so, but the source has changed since, or a part of it is missing: naming every tensor,
        file and chunk.
    """
    manifest = read_finished(directory)
    if manifest is None or not _was_asked_for(manifest, plan, fingerprint):
        return False
    then, now = manifest["fingerprint"]["source"], fingerprint["source"]
    touched = {name for name in now if now[name] != then[name]}
    faults = _missing(directory, manifest, plan)
    if touched:
        faults += _changed(directory, manifest, source, plan, touched, progress, stop)
    raise_all(faults)
    return True


def _was_asked_for(manifest: dict, plan: Plan, fingerprint: dict) -> bool:
    """The same layout, dtype and grid, and files of the same names and sizes; whichever version wrote it."""
    found = manifest["fingerprint"]
    sizes, wanted = ({name: size for name, (size, _) in side["source"].items()} for side in (found, fingerprint))
    targets = tuple(stored_target(name, entry) for name, entry in manifest["tensors"].items())
    return (
        manifest["format"] == FORMAT
        and all(found.get(key) == fingerprint.get(key) for key in ("layout", "dtype", "form"))
        and sizes == wanted
        and targets == tuple(target.without_sources() for target in plan.targets)
    )


def _missing(directory: Path, manifest: dict, plan: Plan) -> list[str]:
    sink: Sink = sink_of(directory, plan)
    again = f"copy it again, or {REPLACE}"
    lines = [
        f"{directory}: {chunk.target.name}: {chunk.path}: missing, or not whole; {again}"
        for chunk in plan.chunks
        if not sink.is_whole(chunk)
    ]
    found = hashed_each(directory / name for name in manifest["files"])
    for (name, expected), there in zip(manifest["files"].items(), found, strict=True):
        if there != expected:
            lines.append(f"{directory}: {name}: missing, or not as {MANIFEST} has it; {again}")
    return lines


def _changed(
    directory: Path,
    manifest: dict,
    source: Source,
    plan: Plan,
    touched: set[str],
    progress: Callable[[Progress], None],
    stop: threading.Event,
) -> list[str]:
    """Tensors and companions of the source, among its `touched` files, that are not what was converted."""
    line = f"{{}}: differs from what {directory} was converted from; {REPLACE}"
    lines = [
        line.format(file)
        for file in companions(source)
        if file.name in manifest["files"]  # of an export, config.json is made anew
        if said_of(source, file) in touched and file_hash(file.read_bytes()) != manifest["files"][file.name]
    ]

    def is_touched(target: Target) -> bool:
        return any(said_of(source, file) in touched for entry in target.sources for file in source.files_of(entry))

    targets = [target for target in plan.targets if is_touched(target)]
    digests = _digests(source, targets, progress, stop)
    for target in targets:
        for number, (entry, then) in enumerate(zip(target.sources, manifest["tensors"][target.name]["sources"], strict=True)):
            found = tree_hash(digests[chunk.path][number] for chunk in target.chunks())
            if {"name": entry.checkpoint, "hash": found} != then:
                lines.append(line.format(where(source, entry)))
    return sorted(set(lines))  # one tensor of the source may be the source of several


def _digests(
    source: Source, targets: list[Target], progress: Callable[[Progress], None], stop: threading.Event
) -> dict[str, tuple[bytes, ...]]:
    """Path of each chunk of `targets` -> xxh3_128 of what is read for it, one a source."""

    def hasher():
        reader = Reader(source)

        def digest(chunk: Chunk) -> tuple[Chunk, tuple[bytes, ...]]:
            return chunk, reader.pieces(chunk).read_only()

        return digest

    chunks = [chunk for target in targets for chunk in target.chunks()]
    found, show = {}, Counter("comparing", chunks, progress)
    for chunk, digests in in_threads(hasher, chunks, stop=stop):
        found[chunk.path] = digests
        show.add(chunk)
    stop_here(stop)
    return found
