"""What explains a run form that is wrong: parameters that were not loaded as stored, or a known mistake, or else its pattern.

A known mistake is one of `parity.mistakes.run_catalogue`, or of the catalogue at that tap: it is named if it gives what the
form gave, or, where nothing can be computed, if what is right in other forms leaves no other. What follows from a tap that is
wrong by itself (`parity.mistakes.diagnosis`) is said to follow.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from oss_model.taps import LAYER_TAPS, MODEL_TAPS
from oss_model.terminal import counted
from parity import equations as eq
from parity import metrics
from parity.gradients import compare_gradients
from parity.mistakes import catalogue
from parity.mistakes.catalogue import Fault
from parity.mistakes.diagnosis import COLLAPSE, PARAMETERS, which
from parity.mistakes.parameters import Parameters
from parity.mistakes.run_catalogue import LOADING, RUN_CATALOGUE, RunFault
from parity.mistakes.wrong_runs import TOKENS, Evidence, Made, Place
from parity.noise import bound
from parity.protocols import CALL, RETURNED, Answers, FormsSubject, Oracle, Port, Question, Taps, Unanswered, Wrongly
from parity.recording import digest
from parity.reports.report import FormResult, Report
from parity.weights import told_apart

GATE = metrics.USUAL_GATE  # of what is no tap of its own: logits that are returned, or adapted
_HEADS = ("q", "k", "v", "q_rope", "k_rope", "attn_core")


class Tried(NamedTuple):
    name: str
    says: str
    fix: str
    before: float
    after: float


class RunDiagnosis:
    """Of the forms of one run, one after the other. `right` runs another one, and says whether it is."""

    def __init__(
        self, report: Report, port: Port, subject: FormsSubject, oracle: Oracle, question: Question, answers: Answers,
        right: Callable[[str], bool],
    ):  # fmt: skip
        self.report, self.port, self.subject, self.answers = report, port, subject, answers
        self.oracle, self.question, self.right = oracle, question, functools.cache(right)
        self.watched: dict[str, Taps] = {}

    def watch(self, form: str, answers: Answers | None = None) -> Taps:
        """Once a form."""
        if answers is not None:
            return self.subject.watch(form, answers)
        if form not in self.watched:
            self.watched[form] = self.subject.watch(form, self.answers)
        return self.watched[form]

    @functools.cached_property
    def wrongly(self) -> Wrongly:
        return self.oracle.of(self.question.replica)

    def parted(self, result: FormResult, place: Place, got: Taps, want: list[np.ndarray] | None, answers: Answers) -> None:
        """Of a form that was seen to part from the reference at a place, where it should be `want`."""
        if self._follows(result, place) or self._lost_in_loading(result, place):
            return
        wrong = [want is None or place not in got or _apart(got[place][row], want[row], keep) > GATE
                 for row, keep in enumerate(answers.judged)]  # fmt: skip
        self._name(result, place, got, want, answers, wrong)

    def gave(self, result: FormResult, place: str, found: Any, want: Any, beside: dict[Place, Any] | None = None) -> None:
        """Of a form that is only known by what it gave."""
        if self._follows(result, (None, place)):
            return
        self._name(
            result, (None, place), {(None, place): found, **(beside or {})}, want, self.answers, [True] * len(self.answers.rows)
        )

    def rounds(self, result: FormResult) -> None:
        """Of a form in bfloat16: told by itself where it is right in float32."""
        if any((one.form, one.dtype, one.verdict) == (result.form, "float32", "ok") for one in self.report.forms):
            self._find(result, (None, "form"), pattern="in bfloat16 alone, right in float32")

    def _follows(self, result: FormResult, place: Place) -> bool:
        """Of another configuration, or of a tap that is wrong by itself: the same one, or any where no place is known."""
        failing: list[Place] = [(tap.layer, tap.tap) for tap in self.report.taps if tap.verdict == "fail"]
        causes = [(None, "config") for one in self.report.configs if one["logits"]]
        causes += [one for one in failing if one == place or (one[1] == "rope" and place[1] in ("q_rope", "k_rope"))]
        causes += failing if place[1] not in (*LAYER_TAPS, *MODEL_TAPS, RETURNED) and result.on == "model" else []
        if causes:
            self._find(result, place, follows={"layer": causes[0][0], "tap": causes[0][1]})
        return bool(causes)

    def _lost_in_loading(self, result: FormResult, place: Place) -> bool:
        layer, tap = place
        calls, prefix = self.port.can.calls, "" if layer is None else f"layers.{layer}."
        if calls is None or result.on != "model":
            return False
        names = [
            name for name in self.port.stored if name.startswith(tuple(prefix + part for part in PARAMETERS.get(tap, ("-",))))
        ]
        for name, stored in self.port.restore(names).items():
            got = calls.loaded([name]).get(name)
            if got is None or digest(got) != digest(stored):
                note = "was not loaded" if got is None else told_apart(stored, got)
                says = LOADING.says.format(name=name, note=note)
                self._find(result, place, says, LOADING.name, LOADING.fix, cause="loading")
                return True
        return False

    def _name(
        self, result: FormResult, place: Place, got: dict[Place, Any], want: Any, answers: Answers, wrong: list[bool]
    ) -> None:
        try:
            oracle = self.wrongly
        except Unanswered as reason:
            self._find(result, place, pattern=f"no known mistake could be tried: {reason}")
            return
        right = functools.cache(lambda layer: _right(oracle, layer))
        e = Evidence(
            result.form, *place, got, answers, wrong, oracle.settings, oracle, right, lambda form: self._right_in(form, e)
        )
        rows = [row for row in RUN_CATALOGUE if place[1] in row.at]
        tried: list[Tried] = []
        for row in rows:
            tried += self._trying(row.name, lambda row=row: self._made(e, row, want))
        if place[1] in LAYER_TAPS and place in got:
            for fault in catalogue.at(place[1], oracle.settings):
                tried += self._trying(fault.name, lambda fault=fault: self._of_the_code(e, fault, want))
        pattern = self._pattern(e, want)
        found = sorted((one for one in tried if one.after * COLLAPSE <= one.before), key=lambda one: one.after)
        if not found:
            signs = [one for row in rows for one in self._trying(row.name, lambda row=row: self._signs(e, row))]
            name, says, fix, *_ = signs[0] if len(signs) == 1 else (None, None, None)
            self._find(result, place, says, name, fix, pattern=pattern, tried=len(tried))
            return
        best, *rest = found
        others = [{"name": one.name, "residual_after": one.after} for one in rest if one.name != best.name]
        self._find(result, place, best.says, best.name, best.fix, best[3:], others, pattern, tried=len(tried))

    def _trying(self, name: str, ask: Callable[[], Iterable[Tried]]) -> list[Tried]:
        """What a mistake of ours prevents must neither end the run nor go unseen."""
        try:
            return list(ask())
        except Unanswered:
            return []
        except Exception as error:
            said = f"trying {name}: {type(error).__name__}: {' '.join(str(error).split())}"
            self.report.errors += [] if said in self.report.errors else [said]
            return []

    @staticmethod
    def _signs(e: Evidence, row: RunFault) -> Iterable[Tried]:
        numbers = row.signs(e)
        return [] if numbers is None else [Tried(row.name, row.says.format(**numbers), row.fix, 0.0, 0.0)]

    def _made(self, e: Evidence, row: RunFault, want: Any) -> Iterable[Tried]:
        return [
            Tried(row.name, row.says.format(**made.numbers), row.fix, *self._measured(e, made, want)) for made in row.made(e)
        ]

    def _of_the_code(self, e: Evidence, fault: Fault, want: Any) -> Iterable[Tried]:
        made = Made([e.computed(row, wrong=fault.wrong) for row in e.rows])
        says = catalogue.sentence(fault, e.settings["sliding_window"], e.settings)
        return [Tried(fault.name, says, fault.fix, *self._measured(e, made, want))]

    def _measured(self, e: Evidence, made: Made, want: Any) -> tuple[float, float]:
        """How far the form is from what is right, and from what the mistake gives: infinitely, if by more than noise."""
        place = made.place or e.place
        got = e.got.get(place)
        if got is None:
            return 0.0, metrics.WORST
        if isinstance(made.rows, dict):
            worst = [max(one["relative_l2"] for one in compare_gradients(side, got, [name for name in side if name in got]))
                     for side in (want, made.rows)]  # fmt: skip
            return worst[0], worst[1] if worst[1] <= metrics.GRADIENT_GATE else metrics.WORST
        if place[1] == TOKENS:
            same = all(a.tolist() == b.tolist() for a, b in zip(made.rows, got, strict=True))
            return 1.0, 0.0 if same else metrics.WORST
        gate, before = GATE, want if place == e.place else None
        if place[1] in LAYER_TAPS and place[1] != "expert_choice" and e.place in e.got:
            before, rounded = ([e.computed(row, place, dtype=dtype) for row in e.rows] for dtype in (np.float64, np.float32))
            gate = float(bound(max(map(_apart, rounded, before, e.answers.judged))))
        keeps = [np.where(_of(made.of, keep), keep, False) for keep in e.answers.judged]
        sides = (before, made.rows)
        apart, left = (
            max(_apart(got[row], side[row], keeps[row]) for row in e.rows) if side is not None else 1.0 for side in sides
        )
        return apart, left if left <= gate else metrics.WORST

    def _right_in(self, form: str, e: Evidence) -> bool | None:
        """Whether in another form the value at the same place is that of its own inputs."""
        known = [one for one in self.report.forms if (one.form, one.dtype) == (form, "float32")]
        if known and known[0].verdict == "ok":
            return True
        if form not in self.subject.forms(True):
            return None
        if e.tap not in LAYER_TAPS:
            return self.right(form)
        got = self.watch(form)
        if e.place not in got:
            return None
        other = Evidence(form, *e.place, got, self.answers, e.wrong, e.settings, e.oracle, e.right, lambda form: None)
        exact, rounded = ([other.computed(row, dtype=dtype) for row in other.rows] for dtype in (np.float64, np.float32))
        judged = self.answers.judged
        gate = bound(max(map(_apart, rounded, exact, judged)))
        return bool(max(map(_apart, got[e.place], exact, judged)) <= gate)

    # --- in words -----------------------------------------------------------------------------------------------

    def _pattern(self, e: Evidence, want: Any) -> str:
        """Where it is wrong: rows, tokens, heads, how much, and in which forms."""
        said = []
        if want is not None and e.place in e.got and e.tap in (*LAYER_TAPS, RETURNED):
            bad = [_wrong_tokens(e.got[e.place][row], want[row]) & keep for row, keep in enumerate(e.answers.judged)]
            rows = [row for row in e.rows if bad[row].any()]
            if len(rows) < len(bad):
                padded = all(e.padding(row) for row in rows) and not any(e.padding(row) for row in e.rows if row not in rows)
                said.append(f"row {', '.join(map(str, rows))} alone{', which is padded' if padded else ''}")
            said += list(dict.fromkeys(self._tokens(e, row, bad[row]) for row in rows))
            got, right = (np.concatenate([side[row][bad[row]] for row in rows]) if rows else np.zeros((0, 1))
                          for side in (e.got[e.place], want))  # fmt: skip
            if e.tap in _HEADS and len(got):
                split = np.abs(got - right).reshape(len(got), -1, e.settings["head_dim"]) > 1e-4 * np.abs(right).max()
                said.append(which("head", split.any(axis=(0, 2))))
            if len(got) and np.isnan(got).all():
                said.append("no number")
            elif len(got) and np.isfinite(got).all():
                times = float((got * right).sum() / max((right**2).sum(), 1e-300))
                said += [f"{times:.5g} times what it should be"] if metrics.rel_l2(got, times * right) < 1e-5 else []
        here = [one for one in self.report.forms if one.dtype == "float32"]
        for verdict, words in (("fail", "wrong in"), ("ok", "right in")):
            names = [one.form for one in here if one.verdict == verdict]
            if names:
                said.append(f"{words} {', '.join(names)}")
        return "; ".join(part for part in said if part)

    @staticmethod
    def _tokens(e: Evidence, row: int, bad: np.ndarray) -> str:
        first, calls = int(np.flatnonzero(bad)[0]), e.got.get((None, CALL))
        if bad[first:].all():
            if first == 0:
                return "all tokens"
            if calls is not None and first == np.flatnonzero(calls[row] == calls[row][first])[0] and calls[row][first] > 0:
                return f"from the first token of call {calls[row][first]} on" if bad.sum() > 1 else f"token {first} alone"
            return "tokens past the window" if first == e.window else f"tokens from {first} on"
        if calls is not None and calls[row].max() > 0 and len(set(calls[row][bad])) == 1:
            return f"tokens of call {calls[row][first]} alone"
        return f"{int(bad.sum())} of {counted(len(bad), 'token')}, the first {first}"

    def _find(
        self, result: FormResult, place: Place, says: str | None = None, name: str | None = None, fix: str | None = None,
        residuals: tuple[float | None, float | None] = (None, None), others: list[dict[str, Any]] | None = None,
        pattern: str = "", cause: str = "form", tried: int = 0, follows: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Forms in which the same is wrong at the same place are told together."""
        for one in self.report.findings:
            same = (one["layer"], one["tap"], one["name"], one["fault"], one["follows"]) == (*place, name, says, follows)
            if one.get("forms") and same and (name is not None or follows is not None or one["pattern"] == pattern):
                one["forms"].append(result.form)
                return
        found = {
            "cause": cause, "layer": place[0], "tap": place[1], "forms": [result.form], "fault": says, "name": name,
            "residual_before": residuals[0], "residual_after": residuals[1], "fix": fix, "others": others or [],
            "pattern": pattern, "follows": follows,
        }  # fmt: skip
        self.report.findings.append(found)
        if self.report.diagnosis is None and not self.report.explained and follows is None:
            if name is not None:
                self.report.diagnosis = found
            else:
                self.report.explained = f"{result.form}, " + (place[1] if place[0] is None else f"layer {place[0]} {place[1]}")
                self.report.pattern, self.report.tried = pattern, tried


def _right(oracle: Wrongly, layer: int | None) -> eq.Values:
    def outside():
        return (*oracle.first_parameters(), *oracle.last_parameters())

    if layer is None:
        return Parameters("", outside, lambda names: {}).right(set())
    one = oracle.layer(layer)
    return Parameters(f"layers.{layer}.", lambda: one.parameters(False), lambda names: {}, one).right(set())


def _of(some: slice, keep: np.ndarray) -> np.ndarray:
    chosen = np.zeros_like(keep)
    chosen[some] = True
    return chosen


def _apart(got: np.ndarray, want: np.ndarray, keep: np.ndarray) -> float:
    """The worst token's relative L2."""
    if got.shape != want.shape:
        return metrics.WORST
    if not keep.any():
        return 0.0
    return float(metrics.finite(metrics.token_rel_l2(got[keep][None], want[keep][None])).max())


def _wrong_tokens(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    if got.shape != want.shape:
        return np.ones(len(want), bool)
    return metrics.token_rel_l2(got[None], want[None])[0] > GATE
