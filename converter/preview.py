"""`--dry-run`: what a conversion would do, without writing anything."""

import dataclasses
import os
import threading
from typing import Any

from converter.destinations import destination_of, refuse
from converter.finished import is_complete
from converter.form import make_form
from converter.job import open_job
from converter.plan import Plan, Target
from converter.preflight import DISK_RATE, Needs, estimate_seconds, free_space, measure
from oss_model.buckets import path_of
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
    space_free: int | None  # None: nobody says, of a bucket
    memory: int  # resident bytes at the most
    seconds: float  # an estimate
    plan: list[dict]  # a tensor: from, how, pattern, to, shape, dtype, chunks, bytes
    to: str = "orbax"
    notes: list[str] = dataclasses.field(default_factory=list)  # what whoever uses it should know


def preview(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: str | None = None,
    *,
    tokenizer: str | os.PathLike | None = None,
    overwrite: bool = False,
    max_memory: int | None = None,
    **form: Any,
) -> Preview:
    """Check everything `convert` checks before it writes, and say what it would do. Arguments are the same.

    Args:
      form: the rest of what `make_form` takes.

    Raises:
      InputError: as `convert` does.
    """
    destination, asked = destination_of(path_of(dst)), make_form(dtype=dtype, **form)
    refuse(destination.path, asked.to, overwrite)
    with open_job(src, asked, tokenizer) as job:
        source, plan = job.source, job.plan
        if destination.is_under_way():
            raise InputError(
                f"{destination.work}: expected no conversion that is being put in its place, found one that was cut off; "
                "convert-oss without --dry-run ends that first"
            )
        done = False
        if not overwrite:
            done = is_complete(destination.path, source, plan, job.before, lambda progress: None, threading.Event())
        if done:
            needs = Needs(0, free_space(destination.path), 0, 1)
        else:
            destination.check(source.directory, overwrite)
            sink = destination.sink(plan)
            sink.load()
            needs = measure(source, plan, sink, destination.checkpoint, max_memory)
        return Preview(
            status="already-complete" if done else "planned",
            source_layout=source.layout.name,
            dtype=plan.form.dtype,
            tensors=len(plan.targets),
            chunks=len(plan.chunks),
            bytes_read=0 if done else job.read_nbytes,
            bytes_written=0 if done else plan.nbytes,
            work_directory=str(destination.work.resolve()),
            space_needed=needs.space_needed,
            space_free=needs.space_free,
            memory=needs.memory,
            seconds=0.0 if done else round(estimate_seconds(source, plan, needs.workers), 1),
            plan=_rows(plan),
            to=plan.form.to,
            notes=job.notes,
        )


def describe(found: Preview) -> str:
    """The same for people: the sums, then each tensor."""
    form = found.dtype if found.to == "orbax" else found.to
    lines = [f"{found.source_layout} -> {form}: {found.tensors} tensors in {found.chunks} chunks"]
    if found.status == "already-complete":
        lines.append("already complete: there is nothing to do")
    else:
        lines += [
            f"reads {found.bytes_read:,} bytes, writes {found.bytes_written:,} bytes",
            f"works in {found.work_directory} until all is whole",
            f"needs {found.space_needed:,} bytes"
            + (" in the bucket" if found.space_free is None else f" of disk, {found.space_free:,} are free"),
            f"takes up to {found.memory >> 20} MiB of memory",
            f"takes about {found.seconds:.0f} s where "
            f"{'the disk writes' if found.space_free is not None else 'the network sends'}"
            f" {DISK_RATE / 1e9:.0f} GB/s, without verification",
            *(f"note: {note}" for note in found.notes),
        ]
    name, size = (max(map(len, column)) for column in zip(*map(_stored, found.plan), strict=True))
    lines.append("")
    for row in found.plan:
        to, what = _stored(row)
        how = f"{row['how']}, {row['pattern']}" if row["how"] else row["pattern"]
        lines.append(f"{to:<{name}}  {what:<{size}}  <- {' + '.join(row['from'])}: {how}")
    return "\n".join(lines)


def _stored(row: dict) -> tuple[str, str]:
    """What a tensor is called, and what it is, where it is written."""
    return row["to"], f"{row['dtype']} {row['shape']}, {row['chunks']} chunk{'s' * (row['chunks'] > 1)}, {row['bytes']:,} bytes"


def _rows(plan: Plan) -> list[dict]:
    return [_row(target) for target in plan.targets]


def _row(target: Target) -> dict:
    first = next(part for part in target.parts)
    source = next(entry for entry in first.sources)
    to = first.to.pattern.split(" -> ")[0]
    return {
        "from": [entry.checkpoint for entry in target.sources],
        "how": "quantized" if first.is_quantized else "decoded" if len(first.sources) > 1 else "",
        "pattern": source.pattern if not target.place else f"{' '.join(source.order)} -> {to}",
        "to": target.name,
        "shape": list(target.shape),
        "dtype": target.dtype.name,
        "chunks": len(target.chunks()),
        "bytes": target.nbytes,
    }
