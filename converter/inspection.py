"""`inspect-oss`: what a directory is, and what can be done with it."""

import collections
import contextlib
import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np

from converter import adapters
from converter.configs import TRAINED
from converter.ends import Source
from converter.form import Form
from converter.manifest import read_manifest
from converter.orbax_source import OrbaxSource, stored_arrays
from converter.plan import make_plan
from converter.source import open_checkpoint
from oss_model.buckets import path_of
from oss_model.config import ModelConfig
from oss_model.errors import InputError, nothing_at
from oss_model.files import parse_json
from oss_model.lora_note import read_note
from oss_model.zarr import METADATA

PUBLISHED = {
    (cfg.num_hidden_layers, cfg.num_experts, cfg.hidden_size, cfg.vocab_size): name
    for name, cfg in (("gpt-oss-20b", ModelConfig.gpt_oss_20b()), ("gpt-oss-120b", ModelConfig.gpt_oss_120b()))
}


@dataclasses.dataclass
class Inspection:
    """`--json` writes these fields."""

    path: str
    form: str  # "safetensors", "orbax", "orbax-lora" or "peft"
    layout: str | None  # as `convert-oss --json` names it; None of updates
    title: str
    model: str | None  # of which published model it has the sizes
    config: dict  # what config.json says, in the terms of `ModelConfig`
    tensors: int
    nbytes: int
    dtypes: dict[str, list[int]]  # name -> number of tensors, bytes
    scales: dict[int, int]  # of packed experts: scale byte -> how often
    made_from: dict | None  # conversion.json: source, form, created; or what training noted
    updates: dict[str, dict]  # of LoRA: module -> rank, alpha
    what_to_do: list[str]


def inspect(path: str | Path) -> Inspection:
    """
    Raises:
      InputError: if it is none of the forms, naming all that is wrong with it.
    """
    directory = path_of(path)
    if not directory.is_dir():
        raise InputError(f"{directory}: expected a directory, found {nothing_at(directory)}")
    if adapters.is_adapter(directory):
        return _of_updates(directory)
    with contextlib.closing(open_checkpoint(directory)) as source:
        return _of_a_model(directory, source)


def _of_a_model(directory: Path, source: Source) -> Inspection:
    cfg, dtypes, scales = source.cfg, collections.defaultdict(lambda: [0, 0]), np.zeros(256, np.int64)
    for entry in source.entries():
        dtype = source.dtype(entry)
        dtypes[dtype.name][0] += 1
        dtypes[dtype.name][1] += math.prod(entry.checkpoint_shape) * dtype.itemsize
        if entry.packed and entry.model.endswith("scales"):
            scales += np.bincount(source.read(entry).reshape(-1), minlength=256)
    orbax = isinstance(source, OrbaxSource)
    manifest = read_manifest(source.home)
    made_from = {key: manifest[key] for key in ("source", "dtype", "form", "created") if key in manifest} if manifest else None
    with contextlib.suppress(OSError, ValueError):
        made_from = (made_from or {}) | {"trained_from": parse_json((source.home / TRAINED).read_bytes())["base"]}
    sizes = (cfg.num_hidden_layers, cfg.num_experts, cfg.hidden_size, cfg.vocab_size)
    return Inspection(
        path=str(directory),
        form="orbax" if orbax else "safetensors",
        layout=source.layout.name,
        title=source.layout.title,
        model=PUBLISHED.get(sizes),
        config={key: value for key, value in dataclasses.asdict(cfg).items() if isinstance(value, int | float | str | tuple)},
        tensors=len(source.entries()),
        nbytes=sum(nbytes for _, nbytes in dtypes.values()),
        dtypes=dict(dtypes),
        scales={int(byte): int(scales[byte]) for byte in np.flatnonzero(scales)},
        made_from=made_from,
        updates={},
        what_to_do=_for_a_model(directory, source, manifest is not None),
    )


