"""What a comparison found, and how it is shown: a table of about a screen, and one JSON object."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from oss_model.taps import LAYER_TAPS
from parity import configs
from parity.metrics import FREE_RUN_NOISE, PRECISION_FAIL, PRECISION_WARN


def layer_of(name: str) -> int | None:
    """Of a parameter; None outside the layers."""
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def _depth(name: str) -> float:
    """Where in the forward pass a parameter is used: before the layers, in one, or after them."""
    layer = layer_of(name)
    return layer if layer is not None else -1 if name.startswith("embedding.") else math.inf


EXIT = {"pass": 0, "fail": 1, "incomplete": 3}


@dataclasses.dataclass
class Weight:
    """One parameter: `note` says how it differs, and is empty where it is bit-exact."""

    name: str
    note: str = ""

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)


@dataclasses.dataclass
class TapResult:
    """One component of one layer, fed the reference's own input.

    `worst_token_rel_l2` is the number judged. `port_over_reference` is the precision arm's: the port's error against
    the float32 oracle over the reference's own, both in bfloat16.
    """

    layer: int | None
    tap: str
    worst_token_rel_l2: float
    max_abs: float
    verdict: str  # "ok", "fail" or "incomplete"
    note: str = ""
    port_over_reference: float | None = None


@dataclasses.dataclass
class Report:
    source: str
    checkpoint: str
    model: str
    tokens: int
    seed: int
    layers: bool = False  # was the semantics arm asked for?
    dtype: str = "float32"  # "bfloat16": the precision arm was asked for
    weights: list[Weight] = dataclasses.field(default_factory=list)
    taps: list[TapResult] = dataclasses.field(default_factory=list)
    free_run: dict[str, Any] | None = None
    growth: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # {"layer", "replayed", "own"}: worst token
    # of the residual stream after each layer of the free run, relative L2
    token_kl: list[float] = dataclasses.field(default_factory=list)  # of the free run, routing replayed; nats
    gradients: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # {"name", "relative_l2", "verdict"}
    judged_flips: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # {"layer", "token", "lost", "took",
    # "margin", "explained"}: of the free run with the reference's routing replayed; one that is not explained fails
    flips: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # with its own routing, told and not judged:
    # the same keys, and "follows": None, or {"layer", "token"} of the earlier flip that explains it
    configs: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # {"name", "checkpoint", "source", "logits"}
    # of what the two configurations say differently; "logits": whether these depend on it
    warnings: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)  # of the diagnosis itself, which are bugs
    diagnosis: dict[str, Any] | None = None  # {"cause", "fault", "residual_before", "residual_after", ...}: what explains it
    witness: dict[str, Any] | None = None  # of the tap of the diagnosis: {"layer", "tap", "noise", "reference", "port",
    # "left"}: how far each side is from the equation, what its own noise is, and who is further than that
    pattern: str = ""  # of the first divergence: which heads, experts, channels
    tried: int = 0  # known mistakes that were tried on it
    explained: str = ""  # where: "layer 3 attn_core", or a parameter's name
    incomplete: list[str] = dataclasses.field(default_factory=list)  # why it can't say PASS
    peak_rss_bytes: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        if self.first_divergence is not None:
            return "fail"
        return "incomplete" if self.incomplete or any(tap.verdict == "incomplete" for tap in self.taps) else "pass"

    @property
    def precision(self) -> str | None:
        """ "ok", "warn" or "fail" by the worst ratio of the precision arm; None without it."""
        ratios = [tap.port_over_reference for tap in self.taps if tap.port_over_reference is not None]
        if not ratios:
            return None
        return "ok" if max(ratios) <= PRECISION_WARN else "warn" if max(ratios) <= PRECISION_FAIL else "fail"

    @property
    def exit_code(self) -> int:
        return EXIT[self.verdict]

    @property
    def first_divergence(self) -> dict[str, Any] | None:
        """Where it first goes wrong, None if nothing fails: of the arms that fail, what the one says that places it best."""
        return next(self._divergences(), None)

    def _divergences(self) -> Iterator[dict[str, Any]]:
        yield from ({"layer": tap.layer, "tap": tap.tap} for tap in self.taps if tap.verdict == "fail")
        yield from ({"layer": None, "tap": "config"} for difference in self.configs if difference["logits"])
        yield from ({"layer": weight.layer, "tap": "weights"} for weight in self.weights if weight.note)
        failing = [self._jump()] if self.free_run is not None and self.free_run["verdict"] == "fail" else []
        failing += [(flip["layer"], "expert_choice") for flip in self.judged_flips if not flip["explained"]]
        # A router whose input is wrong chooses wrongly, so within a layer the stream goes first: sorting is stable.
        failing.sort(key=lambda place: math.inf if place[0] is None else place[0])
        yield from ({"layer": layer, "tap": tap} for layer, tap in failing)
        yield from ({"layer": layer_of(one["name"]), "tap": "gradients"} for one in self.wrong_gradients)
        worse = (tap for tap in self.taps if (tap.port_over_reference or 0.0) > PRECISION_FAIL)
        yield from ({"layer": tap.layer, "tap": tap.tap} for tap in worse)

    def _jump(self) -> tuple[int | None, str]:
        """Where the error of the free run grows most in one step: a layer, or what comes after the last."""
        assert self.free_run is not None
        last = self.free_run["max_abs"] / (self.free_run["max_logit"] or 1.0)
        errors = [0.0, *(point["replayed"] for point in self.growth), last]
        steps = [after / max(before, FREE_RUN_NOISE) for before, after in itertools.pairwise(errors)]
        step = max(range(len(steps)), key=steps.__getitem__)
        return (self.growth[step]["layer"], "free run") if step < len(self.growth) else (None, "logits")

    @property
    def wrong_gradients(self) -> list[dict[str, Any]]:
        """In the order in which gradients are computed, from the logits back: what is wrong spreads that way."""
        wrong = [gradient for gradient in self.gradients if gradient["verdict"] == "fail"]
        return sorted(wrong, key=lambda gradient: _depth(gradient["name"]), reverse=True)

    def lacks(self, reason: str) -> None:
        """Something asked for that could not be done: with it the report cannot say PASS."""
        if reason not in self.incomplete:
            self.incomplete.append(reason)

    def to_json(self) -> str:
        differing = [dataclasses.asdict(weight) for weight in self.weights if weight.note]
        found = {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "first_divergence": self.first_divergence,
            "diagnosis": self.diagnosis,
            "witness": self.witness,
            "pattern": self.pattern,
            "tried": self.tried,
            "source": self.source,
            "checkpoint": self.checkpoint,
            "tokens": self.tokens,
            "seed": self.seed,
            "dtype": self.dtype,
            "configs": self.configs,
            "warnings": self.warnings,
            "errors": self.errors,
            "precision": self.precision,
            "weights": {"checked": len(self.weights), "exact": len(self.weights) - len(differing), "differing": differing},
            "taps": [dataclasses.asdict(tap) for tap in self.taps],
            "free_run": self.free_run,
            "growth": self.growth,
            "token_kl": self.token_kl,
            "gradients": self.gradients,
            "judged_flips": self.judged_flips,
            "flips": self.flips,
            "incomplete": self.incomplete,
            "peak_rss_bytes": self.peak_rss_bytes,
            "seconds": self.seconds,
        }
        return json.dumps(found, indent=2, allow_nan=False)

    def table(self) -> str:
        return "\n".join(_table(self))


_COLUMNS = "{:<9} {:<18} {:<12} {:<15} {:<36} {}"


def _table(report: Report) -> Iterable[str]:
    arms = "check-parity --layers" if report.layers else "check-parity"
    yield f"{arms}   {report.model}   {report.tokens} tokens   oracle: PyTorch, transformers, float32"
    yield from (f"warning: {warning}" for warning in report.warnings)
    for difference in report.configs:
        verdict = "FAIL" if difference["logits"] else "not in the logits"
        yield f"config     {configs.said(difference)}   {verdict}"
    exact = sum(not weight.note for weight in report.weights)
    verdict = "ok" if exact == len(report.weights) else "FAIL"
    yield _COLUMNS.format("weights", f"{exact}/{len(report.weights)}", "", "", "bit-exact, decoded by transformers", verdict)
    differing = [weight for weight in report.weights if weight.note]
    for weight in differing[:8]:
        yield f"          {weight.name}: {weight.note}"
    if len(differing) > 8:
        yield f"          ... and {len(differing) - 8} more: --json FILE names each"
    if report.taps:
        yield _COLUMNS.format("layer", "tap", "worst token", "port/reference", "note", "verdict")
        yield from _tap_rows(report)
    if report.precision is not None:
        worst = max(report.taps, key=lambda tap: tap.port_over_reference or 0.0)
        where = worst.tap if worst.layer is None else f"layer {worst.layer} {worst.tap}"
        verdict = report.precision.upper() if report.precision == "fail" else report.precision
        yield f"precision in bfloat16: at most {worst.port_over_reference:.2f} times the reference's error, {where}   {verdict}"
    if report.free_run is not None:
        yield from _free_run_rows(report)
    yield from _flip_rows(report)
    if report.gradients:
        worst = max(report.gradients, key=lambda gradient: gradient["relative_l2"])
        bad = [gradient["name"] for gradient in report.wrong_gradients]
        verdict = f"FAIL: {', '.join(bad[:4])}{', ...' if len(bad) > 4 else ''}" if bad else "ok"
        yield f"gradients  {len(report.gradients)} parameters, worst {worst['relative_l2']:.1e}, {worst['name']}   {verdict}"
    for reason in report.incomplete:
        yield f"incomplete: {reason}"
    for error in report.errors:
        yield f"error: {error}; this is a bug of check-parity, please report it"
    where = report.first_divergence
    if where is not None:
        place = "the whole model" if where["layer"] is None else f"layer {where['layer']}"
        yield f"first divergence: {place}, {where['tap']}"
        yield from _diagnosis_rows(report)
    yield f"{report.verdict.upper()}   {report.seconds:.1f} s   peak memory {report.peak_rss_bytes / 2**30:.1f} GiB"


def _tap_rows(report: Report) -> Iterable[str]:
    """Consecutive layers that are healthy throughout fold into one row, and so do healthy taps of a bad layer."""
    by_layer = [(layer, list(taps)) for layer, taps in itertools.groupby(report.taps, key=lambda tap: tap.layer)]
    marked = False
    for folded, stretch in itertools.groupby(by_layer, key=lambda item: item[0] is not None and _healthy(item[1])):
        if folded:
            layers = list(stretch)
            yield _row(_span([layer for layer, _ in layers]), [tap for _, taps in layers for tap in taps])
            continue
        for layer, taps in stretch:
            for healthy, group in itertools.groupby(taps, key=lambda tap: tap.verdict == "ok"):
                members = list(group)
                for row in [members] if healthy else [[tap] for tap in members]:
                    first = not marked and row[0].verdict == "fail"
                    marked = marked or first
                    yield _row("model" if layer is None else str(layer), row) + ("  <- first" if first else "")


def _row(layer: str, taps: list[TapResult]) -> str:
    worst = max(taps, key=lambda tap: tap.worst_token_rel_l2)
    names = list(dict.fromkeys(tap.tap for tap in taps))
    everything = set(names) >= set(LAYER_TAPS)
    ratios = [tap.port_over_reference for tap in taps if tap.port_over_reference is not None]
    ratio = f"{max(ratios):.2f}" if ratios else ""
    tap = f"all {len(names)} taps" if everything else names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
    notes = dict.fromkeys(tap.note for tap in taps if tap.note)
    verdict = "ok" if worst.verdict == "ok" else worst.verdict.upper() if worst.verdict == "fail" else worst.verdict
    times = f" x{len(taps)}" if len(taps) > 1 else ""
    note = "; ".join(notes)
    note = note if len(note) <= 60 else f"{note[:57]}..."
    return _COLUMNS.format(layer, tap, f"{worst.worst_token_rel_l2:.1e}", ratio, note, verdict + times)


def _free_run_rows(report: Report) -> Iterable[str]:
    assert report.free_run is not None
    runs = {"routing replayed": report.free_run, "own routing": report.free_run["own_routing"]}
    if "bfloat16" in report.free_run:
        runs["in bfloat16"] = report.free_run["bfloat16"]
        runs["reference in it"] = report.free_run["reference_bfloat16"]  # what noise is: PyTorch against itself
    for name, run in runs.items():
        kl = f"KL {run['kl_mean']:.1e} mean, {run['kl_p95']:.1e} p95, {run['kl_max']:.1e} max   top-1 {run['top1']:.1%}"
        verdict = {"ok": "ok", "fail": "FAIL"}.get(run.get("verdict", ""), "")
        yield f"free run  {name:<16} max |d logit| {run['max_abs']:.1e} of {run['max_logit']:.3g}   {kl}   {verdict}".rstrip()


def _flip_rows(report: Report) -> Iterable[str]:
    """Judged with the reference's routing replayed, told with the port's own."""
    judged, told = report.judged_flips, report.flips
    if judged or told:
        wrong = sum(not flip["explained"] for flip in judged)
        near_ties, verdict = len(judged) - wrong, "FAIL" if wrong else "ok"
        yield f"expert flips  routing replayed {len(judged)}: {near_ties} near-ties, {wrong} not explained   {verdict}"
        follow = sum(flip["follows"] is not None for flip in told)
        unclear = sum(not flip["explained"] for flip in told)
        kinds = f"{len(told) - follow - unclear} near-ties, {follow} follow from an earlier flip, {unclear} not explained"
        yield f"expert flips  own routing      {len(told)}: {kinds}"


def _diagnosis_rows(report: Report) -> Iterable[str]:
    found = report.diagnosis
    if found is not None:
        where = f"{found['tap']}: " if "." in found["tap"] else ""
        yield f"diagnosis: {where}{found['fault']}{residuals(found)}   [{found['name']}]"
        yield f"  to do: {found['fix']}"
        if found["others"]:
            yield f"  as well as: {', '.join(other['name'] for other in found['others'])}"
    elif report.explained:
        pattern = f"; {report.pattern}" if report.pattern else ""
        why = f"none of the {report.tried} known mistakes of this place explains it"
        why = why if report.tried else "no known mistake could be tried here; it takes SRC and PyTorch"
        yield f"diagnosis: {report.explained}: {why}{pattern}"


def residuals(diagnosis: dict[str, Any]) -> str:
    """Measured of a mistake that was tried; nothing was of what two files say."""
    before, after = diagnosis["residual_before"], diagnosis["residual_after"]
    return "" if before is None else f": residual {before:.1e} -> {after:.1e}"


def _healthy(taps: list[TapResult]) -> bool:
    return all(tap.verdict == "ok" for tap in taps)


def _span(layers: list[int | None]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
