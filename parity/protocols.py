"""What the two sides of a comparison must be able to do. NumPy at the border: neither side sees the other's framework.

A model of one's own is compared by giving `parity.compare` an object that follows `Port`; an example is in
`scripts/examples/compare_own_model.py`. Taps are those of `oss_model.taps`. Arrays are float32 or bfloat16 (`ml_dtypes`),
[batch, length, ...]; the router's are [batch * length, ...]. Reports call a side by its `str()`.

Not every port can decode, differentiate, or say what memory it takes: it says what it can in `PortCan` and `LayerCan`. An
arm that a side has no part in is reported as incomplete, by name.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from parity.prompts import Prompt

Arrays = dict[str, np.ndarray]
Settings = dict[str, Any]  # what a configuration says: names of `oss_model.ModelConfig`, and eos_token_id -> value as JSON


class Sizes(NamedTuple):
    layers: int
    experts: int
    vocab: int
    window: int
    max_positions: int


class Rows(Protocol):
    """Stands for an array whose first axis is read, or decoded, as it is asked for: experts are gigabytes."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: int | slice) -> np.ndarray: ...


class Expected(NamedTuple):
    """A parameter as the reference has it.

    Attributes:
      differs: says how a stored one is different; empty if it is not.
      value: gives it; None where only its hash is known.
    """

    name: str
    shape: tuple[int, ...]
    differs: Callable[[np.ndarray], str]
    value: Callable[[], "np.ndarray | Rows"] | None


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


class SupportsRestore(Protocol):
    """A layer of a port that has its parameters in memory: they are not read a second time to be compared."""

    def restore(self, names: Iterable[str]) -> Arrays:
        """As `Port.restore`."""
        ...


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


class SupportsLeastMemory(Protocol):
    """A port that knows how much memory it takes to compare it."""

    def least_memory(self, batch: int, length: int) -> int:
        """Resident bytes of the process at the peak, all in, with a prompt [batch, length]."""
        ...


class LayerCan(NamedTuple):
    """What a layer of a port can do besides; None where it cannot."""

    decode: SupportsDecode | None = None
    restore: SupportsRestore | None = None


class PortCan(NamedTuple):
    """What a port can do besides; None where it cannot.

    `settings` is what its configuration holds, names and values of `parity.configs`: what differs from the reference's is
    told before anything else.
    """

    settings: Settings | None = None
    gradients: SupportsGradients | None = None
    least_memory: SupportsLeastMemory | None = None


class Layer(Protocol):
    """One layer of either side. Shapes: batch b, length l, hidden h, heads n, kv heads m, head_dim d, experts chosen k."""

    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        """Every tap of the layer for input x [b, l, h], in the dtype of x.

        `forced` holds values to go on with in place of the layer's own: each part then works on the reference's input.
        What is returned is what the layer itself computed there, before the forced value took its place.
        Forced `expert_choice` without `expert_weights` means: these experts, weighed by the layer's own logits.

        Returns:
          attn_norm, attn_out, mlp_norm, mlp_out, layer_out [b, l, h]; q, q_rope, attn_core [b, l, n, d]; k, k_rope, v
          [b, l, m, d]; router_logits [b * l, experts]; expert_choice, an int, and expert_weights [b * l, k].
        """
        ...

    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The sum of the experts alone: x [tokens, h], choice and weights [tokens, k] -> [tokens, h]."""
        ...


class PortLayer(Layer, Protocol):
    @property
    def can(self) -> LayerCan: ...


class Port(Protocol):
    """The side that is judged."""

    @property
    def sizes(self) -> Sizes: ...

    @property
    def can(self) -> PortCan:
        """`PortCan()` for a port that does no more than the following."""
        ...

    @property
    def stored(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Its parameters: name (as in an Orbax checkpoint of ours) -> (shape, dtype).

        A port that has none to show leaves it empty, and its run ends incomplete.
        """
        ...

    def restore(self, names: Iterable[str]) -> Arrays:
        """These parameters, as stored."""
        ...

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """int [b, l] -> [b, l, h] in `dtype`."""
        ...

    def layer(self, n: int) -> PortLayer: ...

    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        """The residual stream after the last layer, [b, l, h], -> `final_norm` [b, l, h] and `logits` [b, l, vocab].

        With `final_norm` forced, the logits are computed from that.
        """
        ...

    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int [positions] -> float32 cos and sin, [positions, d / 2]."""
        ...


# --- the reference ----------------------------------------------------------------------------------------------


class OracleLayer(Layer, Protocol):
    def parameters(self, packed: bool) -> Iterable[Expected]:
        """The layer's, named and laid out as in an Orbax checkpoint of ours; experts packed if asked for and stored so."""
        ...


class SupportsReferenceGradients(Protocol):
    """A reference that also differentiates."""

    def gradients(self, tokens: np.ndarray) -> tuple[Arrays, list[np.ndarray]]:
        """What `SupportsGradients.gradients` should be, of every parameter as values, and the routing it is for.

        Args:
          tokens: int [batch, length], without padding.
        """
        ...


class Asked(NamedTuple):
    """What of a reference a comparison is to use."""

    layers: bool
    dtype: str
    gradients: bool


class Oracle(Protocol):
    """The side that is right: PyTorch (`parity.reference`), or what it said before (`parity.recording`)."""

    @property
    def sizes(self) -> Sizes: ...
    @property
    def settings(self) -> Settings:
        """Empty in recordings of before."""
        ...

    @property
    def prompt(self) -> Prompt | None:
        """The only one that it can be asked; None if any."""
        ...

    @property
    def differentiates(self) -> SupportsReferenceGradients | None: ...

    @property
    def rope_positions(self) -> np.ndarray:
        """int [positions], where its tables are to be compared."""
        ...

    def faults(self, port: Port, asked: Asked) -> list[str]:
        """Why it cannot be used for this, a line each."""
        ...

    def first_parameters(self) -> Iterable[Expected]:
        """Those before the layers."""
        ...

    def last_parameters(self) -> Iterable[Expected]:
        """Those after the layers."""
        ...

    def elsewhere(self, n: int, name: str) -> Iterable[Expected]:
        """A small parameter of layer n (its name without the layer) in all other layers."""
        ...

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray: ...
    def layer(self, n: int) -> OracleLayer: ...
    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays: ...
    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 frequencies [d / 2] and cos, sin [positions, d / 2]."""
        ...
