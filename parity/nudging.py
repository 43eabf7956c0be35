"""How far rounding alone moves a model: the reference against itself, where what each layer is given is off by rounding."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from parity import metrics
from parity.protocols import Oracle

DRAWS = 3  # a model may make more of rounding than most, and not always as much


class Moved(NamedTuple):
    """The largest |difference| of the draws, all float32, every choice of experts being that of the run without.

    Attributes:
      logits: [batch, length], of a token's logits.
      routing: [layers, batch * length], of a token's router logits. largest: the largest |router logit| itself.
    """

    logits: np.ndarray
    routing: np.ndarray
    largest: np.ndarray


def moved(oracle: Oracle, batches: Sequence[np.ndarray]) -> list[Moved]:
    """Of tokens, int [batch, length] each: every layer is made once for all of them."""
    float32 = np.dtype(np.float32)
    right = [oracle.embed(tokens, float32) for tokens in batches]
    rngs = [[np.random.default_rng(draw) for draw in range(DRAWS)] for _ in batches]
    nudged = [[stream] * DRAWS for stream in right]
    routing: list[list[np.ndarray]] = [[] for _ in batches]
    largest: list[list[np.ndarray]] = [[] for _ in batches]
    for n in range(oracle.sizes.layers):
        layer = oracle.layer(n)
        for b in range(len(batches)):
            taps = layer.run(right[b])
            forced = {"expert_choice": taps["expert_choice"]}
            runs = [layer.run(_off(stream, rng), forced) for stream, rng in zip(nudged[b], rngs[b], strict=True)]
            right[b], nudged[b] = taps["layer_out"], [run["layer_out"] for run in runs]
            routing[b].append(_apart([run["router_logits"] for run in runs], taps["router_logits"]))
            largest[b].append(np.abs(taps["router_logits"]).max(-1))
    found = []
    for b, stream in enumerate(right):
        logits = _apart([oracle.unembed(one)["logits"] for one in nudged[b]], oracle.unembed(stream)["logits"])
        found.append(Moved(logits, np.stack(routing[b]), np.stack(largest[b])))
    return found


def _off(stream: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return stream * (1 + metrics.FLOOR * rng.standard_normal(stream.shape, np.float32))


def _apart(some: list[np.ndarray], right: np.ndarray) -> np.ndarray:
    return np.max([metrics.finite(np.abs(one - right).max(-1)) for one in some], axis=0)
