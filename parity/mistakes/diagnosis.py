"""What explains the first divergence: the configurations, or else the weights, or else a known mistake in the code.

A mistake in the code is a wrong equation (`parity.mistakes.wrong_equations`), computed from what the failing tap was given,
and the residual measured again. It is only looked for where the tap's own parameters are right: wrong ones explain what they
do. Nothing is tried in the port or in PyTorch, so that a recording will do for a reference.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from parity import configs, metrics
from parity import equations as eq
from parity.judge import Judge
from parity.mistakes import catalogue, edits
from parity.mistakes.catalogue import Fault
from parity.mistakes.parameters import Parameters, UnknownValueError
from parity.mistakes.run_catalogue import LOADING
from parity.protocols import Arrays, Expected, Oracle, Port, Settings
from parity.reports.report import Report, Weight

# A mistake is named when it takes the residual below the arm's gate, and at least this many times down.
COLLAPSE = 10.0
FINDINGS = 24  # looked into at the most; a mistake of the whole code is one a layer
MOST = 16  # parameters that are tried: of a fine-tuned model all differ, and experts are gigabytes
_HEADS = ("q", "k", "v", "q_rope", "k_rope", "attn_core")
# Of each tap, the parameters that it is computed with; those of a layer without its prefix.
PARAMETERS = {
    "embedding": ("embedding.",), "final_norm": ("norm.",), "logits": ("lm_head.",),
    "attn_norm": ("attn.norm.",), "q": ("attn.q_proj.",), "k": ("attn.k_proj.",), "v": ("attn.v_proj.",),
    "attn_core": ("attn.sinks",), "attn_out": ("attn.o_proj.",), "mlp_norm": ("mlp.norm.",),
    "router_logits": ("mlp.router.",), "mlp_out": ("mlp.gate_up.", "mlp.down."),
}  # fmt: skip


class Explained(NamedTuple):
    """The known mistakes that explain a parameter, the best first: (name, share that differed, share left)."""

    found: list[tuple[str, float, float]]
    where: str


class Diagnosis:
    """Of one run. Every tap is fed the reference's values, so each that fails has a cause of its own, and is looked into."""

    def __init__(self, report: Report, judge: Judge, oracle: Oracle, port: Port):
        self.report, self.judge, self.oracle, self.port, self.done = report, judge, oracle, port, False
        self.configured = False  # whether the configurations differ: what follows from that is not looked into
        self.window, self.settings = oracle.sizes.window, oracle.settings
        self.looked: set[str] = set()  # parameters that differ, and were tried
        self.explained: dict[str, Explained] = {}  # and what explains them
        self.told: set[str] = set()  # and what was said of

    def configuration(self, port: Settings) -> None:
        """Before anything else: what explains everything that follows from it."""
        self.report.configs = configs.differences(port, self.settings)
        said = [configs.said(one) for one in self.report.configs if one["logits"]]
        self.configured = bool(said)
        if said:
            fix = "make DST/config.json say what SRC's does; convert-oss copies it"
            self._tell("config", None, "config", "; ".join(said), "config-differs", fix)

    def parameter(self, expected: Expected, got: np.ndarray, parameters: Parameters) -> None:
        """Of a parameter that is not what it should be. It may be harmless, or trained: what it explains is told later."""
        name = expected.name
        copied = name == "lm_head.weight" and "embedding.weight" in self.explained  # the two halves of an exchange
        if len(self.looked) >= MOST and not copied:
            return
        self.looked.add(name)
        tried: list[edits.Found] = []
        try:
            for one in self._edits(expected, got, parameters):
                tried.append(one)
        except Exception as error:  # a bug of ours, which must neither end the run nor go unseen
            self.failed(f"looking into {name}", error)
        wheres = {fault: where for fault, _, _, where in tried}
        found = _collapsing([(fault, before, after) for fault, before, after, _ in tried], 0.01)
        if found:
            self.explained[name] = Explained(found, wheres[found[0][0]])

    def _edits(self, expected: Expected, got: np.ndarray, parameters: Parameters) -> Iterable[edits.Found]:
        name, n = expected.name.removeprefix(parameters.prefix), parameters.number
        if expected.value is None:
            others = parameters.by_name() if n is not None else self._outside()
            found = edits.undone(expected, got, name, others, () if n is None else self.oracle.elsewhere(n, name))
            return ((fault, 1.0, 0.0, "") for fault in found)  # of a hash: all of it or nothing
        right = self.right(parameters)

        @functools.cache
        def packed() -> tuple | None:
            stored, experts = parameters.by_name(packed=True), name.rsplit(".", 1)[0]
            pair = [stored.get(f"{experts}.{kind}") for kind in ("blocks", "scales")]
            return tuple(one.value() for one in pair if one is not None and one.value is not None) if all(pair) else None

        elsewhere = (lambda: self.oracle.elsewhere(n, name)) if n is not None else lambda: ()
        look = edits.Look(name, right.__getitem__ if n is not None else self._outer_value, elsewhere, packed)
        return edits.explain(expected.value(), got, look)

    def _outside(self) -> dict[str, Expected]:
        return {one.name: one for one in (*self.oracle.first_parameters(), *self.oracle.last_parameters())}

    def _outer_value(self, name: str) -> np.ndarray:
        value = self._outside()[name].value
        assert value is not None
        return value()[:]

    def right(self, parameters: Parameters) -> eq.Values:
        return parameters.right({weight.name for weight in self.report.weights if not weight.note})

    def tap(self, n: int | None, tap: str, parameters: Parameters, given: Arrays, want: np.ndarray, got: np.ndarray) -> None:
        """Of a tap that fails on the reference's own inputs `given`; n is None outside the layers."""
        if not self.settings or self.configured or self._weights(n, tap) or self._lost(n, tap):
            return
        if n is not None and tap in ("q_rope", "k_rope") and any(one["tap"] == "rope" for one in self.report.findings):
            self._find("code", n, tap, follows={"layer": None, "tap": "rope"})
            return
        if len(self.report.findings) >= FINDINGS:
            return
        settings = self.settings if n is None else eq.of_layer(self.settings, n)
        right, gate = self.right(parameters), self.report.taps[-1].gate

        def measure(made: np.ndarray) -> float:
            return self._apart(tap, made, got, given)

        if self._reference_left(n, tap, given, want, got, right, settings):
            return
        tried, before = [], measure(want)
        for fault in catalogue.at(tap, self.settings):
            try:
                tried.append((fault.name, before, measure(self._made(fault, tap, given, right, settings))))
            except UnknownValueError:
                continue
            except Exception as error:  # a bug of ours, which must neither end the run nor go unseen
                self.failed(f"trying {fault.name} at {tap}", error)
        self._conclude(n, tap, tried, gate, pattern(tap, got, {**given, tap: want}, self.judge) if n is not None else "")

    def finish(self) -> None:
        """When every parameter has been seen: where nothing but weights is wrong, or what one alone could not tell."""
        differing = [one for one in self._differing("") if one.name not in self.told]
        if differing and not self.configured:
            first = next((one for one in differing if one.name in self.explained), differing[0])
            self._tell_of(first, f" (and {len(differing) - 1} parameters more)" if len(differing) > 1 else "")
        found = self.report.diagnosis
        if found is not None and found["cause"] != "weights":
            found = next((one for one in self.report.findings if one["cause"] == "weights"), None)
        both = ("embedding-is-lm-head", "lm-head-is-embedding")
        halves = [self.explained[name].found[0][0] for name in ("embedding.weight", "lm_head.weight") if name in self.explained]
        if found is not None and found["name"] in both and halves == list(both):
            exchange = catalogue.CATALOGUE["embedding-lm-head-swapped"]
            found |= {"name": exchange.name, "fault": exchange.says, "fix": exchange.fix}
        if found is not None and found["name"] == "weights-differ" and len(differing) == len(self.report.weights) > 1:
            all_of_it = f"0 of {len(differing)} parameters are exact: another model, or all of it was trained; "
            found["fault"] = all_of_it + found["fault"]

    def _tell_of(self, weight: Weight, rest: str) -> None:
        """That a parameter differs, by its known mistake if it has one."""
        known = self.explained.get(weight.name)
        self.told.add(weight.name)
        if known is None:
            said = f"it is not that of SRC: {weight.note}{rest}"
            self._tell("weights", weight.layer, weight.name, said, "weights-differ", _CONVERT)
            return
        (name, before, after), *others = known.found
        fault = catalogue.CATALOGUE[name]
        says = f"{known.where}: {fault.says}" if known.where else fault.says
        partner = self._partner(name, weight.name)
        if partner is not None and not self._differing(partner):
            name, says = "weights-differ", f"it is a copy of {partner}, which is as it should be"
        self._tell("weights", weight.layer, weight.name, says, name, fault.fix, (before, after), others)

    @staticmethod
    def _partner(fault: str, name: str) -> str | None:
        """The other parameter of an exchange within a layer: where that is right, there was none."""
        edit, layer = edits.EDITS.get(fault), name.startswith("layers.")
        return edit.swaps(name) if edit is not None and edit.swaps is not None and layer else None

    def _weights(self, n: int | None, tap: str) -> bool:
        """Whether a parameter that the tap is computed with differs; then that is what is said."""
        prefix = "" if n is None else f"layers.{n}."
        parts = (one for part in PARAMETERS.get(tap, ()) for one in self._differing(prefix + part))
        differing = [one for one in parts if one.name not in self.report.righted]
        if not differing:
            return False
        first = next((one for one in differing if one.name in self.explained), differing[0])
        if first.name in self.told:
            return True
        others = [one.name for one in differing if one is not first]
        self._tell_of(first, f" (and {', '.join(others)})" if others else "")
        return True

    def _lost(self, n: int | None, tap: str) -> bool:
        """Whether a parameter that the tap is computed with is not what is stored; then that is what is said."""
        prefixes = tuple(("" if n is None else f"layers.{n}.") + part for part in PARAMETERS.get(tap, ()))
        lost = [one for one in self.report.loading if one.name.startswith(prefixes)] if prefixes else []
        for one in lost[:1]:
            self._tell("loading", n, tap, LOADING.says.format(name=one.name, note=one.note), LOADING.name, LOADING.fix)
        return bool(lost)

    def _differing(self, prefix: str) -> list[Weight]:
        return [weight for weight in self.report.weights if weight.note and weight.name.startswith(prefix)]

    def _apart(self, tap: str, want: np.ndarray, got: np.ndarray, given: Arrays) -> float:
        """How far a tap is from what it should be, by the number that its gate is about."""
        if want.size != got.size:
            return metrics.WORST
        want = want.reshape(got.shape)
        if tap == "expert_choice":
            return float((np.sort(want, -1) != np.sort(got, -1)).mean())
        if tap == "rope":
            # Rounding grows with the angle, at most the position: a mistake may have other frequencies than the reference.
            return float(metrics.finite(np.abs(want - got) / (1 + given["positions"][None, :, None])).max())
        return min(float(self.judge.errors(got, want).max()), metrics.WORST)

    def _reference_left(
        self, n: int | None, tap: str, given: Arrays, want: np.ndarray, got: np.ndarray, right: eq.Values, settings: Settings
    ) -> bool:
        """The third witness: which of the two left the equation. If it is PyTorch, that is all that can be said."""
        try:
            exact, rounded = (compute(tap, given, right, settings) for compute in (eq.tap, eq.noise))
        except UnknownValueError:
            return False
        except Exception as error:  # a bug of ours, as below
            self.failed(f"the equation of {tap}", error)
            return False
        noise, reference, port = (self._apart(tap, exact, one, given) for one in (rounded, want, got))
        limit = metrics.TIMES * max(noise, metrics.FLOOR)
        left = [side for side, off in (("PyTorch", reference), ("the port", port)) if off > limit]
        where = tap if n is None else f"layer {n} {tap}"
        if self.report.witness is None:
            self.report.witness = {
                "layer": n, "tap": tap, "noise": noise, "reference": reference, "port": port, "left": left
            }  # fmt: skip
        if "PyTorch" not in left:
            return False
        self.done = True
        self.report.lacks(
            f"{where}: the witnesses disagree: PyTorch is {reference:.1e} from the equation in float64, whose own noise in "
            f"float32 is {noise:.1e}; the port is {port:.1e} from it"
        )
        self.report.taps[-1].verdict = "fail" if "the port" in left else "incomplete"
        return True

    @staticmethod
    def _made(fault: Fault, tap: str, given: Arrays, right: eq.Values, settings: Settings) -> np.ndarray:
        assert fault.wrong is not None
        return fault.wrong.tap(tap, given, right, settings)

    def failed(self, doing: str, error: Exception) -> None:
        self.report.errors.append(f"{doing}: {type(error).__name__}: {' '.join(str(error).split())}")

    def _conclude(self, layer: int | None, tap: str, tried: list[tuple[str, float, float]], gate: float, where: str) -> None:
        """Of a tap whose parameters are right."""
        if not self.done:
            self.report.explained = tap if layer is None else f"layer {layer} {tap}"
            self.report.pattern, self.report.tried = where, len(tried)
        if found := _collapsing(tried, gate):
            (name, before, after), *others = found
            fault = catalogue.CATALOGUE[name]
            says = catalogue.sentence(fault, self.window, self.settings)
            self._tell("code", layer, tap, says, name, fault.fix, (before, after), others, where)
        else:
            self._find("code", layer, tap, pattern=where, tried=len(tried))
        self.done = True

    def _tell(
        self, cause: str, layer: int | None, tap: str, says: str, name: str, fix: str,
        residuals: tuple[float | None, float | None] = (None, None), others: Iterable[tuple[str, float, float]] = (),
        where: str = "",
    ) -> None:  # fmt: skip
        found = {
            "fault": says,
            "name": name,
            "residual_before": residuals[0],
            "residual_after": residuals[1],
            "fix": fix,
            "others": [{"name": other, "residual_after": left} for other, _, left in others],
        }
        told = self._find(cause, layer, tap, pattern=where, **found)
        if not self.done:
            self.report.diagnosis = told
        self.done = True

    def _find(self, cause: str, layer: int | None, tap: str, **found: Any) -> dict[str, Any]:
        one = {
            "cause": cause,
            "layer": layer,
            "tap": tap,
            "fault": None,
            "name": None,
            "pattern": "",
            "follows": None,
            "forms": [],
        } | found
        self.report.findings.append(one)
        return one


