"""What a comparison found, and how it is shown: a table of about a screen, and one JSON object."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from html import escape
from typing import Any

from parity.metrics import FREE_RUN_NOISE, PRECISION_FAIL, PRECISION_WARN, USUAL_GATE


def layer_of(name: str) -> int | None:
    """Of a parameter; None outside the layers."""
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def _depth(name: str) -> float:
    """Where in the forward pass a parameter is used: before the layers, in one, or after them."""
    layer = layer_of(name)
    return layer if layer is not None else -1 if name.startswith("embedding.") else math.inf


EXIT = {"pass": 0, "fail": 1, "incomplete": 3}
STORED = "none, stored bytes"  # the oracle of a report that is of these alone


@dataclasses.dataclass
class Weight:
    """One parameter: `note` says how it differs, and is empty where it is bit-exact, or was expected to change.

    `moved` is how far it then is from what it was, relative L2: NaN where that is not known, None where it is exact. `rule` is
    what it is another by, by design (`parity.design`).
    """

    name: str
    note: str = ""
    moved: float | None = None
    rule: str = ""

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)


@dataclasses.dataclass
class TapResult:
    """One component of one layer, fed the reference's own input.

    `worst_token_rel_l2` is the number judged, by `gate`. `port_over_reference` is the precision arm's: the port's error against
    the float32 oracle over the reference's own, both in bfloat16.
    """

    layer: int | None
    tap: str
    worst_token_rel_l2: float
    max_abs: float
    verdict: str  # "ok", "fail" or "incomplete"
    note: str = ""
    port_over_reference: float | None = None
    gate: float = USUAL_GATE

    @property
    def place(self) -> str:
        return self.tap if self.layer is None else f"layer {self.layer} {self.tap}"


@dataclasses.dataclass
class FormResult:
    """One way to run the model: `worst` is what its verdict goes by, None where it was not run.

    Of logits in float32 the largest difference over the largest logit; in bfloat16 the median token's error over the
    reference's own; of tokens the rows that are wrong; of gradients the worst parameter's relative L2. `layer` and `tap` are
    where a form that fails first parts from the reference; "returned" if that is after every tap.
    """

    form: str
    on: str  # "model" or "replica"
    dtype: str
    verdict: str  # "ok", "fail" or "incomplete"
    worst: float | None
    note: str = ""
    layer: int | None = None
    tap: str | None = None


@dataclasses.dataclass(repr=False)
class Report:
    source: str
    checkpoint: str
    model: str
    tokens: int
    seed: int
    layers: bool = False  # was the semantics arm asked for?
    dtype: str = "float32"  # "bfloat16": the precision arm was asked for
    oracle: str = "PyTorch, transformers, float32"
    device: str = ""  # that the port computed on, where it is no CPU
    weights: list[Weight] = dataclasses.field(default_factory=list)
    loaded: int = 0  # parameters that were loaded, and looked at: they must be the bytes that are stored
    loading: list[Weight] = dataclasses.field(default_factory=list)  # those that are not
    righted: list[str] = dataclasses.field(default_factory=list)  # parameters that are not the source's, and were put right in
    # what the port computes with: the code behind them is judged too
    taps: list[TapResult] = dataclasses.field(default_factory=list)
    free_run: dict[str, Any] | None = None
    growth: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # {"layer", "replayed", "own"}: worst token
    # of the residual stream after each layer of the free run, relative L2
    token_kl: list[float] = dataclasses.field(default_factory=list)  # of the free run, routing replayed; nats
    gradients: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # {"name", "relative_l2", "verdict"}
    forms: list[FormResult] = dataclasses.field(default_factory=list)
    judged_flips: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # {"layer", "token", "lost", "took",
    # "margin", "explained"}: of the free run with the reference's routing replayed; one that is not explained fails
    as_stored: dict[str, float] | None = None  # logits of the checkpoint where its values are others by design, or trained
    flips: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # with its own routing, told and not judged:
    # the same keys, and "follows": None, or {"layer", "token"} of the earlier flip that explains it
    configs: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # {"name", "checkpoint", "source", "logits"}
    # of what the two configurations say differently; "logits": whether these depend on it
    warnings: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)  # of the diagnosis itself, which are bugs
    diagnosis: dict[str, Any] | None = None  # {"cause", "fault", "residual_before", "residual_after", ...}: what explains it
    findings: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of every tap that fails and every group of
    # parameters that differ, in the order found: as `diagnosis`, "fault" and "name" None where no known mistake explains it,
    # and "pattern", and "follows": None, or {"layer", "tap"} of what it is a consequence of
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
        yield from ({"layer": weight.layer, "tap": "loading"} for weight in self.loading)
        yield from ({"layer": weight.layer, "tap": "weights"} for weight in self.weights if weight.note)
        failing = [self._jump()] if self.free_run is not None and self.free_run["verdict"] == "fail" else []
        failing += [(flip["layer"], "expert_choice") for flip in self.judged_flips if not flip["explained"]]
        # A router whose input is wrong chooses wrongly, so within a layer the stream goes first: sorting is stable.
        failing.sort(key=lambda place: math.inf if place[0] is None else place[0])
        yield from ({"layer": layer, "tap": tap} for layer, tap in failing)
        yield from (
            {"layer": one.layer, "tap": one.tap or "form", "form": one.form} for one in self.forms if one.verdict == "fail"
        )
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
        from parity.reports.sections import sections

        differing = [{"name": weight.name, "note": weight.note} for weight in self.weights if weight.note]
        moved = [weight for weight in self.weights if weight.moved is not None]
        changed = [{"name": weight.name, "moved": _json(weight.moved or 0.0)} for weight in moved if not weight.rule]
        designed = [
            {"name": weight.name, "rule": weight.rule, "moved": _json(weight.moved or 0.0)} for weight in moved if weight.rule
        ]
        found = {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "first_divergence": self.first_divergence,
            "diagnosis": self.diagnosis,
            "findings": self.findings,
            "witness": self.witness,
            "pattern": self.pattern,
            "tried": self.tried,
            "source": self.source,
            "checkpoint": self.checkpoint,
            "tokens": self.tokens,
            "seed": self.seed,
            "dtype": self.dtype,
            "oracle": self.oracle,
            "device": self.device,
            "configs": self.configs,
            "warnings": self.warnings,
            "errors": self.errors,
            "precision": self.precision,
            "weights": {
                "checked": len(self.weights),
                "exact": len(self.weights) - len(differing) - len(moved),
                "differing": differing,
                "changed": changed,
                "by_design": designed,
            },
            "loading": {"checked": self.loaded, "differing": [{"name": one.name, "note": one.note} for one in self.loading]},
            "righted": self.righted,
            "taps": [dataclasses.asdict(tap) for tap in self.taps],
            "free_run": self.free_run,
            "as_stored": self.as_stored,
            "growth": self.growth,
            "token_kl": self.token_kl,
            "gradients": self.gradients,
            "forms": [dataclasses.asdict(form) for form in self.forms],
            "judged_flips": self.judged_flips,
            "flips": self.flips,
            "incomplete": self.incomplete,
            "sections": [
                {"name": s.name, "verdict": s.verdict, "headline": s.headline, "lines": s.lines} for s in sections(self)
            ],
            "peak_rss_bytes": self.peak_rss_bytes,
            "seconds": self.seconds,
        }
        return json.dumps(found, indent=2, allow_nan=False)

    def __repr__(self) -> str:
        """A line: all of it is pages long."""
        exact = sum(not weight.note and weight.moved is None for weight in self.weights)
        return f"<Report {self.verdict.upper()}: {exact} of {len(self.weights)} weights exact, {len(self.taps)} taps>"

    def _repr_html_(self) -> str:
        """The page, in a notebook: in a frame of its own, whose styles and scripts are not the notebook's."""
        from parity.reports.html import render

        style = "width: 100%; height: 80vh; border: 0"
        return f'<iframe srcdoc="{escape(render(self))}" title="check-parity" style="{style}" sandbox="allow-scripts"></iframe>'

    def to_pandas(self) -> Any:
        """The taps as a `pandas.DataFrame`, a row each; pandas is not installed with this."""
        import pandas  # type: ignore[import-not-found]

        return pandas.DataFrame([dataclasses.asdict(tap) for tap in self.taps])

    def table(self, width: int | None = None) -> str:
        from parity.reports.table import table

        return table(self, width)


def _json(number: float) -> float | None:
    """JSON has neither NaN nor infinities."""
    return number if math.isfinite(number) else None
