"""The parameters of a layer, or of what lies outside the layers, as they should be: for the equations, and for edits."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from parity.equations import mxfp4
from parity.protocols import Arrays, Expected, OracleLayer


class Parameters:
    """
    Attributes:
      prefix: of their names: "layers.3.", or "" outside the layers.
      expected: gives the reference's, in the order in which they are compared; nothing is kept of them in between, for
        what is read for one is gigabytes.
      restore: reads the port's.
      layer: the reference's; None outside the layers.
    """

    def __init__(
        self,
        prefix: str,
        expected: Callable[[], Iterable[Expected]],
        restore: Callable[[Iterable[str]], Arrays],
        layer: OracleLayer | None = None,
    ):
        self.prefix, self.expected, self.restore, self.layer = prefix, expected, restore, layer

    @property
    def number(self) -> int | None:
        """The layer's."""
        return int(self.prefix.split(".")[1]) if self.prefix else None

    def by_name(self, packed: bool | None = None) -> dict[str, Expected]:
        """Without the layer; experts in the other form if asked."""
        found = self.expected() if packed is None or self.layer is None else self.layer.parameters(packed)
        return {one.name.removeprefix(self.prefix): one for one in found}

    def right(self, exact: set[str]) -> "Right":
        return Right(self, exact)


class UnknownValueError(LookupError):
    """Nobody has the right values of this parameter: neither the reference, nor a port that has other ones."""


class Right(Mapping[str, Any]):
    """Values as they should be, experts decoded: the reference's, or where it knows hashes alone, the port's that have them.

    `exact` are the names, in full, of the port's parameters that are right.
    """

    def __init__(self, parameters: Parameters, exact: set[str]):
        self.parameters, self.exact = parameters, exact
        self.expected = parameters.by_name(packed=False)
        self.read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.read:
            self.read[name] = self._value(name)
        return self.read[name]

    def _value(self, name: str) -> Any:
        one, full = self.expected.get(name), self.parameters.prefix + name
        if one is not None and one.value is not None:
            return one.value()
        if full in self.exact:
            return self.parameters.restore([full])[full]
        packed = [full.removesuffix("weight") + kind for kind in ("blocks", "scales")]
        if self.exact.issuperset(packed):
            return Decoded(*self.parameters.restore(packed).values())
        raise KeyError(full) if one is None else UnknownValueError(full)

    def __iter__(self) -> Iterator[str]:
        return iter(self.expected)

    def __len__(self) -> int:
        return len(self.expected)


class Decoded:
    """Packed experts, each decoded when it is asked for."""

    def __init__(self, blocks: np.ndarray, scales: np.ndarray):
        self.blocks, self.scales = blocks, scales

    def __getitem__(self, expert: int) -> np.ndarray:
        return mxfp4(self.blocks[expert], self.scales[expert])