def _for_a_model(directory: Path, source: Source, ours: bool) -> list[str]:
    path = shlex.quote(str(directory))
    lossless = [to for to in ("hf", "hf-bf16", "openai") if to != source.layout.name and _is_lossless(source, to)]
    lossy = [to for to in ("hf", "openai") if not _is_lossless(source, to)]
    found = [f"convert-oss {path} OUT --to {to}" for to in lossless]
    found += [f"convert-oss {path} OUT --to {to} --quantizer best   # lossy; --like SRC" for to in lossy]
    if isinstance(source, OrbaxSource):
        loaded = directory if (directory / METADATA).is_file() else source.directory  # others look for no item
        load = f"create_model_from_checkpoint({str(loaded)!r}, cfg)"
        place = shlex.quote(str(loaded))
        return [load, *([f"verify-oss {place}", f"check-parity {place}"] if ours else [f"convert-oss {path} OUT"]), *found]
    packed = [f"convert-oss {path} OUT --dtype mxfp4"] if source.layout.packed else []
    proof = [] if source.layout.foreign else [f"check-parity {path} OUT --layers"]
    return [f"convert-oss {path} OUT", *packed, *proof, *found]


def _is_lossless(source: Source, to: str) -> bool:
    try:
        make_plan(source, Form(to=to, dtype="bfloat16" if to == "hf-bf16" else "mxfp4"))
    except InputError:
        return False
    return True


def _of_updates(directory: Path) -> Inspection:
    peft = (directory / adapters.CONFIG).is_file()
    if peft:
        about = adapters.peft_config(directory)
        shapes = {name: (t.shape, t.dtype) for name, t in adapters.peft_tensors(directory).items()}
        modules = sorted({_module(name) for name in shapes if ".lora_" in name})
        kinds = {"rank": "r", "alpha": "lora_alpha"}
        ranks = {name: {key: adapters.peft_value(about, kind, name) for key, kind in kinds.items()} for name in modules}
        base = about.get("base_model_name_or_path")
    else:
        shapes = {name: (array.shape, array.dtype) for name, array in stored_arrays(directory).items()}
        ranks, base = {name: one._asdict() for name, one in (read_note(directory) or {}).items()}, None
    dtypes = collections.defaultdict(lambda: [0, 0])
    for shape, dtype in shapes.values():
        dtypes[dtype.name][0] += 1
        dtypes[dtype.name][1] += math.prod(shape) * dtype.itemsize
    other, path = "orbax-lora" if peft else "peft", shlex.quote(str(directory))
    return Inspection(
        path=str(directory),
        form="peft" if peft else "orbax-lora",
        layout=None,
        title="LoRA updates, PEFT's" if peft else "LoRA updates, of oss_model",
        model=None,
        config={},
        tensors=len(shapes),
        nbytes=sum(nbytes for _, nbytes in dtypes.values()),
        dtypes=dict(dtypes),
        scales={},
        made_from={"model": base} if base else None,
        updates=ranks,
        what_to_do=[
            f"convert-oss {path} OUT --to {other} --base MODEL",
            f"convert-oss MODEL OUT --to hf --merge {path}",
            *([] if peft else [f"oss_model.load_lora(model, {str(directory)!r})"]),
        ],
    )


def _module(tensor: str) -> str:
    return tensor.removeprefix(adapters.TOP).partition(".lora_")[0]


def describe(found: Inspection, size: Callable[[int], str]) -> str:
    """The same for people."""
    lines = [f"{found.path}: {found.title}{f', the sizes of {found.model}' if found.model else ''}"]
    if found.config:
        c = found.config
        lines.append(
            f"    {c['num_hidden_layers']} layers, {c['num_experts']} experts of which {c['num_experts_per_tok']} compute, "
            f"hidden {c['hidden_size']}, {c['num_attention_heads']} heads, vocabulary {c['vocab_size']}, "
            f"window {c['sliding_window']}"
        )
    kinds = ", ".join(f"{count} {name} ({size(nbytes)})" for name, (count, nbytes) in sorted(found.dtypes.items()))
    lines.append(f"    {found.tensors} tensors, {size(found.nbytes)}: {kinds}")
    if found.scales:
        low, high, total = min(found.scales), max(found.scales), sum(found.scales.values())
        most = max(found.scales, key=lambda byte: found.scales[byte])
        share = found.scales[most] / total
        lines.append(
            f"    MXFP4 scales 2^{low - 127} to 2^{high - 127}, the most 2^{most - 127} ({share:.0%} of {total:,} blocks)"
        )
    for name, about in list(found.updates.items())[:3]:
        lines.append(f"    {name}: rank {about['rank']}, alpha {about['alpha']}")
    if len(found.updates) > 3:
        lines.append(f"    and {len(found.updates) - 3} more")
    for key, value in (found.made_from or {}).items():
        lines.append(f"    {key}: {value if isinstance(value, str) else json.dumps(value)}")
    return "\n".join([*lines, "", *(f"  {line}" for line in found.what_to_do)])
