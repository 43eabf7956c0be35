"""The arm of `parity.forms`: both sides are asked the same, and what they say is held together.

Logits in float32 are held to the free run's bound; in bfloat16 the port's error is put over the reference's own, by the median
token, since near-ties of the router send some tokens of any two right models elsewhere. A token after a near-tie in its row is
not judged in float32 either; how many were is in the note. Tokens that were generated must be the reference's up to a near-tie
of the logits.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oss_model import ModelConfig
from oss_model.synthetic import write_checkpoint
from oss_model.taps import LAYER_TAPS, MODEL_TAPS
from parity import metrics
from parity.forms import LONG_FORM
from parity.gradients import compare_gradients
from parity.mistakes.run_diagnosis import RunDiagnosis
from parity.mistakes.wrong_runs import TOKENS, UPDATED
from parity.protocols import RETURNED, Answers, Arrays, FormsSubject, Oracle, Port, Question, Taps, Unanswered
from parity.reports.report import FormResult, Report

SEEDS = 8  # of rows, tried for some without a near-tie
NEW = 2.0  # tokens to generate, in windows: the ring is written over
BFLOAT16 = "bfloat16"
MOVED = ("moved", "moved_margins")  # of `Answers`, what has a number a token
LONG = 4096  # tokens


def compare_forms(
    port: Port,
    oracle: Oracle,
    report: Report,
    which: str | Sequence[str],
    *,
    fits: bool,
    seed: int,
    progress: Callable[[int, int, str], None],
    dtypes: Sequence[str] = ("float32", BFLOAT16),
) -> None:
    """Fill `report.forms`.

    Args:
      which: "default", "all", or names of forms.
      fits: whether the model itself is run; else a replica of it with smaller sizes.
      seed: of the rows, and of a replica.
      dtypes: that forms of logits are run in; others are in float32 alone.
    """
    subject = port.can.forms
    if subject is None:  # a port of one's own that declares none
        return
    forms = subject.forms(which != "default")
    if not isinstance(which, str):
        forms = {name: forms[name] for name in which}
    window, limit = subject.cfg.sliding_window, subject.cfg.max_position_embeddings
    with tempfile.TemporaryDirectory() as scratch:
        directory = None
        if not fits:
            directory = write_checkpoint(Path(scratch) / "replica", replica(subject.cfg, oracle), seed=seed)
            subject = subject.of(directory)
            window = subject.cfg.sliding_window
        longest = min(int(2.5 * window) + 1, limit // 2)
        question = Question(
            replica=directory,
            lengths=(longest, max(longest - 7, 1)),
            new=max(2, min(int(NEW * window), limit - longest)),
            kinds=tuple(dict.fromkeys(forms.values())),
            updates=subject.updates if "updated logits" in forms.values() else None,
            seeds=tuple(range(seed, seed + SEEDS)),
        )
        _Arm(port, subject, oracle, report, "model" if fits else "replica", question, dtypes).run(forms, progress)


def compare_long(port: Port, oracle: Oracle, report: Report, *, seed: int, progress: Callable[[int, int, str], None]) -> None:
    """Add to `report.forms` a run of one row, LONG tokens, through a replica: what goes wrong only far from the start.

    Every token goes to all experts there, so that no near-tie takes tokens out of the comparison.
    """
    subject = port.can.forms
    if subject is None:
        report.lacks("long: the port has no forms (parity.protocols.FormsSubject): no long row was run")
        return
    cfg = dataclasses.replace(replica(subject.cfg, oracle), num_experts=3, num_experts_per_tok=3)
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_checkpoint(Path(scratch) / "replica", cfg, seed=seed)
        lengths = (min(LONG, cfg.max_position_embeddings),)
        question = Question(directory, lengths, 0, ("logits",), None, (seed,))
        _Arm(port, subject.of(directory), oracle, report, "replica", question).run({LONG_FORM: "logits"}, progress)


def replica(cfg: ModelConfig, oracle: Oracle) -> ModelConfig:
    """The reference's own configuration with its sizes scaled down, every one distinct; what is no size is kept."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    own = {name: value for name, value in oracle.settings.items() if name in known}
    kinds = list(own.get("layer_types", cfg.layer_types))
    turn = next((n for n in range(1, len(kinds)) if kinds[n] != kinds[0]), 1)
    kinds = (kinds[: turn + 1] * 2)[:4] if len(set(kinds)) > 1 else kinds[:4]
    groups = max(1, own.get("num_attention_heads", cfg.num_attention_heads) // own.get("num_key_value_heads", 1))
    sizes = {
        "num_hidden_layers": len(kinds),
        "layer_types": tuple(kinds),
        "vocab_size": 512,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "num_attention_heads": 2 * groups,
        "num_experts": 10,
        "num_experts_per_tok": min(own.get("num_experts_per_tok", cfg.num_experts_per_tok), 6),
        "sliding_window": 22,
        "use_sharding": False,
        "param_dtype": None,
    }
    return dataclasses.replace(cfg, **{**own, **sizes})


@dataclasses.dataclass
class _Arm:
    port: Port
    subject: FormsSubject
    oracle: Oracle
    report: Report
    on: str
    question: Question
    dtypes: Sequence[str] = ("float32", BFLOAT16)

    def run(self, forms: dict[str, str], progress: Callable[[int, int, str], None]) -> None:
        """These forms, each with what it gives."""
        before = len(self.report.forms)
        progress(0, len(forms), "reference")
        try:
            answers = self.oracle.answers(self.question)
        except Unanswered as reason:
            self.report.lacks(f"forms: {reason}")
            return

        def right(form: str) -> bool:
            _, _, found = next(iter(self.subject.run([(form, "float32")], answers)))
            return self._judge(form, "float32", self.subject.forms(True)[form], found, answers).verdict == "ok"

        given = self.report, self.port, self.subject, self.oracle, self.question, answers
        self.diagnosis = RunDiagnosis(*given, right)
        runs = [(form, dtype) for form, gives in forms.items() for dtype in self.dtypes if _asked(gives, dtype)]
        wrong: list[tuple[FormResult, Any]] = []
        for done, (form, dtype, found) in enumerate(self.subject.run(runs, answers)):
            progress(done, len(runs), form)
            result = self._judge(form, dtype, forms[form], found, answers)
            if result.verdict == "fail" and self._again(result, forms[form], answers):
                wrong.append((result, found))
            self.report.forms.append(result)
        for result in self.report.forms[before:]:
            if result.verdict == "incomplete":
                self.report.lacks(f"forms: {result.form} in {result.dtype} was not compared: {result.note}")
        for done, (result, found) in enumerate(wrong):
            progress(done, len(wrong), f"{result.form}?")
            if result.dtype == "float32":
                self._explain(result, forms[result.form], found, answers)
            else:
                self.diagnosis.rounds(result)

    def _again(self, result: FormResult, gives: str, answers: Answers) -> bool:
        """Whether a form that is wrong is wrong a second time: else nothing can be said of it but that."""
        _, _, found = next(iter(self.subject.run([(result.form, result.dtype)], answers)))
        second = self._judge(result.form, result.dtype, gives, found, answers)
        if second.verdict != "fail":
            result.verdict = "incomplete"
            result.note = f"not reproducible: wrong the first time ({result.note}), right the second, at the same input"
        return second.verdict == "fail"

    def _judge(self, form: str, dtype: str, gives: str, found: Any, answers: Answers) -> FormResult:
        result = FormResult(form, self.on, dtype, "incomplete", None)
        if isinstance(found, str):
            result.note = found
        elif gives == "tokens":
            self._tokens(result, found, answers, form)
        elif gives == "gradients":
            self._gradients(result, found, answers)
        else:
            want = answers.updated if gives == "updated logits" else answers.logits
            if want is None:
                result.note = "the reference cannot be asked: it takes the package peft"
            elif dtype == BFLOAT16:
                self._ratio(result, found, want, answers)
            else:
                self._logits(result, found, want, answers)
        return result

    def _logits(self, result: FormResult, found: list[np.ndarray], want: list[np.ndarray], answers: Answers) -> None:
        worst, judged, total, bad = 0.0, 0, 0, []
        for row, (got, right, before) in enumerate(zip(found, want, answers.judged, strict=True)):
            if got.shape != right.shape:
                result.verdict, result.worst = "fail", metrics.WORST
                result.note = f"row {row}: logits {list(got.shape)}, should be {list(right.shape)}"
                return
            apart = metrics.finite(np.abs(got - right).max(axis=-1)) / np.abs(right).max()
            bounds = answers.bounds[row]
            within = apart <= np.where(bounds < 1, bounds, metrics.FREE_RUN_GATE)
            judged, total = judged + int((before | within).sum()), total + len(before)
            worst = max(worst, float(np.where(before | within, apart, 0.0).max()))
            wrong = np.flatnonzero(before & ~within)
            if wrong.size:
                bad.append(_places(row, wrong, len(apart)))
        result.worst, result.verdict = min(worst, metrics.WORST), "fail" if bad else "ok"
        notes = bad + ([f"{total - judged} of {total} tokens are off where rounding alone decides"] if judged < total else [])
        if not bad and judged * 2 < total:
            result.verdict = "incomplete"
        result.note = "; ".join(notes)

    def _explain(self, result: FormResult, gives: str, found: Any, answers: Answers) -> None:
        """Where a form parts from the reference, if its stream can be seen, and what explains it."""
        if gives == "logits":
            self._locate(result, self.diagnosis.watch(result.form), answers)
        elif gives == "updated logits":
            self.diagnosis.gave(result, UPDATED, found, answers.updated, {(None, "updates"): self.subject.updates})
        elif gives == "gradients":
            self.diagnosis.gave(result, "gradients", found, answers.gradients)
        elif not self._replayed(result, answers):
            self.diagnosis.gave(result, TOKENS, found, answers.made)

    def _replayed(self, result: FormResult, answers: Answers) -> bool:
        """Whether the cache goes wrong on the tokens that should have been generated: then that is where, and what."""
        if "cache" not in self.subject.forms(True):
            return False
        rows = [np.concatenate([row, made[:-1]]) for row, made in zip(answers.rows, answers.made, strict=True)]
        margins, k = [np.full(len(row), np.inf) for row in rows], self.subject.cfg.num_experts_per_tok
        try:
            for want in self.oracle.taps(self.question.replica, rows):
                for (_, tap), found in want.items():
                    if tap == "router_logits" and k < found[0].shape[-1]:
                        margins = [np.minimum(*pair) for pair in zip(margins, (_margin(one, k) for one in found), strict=True)]
        except Unanswered:
            return False
        longer = answers._replace(rows=rows, margins=margins, **{name: _longer(getattr(answers, name), rows) for name in MOVED})
        return self._locate(result, self.diagnosis.watch("cache", longer), longer, elsewhere=True)

    def _locate(self, result: FormResult, found: Taps, answers: Answers, elsewhere: bool = False) -> bool:
        """Where a form that is watched first parts from the reference: both sides' streams are compared."""
        try:
            for want in self.oracle.taps(self.question.replica, answers.rows) if found else ():
                layer = next(iter(want))[0]
                for tap in (*LAYER_TAPS, *MODEL_TAPS):
                    if (layer, tap) in want and not self._same(layer, tap, found.get((layer, tap)), want[layer, tap], answers):
                        result.layer, result.tap = layer, tap
                        place = tap if layer is None else f"layer {layer} {tap}"
                        missing = ", which was not computed" if (layer, tap) not in found else ""
                        replayed = ", on the cache, given the right tokens" if elsewhere else ""
                        result.note = f"parts at {place}{missing}{replayed}; {result.note}"
                        self.diagnosis.parted(result, (layer, tap), found, want[layer, tap], answers)
                        return True
        except Unanswered:
            return False
        if found and not elsewhere:
            result.tap = RETURNED
            result.note = f"every tap is right, what is returned is not; {result.note}"
            self.diagnosis.parted(result, (None, RETURNED), found, answers.logits, answers)
        return False

    @staticmethod
    def _same(layer: int | None, tap: str, found: list[np.ndarray] | None, want: list[np.ndarray], answers: Answers) -> bool:
        if found is None:
            return False
        for row, (got, right, judged) in enumerate(zip(found, want, answers.judged, strict=True)):
            got, right = got[judged], right[judged]
            if tap == "expert_choice":
                if not np.array_equal(np.sort(got, -1), np.sort(right, -1)):
                    return False
            elif got.shape != right.shape or (_errors(got, right) > answers.bound(row, layer, tap)).any():
                return False
        return True

    def _ratio(self, result: FormResult, found: list[np.ndarray], want: list[np.ndarray], answers: Answers) -> None:
        if answers.logits16 is None:
            result.note = "the reference's own logits in bfloat16 are not known"
            return
        errors = [np.concatenate([_errors(side[row], right) for row, right in enumerate(want)])
                  for side in (found, answers.logits16)]  # fmt: skip
        result.worst = metrics.error_ratio(*(float(np.median(metrics.finite(each))) for each in errors))
        result.verdict = "fail" if result.worst > metrics.PRECISION_FAIL else "ok"
        result.note = "the median token's error over the reference's own"

    def _tokens(self, result: FormResult, found: list[np.ndarray], answers: Answers, form: str) -> None:
        notes, wrong, left, total = [], 0, 0, sum(map(len, answers.made))
        for row, (got, made, margins) in enumerate(zip(found, answers.made, answers.made_margins, strict=True)):
            want = made[: until(made, answers.eos)] if form.endswith("eos") else made
            if got.tolist() == want.tolist():
                continue
            parts = np.flatnonzero(got[: len(want)] != want[: len(got)])
            step = int(parts[0]) if parts.size else min(len(got), len(want))
            second = answers.made_seconds is None or (parts.size and got[step] == answers.made_seconds[row][step])
            if parts.size and second and margins[step] < answers.tie(row):
                notes.append(f"row {row} parts at a near-tie, token {step}")
                left += len(want) - step
                continue
            wrong += 1
            said = f"{got[step]}, should be {want[step]}" if parts.size else f"{len(got)} tokens, should be {len(want)}"
            notes.append(f"row {row}: token {step}: {said}" if parts.size else f"row {row}: {said}")
        result.worst, result.verdict, result.note = float(wrong), "fail" if wrong else "ok", "; ".join(notes)
        if not wrong and left * 2 > total:
            result.verdict = "incomplete"

    def _gradients(self, result: FormResult, found: Arrays, answers: Answers) -> None:
        if answers.gradients is None:
            result.note = "the reference has no gradients"
            return
        names = [name for name in answers.gradients if name in found]
        compared = compare_gradients(answers.gradients, found, names)
        if any(one["verdict"] == "fail" for one in compared):
            with contextlib.suppress(Unanswered):
                moved = self.oracle.of(self.question.replica).moved_gradients(answers.rows[0][None])
                compared = compare_gradients(answers.gradients, found, names, moved)
        kinds = {kind: [one for one in compared if one["verdict"] == kind] for kind in ("fail", "incomplete", "ok")}
        result.verdict, some = next((kind, some) for kind, some in kinds.items() if some)
        worst = max(some, key=lambda one: one["relative_l2"])
        result.worst = worst["relative_l2"]
        if result.verdict == "fail" and not answers.judged[0].all():
            result.verdict, result.note = "incomplete", f"worst {worst['name']}: tokens are near a tie of the routing"
        elif result.verdict != "ok":
            noise = ": rounding alone moves PyTorch's by a tenth and more" if result.verdict == "incomplete" else ""
            result.note = f"worst {worst['name']}{noise}"


def _longer(moved: list[np.ndarray] | None, rows: list[np.ndarray]) -> list[np.ndarray] | None:
    """The most of each row, where it has become longer."""
    return moved and [np.pad(by, (0, len(row) - len(by)), "maximum") for by, row in zip(moved, rows, strict=True)]


def _asked(gives: str, dtype: str) -> bool:
    """In bfloat16 logits alone: tokens flip there, and gradients and updates are held in float32."""
    return dtype == "float32" or gives == "logits"


def _margin(logits: np.ndarray, k: int) -> np.ndarray:
    """Of each token [length], as `Answers.margins`, of one layer."""
    best = -np.sort(-logits, axis=-1)
    return (best[:, k - 1] - best[:, k]) / np.abs(logits).max(-1)


def until(made: np.ndarray, eos: tuple[int, ...]) -> int:
    """How many of these tokens there are up to one that ends the text, and with it."""
    ends = np.flatnonzero(np.isin(made, eos))
    return int(ends[0]) + 1 if ends.size else len(made)


def _errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    if got.shape != want.shape:
        return np.full(len(want), np.inf)
    return metrics.token_rel_l2(got[None], want[None])[0]


def _places(row: int, wrong: np.ndarray, length: int) -> str:
    if len(wrong) == length:
        return f"row {row}, all tokens"
    if len(wrong) == length - wrong[0]:
        return f"row {row}, tokens from {wrong[0]} on"
    return f"row {row}, {len(wrong)} of {length} tokens, the first {wrong[0]}"
