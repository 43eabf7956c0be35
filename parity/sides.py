"""What the two sides of a comparison must be able to do. NumPy at the border: neither side sees the other's framework.

A model of one's own is compared by giving `parity.compare` an object that follows `Port`; `scripts/compare_own_model.py`
is an example. Taps are those of `oss_model.taps`. Arrays are float32 or bfloat16 (`ml_dtypes`), [batch, length, ...];
the router's are [batch * length, ...]. Reports call a side by its `str()`.

Not every port can decode, differentiate, or say what memory it takes: `SupportsDecode` and the protocols after it are
asked for one by one. An arm that a side has no part in is reported as incomplete, by name.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

Arrays = dict[str, np.ndarray]
Settings = dict[str, Any]  # what a configuration says: names of `oss_model.ModelConfig`, and eos_token_id -> value as JSON


class Sizes(NamedTuple):
    layers: int
    experts: int
    vocab: int
    window: int
    max_positions: int


class Expected(NamedTuple):
    """A parameter as the reference has it.

    Attributes:
      differs: says how a stored one is different; empty if it is not.
      suspects: which known mistakes would explain that: (fault, share of values that differ from the right ones, share
        that differs from what the mistake makes of them, which experts it is about; empty if it is all of them).
    """

    name: str
    shape: tuple[int, ...]
    differs: Callable[[np.ndarray], str]
    value: Callable[[], np.ndarray]
    suspects: Callable[[np.ndarray], Iterable[tuple[str, float, float, str]]] = lambda got: ()


class Layer(Protocol):
    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        """Every tap of the layer for input x, in the dtype of x.

        `forced` holds values to go on with in place of the layer's own: each part then works on the reference's input.
        What is returned is what the layer itself computed there, before the forced value took its place.
        Forced `expert_choice` without `expert_weights` means: these experts, weighed by the layer's own logits.
        """
        ...

    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The sum of the experts alone: x [tokens, hidden], choice and weights [tokens, k] -> [tokens, hidden]."""
        ...


class Port(Protocol):
    """The side that is judged.

    `stored` says which parameters there are: name (as in an Orbax checkpoint of ours) -> (shape, dtype). A port that
    has none to show leaves it empty, and its run ends incomplete.
    """

    @property
    def sizes(self) -> Sizes: ...
    @property
    def stored(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]: ...
    def restore(self, names: Iterable[str]) -> Arrays: ...
    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray: ...
    def layer(self, n: int) -> Layer: ...
    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays: ...
    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@runtime_checkable
class SupportsSettings(Protocol):
    """A side, whichever, that says what its configuration holds: what differs there is told before anything else."""

    @property
    def settings(self) -> Settings: ...


def settings_of(side: object) -> Settings:
    """Empty if it does not say."""
    return side.settings if isinstance(side, SupportsSettings) else {}


@runtime_checkable
class SupportsDecode(Protocol):
    """A layer of a port that also computes a token at a time, on a key-value cache."""

    def decode(self, x: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """`layer_out` of every token, one at a time, each seeing of those before it only what the cache has kept.

        Args:
          x: [batch, length, hidden].
          choice: int [batch * length, k], the experts to go to.

        Returns:
          [batch, length, hidden] in the dtype of x.
        """
        ...


@runtime_checkable
class SupportsGradients(Protocol):
    """A port that also differentiates, the whole model at once."""

    def gradients(self, tokens: np.ndarray, routing: list[np.ndarray]) -> Arrays:
        """d loss / d parameter, for the mean cross entropy of each next token.

        Args:
          tokens: int [batch, length], without padding.
          routing: of each layer the experts to go to, int [batch * length, k]. They are weighed by the port's own logits.

        Returns:
          Parameter's name -> float32 array of the parameter's shape. Packed parameters have no gradient.
        """
        ...


@runtime_checkable
class SupportsRestore(Protocol):
    """A layer of a port that has its parameters in memory: they are not read a second time to be compared."""

    def restore(self, names: Iterable[str]) -> Arrays:
        """As `Port.restore`."""
        ...


@runtime_checkable
class SupportsLeastMemory(Protocol):
    """A port that knows how much memory it takes to compare it."""

    def least_memory(self, batch: int, length: int) -> int:
        """Resident bytes of the process at the peak, all in, with a prompt [batch, length]."""
        ...


class OracleLayer(Layer, Protocol):
    def parameters(self, packed: bool) -> Iterable[Expected]: ...
    def run_with(self, fault: str, x: np.ndarray, forced: Arrays, tap: str) -> np.ndarray | None:
        """What a tap is with a known mistake made (`parity.faults`); None where the reference is only a recording."""
        ...


class Oracle(Protocol):
    """The side that is right: PyTorch (`parity.reference`), or what it said before (`parity.recording`)."""

    @property
    def sizes(self) -> Sizes: ...
    @property
    def rope_positions(self) -> np.ndarray: ...
    def first_parameters(self) -> Iterable[Expected]: ...
    def last_parameters(self) -> Iterable[Expected]: ...
    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray: ...
    def layer(self, n: int) -> OracleLayer: ...
    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays: ...
    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 frequencies [head_dim / 2] and cos, sin [positions, head_dim / 2]."""
        ...

    def run_with(self, fault: str, given: np.ndarray) -> np.ndarray | None:
        """What lies outside the layers, with a known mistake made: of tokens, of the last stream, of its norm, or
        (stacked cos and sin) of positions. None where the reference is only a recording."""
        ...


@runtime_checkable
class GradientOracle(Protocol):
    """An oracle that also differentiates."""

    def gradients(self, tokens: np.ndarray) -> tuple[Arrays, list[np.ndarray]]:
        """What `SupportsGradients.gradients` should be, of every parameter as values, and the routing it is for.

        Args:
          tokens: int [batch, length], without padding.
        """
        ...
