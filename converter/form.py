"""The form that is asked for: what is written, how parameters are stored in it, and what may be lost on the way."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from oss_model import quantization
from oss_model.buckets import path_of
from oss_model.config import PARAM_DTYPES
from oss_model.errors import raise_all

# `--to` -> the dtypes that its parameters can have, the usual one first.
DTYPES = {"orbax": PARAM_DTYPES, "hf": ("mxfp4",), "hf-bf16": ("bfloat16", "float32"), "openai": ("mxfp4",)}


@dataclasses.dataclass(frozen=True)
class Form:
    """
    Attributes:
      to: "orbax", or the name of a layout of safetensors.
      dtype: of the parameters; "mxfp4": experts packed, everything else bfloat16.
      quantizer: the rule by which experts' values become MXFP4 (`oss_model.quantization`); None: they may not.
      like: a packed checkpoint; blocks whose values are the same there keep its bytes.
      merge: LoRA updates that are added (`oss_model.lora.save_lora`).
      ignore: unknown keys of config.json that are left out.
    """

    to: str = "orbax"
    dtype: str = "bfloat16"
    quantizer: str | None = None
    like: Path | None = None
    merge: Path | None = None
    ignore: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        return self.dtype == "mxfp4"

    @property
    def may_round(self) -> bool:
        """Whether float32 is rounded to bfloat16 where the form has no float32: what serves has none, what trains may."""
        return self.to != "orbax"

    def note(self) -> dict:
        """For conversion.json: empty where an earlier version would have said nothing."""
        if self == Form(dtype=self.dtype):
            return {}
        paths = {"like": self.like, "merge": self.merge}
        found = {"to": self.to, "quantizer": self.quantizer} | {k: str(p.resolve()) if p else None for k, p in paths.items()}
        return found | ({"ignored_config_keys": list(self.ignore)} if self.ignore else {})


def make_form(
    to: str = "orbax",
    dtype: str | None = None,
    quantizer: str | None = None,
    like: str | os.PathLike | None = None,
    merge: str | os.PathLike | None = None,
    ignore_config_key: Sequence[str] = (),
) -> Form:
    """The form by its parts, as `convert` takes them.

    Raises:
      InputError: for every part that is unknown, or that does not go with the others.
    """
    faults = []
    if to not in DTYPES:
        faults.append(f"to: expected one of {', '.join(DTYPES)}, found {to!r}")
    elif dtype is not None and dtype not in DTYPES[to]:
        those = "one of " * (len(DTYPES[to]) > 1) + ", ".join(DTYPES[to])
        faults.append(f"dtype: expected {those}{'' if to == 'orbax' else f' for {to}'}, found {dtype!r}")
    if quantizer is not None and quantizer not in quantization.RULES:
        faults.append(f"quantizer: expected one of {', '.join(quantization.RULES)}, found {quantizer!r}")
    raise_all(faults)
    paths = {name: None if path is None else path_of(path) for name, path in (("like", like), ("merge", merge))}
    form = Form(to, dtype or DTYPES[to][0], quantizer, **paths, ignore=tuple(sorted(set(ignore_config_key))))
    if not form.packed:
        for name, value in (("quantizer", quantizer), ("like", like)):
            if value is not None:
                faults.append(f"{name}: expected packed experts to be asked for (--dtype mxfp4, --to hf or openai), found {to}")
    elif like is not None and quantizer is None:
        faults.append("like: expected a quantizer, for what has changed, found none; --quantizer best")
    raise_all(faults)
    return form


def noted_form(manifest: dict) -> Form:
    """That of a finished checkpoint."""
    note = manifest.get("form") or {}
    paths = {name: path_of(note[name]) if note.get(name) else None for name in ("like", "merge")}
    ignored = tuple(note.get("ignored_config_keys", ()))
    return Form(note.get("to", "orbax"), manifest["dtype"], note.get("quantizer"), **paths, ignore=ignored)
