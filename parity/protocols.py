"""What the two sides of a comparison must be able to do. NumPy at the border: neither side sees the other's framework.

A model of one's own is compared by giving `parity.compare` an object that follows `Port`; an example is in
`scripts/examples/compare_own_model.py`. Taps are those of `oss_model.taps`. Arrays are float32 or bfloat16 (`ml_dtypes`),
[batch, length, ...]; the router's are [batch * length, ...]. Reports call a side by its `str()`.

Not every port can decode, differentiate, or say what memory it takes: it says what it can in `PortCan` and `LayerCan`. An
arm that a side has no part in is reported as incomplete, by name.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from parity import metrics
from parity.prompts import Prompt

if TYPE_CHECKING:
    from oss_model import ModelConfig

Arrays = dict[str, np.ndarray]
Taps = dict[tuple[int | None, str], list[np.ndarray]]  # (layer, tap) -> of each row [length, ...]
Updates = dict[str, tuple[np.ndarray, np.ndarray]]  # module -> low-rank A and B, laid out as `oss_model.layers.LowRank` says
Settings = dict[str, Any]  # what a configuration says: names of `oss_model.ModelConfig`, and eos_token_id -> value as JSON


CALL, RETURNED = "call", "returned"  # of `FormsSubject.watch`, beside the taps


def padding_of(tap: str) -> str:
    return f"{tap} of padding"


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


class Call(Protocol):
    """A call of the whole model under way: what comes before the layers, each layer, and what comes after are its parts."""

    def advance(self, part: int | None, forced: Arrays | None = None) -> Arrays:
        """Run the next part, and give its taps, as `Layer.run` does; none if the model does not run it.

        Args:
          part: the layer's number; None before and after the layers.
          forced: tap -> value to go on with in place of the model's own, `embedding` and `layer_out` among them.
        """
        ...

    def finish(self) -> Any:
        """The logits that the call gave in the end, [batch, length, vocab]; None if it did not come to its end."""
        ...

    def close(self) -> None:
        """Give it up."""
        ...


class SupportsCalls(Protocol):
    """A port that runs its own walk over the layers: how it puts its parts together is compared too.

    Several calls are made side by side, a part each in turn.
    """

    def call(self, tokens: np.ndarray, positions: np.ndarray | None, dtype: np.dtype) -> Call:
        """The whole model called on int [batch, length]; positions are negative on padding, None without any."""
        ...

    def loaded(self, names: Iterable[str]) -> Arrays:
        """These parameters, which the calls go by, as they are in memory."""
        ...

    def replace(self, name: str, value: np.ndarray) -> None:
        """Give a parameter another value, for all calls: what is wrong in the checkpoint is put right behind it."""
        ...


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


class Question(NamedTuple):
    """What the reference is asked for run forms (`parity.forms`).

    Attributes:
      replica: a safetensors directory to be asked about in place of its own; None: its own.
      lengths: of the rows; their tokens are drawn with the first of `seeds` where all can be judged (`Answers.judged`), or with
        the one where the most can.
      new: how many tokens to generate after each row.
      kinds: what is wanted: "logits", "tokens", "gradients", "updated logits".
      updates: low-rank updates, and their alpha.
    """

    replica: "Path | None"
    lengths: tuple[int, ...]
    new: int
    kinds: tuple[str, ...]
    updates: tuple[Updates, float] | None
    seeds: tuple[int, ...]


class Answers(NamedTuple):
    """What the reference says, each row run alone.

    Attributes:
      rows: token ids, an int64 array each.
      margins: float32 [length] a row: by how much the last expert of a token was chosen, the least of all layers, over the
        largest router logit.
      logits, logits16: float32 [length, vocab] a row, computed in float32 and in bfloat16.
      made: the tokens that follow, greedily. made_margins: by how much each was the likeliest, over the largest logit.
        made_seconds: the next likeliest; None in recordings of before.
      eos: a token that is generated early, for the form that must stop there.
      updated: logits with the updates; None if it cannot.
      gradients: parameter's name -> d mean cross entropy of row 0 / d parameter, float32; None if not asked, or it cannot.
      moved: [length] a row: how far rounding moves a token's logits (`Moved`), over the row's largest.
      moved_margins: the same of its router logits, over the token's largest, the most of all layers.
      moved_taps: of each row `Moved.taps`. None, as these others in recordings of before, in recordings.
    """

    rows: list[np.ndarray]
    margins: list[np.ndarray]
    logits: list[np.ndarray]
    logits16: list[np.ndarray] | None
    made: list[np.ndarray]
    made_margins: list[np.ndarray]
    eos: tuple[int, ...]
    updated: list[np.ndarray] | None
    gradients: Arrays | None
    moved: list[np.ndarray] | None = None
    moved_margins: list[np.ndarray] | None = None
    made_seconds: list[np.ndarray] | None = None
    moved_taps: list[dict[tuple[int | None, str], float]] | None = None

    @property
    def judged(self) -> list[np.ndarray]:
        """Of each row the tokens that tell something, bool [length].

        From a near-tie of the routing on, where rounding may send a token elsewhere, they do not, nor where rounding may move
        logits as far as they are large.
        """
        moved = self.moved_margins or [np.zeros(len(row)) for row in self.rows]
        near = [np.maximum(metrics.NEAR_TIE, metrics.TIMES * by) for by in moved]
        ties = [np.logical_or.accumulate(margins < least) for margins, least in zip(self.margins, near, strict=True)]
        return [~tied & (bound < 1) for tied, bound in zip(ties, self.bounds, strict=True)]

    @property
    def bounds(self) -> list[np.ndarray]:
        """Of each row by how much a token's logits may differ, over the row's largest: [length]."""
        moved = self.moved or [np.zeros(len(row)) for row in self.rows]
        return [np.maximum(metrics.FREE_RUN_GATE, metrics.TIMES * by) for by in moved]

    def tie(self, row: int) -> float:
        """Two logits that are so close, over the largest, may change places by rounding."""
        return max(metrics.NEAR_TIE, metrics.TIMES * float(self.moved[row].max())) if self.moved else metrics.NEAR_TIE

    def bound(self, row: int, layer: int | None, tap: str) -> float:
        """By how much a tap may differ, the worst token's relative L2."""
        by = self.moved_taps[row].get((layer, tap), 0.0) if self.moved_taps else 0.0
        return max(metrics.USUAL_GATE, metrics.TIMES * by)


