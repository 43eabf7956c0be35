"""What float32 does to each tap: the equation in float32 against float64, on what the tap is fed. Gates come from it.

A tap may be `metrics.TIMES` its own noise from the reference, and the reference no further from the equation: else the
witnesses disagree, and nothing is said of the port.
"""

import weakref
from typing import Any, NamedTuple

import numpy as np

from parity import equations as eq
from parity import metrics
from parity.judge import Judge
from parity.mistakes.parameters import UnknownValueError
from parity.protocols import Arrays, Settings

# Of a layer of more expert values than this, and of logits of more: so many tokens stand for all, spread over the prompt.
LARGE, SAMPLED = 100_000_000, 8
BY_CHANNEL = ("attn_out", "mlp_out", "layer_out")  # one channel of large models is thousands of times the others


class Noise(NamedTuple):
    """
    Attributes:
      worst: the worst token's relative L2.
      channels: float64 [hidden], each channel's relative L2 over its own scale; None where it is not judged so.
      reference: how far the reference is from the equation, as `worst`.
    """

    worst: float
    channels: np.ndarray | None
    reference: float

    @property
    def gate(self) -> float:
        return bound(self.worst)


def bound(noise: Any) -> Any:
    return metrics.TIMES * np.maximum(noise, metrics.FLOOR)


_known: "weakref.WeakKeyDictionary[Any, dict[Any, Noise | None]]" = weakref.WeakKeyDictionary()


def noise(
    oracle: Any, judge: Judge, n: int | None, tap: str, given: Arrays, right: eq.Values, settings: Settings, want: np.ndarray
) -> Noise | None:
    """Of a tap whose value should be `want`, computed from `given`; None where a parameter is not known. Kept by oracle."""
    known = _known.setdefault(oracle, {})
    key = judge.prompt.tokens.tobytes(), judge.prompt.valid.tobytes(), n, tap
    if key not in known:
        try:
            known[key] = _measured(judge, tap, given, right, settings, want)
        except UnknownValueError:
            return None
    return known[key]


def _measured(judge: Judge, tap: str, given: Arrays, right: eq.Values, settings: Settings, want: np.ndarray) -> Noise:
    tokens = judge.prompt.valid.reshape(-1)
    size = {"mlp_out": 3 * settings["num_experts"] * settings["hidden_size"] * settings["intermediate_size"],
            "logits": settings["vocab_size"] * settings["hidden_size"]}.get(tap, 0)  # fmt: skip
    if size > LARGE:
        some = np.flatnonzero(tokens)
        some = some[np.linspace(0, len(some) - 1, min(SAMPLED, len(some))).astype(int)]
        batch = judge.prompt.tokens.shape
        given = {name: _some(value, batch, some) for name, value in given.items()}
        want, tokens = _some(want, batch, some), np.ones(len(some), bool)
    exact, rounded = (compute(tap, given, right, settings) for compute in (eq.tap, eq.noise))
    rows = [np.asarray(each).reshape(len(tokens), -1)[tokens] for each in (exact, rounded, want)]
    worst, reference = (float(metrics.finite(_by_token(each, rows[0])).max()) for each in rows[1:])
    channels = metrics.channel_rel_l2(rows[1], rows[0]) if tap in BY_CHANNEL else None
    return Noise(worst, channels, reference)


def _some(value: np.ndarray, batch: tuple[int, ...], some: np.ndarray) -> np.ndarray:
    """A tap at some tokens: as one row, or as the router's are."""
    if value.shape[:2] == batch:
        return value.reshape(-1, *value.shape[2:])[some][None]
    return value[some] if value.shape[0] == batch[0] * batch[1] else value


def _by_token(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    return metrics.token_rel_l2(got[None], want[None])[0]
