"""The harness tested by injection: every mistake of the catalogue put into a right port, at several depths and seeds.

A mistake must be found, at its layer and tap, and should be named; what is numerically equivalent, and right ports that
compute in other orders, must not be alarmed about. Beside it, what today's practice lets pass: the cosine of the last
token's logits on a short prompt.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oss_model import ModelConfig
from oss_model.synthetic import write_checkpoint
from parity.candidate import Candidate
from parity.comparison import compare
from parity.forms import GRADIENTS, LOGITS, LORA_ALPHA, TOKENS, UPDATED
from parity.forms import updates as updates_of
from parity.forms_arm import compare_forms
from parity.injection.blocks import INJECTIONS
from parity.injection.candidate import Faulty
from parity.injection.files import SOURCE, corrupt_checkpoint, corrupt_source
from parity.injection.outcomes import COSINE, COSINE_TOKENS, Outcome, RunOutcome, SelfTest
from parity.injection.runs import EQUIVALENT_RUNS, RUN_INJECTIONS, RunInjection
from parity.mistakes.catalogue import CATALOGUE, Fault, applies
from parity.prompts import random_prompt
from parity.protocols import Answers, Oracle, Port, Question
from parity.recording import Recording
from parity.reference import Reference, ReferenceLayer
from parity.reports.report import FormResult, Report

HEALTHY: tuple[dict[str, Any], ...] = (
    {},
    {"expert_path": "scan"},
    {"expert_path": "grouped"},
    {"expert_path": "pairs"},
    {"expert_path": "ragged"},
    {"compiled": True},
)
TRUE_TOO = {"rope-missing": "rope-not-on-k"}  # of k, at its own tap
KINDS = (LOGITS, TOKENS, GRADIENTS, UPDATED)
Convert = Callable[..., Any]
Progress = Callable[[int, int, str], None]


def self_test(
    scratch: Path,
    convert: Convert,
    *,
    cfg: ModelConfig | None = None,
    seeds: int = 3,
    depths: int = 3,
    golden: bool = False,
    only: Callable[[Fault], bool] = lambda fault: True,
    running: Iterable[str] = (),
    share: tuple[int, int] = (0, 1),
    progress: Progress = lambda done, total, what: None,
) -> SelfTest:
    """Inject the catalogue.

    Args:
      scratch: an empty directory to work in.
      convert: `converter.convert`.
      cfg: of the model; the tiny one if None.
      seeds: how many checkpoints and prompts, each its own.
      depths: at how many layers: 1, the first; 2, the last too; 3, and one between.
      golden: compare with a recording of the reference, which has hashes in place of parameters.
      only: which mistakes.
      running: names of `parity.injection.runs.RUN_INJECTIONS` and EQUIVALENT_RUNS: each is put into one of the ways to run the
        checkpoint. Meshes take simulated devices in this process, where the mistake is.
      share: (which, of how many): every so-many-th run of each seed. See `parity.injection.processes`.
      progress: called with (runs done, runs in all, what is being done).
    """
    torch.set_num_threads(1)  # tensors this small are computed sooner than a second thread is woken
    start, result, cfg = time.monotonic(), SelfTest(), cfg or ModelConfig.tiny()
    done, names, (which, of) = 0, list(running), share
    for seed in range(seeds):
        bench = _Bench(result, scratch / f"seed-{seed}", convert, cfg, seed, golden)
        fitting = [fault for fault in CATALOGUE.values() if only(fault) and applies(fault, bench.reference.settings)]
        runs: list[tuple[str, Callable[[], None]]] = [
            *(("healthy", partial(bench.run_right, options)) for options in HEALTHY),
            *((fault.name, partial(bench.put_in, fault, n)) for fault in fitting for n in _layers(fault, cfg, depths)),
            *((name, partial(bench.run_wrong, name)) for name in names),
        ]
        mine = runs[which::of]
        for what, run in mine:
            progress(done, seeds * len(mine), what)
            run()
            done += 1
    result.seconds = time.monotonic() - start
    return result


class _Bench:
    """A checkpoint and prompt of one seed, with what is compared with it; what comes out goes into `result`."""

    def __init__(self, result: SelfTest, work: Path, convert: Convert, cfg: ModelConfig, seed: int, golden: bool):
        self.result, self.work, self.convert, self.seed = result, work, convert, seed
        self.source, self.checkpoint, self.packed = work / "source", work / "checkpoint", work / "packed"
        write_checkpoint(self.source, cfg, seed=seed)
        convert(self.source, self.checkpoint)
        convert(self.source, self.packed, "mxfp4")
        self.reference = _Kept(self.source)
        self.oracle: Oracle = self.reference
        if golden:
            compare(self.reference, Candidate(self.checkpoint), seed=seed, record=work / "recording")
            self.oracle = Recording(work / "recording")
        self.usual = _last_logits(self.reference, seed)
        self.read: dict[str, Any] = {}
        self.asked = _Asked(self.source)

    def run_right(self, options: dict[str, Any]) -> None:
        report = compare(self.oracle, Candidate(self.checkpoint, **options), seed=self.seed)
        self.result.healthy += 1
        if report.verdict != "pass":
            self.result.alarms.append(f"healthy {options}, seed {self.seed}: {_said(report)}")

    def put_in(self, fault: Fault, n: int | None) -> None:
        result, at = self.result, f"{fault.name}, layer {n}, seed {self.seed}"
        if fault.name in INJECTIONS:
            port, changed = Faulty(self.checkpoint, fault.name, n, self.read), []
        else:
            out = self.work / f"{fault.name}-{n}"
            port, changed = _corrupted(fault, n, self.source, self.checkpoint, self.packed, out, self.convert)
        report = compare(self.oracle, port, seed=self.seed)
        result.alarms += [f"{at}: {error}" for error in report.errors]
        if fault.equivalent:
            result.equivalent += 1
            named = report.diagnosis is not None and report.diagnosis["name"] == fault.name
            if report.verdict != "pass" and not named:  # where it does show, by its own name
                result.alarms.append(f"{at}: {_said(report)}")
        else:
            cosine = _cosine(self.usual, _last_logits(port, self.seed))
            result.outcomes.append(_judged(fault, n, self.seed, report, changed, cosine))

    def run_wrong(self, name: str) -> None:
        if name in RUN_INJECTIONS:
            self.result.running.append(_run(name, RUN_INJECTIONS[name], self.work, self.asked, self.seed))
        else:
            self.result.equivalent += 1
            _, report = _ran(EQUIVALENT_RUNS[name], self.work, self.asked, self.seed)
            if report.verdict != "pass":
                self.result.alarms.append(f"{name}, seed {self.seed}: {_said(report)}")


def _run(name: str, mistake: RunInjection, work: Path, oracle: Oracle, seed: int) -> RunOutcome:
    first, report = _ran(mistake, work, oracle, seed)
    located = None if mistake.place is None else (first.layer, first.tap) == mistake.place
    named = report.diagnosis is not None and report.diagnosis["name"] == (mistake.named or name)
    false = _false(report, mistake.named or name)
    said = f"{first.note}; {_said(report)}"
    return RunOutcome(name, mistake.where, first.form, seed, first.verdict == "fail", located, named, false, said)


def _ran(mistake: RunInjection, work: Path, oracle: Oracle, seed: int) -> tuple[FormResult, Report]:
    """One mistake of how the model is run, in the first form that must find it."""
    port, report = Candidate(work / "checkpoint", source=work / "source"), Report("", "", "", 0, 0)
    with mistake.injected():
        forms, quiet = list(mistake.forms[:1]), lambda *_: None
        compare_forms(port, oracle, report, forms, fits=True, seed=seed, progress=quiet, dtypes=("float32",))
    return report.forms[0], report


def _false(report: Report, right: str) -> list[str]:
    """What was named and is not what was made; that weights differ is true of any that do."""
    return sorted({one["name"] for one in report.findings} - {None, right, "weights-differ", TRUE_TOO.get(right)})


class _Kept(Reference):
    """A reference whose layers stay in memory, decoded."""

    def layer(self, n: int) -> ReferenceLayer:
        if n not in self.kept:
            self.kept[n] = super().layer(n)
        return self.kept[n]

    def __init__(self, source: Path):
        super().__init__(source)
        self.kept: dict[int, ReferenceLayer] = {}


class _Asked(Reference):
    """A reference that answers for run forms once, for all of them."""

    def answers(self, question: Question) -> Answers:
        if self.said is None:
            updates = updates_of(ModelConfig.from_json(self.source / "config.json")), LORA_ALPHA
            self.said = super().answers(question._replace(kinds=tuple(KINDS), updates=updates))
        return self.said

    said: Answers | None = None


def _layers(fault: Fault, cfg: ModelConfig, depths: int) -> list[int | None]:
    """First, middle and last of the layers it can be in."""
    if fault.where == "model":
        return [None]
    wanted = {"sliding": "sliding_attention", "full": "full_attention"}.get(fault.where)
    fitting = [n for n, kind in enumerate(cfg.layer_types) if wanted in (None, kind)]
    return list(dict.fromkeys([fitting[0], fitting[-1], fitting[len(fitting) // 2]][:depths])) if fitting else []


def _corrupted(
    fault: Fault, n: int | None, source: Path, checkpoint: Path, packed: Path, out: Path, convert: Convert
) -> tuple[Port, list[str]]:
    """A port of files with the mistake in them, and the parameters that differ by it."""
    if fault.name in SOURCE:
        assert n is not None
        changed = corrupt_source(fault.name, source, out / "source", n)
        convert(out / "source", out / "checkpoint")
        return Candidate(out / "checkpoint"), changed
    changed = corrupt_checkpoint(fault.name, checkpoint, out, n or 0, packed)
    return Candidate(out), changed


def _judged(fault: Fault, n: int | None, seed: int, report: Report, changed: list[str], cosine: float) -> Outcome:
    where, found = report.first_divergence or {}, report.verdict == "fail"
    differing = [weight.name for weight in report.weights if weight.note]
    if changed:
        first = None if n is None else min(int(name.split(".")[1]) for name in changed)
        located = where.get("layer") == first and sorted(differing) == sorted(changed)
    else:
        located = where == {"layer": n, "tap": fault.tap}
    named = report.diagnosis is not None and report.diagnosis["name"] == fault.name
    false = _false(report, fault.name)
    said = "" if found and located and named and not false else f"{_said(report)} {', '.join(false)}".strip()
    return Outcome(fault.name, n, seed, found, located, named, false, said, cosine >= COSINE)


def _said(report: Report) -> str:
    named = "nothing named" if report.diagnosis is None else report.diagnosis["name"]
    return f"{named}, first divergence {report.first_divergence}"


def _last_logits(side: Oracle | Port, seed: int) -> np.ndarray:
    """What people check today: the whole model on a few tokens, the last token's logits."""
    x = side.embed(random_prompt(side.sizes.vocab, COSINE_TOKENS, seed).tokens, np.dtype(np.float32))
    for n in range(side.sizes.layers):
        x = side.layer(n).run(x)["layer_out"]
    return side.unembed(x)["logits"].reshape(COSINE_TOKENS, -1)[-1].astype(np.float64)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
