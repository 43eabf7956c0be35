"""The arms of a comparison, run layer by layer.

Weights (`parity.weights`): every stored byte. Semantics: each component fed the reference's input and routing, in float32.
Precision: the same in bfloat16, the port's error over the reference's own. Free run: the whole model, its own states carried
from layer to layer. Decode: a token at a time on the key-value cache. Bounds and their reasons are in
`parity.metrics`; what the two sides are in `parity.protocols`.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from oss_model.taps import LAYER_TAPS
from parity import equations as eq
from parity import metrics
from parity.design import Design
from parity.judge import ROUTING, Judge
from parity.mistakes.diagnosis import Diagnosis
from parity.mistakes.parameters import Parameters
from parity.noise import bound, noise
from parity.prompts import Prompt
from parity.protocols import Arrays, Call, Oracle, OracleLayer, Port, PortLayer, SupportsRestore, Unanswered
from parity.recording import Recorder
from parity.reports.report import Report, Weight
from parity.walk import Assembled
from parity.weights import UNFIT, Weights

Progress = Callable[[int, int, str], None]
FORCED = ("semantics", "precision")  # the calls that are fed the reference's values
FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass
class Streams:
    """The reference's residual stream from layer to layer, [batch, length, hidden], and the port's calls beside it.

    truth: in float32, the oracle. reference16: in bfloat16, with the oracle's routing; None without the precision arm.
    calls: "semantics" and "precision" are fed the oracle's value at every tap, in float32 and in bfloat16; "replayed" and
    "replayed16" go by its routing alone, "own" by nothing but the tokens.
    before: what "replayed" had after the last part.
    together: whether "own" has chosen no other experts so far: its choice then is that with the routing replayed.
    """

    truth: np.ndarray
    calls: dict[str, Call]
    before: np.ndarray
    reference16: np.ndarray | None = None
    together: bool = True


@dataclasses.dataclass
class Arms:
    """One comparison under way: both sides, walked through together."""

    port: Port
    oracle: Oracle
    report: Report
    prompt: Prompt
    precision: bool
    decode: bool
    progress: Progress
    expect_changed: tuple[str, ...] = ()
    design: Design | None = None

    def __post_init__(self):
        self.judge = Judge(self.prompt, self.report)
        self.diagnosis = Diagnosis(self.report, self.judge, self.oracle, self.port)
        self.weights = Weights(self.port, self.report, self.diagnosis, self.expect_changed, self.design)
        self.again: Call | None = None  # measures a second time what fails, up to the part `measured`
        self.measured: tuple[int, Arrays] = -1, {}
        self.as_stored: Call | None = None  # goes through each part before its values become the reference's

    def whole(self) -> None:
        count, sizes = self.oracle.sizes.layers, (self.port.sizes.layers, self.port.sizes.vocab)
        self.progress(0, count, "embedding")
        self.diagnosis.configuration(self.port.can.settings or {})
        fits = sizes == (count, self.oracle.sizes.vocab)
        with contextlib.ExitStack() as self.open:
            if fits and (self.design or self.expect_changed) and self.port.can.calls is not None:
                self.as_stored = self.start(FLOAT32)
                self.as_stored.advance(None)
            if fits and self.precision and self.port.can.calls is not None:
                self.start(BFLOAT16)  # its model is there before parameters become the reference's: in this one, too
            fits = self.weights.compare(Parameters("", self.oracle.first_parameters, self.port.restore)) and fits
            if not fits:
                self.report.lacks(UNFIT)
            elif self.port.can.calls is None:
                self.report.warnings.append(
                    f"{self.port}: its parts were put together by check-parity, since it has no calls of its own"
                    " (parity.protocols.SupportsCalls)"
                )
            streams = self.first() if fits else None
            for n in range(count):
                self.progress(n, count, f"layer {n}")
                streams = self.layer(n, streams)
            self.progress(count, count, "logits")
            if self.as_stored is not None:
                self.as_stored.advance(None)
            if not self.weights.compare(Parameters("", self.oracle.last_parameters, self.port.restore)):
                streams = None
            for name in sorted(self.port.stored.keys() - {weight.name for weight in self.report.weights}):
                self.report.weights.append(Weight(name, "unexpected: the source has no such parameter"))
            if streams is not None:
                self.last(streams)
        self.diagnosis.finish()
        if not self.port.stored:
            self.report.lacks("the port shows no parameters, so none were compared")

    @property
    def packed(self) -> bool:
        return any(name.endswith(".blocks") for name in self.port.stored)

    def start(self, dtype: np.dtype) -> Call:
        if self.port.can.calls is None:
            return Assembled(self.port, self.prompt.tokens, dtype)
        valid, positions = self.prompt.valid, None
        if not valid.all():
            positions = np.where(valid, np.arange(valid.shape[1])[None], -1)
        call = self.port.can.calls.call(self.prompt.tokens, positions, dtype)
        self.open.callback(call.close)
        return call

    def first(self) -> Streams:
        positions = self.oracle.rope_positions
        got, want = self.port.rope_tables(positions), self.oracle.rope_tables(positions)
        self.judge.rope(positions, got, want)
        if self.precision and self.report.layers and self.port.can.rope_tables16 is not None:
            self.judge.rope16(positions, self.port.can.rope_tables16(positions), want)
        self.explain("rope", {"positions": positions}, np.stack(want[1:]), np.stack(got))
        names = (["semantics"] if self.report.layers else []) + ["replayed", "own"]
        calls = {name: self.start(FLOAT32) for name in names}
        if self.precision:
            calls |= {name: self.start(BFLOAT16) for name in (["precision"] if self.report.layers else []) + ["replayed16"]}
        truth = self.oracle.embed(self.prompt.tokens, FLOAT32)
        forced = {"embedding": truth}
        found = {name: call.advance(None, forced if name in FORCED else None) for name, call in calls.items()}
        ours = found["replayed"].get("embedding")
        self.judge.tap(None, "embedding", ours, truth, gate=bound(0.0))  # rows that are looked up: nothing rounds
        self.explain("embedding", {"tokens": self.prompt.tokens}, truth, ours)
        before = truth if ours is None or ours.size != truth.size else ours
        return Streams(truth, calls, before, self.oracle.embed(self.prompt.tokens, BFLOAT16) if self.precision else None)

    def layer(self, n: int, streams: Streams | None) -> Streams | None:
        """Everything about one layer, whose parameters are in memory meanwhile; returns the streams after it."""
        layer = self.port.layer(n) if n < self.port.sizes.layers else None
        expected = self.oracle.layer(n)
        reads: SupportsRestore = self.port if layer is None or layer.can.restore is None else layer.can.restore
        parameters = Parameters(f"layers.{n}.", lambda: expected.parameters(self.packed), reads.restore, expected)
        if self.as_stored is not None:
            self.as_stored.advance(n)
        fits = self.weights.compare(parameters)
        return self.activations(n, parameters, layer, streams) if fits and streams is not None and layer is not None else None

    def activations(self, n: int, parameters: Parameters, layer: PortLayer, streams: Streams) -> Streams | None:
        expected = parameters.layer
        assert expected is not None
        taps = expected.run(streams.truth)
        calls, routing = streams.calls, {"expert_choice": taps["expert_choice"]}
        if "semantics" in calls:
            self.semantics(n, parameters, expected, layer, streams.truth, calls["semantics"].advance(n, taps), taps)
        if "precision" in calls:
            self.judge.precision(
                n, taps, calls["precision"].advance(n, taps), expected.run(streams.truth.astype(BFLOAT16), taps)
            )
        free, replay = calls["own"].advance(n), calls["replayed"].advance(n, routing)
        if not replay and not free:
            if self.port.can.calls is not None:
                self.judge.not_run(n)
            return dataclasses.replace(streams, truth=taps["layer_out"])
        if not self.shows("free run", free, *ROUTING, "layer_out"):
            return None
        self.judge.flips(n, taps, free if streams.together else replay, free)
        self.judge.growth(n, taps["layer_out"], {"replayed": replay["layer_out"], "own": free["layer_out"]})
        if self.decode:
            self.decoded(n, layer, streams.before, taps, replay)
        same = np.array_equal(np.asarray(free["expert_choice"]).reshape(-1), np.asarray(taps["expert_choice"]).reshape(-1))
        together = streams.together and same
        after = dataclasses.replace(streams, truth=taps["layer_out"], before=replay["layer_out"], together=together)
        if streams.reference16 is not None:
            out16 = calls["replayed16"].advance(n, routing).get("layer_out")
            if out16 is not None and self.judge.rounds(out16):
                after.reference16 = expected.run(streams.reference16, routing)["layer_out"]
            else:
                after.reference16 = None
        return after

    def shows(self, arm: str, found: Arrays, *taps: str) -> bool:
        """Whether the port shows the taps that an arm goes on from."""
        missing = [tap for tap in taps if tap not in found]
        if missing:
            self.report.lacks(f"{arm}: the port shows no {', '.join(missing)}, so it was not run to its end")
        return not missing

    def decoded(self, n: int, layer: PortLayer, x: np.ndarray, taps: Arrays, whole: Arrays) -> None:
        if layer.can.decode is not None:
            got = layer.can.decode.decode(x, taps["expert_choice"])
            self.judge.tap(n, "decode", got, whole["layer_out"], "one token at a time against the whole prompt")
        else:
            self.report.lacks(
                "decode: the port has layers that cannot (parity.protocols.SupportsDecode): they were not decoded"
            )

    def last(self, streams: Streams) -> None:
        taps, calls = self.oracle.unembed(streams.truth), streams.calls
        if "semantics" in calls:
            got = calls["semantics"].advance(None, taps)
            given = {"x": streams.truth, "final_norm": taps["final_norm"]}
            for name in ("final_norm", "logits"):
                bounds = self.bounds(None, name, self.outside(), given, taps[name])
                self.judge.tap(None, name, got.get(name), taps[name], **bounds)
                self.explain(name, given, taps[name], got.get(name))
        if "precision" in calls:
            reference = self.oracle.unembed(streams.truth.astype(BFLOAT16), taps)
            self.judge.precision(None, taps, calls["precision"].advance(None, taps), reference)
        logits = {}
        for name in ("replayed", "own", *(["replayed16"] if streams.reference16 is not None else [])):
            shown = calls[name].advance(None).get("logits")
            returned = calls[name].finish()
            if returned is None or np.size(returned) != taps["logits"].size:
                self.report.lacks("free run: the port shows no logits, so it was not run to its end")
                return
            logits[name] = np.asarray(returned)
            if name == "own" and shown is not None and "semantics" in calls:
                self.judge.returned(shown, logits[name])
        if streams.reference16 is not None:
            logits["bfloat16"] = logits.pop("replayed16")
            logits["reference_bfloat16"] = self.oracle.unembed(streams.reference16)["logits"]
        self.judge.free_run(taps["logits"], **logits)
        if self.as_stored is not None and self.report.righted:
            self.judge.as_stored(taps["logits"], self.as_stored.finish())
        assert self.report.free_run is not None
        strange = self.report.free_run["verdict"] == "fail" or not all(flip["explained"] for flip in self.report.judged_flips)
        if strange or isinstance(self.oracle, Recorder):  # a recording has it for ports that need it
            with contextlib.suppress(Unanswered):
                found = self.oracle.moved(self.prompt.tokens)
                if strange:
                    self.judge.amplified(found)

    def explain(self, tap: str, given: Arrays, want: np.ndarray, got: np.ndarray | None) -> None:
        if self.report.taps[-1].verdict == "fail" and got is not None and got.size == want.size:
            self.diagnosis.tap(None, tap, self.outside(), given, want, got.reshape(want.shape))

    def outside(self) -> Parameters:
        """Those before the layers, and after."""
        both = lambda: (*self.oracle.first_parameters(), *self.oracle.last_parameters())  # noqa: E731
        return Parameters("", both, self.port.restore)

    def semantics(
        self, n: int, parameters: Parameters, expected: OracleLayer, layer: PortLayer, x: np.ndarray, got: Arrays, taps: Arrays
    ) -> None:
        """Of each tap, computed from the reference's values: `got` against `taps`."""
        if not got and self.port.can.calls is not None:
            return
        given = {**taps, "x": x, "positions": np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])}
        for name in LAYER_TAPS:
            have, want = got.get(name), taps.get(name)
            if have is None or want is None or have.size != want.size:
                self.judge.tap(n, name, have, want)
            elif name == "expert_choice":
                self.judge.choice(n, taps, have)
            else:
                bounds = self.bounds(n, name, parameters, given, want)
                self.judged(self.judge, n, name, expected, layer, taps, have, bounds)
                if self.report.taps[-1].verdict == "fail":
                    self.same_again(n, name, expected, layer, x, taps, bounds)
            if have is not None and want is not None and self.report.taps[-1].verdict == "fail":
                self.diagnosis.tap(n, name, parameters, given, want, have)

    def judged(
        self,
        judge: Judge,
        n: int,
        name: str,
        expected: OracleLayer,
        layer: PortLayer,
        taps: Arrays,
        have: np.ndarray,
        bounds: dict[str, Any],
    ) -> None:
        if name == "mlp_out":
            self.experts(judge, n, expected, layer, taps, have, **bounds)
        else:
            judge.tap(n, name, have, taps[name], **bounds)

    def same_again(
        self, n: int, name: str, expected: OracleLayer, layer: PortLayer, x: np.ndarray, taps: Arrays, bounds: dict[str, Any]
    ) -> None:
        """A tap that fails is measured once more: one that is right then can be told of, but not what it is."""
        have = None if self.report.righted else self.second(n, x, taps).get(name)  # parts that are loaded anew are as stored
        if have is None:
            return
        judge, tap = Judge(self.prompt, Report("", "", "", 0, 0)), self.report.taps[-1]
        self.judged(judge, n, name, expected, layer, taps, have, bounds)
        (second,) = judge.report.taps
        if second.verdict != "fail":
            apart = f"{tap.worst_token_rel_l2:.1e} the first time, {second.worst_token_rel_l2:.1e} the second"
            tap.verdict, tap.note = "incomplete", f"not reproducible: {apart}, from the same values"
            self.report.lacks(f"{tap.place}: {tap.note}")

    def second(self, n: int, x: np.ndarray, taps: Arrays) -> Arrays:
        """A layer's taps from the same values, in another call of the model."""
        done, found = self.measured
        if self.again is None:
            self.again = self.start(FLOAT32)
            self.again.advance(None, {"embedding": x} if n == 0 else None)
        for part in range(done + 1, n + 1):
            found = self.again.advance(part, taps if part == n else {"layer_out": x} if part == n - 1 else None)
        self.measured = n, found
        return found

    def bounds(self, n: int | None, tap: str, parameters: Parameters, given: Arrays, want: np.ndarray) -> dict[str, Any]:
        """A tap's gates, from its own noise; none where that is not known."""
        if not self.oracle.settings:
            return {}
        settings = self.oracle.settings if n is None else eq.of_layer(self.oracle.settings, n)
        right = self.diagnosis.right(parameters)
        kept = self.oracle.oracle if isinstance(self.oracle, Recorder) else self.oracle
        try:
            found = noise(kept, self.judge, n, tap, given, right, settings, want, self.port.can.noise)
        except Exception as error:  # a bug of ours, which must neither end the run nor go unseen
            self.diagnosis.failed(f"the noise of {tap}", error)
            return {}
        if found is None:
            return {}
        where = tap if n is None else f"layer {n} {tap}"
        if found.strange:
            self.report.warnings.append(
                f"{where}: on the device the equation in float32 is {found.device:.1e} from float64, {found.worst:.1e} here:"
                " that is not taken for noise"
            )
        if found.reference > found.gate:
            self.report.lacks(
                f"{where}: the witnesses disagree: PyTorch is {found.reference:.1e} from the equation in float64, whose own"
                f" noise in float32 is {found.worst:.1e}"
            )
        return {"gate": found.gate, "channels": None if found.channels is None else bound(found.channels)}

    def experts(
        self,
        judge: Judge,
        n: int,
        expected: OracleLayer,
        layer: PortLayer,
        taps: Arrays,
        have: np.ndarray,
        gate: float = metrics.USUAL_GATE,
        channels: np.ndarray | None = None,
    ) -> None:
        """The expert sum; experts that no token of the prompt reaches are fed the same tokens directly."""
        want, note = taps["mlp_out"], ""
        reached = taps["expert_choice"][self.prompt.valid.reshape(-1)]
        missed = np.setdiff1d(np.arange(self.oracle.sizes.experts), reached)
        if missed.size:
            x = taps["mlp_norm"].reshape(-1, want.shape[-1])
            k = taps["expert_choice"].shape[-1]
            choice = missed[np.arange(x.shape[0] * k).reshape(-1, k) % missed.size]
            weights = np.full(choice.shape, 1 / k, np.float32)
            both = [side.experts(x, choice, weights).reshape(want.shape) for side in (expected, layer)]
            want, have = np.concatenate([want, both[0]]), np.concatenate([have.reshape(want.shape), both[1]])
            note = f"{missed.size} unreached experts fed directly"
        judge.tap(n, "mlp_out", have, want, note, gate, channels)