def _collapsing(tried: Iterable[tuple[str, float, float]], gate: float) -> list[tuple[str, float, float]]:
    """Those of (name, residual before, after) that take it down to noise, the best first."""
    return [one for one in sorted(tried, key=lambda one: one[2]) if one[2] <= gate and one[2] * COLLAPSE <= one[1]]


_CONVERT = "if it was trained, that is all; if not: verify-oss DST SRC, and convert again"


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
        found.append(which("head", np.any(wrong.reshape(len(wrong), wrong.shape[1], -1), axis=(0, 2))))
    if tap == "mlp_out":
        bad, choice = np.any(wrong, axis=-1), taps["expert_choice"][tokens]
        share = [bad[(choice == e).any(-1)] for e in range(taps["router_logits"].shape[-1])]
        found.append(which("expert", np.array([used.size > 0 and bool(used.all()) for used in share])))
    found.append(which("channel", np.any(wrong, axis=tuple(range(wrong.ndim - 1)))))
    return "; ".join(part for part in found if part)


def which(noun: str, wrong: np.ndarray) -> str:
    places = np.flatnonzero(wrong)
    if not places.size:
        return ""
    if places.size == wrong.size:
        return f"all {noun}s"
    if places.size <= 6:
        return f"{noun}{'s' if places.size > 1 else ''} {', '.join(map(str, places))} of {wrong.size}"
    return f"{places.size} of {wrong.size} {noun}s, first {places[0]}"
