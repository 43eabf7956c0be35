"""A checkpoint with LoRA updates added: W + alpha / rank · B·A, in float32 (arXiv:2106.09685).

What has no update is the base's own bytes, packed experts too. Experts that have one are values: decoded one at a time, and
added to. Updates are ours, or PEFT's (`converter.adapters`).
"""

from pathlib import Path

import numpy as np

from converter import adapters
from converter.chunks import arranged, rows_of
from converter.ends import Source
from oss_model import layouts, mxfp4
from oss_model.layouts import BFLOAT16, FLOAT32, Entry


class Merged:
    """`base` with the updates of the directory `lora`. As a source it has values, float32, wherever there is an update.

    Raises:
      InputError: naming every update that does not fit, or whose rank or alpha is not noted.
    """

    def __init__(self, base: Source, lora: Path):
        self.base, self.lora = base, lora
        self.directory, self.cfg, self.layout = base.directory, base.cfg, base.layout
        self._updates = adapters.read(lora, base.cfg, self._own)
        self._of_base = {entry.model: entry for entry in base.entries()}
        rows = {entry.model: entry for entry in layouts.entries(layouts.ORBAX, base.cfg)}
        self._merged = {f"{name}.weight": rows[f"{name}.weight"] for name in self._updates}
        gone = {f"{name}.{kind}" for name in self._updates for kind in ("weight", "blocks", "scales")}
        kept = [entry for entry in base.entries() if entry.model not in gone]
        self._entries = [*kept, *self._merged.values()]

    def close(self) -> None:
        self.base.close()

    @property
    def home(self) -> Path:
        return self.base.home

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

    def _own(self, name: str) -> np.ndarray:
        """The base's parameter."""
        (entry,) = (entry for entry in self.base.entries() if entry.model == name)
        return self.base.read(entry)

    def _values(self, entry: Entry, span: slice) -> np.ndarray:
        """Some rows of the base's parameter, in the model's order, float32."""
        read = [arranged(e.split(self.base.read(e, rows_of(e, span))), e.order, _model_order(e)) for e in self._sources(entry)]
        if len(read) == 2:
            return mxfp4.decode(np.ascontiguousarray(read[0]), np.ascontiguousarray(read[1]), np.float32)
        values = np.ascontiguousarray(read[0])
        return mxfp4.widen(values) if values.dtype == BFLOAT16 else values

    def _update(self, entry: Entry, span: slice) -> np.ndarray:
        update = self._updates[entry.model.removesuffix(".weight")]
        (a, b), scale = update[:2], update.scale
        shape = (span.stop - span.start, *entry.model_shape[1:])
        if entry.order[0] == "experts" and not entry.model.endswith("router.weight"):
            found = [b[n].reshape(-1, b.shape[-1]) @ a[n] for n in range(span.start, span.stop)]
            return (np.stack(found) * np.float32(scale)).reshape(shape)
        rows = b[span].reshape(-1, b.shape[-1])
        return (rows @ a.reshape(a.shape[0], -1) * np.float32(scale)).reshape(shape)


def _model_order(entry: Entry) -> tuple[str, ...]:
    """Names of the parameter's axes."""
    return tuple(entry.pattern.split(" -> ")[1].split())
