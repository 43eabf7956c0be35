"""The numbers parity is judged by, and the bounds they are held to. NumPy only."""

import math
from typing import Any

import numpy as np

# A tap's gate is so many times its own noise: the equation in float32 against float64, on the same input, the worst token.
# Right ports measured up to 4 times it, PyTorch 2.1; the floor is a float32's own rounding. Whoever is further from the
# equation has left it.
TIMES, FLOOR = 10.0, 2e-7
# Where that is not known (a parameter whose right value nobody has), and of what is no tap of one component: the worst token's
# relative L2 error, float32 both sides, inputs forced.
USUAL_GATE = 1e-4
# Whole-model float32 logits, max |difference| over max |logit|, the reference's routing replayed: ten times the
# worst of 16 seeds over 4 to 24 layers (5e-6). Routing and scale faults, and wrong wiring of a block, are five orders above it.
FREE_RUN_GATE = 5e-5
FREE_RUN_NOISE = 5e-6  # that worst
# cos and sin, |difference| over (1 + angle). The frequencies come out of pow, which libraries round differently in
# the last two places (2.4e-7), each side rounds the angle (1.2e-7), and YaRN's concentration multiplies (1.35). Where a
# frequency is nearly all interpolated, 1 - ramp in float32 is off by more: 7e-7 against one in float64, 1.1e-6 in the tables.
ROPE_GATE = 2e-6
# Two experts whose reference logits are this much closer than the candidate's logit noise may change places.
FLIP_MARGIN = 4.0
# Of a router's logits, or of the model's: two that are this close, over the largest, may change places by rounding.
NEAR_TIE = 4e-5
# What counts as noise there at most, relative to the token's largest logit: a free run's router logits in float32 are
# good to 1e-5 or better, and beyond this the difference is a fault that explains nothing.
FLIP_NOISE = 1e-3


# The precision arm: the port's bfloat16 error over the reference's own. Up to the first is fine, up to the second a
# warning; beyond it rounding is not the explanation.
PRECISION_WARN, PRECISION_FAIL = 1.5, 3.0
# A parameter's gradient, relative L2, float32. Right ports measure up to 2e-4, and 2e-3 for biases of keys: those shift
# all of a query's logits but the sink's alike, so their gradient is a small difference of large terms.
GRADIENT_GATE = 1e-2
WORST = 1e9  # stands for infinity and for what is no number at all: JSON has neither


def finite(numbers: np.ndarray) -> np.ndarray:
    return np.nan_to_num(numbers, nan=WORST, posinf=WORST, neginf=WORST)


def rel_l2(got: np.ndarray, want: np.ndarray) -> float:
    """Relative L2 error of an array. Both zero are equal: 0. Where it is no number, or only `want` is zero: infinity."""
    a, b = got.reshape(-1).astype(np.float64), want.reshape(-1).astype(np.float64)
    error = float(np.linalg.norm(a - b))
    if error == 0:
        return 0.0
    size = float(np.linalg.norm(b))
    return error / size if size > 0 and math.isfinite(error / size) else math.inf


def token_rel_l2(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative L2 error of each token.

    Args:
      got, want: [batch, length, ...], all further axes one token's.

    Returns:
      float64 [batch, length]. NaN or infinity anywhere in a token of `got` gives infinity.
    """
    batch = got.shape[:2]
    relative = np.empty(batch)
    for token in np.ndindex(batch):  # one at a time: all logits of a long prompt are gigabytes in float64
        relative[token] = rel_l2(got[token], want[token])
    return relative


def channel_rel_l2(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative L2 error of each channel over all tokens: [tokens, channels] -> float64 [channels]; of a zero one, absolute."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    size = np.linalg.norm(b, axis=0)
    return finite(np.linalg.norm(a - b, axis=0) / np.where(size > 0, size, 1.0))


def error_ratio(port: float, reference: float) -> float:
    """The port's error over the reference's; 1 where neither has any. One below 1e-6 is exact for a bfloat16."""
    floor = 1e-6
    return min(max(port, floor) / max(reference, floor), WORST)


def kl(want_logits: np.ndarray, got_logits: np.ndarray) -> np.ndarray:
    """KL(reference || candidate) in nats at each place; logits [batch, length, vocab] -> float64 [batch, length]."""
    divergence = np.empty(want_logits.shape[:2])
    for token in np.ndindex(divergence.shape):
        want, got = (_log_softmax(logits[token].astype(np.float64)) for logits in (want_logits, got_logits))
        divergence[token] = np.sum(np.exp(want) * (want - got))
    return divergence


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def free_run(want: np.ndarray, got: np.ndarray) -> dict[str, float]:
    """How far logits [batch, length, vocab] are apart, as numbers for the report."""
    divergence = kl(want, got)
    divergence = finite(divergence)
    return {
        "max_abs": float(finite(np.abs(got.astype(np.float32) - want)).max()),
        "max_logit": float(np.abs(want).max()),
        "kl_mean": float(divergence.mean()),
        "kl_p95": float(np.quantile(divergence, 0.95)),
        "kl_max": float(divergence.max()),
        "top1": float((want.argmax(-1) == got.argmax(-1)).mean()),
    }


def flips(
    want_logits: np.ndarray, want_choice: np.ndarray, got_logits: np.ndarray, got_choice: np.ndarray
) -> list[dict[str, Any]]:
    """Tokens whose set of experts differs, each with the margin that explains it or not.

    A flip is explained when the reference's logits of the expert it lost and the one it took differ by no more than
    FLIP_MARGIN times the largest difference between the two sides' logits of that token (counted up to FLIP_NOISE):
    then noise decides.

    Args:
      want_logits, got_logits: [tokens, experts]. want_choice, got_choice: [tokens, k].
    """
    found = []
    for token in np.flatnonzero((np.sort(want_choice, -1) != np.sort(got_choice, -1)).any(-1)):
        lost = sorted(set(want_choice[token].tolist()) - set(got_choice[token].tolist()))
        took = sorted(set(got_choice[token].tolist()) - set(want_choice[token].tolist()))
        logits = want_logits[token].astype(np.float64)
        margin = float(max(logits[lost]) - min(logits[took])) if lost and took else WORST
        noise = float(np.abs(got_logits[token].astype(np.float64) - logits).max())
        noise = min(noise, FLIP_NOISE * float(np.abs(logits).max()))
        found.append(
            {"token": int(token), "lost": lost, "took": took, "margin": margin, "explained": margin <= FLIP_MARGIN * noise}
        )
    return found
