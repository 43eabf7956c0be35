"""How far rounding alone moves a model: the reference against itself, where what each layer is given is off by rounding."""

from collections.abc import Sequence

import numpy as np

from parity import metrics
from parity.protocols import Arrays, Moved, Oracle

DRAWS = 3  # a model may make more of rounding than most, and not always as much


def moved(oracle: Oracle, batches: Sequence[np.ndarray]) -> list[Moved]:
    """Of tokens, int [batch, length] each: every layer is made once for all of them."""
    float32 = np.dtype(np.float32)
    right = [oracle.embed(tokens, float32) for tokens in batches]
    rngs = [[np.random.default_rng(draw) for draw in range(DRAWS)] for _ in batches]
    nudged = [[stream] * DRAWS for stream in right]
    routing: list[list[np.ndarray]] = [[] for _ in batches]
    largest: list[list[np.ndarray]] = [[] for _ in batches]
    taps: list[dict[tuple[int | None, str], float]] = [{} for _ in batches]
    for n in range(oracle.sizes.layers):
        layer = oracle.layer(n)
        for b in range(len(batches)):
            want = layer.run(right[b])
            forced = {"expert_choice": want["expert_choice"]}
            runs = [layer.run(_off(stream, rng), forced) for stream, rng in zip(nudged[b], rngs[b], strict=True)]
            right[b], nudged[b] = want["layer_out"], [run["layer_out"] for run in runs]
            apart = [np.abs(run["router_logits"] - want["router_logits"]).max(-1) for run in runs]
            routing[b].append(metrics.finite(np.max(apart, axis=0)))
            largest[b].append(np.abs(want["router_logits"]).max(-1))
            taps[b] |= {(n, name): _worst(runs, want, name, batches[b]) for name in want if name != "expert_choice"}
    found = []
    for b, stream in enumerate(right):
        want, apart = oracle.unembed(stream), []
        for one in nudged[b]:  # one at a time: logits are large
            got = oracle.unembed(one)
            apart.append(np.abs(got["logits"] - want["logits"]).max(-1))
            for name in ("final_norm", "logits"):
                taps[b][None, name] = max(taps[b].get((None, name), 0.0), _worst([got], want, name, batches[b]))
        found.append(Moved(metrics.finite(np.max(apart, axis=0)), np.stack(routing[b]), np.stack(largest[b]), taps[b]))
    return found


def _off(stream: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return stream * (1 + metrics.FLOOR * rng.standard_normal(stream.shape, np.float32))


def _worst(runs: list[Arrays], want: Arrays, name: str, tokens: np.ndarray) -> float:
    right, *some = (side[name].reshape(*tokens.shape, -1) for side in (want, *runs))
    return float(max(metrics.finite(metrics.token_rel_l2(one, right)).max() for one in some))
