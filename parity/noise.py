"""What float32 does to each tap: the equation in float32 against float64, on what the tap is fed. Gates come from it.

A tap may be `metrics.TIMES` its own noise from the reference, and the reference no further from the equation: else the
witnesses disagree, and nothing is said of the port.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from parity import equations as eq
from parity import metrics
from parity.judge import Judge
from parity.mistakes.parameters import UnknownValueError
from parity.protocols import Arrays, Settings

# Of a layer of more expert values than this, and of logits of more: so many tokens stand for all, spread over the prompt. On a
# device always: it compiles each expert for each number of its tokens.
LARGE, SAMPLED = 100_000_000, 8
BY_CHANNEL = ("attn_out", "mlp_out", "layer_out")  # one channel of large models is thousands of times the others


OnDevice = Callable[[str, Arrays, Any, Settings], np.ndarray]  # `parity.protocols.PortCan.noise`
TAKEN = 10.0  # what float32 does on a device counts up to so many times what it does here


class Noise(NamedTuple):
    """
    Attributes:
      worst: the worst token's relative L2.
      channels: float64 [hidden], each channel's relative L2 over its own scale; None where it is not judged so.
      reference: how far the reference is from the equation, as `worst`.
      device: as `worst`, on the device that the port computes on; beyond TAKEN times `worst` it is not taken. None on a CPU.
    """

    worst: float
    channels: np.ndarray | None
    reference: float
    device: float | None = None

    @property
    def gate(self) -> float:
        return float(bound(max(self.worst, self.device if self.device is not None and not self.strange else 0.0)))

    @property
    def strange(self) -> bool:
        """Whether the device is no good for float32: a fault of how it multiplies would widen its own gate."""
        return self.device is not None and bound(self.device) > TAKEN * bound(self.worst)


def bound(noise: Any) -> Any:
    return metrics.TIMES * np.maximum(noise, metrics.FLOOR)


_known: "weakref.WeakKeyDictionary[Any, dict[Any, Noise | None]]" = weakref.WeakKeyDictionary()


def noise(
    oracle: Any,
    judge: Judge,
    n: int | None,
    tap: str,
    given: Arrays,
    right: eq.Values,
    settings: Settings,
    want: np.ndarray,
    on_device: OnDevice | None = None,
) -> Noise | None:
    """Of a tap whose value should be `want`, computed from `given`; None where a parameter is not known. Kept by oracle."""
    known = _known.setdefault(oracle, {})
    key = judge.prompt.tokens.tobytes(), judge.prompt.valid.tobytes(), n, tap, on_device
    if key not in known:
        try:
            known[key] = _measured(judge, tap, given, right, settings, want, on_device)
        except UnknownValueError:
            return None
    return known[key]


def _measured(
    judge: Judge,
    tap: str,
    given: Arrays,
    right: eq.Values,
    settings: Settings,
    want: np.ndarray,
    on_device: OnDevice | None,
) -> Noise:
    tokens = judge.prompt.valid.reshape(-1)
    size = {"mlp_out": 3 * settings["num_experts"] * settings["hidden_size"] * settings["intermediate_size"],
            "logits": settings["vocab_size"] * settings["hidden_size"]}.get(tap, 0)  # fmt: skip
    if size > LARGE or (size and on_device is not None):
        some = np.flatnonzero(tokens)
        some = some[np.linspace(0, len(some) - 1, min(SAMPLED, len(some))).astype(int)]
        batch = judge.prompt.tokens.shape
        given = {name: _some(value, batch, some) for name, value in given.items()}
        want, tokens = _some(want, batch, some), np.ones(len(some), bool)
    computed = [compute(tap, given, right, settings) for compute in (eq.tap, eq.noise, on_device) if compute is not None]
    exact, rounded, *device = (np.asarray(each).reshape(len(tokens), -1)[tokens] for each in computed)
    worst, reference, *there = (
        float(metrics.finite(_by_token(each, exact)).max())
        for each in (rounded, want.reshape(len(tokens), -1)[tokens], *device)
    )
    found = Noise(worst, None, reference, *there)
    if tap not in BY_CHANNEL:
        return found
    sides = [rounded] if found.strange else [rounded, *device]
    return found._replace(channels=np.max([metrics.channel_rel_l2(side, exact) for side in sides], axis=0))


def _some(value: np.ndarray, batch: tuple[int, ...], some: np.ndarray) -> np.ndarray:
    """A tap at some tokens: as one row, or as the router's are."""
    if value.shape[:2] == batch:
        return value.reshape(-1, *value.shape[2:])[some][None]
    return value[some] if value.shape[0] == batch[0] * batch[1] else value


def _by_token(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    return metrics.token_rel_l2(got[None], want[None])[0]
