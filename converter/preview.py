"""`--dry-run`: what a conversion would do, without writing anything."""

import dataclasses
import os
import threading

from converter.destination import Destination
from converter.finished import is_complete
from converter.manifest import fingerprint
from converter.plan import Plan, Target, make_plan
from converter.preflight import DISK_RATE, Needs, estimate_seconds, free_space, measure
from converter.source import open_source
from converter.store import load_orbax
from converter.workspace import Workspace
from oss_model.errors import InputError


@dataclasses.dataclass
class Preview:
    """`--dry-run --json` prints these fields."""

    status: str  # "planned"; "already-complete": there is nothing to do
    source_layout: str
    dtype: str
    tensors: int
    chunks: int
    bytes_read: int
    bytes_written: int
    work_directory: str  # where it is written until it is whole
    space_needed: int
    space_free: int
    memory: int  # resident bytes at the most
    seconds: float  # an estimate
    plan: list[dict]  # a tensor: from, pattern, to, shape, dtype, chunks, bytes


def preview(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: str = "bfloat16",
    *,
    overwrite: bool = False,
    max_memory: int | None = None,
) -> Preview:
    """Check everything `convert` checks before it writes, and say what it would do.

    Raises:
      InputError: as `convert` does.
    """
    destination = Destination(dst)
    checkpoint = open_source(src, dtype)
    with checkpoint.shards:
        plan = make_plan(checkpoint, dtype)
        workspace = Workspace(destination.partial)
        if destination.is_under_way(workspace):
            raise InputError(
                f"{workspace.directory}: expected no conversion that is being put in its place, found one that was cut off; "
                "convert-oss without --dry-run ends that first"
            )
        before, done = fingerprint(checkpoint, dtype), False
        if not overwrite:
            done = is_complete(destination.path, checkpoint, plan, before, lambda progress: None, threading.Event())
        if done:
            needs = Needs(0, free_space(destination.path), 0, 1)
        else:
            destination.check(checkpoint.directory, overwrite)
            workspace.check()
            load_orbax()
            needs = measure(checkpoint, plan, workspace.checkpoint, max_memory)
        return Preview(
            status="already-complete" if done else "planned",
            source_layout=checkpoint.layout.name,
            dtype=dtype,
            tensors=len(plan.targets),
            chunks=len(plan.chunks),
            bytes_read=0 if done else sum(tensor.nbytes for tensor in checkpoint.shards.tensors.values()),
            bytes_written=0 if done else plan.nbytes,
            work_directory=str(workspace.directory.resolve()),
            space_needed=needs.space_needed,
            space_free=needs.space_free,
            memory=needs.memory,
            seconds=0.0 if done else round(estimate_seconds(checkpoint, plan, needs.workers), 1),
            plan=_rows(plan),
        )


def describe(found: Preview) -> str:
    """The same for people: a line a tensor, then the sums."""
    lines = []
    for row in found.plan:
        lines.append(f"{' + '.join(row['from'])}")
        how = f"decoded, {row['pattern']}" if len(row["from"]) > 1 else row["pattern"]
        size = f"{row['dtype']} {row['shape']}, {row['chunks']} chunks, {row['bytes']:,} bytes"
        lines += [f"    {how}", f"    -> {row['to']}: {size}"]
    lines += ["", f"{found.source_layout} -> {found.dtype}: {found.tensors} tensors in {found.chunks} chunks"]
    if found.status == "already-complete":
        return "\n".join([*lines, "already complete: there is nothing to do"])
    lines += [
        f"reads {found.bytes_read:,} bytes, writes {found.bytes_written:,} bytes",
        f"works in {found.work_directory} until all is whole",
        f"needs {found.space_needed:,} bytes of disk, {found.space_free:,} are free",
        f"takes up to {found.memory >> 20} MiB of memory",
        f"takes about {found.seconds:.0f} s where the disk writes {DISK_RATE / 1e9:.0f} GB/s, without verification",
    ]
    return "\n".join(lines)


def _rows(plan: Plan) -> list[dict]:
    return [_row(target) for target in plan.targets]


def _row(target: Target) -> dict:
    return {
        "from": [entry.checkpoint for entry in target.sources],
        "pattern": target.sources[0].pattern,
        "to": target.name,
        "shape": list(target.shape),
        "dtype": target.dtype.name,
        "chunks": len(target.chunks()),
        "bytes": target.nbytes,
    }
