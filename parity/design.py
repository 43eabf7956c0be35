"""Of two checkpoints one may have been made from the other and hold other values by design: quantized, or rounded to bfloat16.

What is expected of it then is its own manifest's rule applied to the other's values, bit for bit, by the equation of
`parity.equations`. The manifest only says which rule: values that do not follow it differ.
"""

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from oss_model.buckets import path_of
from oss_model.files import parse_json
from parity import equations as eq
from parity.protocols import Expected

ROWS = 64  # at a time: what is worked on is then in the processor's cache
ROUNDED = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Design:
    """
    Attributes:
      rule: by which experts became MXFP4; None: they did not.
      of_reference: whether it is the reference that was made from the port's checkpoint, or the other way round.
    """

    rule: str | None
    of_reference: bool

    def moved(self, one: Expected, got: np.ndarray) -> tuple[str, float] | None:
        """By which rule a parameter of the port is another than the reference's, and how far; None if by none.

        The distance is relative L2, of what was made to what it was made from.
        """
        if one.value is None or one.shape != got.shape or got.dtype == np.uint8:
            return None
        want, packed = one.value(), one.name.endswith((".mlp.gate_up.weight", ".mlp.down.weight"))
        by = self.rule if packed and self.rule else ROUNDED
        apart = square = 0.0
        step = (len(want), ROWS, 1)[min(got.ndim, 3) - 1]  # along the first axis: an expert, some rows, or all of a vector
        for index in range(0, len(want), step):
            sides = [np.asarray(side[index : index + step]).reshape(-1, got.shape[-1]) for side in (want, got)]
            made, of = sides if self.of_reference else sides[::-1]
            for start in range(0, len(made), ROWS):
                part, source = (np.ascontiguousarray(side[start : start + ROWS]) for side in (made, of))
                if not _follows(part, source, by):
                    return None
                apart += float(((part.astype(np.float64) - source.astype(np.float64)) ** 2).sum())
                square += float((source.astype(np.float64) ** 2).sum())
        return by, (apart / square) ** 0.5 if square else 0.0


def by_design(source: Path, checkpoint: Path) -> Design | None:
    """What the one that was made from the other says of how: None where that is nothing, or neither was."""
    for made, of, of_reference in ((checkpoint, source, False), (source, checkpoint, True)):
        manifest = _manifest(made)
        if manifest is not None and _is_of(manifest, of):
            form = manifest.get("form") or {}
            rule = form.get("quantizer")
            rounded = form.get("to", "orbax") != "orbax"
            return Design(rule, of_reference) if rule in eq.RULES or (rule is None and rounded) else None
    return None


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        found = parse_json((path / "conversion.json").read_bytes())
        return found if isinstance(found["source"]["path"], str) and isinstance(found.get("form") or {}, dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_of(manifest: dict[str, Any], other: Path, steps: int = 3) -> bool:
    """Whether the other one is where the source was; or, since both may have been moved, has the files that it had.

    A source that was itself converted from it without loss counts as it.
    """
    if manifest["source"]["path"] == str(other.resolve()):
        return True
    between = _manifest(path_of(manifest["source"]["path"])) if steps else None
    if between is not None and not between.get("form") and _is_of(between, other, steps - 1):
        return True
    try:
        files = dict(manifest["fingerprint"]["source"])
        return bool(files) and all((other / name).stat().st_size == size for name, (size, _) in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _follows(made: np.ndarray, of: np.ndarray, by: str) -> bool:
    """Whether values [rows, in] are what the rule makes of others, bit for bit; a block that was kept as it was is too."""
    if by == ROUNDED:
        bfloat16 = np.dtype(ml_dtypes.bfloat16)
        if (made.dtype, of.dtype) != (bfloat16, np.dtype(np.float32)):
            return False
        return np.array_equal(made.view(np.uint16), of.astype(bfloat16).view(np.uint16))
    right, found, before = (a.astype(np.float32).reshape(-1, 32).view(np.uint32) for a in (eq.quantized(of, by), made, of))
    other = (found != right).any(-1)
    return bool((found[other] == before[other]).all())
