"""Which known mistake explains the first divergence: each is made in the reference, and the residual measured again."""

import contextlib
from collections.abc import Callable, Iterable

import numpy as np

from parity import faults, metrics
from parity.judge import Judge
from parity.report import Report
from parity.sides import Arrays, Expected, Oracle, OracleLayer

# A mistake is named when it takes the residual below the arm's gate, and at least this many times down.
COLLAPSE = 10.0
_HEADS = ("q", "k", "v", "q_rope", "k_rope", "attn_core")


class Diagnosis:
    """Of one run. Only what diverges first is looked into: later divergences may be its consequences."""

    def __init__(self, report: Report, judge: Judge, window: int):
        self.report, self.judge, self.done = report, judge, False
        self.sizes = {"window": window, "longer": window + 1, "shorter": window - 1, "half": window // 2}

    def parameter(self, expected: Expected, got: np.ndarray) -> None:
        """Of a parameter that is not what it should be. One that was trained is not explained, and is not the end of it."""
        if self.done or self.report.tried:
            return
        tried = []
        with contextlib.suppress(Exception):  # a mistake that cannot be tried on this parameter must not end the run
            tried.extend(expected.suspects(got))
        self._conclude(None, expected.name, tried, 0.01, "")
        self.done = self.report.diagnosis is not None

    def tap(self, n: int, tap: str, oracle: OracleLayer, x: np.ndarray, taps: Arrays, got: np.ndarray) -> None:
        """Of a layer's tap that fails on the reference's inputs `taps`."""
        if self.done:
            return

        def measure(made: np.ndarray) -> float:
            if made.size != got.size:
                return metrics.WORST
            if tap == "expert_choice":
                return float((np.sort(made, -1) != np.sort(got.reshape(made.shape), -1)).mean())
            return self._residual(got, made)

        tried = self._try(tap, lambda fault: oracle.run_with(fault, x, taps, tap), measure, measure(taps[tap]))
        self._conclude(n, tap, tried, metrics.SEMANTICS_GATE, pattern(tap, got, taps, self.judge))

    def outside(self, tap: str, oracle: Oracle, given: np.ndarray, want: np.ndarray, got: np.ndarray) -> None:
        """Of a tap outside the layers: `given` is what it is computed from."""
        if self.done:
            return
        if tap == "rope":
            # Rounding grows with the angle, at most the position: a mistake may have other frequencies than the reference.
            gate, angle = metrics.ROPE_GATE, given[None, :, None]
            measure = lambda made: float(metrics.finite(np.abs(made - got) / (1 + angle)).max())  # noqa: E731
        else:
            gate, measure = metrics.SEMANTICS_GATE, lambda made: self._residual(got, made)
        tried = self._try(tap, lambda fault: oracle.run_with(fault, given), measure, measure(want))
        self._conclude(None, tap, tried, gate, "")

    def _residual(self, got: np.ndarray, want: np.ndarray) -> float:
        return min(float(self.judge.errors(got.reshape(want.shape), want).max()), metrics.WORST)

    def _try(
        self, tap: str, make: Callable[[str], np.ndarray | None], measure: Callable[[np.ndarray], float], before: float
    ) -> list[tuple[str, float, float]]:
        tried = []
        for fault in faults.at(tap):
            with contextlib.suppress(Exception):  # such as one expert more of a model that has no more
                made = make(fault.name)
                if made is not None:
                    tried.append((fault.name, before, measure(made)))
        return tried

    def _conclude(
        self, layer: int | None, tap: str, tried: Iterable[tuple[str, float, float]], gate: float, where: str
    ) -> None:
        self.done = True
        self.report.explained = tap if layer is None else f"layer {layer} {tap}"
        tried = sorted(tried, key=lambda one: one[2])
        found = [one for one in tried if one[2] <= gate and one[2] * COLLAPSE <= one[1]]
        self.report.pattern = where
        self.report.tried = len(tried)
        if not found:
            return
        (name, before, after), *others = found
        self.report.diagnosis = {
            "fault": faults.CATALOGUE[name].says.format(**self.sizes),
            "name": name,
            "layer": layer,
            "tap": tap,
            "residual_before": before,
            "residual_after": after,
            "fix": faults.CATALOGUE[name].fix,
            "others": [{"name": other, "residual_after": left} for other, _, left in others],
        }


def pattern(tap: str, got: np.ndarray, taps: Arrays, judge: Judge) -> str:
    """Which heads, experts or channels are wrong, as a person would say it; empty if the tap has no such parts."""
    want = taps[tap]
    if got.size != want.size or tap in ("expert_choice", "expert_weights", "router_logits"):
        return ""
    apart = np.abs(got.reshape(want.shape).astype(np.float32) - want)
    right = apart <= 1e-4 * float(np.abs(want).max()) + 1e-3 * np.abs(want)  # NaN is not
    wrong = np.logical_not(right).reshape(-1, *want.shape[2:] if want.ndim > 2 else want.shape[1:])
    tokens = judge.prompt.valid.reshape(-1)
    wrong = wrong[tokens]
    found = []
    if tap in _HEADS:
        found.append(_which("head", np.any(wrong.reshape(len(wrong), wrong.shape[1], -1), axis=(0, 2))))
    if tap == "mlp_out":
        bad, choice = np.any(wrong, axis=-1), taps["expert_choice"][tokens]
        share = [bad[(choice == e).any(-1)] for e in range(taps["router_logits"].shape[-1])]
        found.append(_which("expert", np.array([used.size > 0 and bool(used.all()) for used in share])))
    found.append(_which("channel", np.any(wrong, axis=tuple(range(wrong.ndim - 1)))))
    return "; ".join(part for part in found if part)


def _which(noun: str, wrong: np.ndarray) -> str:
    places = np.flatnonzero(wrong)
    if not places.size:
        return ""
    if places.size == wrong.size:
        return f"all {noun}s"
    if places.size <= 6:
        return f"{noun}{'s' if places.size > 1 else ''} {', '.join(map(str, places))} of {wrong.size}"
    return f"{places.size} of {wrong.size} {noun}s, first {places[0]}"
