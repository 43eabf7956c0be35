"""Of two checkpoints one may have been made from the other and hold other values by design: quantized, or rounded to bfloat16.

What is expected of it then is its own manifest's rule applied to the other's values, bit for bit, by the equation of
`parity.equations`. The manifest only says which rule: values that do not follow it differ.
"""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np

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
                part, source = made[start : start + ROWS], of[start : start + ROWS]
                if not _follows(part, source, by):
                    return None
                apart += float(((part.astype(np.float64) - source.astype(np.float64)) ** 2).sum())
                square += float((source.astype(np.float64) ** 2).sum())
        return by, (apart / square) ** 0.5 if square else 0.0


def by_design(source: Path, checkpoint: Path) -> Design | None:
    """By the manifest of the one that says that it was made from the other; else by that of the only one that has a rule."""
    forms = {of_reference: _noted(path) for path, of_reference in ((checkpoint, False), (source, True))}
    rules = {side: form for side, (form, _) in forms.items() if form.get("quantizer") or form.get("to", "orbax") != "orbax"}
    others = {False: source, True: checkpoint}
    from_other = [side for side in rules if forms[side][1] == str(others[side].resolve())]
    for side in from_other or (list(rules) if len(rules) == 1 else []):
        return Design(rules[side].get("quantizer"), side)
    return None


def _noted(path: Path) -> tuple[dict, str]:
    """(the form, SRC) that a manifest says; nothing where there is none."""
    try:
        manifest = parse_json((path / "conversion.json").read_bytes())
        return dict(manifest.get("form") or {}), str(manifest["source"]["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, ""


def _follows(made: np.ndarray, of: np.ndarray, by: str) -> bool:
    """Whether values [rows, in] are what the rule makes of others; a block that was kept as it was does too."""
    if by == ROUNDED:
        return made.dtype != of.dtype and np.array_equal(made, of.astype(ml_dtypes.bfloat16).astype(made.dtype))
    right, found, before = (a.astype(np.float32).reshape(-1, 32) for a in (eq.quantized(of, by), made, of))
    other = (found.view(np.uint32) != right.view(np.uint32)).any(-1)
    return bool((found[other] == before[other]).all())
