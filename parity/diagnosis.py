"""Which known mistake explains the first divergence: each is made in the reference, and the residual measured again."""

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
        """Of a parameter that is not what it should be."""
        if not self.done:
            tried = [(name, before, after) for name, before, after in expected.suspects(got)]
            self._conclude(None, expected.name, tried, 0.01, "")

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
        made = ((fault.name, make(fault.name)) for fault in faults.at(tap))
        return [(name, before, measure(value)) for name, value in made if value is not None]

    def _conclude(
        self, layer: int | None, tap: str, tried: Iterable[tuple[str, float, float]], gate: float, where: str
    ) -> None:
        self.done = True
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
    scale = 1e-4 * float(np.abs(want).max())
    wrong = np.asarray(np.abs(got.reshape(want.shape).astype(np.float32) - want) > scale + 1e-3 * np.abs(want))
    found = []
    if tap in _HEADS:
        found.append(_which("head", np.any(wrong, axis=(0, 1, 3))))
    if tap == "mlp_out":
        tokens = np.any(wrong.reshape(-1, want.shape[-1]), axis=-1)
        choice = taps["expert_choice"]
        share = [tokens[(choice == e).any(-1)] for e in range(int(choice.max()) + 1)]
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
