"""A checkpoint with LoRA updates added: W + alpha / rank · B·A, in float32 (arXiv:2106.09685).

What has no update is the base's own bytes, packed experts too. Experts that have one are values: decoded one at a time, and
added to. Rank and alpha are those that `oss_model.lora.save_lora` noted.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from converter.chunks import arranged, rows_of
from converter.ends import Source
from converter.orbax_source import stored_arrays
from oss_model import layouts, mxfp4
from oss_model.errors import InputError, raise_all
from oss_model.layouts import BFLOAT16, FLOAT32, Entry

NOTE = "lora.json"


class Update(NamedTuple):
    """Float32. Of a linear map: a [rank, in], b [out, rank]; of an expert's, with the expert first."""

    a: np.ndarray
    b: np.ndarray
    scale: float


class Merged:
    """`base` with the updates of the directory `lora`. As a source it has values, float32, wherever there is an update.

    Raises:
      InputError: naming every update that does not fit, or whose rank or alpha is not noted.
    """

    def __init__(self, base: Source, lora: Path):
        self.base, self.lora = base, lora
        self.directory, self.cfg, self.layout = base.directory, base.cfg, base.layout
        self._updates = _read(lora, base)
        self._of_base = {entry.model: entry for entry in base.entries()}
        rows = {entry.model: entry for entry in layouts.entries(layouts.ORBAX, base.cfg)}
        self._merged = {f"{name}.weight": rows[f"{name}.weight"] for name in self._updates}
        gone = {f"{name}.{kind}" for name in self._updates for kind in ("weight", "blocks", "scales")}
        kept = [entry for entry in base.entries() if entry.model not in gone]
        self._entries = [*kept, *self._merged.values()]

    def close(self) -> None:
        self.base.close()

    def entries(self) -> list[Entry]:
        return self._entries

    def dtype(self, entry: Entry) -> np.dtype:
        return FLOAT32 if entry.model in self._merged else self.base.dtype(entry)

    def read(self, entry: Entry, rows: slice = slice(None), buffer: np.ndarray | None = None) -> np.ndarray:
        if entry.model not in self._merged:
            return self.base.read(entry, rows, buffer)
        start, stop, _ = rows.indices(entry.model_shape[0])
        return self._values(entry, slice(start, stop)) + self._update(entry, slice(start, stop))

    def together(self, entry: Entry) -> int:
        return 1 if entry.model in self._merged else self.base.together(entry)

    def files_of(self, entry: Entry) -> list[Path]:
        if entry.model not in self._merged:
            return self.base.files_of(entry)
        return sorted({file for e in self._sources(entry) for file in self.base.files_of(e)} | set(self._lora_files()))

    @property
    def files(self) -> list[Path]:
        return sorted({*self.base.files, *self._lora_files()})

    def _lora_files(self) -> list[Path]:
        return sorted(path for path in self.lora.rglob("*") if path.is_file())

    def _sources(self, entry: Entry) -> list[Entry]:
        stem = entry.model.removesuffix("weight")
        names = [entry.model] if entry.model in self._of_base else [f"{stem}blocks", f"{stem}scales"]
        return [self._of_base[name] for name in names]

    def _values(self, entry: Entry, span: slice) -> np.ndarray:
        """Some rows of the base's parameter, in the model's order, float32."""
        read = [arranged(e.split(self.base.read(e, rows_of(e, span))), e.order, _model_order(e)) for e in self._sources(entry)]
        if len(read) == 2:
            return mxfp4.decode(np.ascontiguousarray(read[0]), np.ascontiguousarray(read[1]), np.float32)
        values = np.ascontiguousarray(read[0])
        return mxfp4.widen(values) if values.dtype == BFLOAT16 else values

    def _update(self, entry: Entry, span: slice) -> np.ndarray:
        a, b, scale = self._updates[entry.model.removesuffix(".weight")]
        shape = (span.stop - span.start, *entry.model_shape[1:])
        if entry.order[0] == "experts" and not entry.model.endswith("router.weight"):
            found = [b[n].reshape(-1, b.shape[-1]) @ a[n] for n in range(span.start, span.stop)]
            return (np.stack(found) * np.float32(scale)).reshape(shape)
        rows = b[span].reshape(-1, b.shape[-1])
        return (rows @ a.reshape(a.shape[0], -1) * np.float32(scale)).reshape(shape)


def _model_order(entry: Entry) -> tuple[str, ...]:
    """Names of the parameter's axes."""
    return tuple(entry.pattern.split(" -> ")[1].split())


def _read(lora: Path, base: Source) -> dict[str, Update]:
    """Module -> its update, whole: the updates are small."""
    try:
        noted = dict(json.loads((lora / NOTE).read_text(encoding="utf-8"))["updates"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{lora / NOTE}: expected the ranks and alphas that save_lora notes, found none that can be read ({e}); load the "
            "updates with oss_model.load_lora, and save them anew with save_lora"
        ) from None
    found = {name.removesuffix(".value"): array for name, array in stored_arrays(lora).items()}
    shapes = {entry.model: entry.model_shape for entry in layouts.entries(layouts.ORBAX, base.cfg)}
    faults, updates = [], {}
    known = {f"{name}.lora.{part}" for name in noted for part in "ab"}
    faults += [f"{lora}: {name}: expected to be noted in {NOTE}, found no such update there" for name in found.keys() - known]
    for name, about in noted.items():
        pair = [found.get(f"{name}.lora.{part}") for part in "ab"]
        if f"{name}.weight" not in shapes:
            faults.append(f"{lora}: {name}: expected a linear map of the model, found none of this name")
        elif None in pair:
            faults.append(f"{lora}: {name}: expected lora.a and lora.b, found {'one' if any(pair) else 'none'} of them")
        else:
            a, b = (array.read() for array in pair if array is not None)
            faults += _misfit(lora, name, shapes[f"{name}.weight"], a.shape, b.shape, about["rank"])
            updates[name] = Update(a, b, float(about["alpha"]) / about["rank"])
    raise_all(faults)
    return updates


def _misfit(lora: Path, name: str, shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], rank: int) -> list[str]:
    """By the rule of `oss_model.lora.shapes_of`: the axes of W, those of its input to A and the others to B."""
    experts = name.endswith(("gate_up", "down"))
    inputs = len(a) - (2 if experts else 1)
    lead = shape[:1] if experts else ()
    wanted = (*lead, rank, *shape[len(shape) - inputs :]), (*shape[: len(shape) - inputs], rank)
    return [] if (a, b) == wanted else [f"{lora}: {name}: expected shapes {list(wanted)}, found {[a, b]}"]
