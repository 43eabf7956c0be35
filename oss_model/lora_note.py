"""lora.json: what low-rank updates alone do not say, beside them. Read and written without JAX."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from oss_model.errors import InputError, raise_all
from oss_model.files import parse_json, write_file

NOTE = "lora.json"


class Noted(NamedTuple):
    rank: int
    alpha: float


def read_note(directory: Path) -> dict[str, Noted] | None:
    """Module -> rank and alpha of its update; None where there is no note.

    Raises:
      InputError: if it cannot be read, or naming each module of which it does not say both.
    """
    path = directory / NOTE
    try:
        updates = dict(parse_json(path.read_bytes())["updates"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: expected the note of save_lora, found something unreadable ({e})") from None
    found, faults = {}, []
    for name, about in updates.items():
        rank, alpha = (about.get(key) for key in ("rank", "alpha")) if isinstance(about, dict) else (None, None)
        if is_rank(rank) and is_finite(alpha):
            found[name] = Noted(int(rank), float(alpha))
        else:
            faults.append(f"{path}: {name}: expected a rank from 1 on and a finite alpha, found {str(about)[:80]}")
    raise_all(faults)
    return found


def write_note(directory: Path, updates: Mapping[str, Noted], rules: Sequence[str] = ()) -> None:
    """
    Args:
      rules: by which the modules were chosen.
    """
    noted = {"rules": list(rules), "updates": {name: one._asdict() for name, one in updates.items()}}
    write_file(directory / NOTE, json.dumps(noted, indent=1).encode())


def is_rank(value: Any) -> TypeGuard[int]:
    return type(value) is int and 1 <= value < 1 << 31


def is_finite(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38 and math.isfinite(value)