class Moved(NamedTuple):
    """How far rounding alone moves a model (`parity.nudging`), the most of some draws, each going to the same experts.

    Attributes:
      logits: float32 [batch, length], the largest |difference| of a token's logits.
      routing: float32 [layers, batch * length], of its router's. largest: the largest |router logit| itself.
      taps: (layer, tap) -> the worst token's relative L2.
    """

    logits: np.ndarray
    routing: np.ndarray
    largest: np.ndarray
    taps: dict[tuple[int | None, str], float]


class Unanswered(Exception):
    """Why the reference cannot answer a `Question`."""


class FormsSubject(Protocol):
    """A port that can be run in the ways people run it, the whole model at once."""

    @property
    def cfg(self) -> "ModelConfig": ...

    @property
    def updates(self) -> tuple[Updates, float]:
        """For `Question.updates`."""
        ...

    def forms(self, everything: bool) -> dict[str, str]:
        """The forms it can be asked for, those run by default or all: name -> what one gives, as in `Question.kinds`."""
        ...

    def of(self, source: "Path") -> "FormsSubject":
        """The same code on another model, safetensors."""
        ...

    def run(self, runs: list[tuple[str, str]], asked: Answers) -> Iterator[tuple[str, str, list[np.ndarray] | Arrays | str]]:
        """Each (form, dtype) with what it gave: logits [length, vocab] or tokens a row, gradients by name, or why not."""
        ...

    def watch(self, form: str, asked: Answers) -> Taps:
        """What a form that gives logits computes on the way, in float32; empty where that cannot be seen.

        Beside the taps, where a port can say it: (None, CALL), the number of the call that computed a token, from 0;
        (None, RETURNED), the logits that it gave in the end; (layer, padding_of(tap)), of each row what the tap was on padding.
        They are asked for to say what is wrong, not where.
        """
        ...


class LayerCan(NamedTuple):
    """What a layer of a port can do besides; None where it cannot."""

    decode: SupportsDecode | None = None
    restore: SupportsRestore | None = None


class PortCan(NamedTuple):
    """What a port can do besides; None where it cannot.

    `settings` is what its configuration holds, names and values of `parity.configs`: what differs from the reference's is
    told before anything else. `noise` is what float32 does where it computes, if that is not a CPU: `parity.device.noise`
    for a port of JAX. `rope_tables16` is `Port.rope_tables` in bfloat16.
    """

    settings: Settings | None = None
    gradients: SupportsGradients | None = None
    least_memory: SupportsLeastMemory | None = None
    forms: FormsSubject | None = None
    calls: SupportsCalls | None = None
    noise: Callable[[str, Arrays, Any, Settings], np.ndarray] | None = None
    rope_tables16: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None


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


class Wrongly(Protocol):
    """A reference that has its parameters, and can also be wrong on purpose: to name a mistake by what it gives."""

    def first_parameters(self) -> Iterable[Expected]: ...
    def last_parameters(self) -> Iterable[Expected]: ...
    def layer(self, n: int) -> OracleLayer: ...

    @property
    def settings(self) -> Settings: ...

    def taps(self, replica: Path | None, rows: list[np.ndarray]) -> Iterator[Taps]: ...

    def updated(self, rows: list[np.ndarray], updates: Updates, alpha: float) -> list[np.ndarray] | None:
        """As `Answers.updated`, with this alpha."""
        ...

    def twice(self, part: str, row: np.ndarray) -> Arrays:
        """As `Answers.gradients` of a row, every "block", or the "experts" of every block, applied a second time."""
        ...

    def moved_gradients(self, tokens: np.ndarray) -> dict[str, float]:
        """Parameter's name -> how far rounding alone moves its gradient on tokens [1, length], relative L2."""
        ...


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

    def answers(self, question: Question) -> Answers:
        """
        Raises:
          Unanswered: if it cannot.
        """
        ...

    def moved(self, tokens: np.ndarray) -> Moved:
        """
        Raises:
          Unanswered: as `answers`.
        """
        ...

    def taps(self, replica: Path | None, rows: list[np.ndarray]) -> Iterator[Taps]:
        """Every tap of each row, run alone, in float32: the embedding, each layer, and what comes after, one at a time.

        Raises:
          Unanswered: as `answers`.
        """
        ...

    def of(self, replica: Path | None) -> "Wrongly":
        """Itself, or the same of a replica, asked what a mistake would give.

        Raises:
          Unanswered: as `answers`.
        """
        ...

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray: ...
    def layer(self, n: int) -> OracleLayer: ...
    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays: ...
    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 frequencies [d / 2] and cos, sin [positions, d / 2]."""
        ...
