"""The arms of a comparison, run layer by layer, and their verdicts.

Weights: every stored byte. Semantics: each component fed the reference's input and routing, in float32. Precision:
the same in bfloat16, the port's error over the reference's own. Free run: the whole model, its own states carried
from layer to layer. Decode: a token at a time on the key-value cache. Bounds and their reasons are in
`parity.metrics`; what the two sides are in `parity.protocols`.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil

from oss_model.errors import InputError, raise_all
from oss_model.memory import peak_rss
from oss_model.taps import LAYER_TAPS
from parity import configs
from parity.forms_arm import compare_forms
from parity.judge import ROUTING, Judge
from parity.memory import check_free_memory, check_memory, gradient_bytes
from parity.mistakes.diagnosis import Diagnosis
from parity.mistakes.parameters import Parameters
from parity.prompts import Prompt, random_prompt
from parity.protocols import Arrays, Asked, Oracle, OracleLayer, Port, PortLayer, SupportsRestore
from parity.recording import Recorder
from parity.reports.report import Report, Weight

Progress = Callable[[int, int, str], None]
_UNFIT = "the parameters do not fit the reference, so nothing was computed from there on"
FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def compare(
    source: "str | Path | Oracle",
    checkpoint: "str | Path | Port",
    *,
    layers: bool = True,
    tokens: int | None = None,
    seed: int = 0,
    prompt: Prompt | None = None,
    dtype: str = "float32",
    decode: bool = False,
    gradients: bool = False,
    forms: str = "none",
    record: str | Path | None = None,
    max_memory: int | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Report:
    """Compare a model with the safetensors it was made from.

    Args:
      source: the safetensors directory, read and computed by transformers alone; or a recording of that.
      checkpoint: the Orbax checkpoint, computed by our `Transformer`; or a model of one's own (`parity.protocols.Port`).
      layers: run the semantics arm, every tap of every layer. Without it: weights and free run only.
      tokens: length of the random prompt; 2.5 times the sliding window if None.
      seed: of the random prompt.
      prompt: to use in place of a random one.
      dtype: "bfloat16" adds the precision arm and a free run in bfloat16; what is judged otherwise is always float32.
      gradients: also compare every parameter's gradient on the longest row of the prompt, of models that fit in memory
        whole.
      forms: "default", "all" or "none" of the ways to run the whole model (`parity.forms`).
      record: a new directory to write what the reference says to, for `parity.recording.Recording`.
      decode: also decode the prompt a token at a time on the key-value cache.
      max_memory: resident bytes, all in, that it may take at the most.
      progress: called with (layers done, layers in all, what is being done).

    Raises:
      InputError: if either cannot be read, if the prompt is longer than the model's positions, if gradients are asked for
        of one without a next token, if `max_memory` is too little, or not known to be enough.
    """
    start = time.monotonic()
    if isinstance(checkpoint, str | Path):
        from parity.candidate import Candidate

        port: Port = Candidate(checkpoint, source=Path(source) if isinstance(source, str | Path) else None)
    else:
        port = checkpoint
    if isinstance(source, str | Path):
        from parity.reference import Reference

        oracle: Oracle = Reference(source)
    else:
        oracle = source
    window = oracle.sizes.window
    raise_all(oracle.faults(port, Asked(layers, dtype, gradients)))
    if prompt is None and tokens is None:
        prompt = oracle.prompt
    if prompt is None:
        prompt = random_prompt(oracle.sizes.vocab, math.ceil(2.5 * window) if tokens is None else tokens, seed)
    longest = int(prompt.valid.sum(axis=1).max())
    limit = oracle.sizes.max_positions
    if longest > limit:
        raise InputError(
            f"--tokens or --prompt-file: expected at most {limit} tokens, the model's max_position_embeddings, found {longest}"
        )
    if gradients and longest < 2:
        raise InputError(
            f"--gradients: expected a prompt of at least 2 tokens, since the loss is that of the next one, found {longest};"
            " use --tokens 2 or more, or a longer prompt"
        )
    if max_memory is not None:
        check_memory(port, prompt.tokens.shape, max_memory, gradients)
    if gradients and port.can.gradients is not None:
        check_free_memory(port)
    watched, recorder = oracle, None
    if record is not None:
        described = {"source": str(source), "dtype": "float32", "layers": layers, "versions": _versions()}
        watched = recorder = Recorder(oracle, record, prompt, described)
    title, warnings = configs.title(oracle.sizes, oracle.settings)
    report = Report(str(source), str(checkpoint), title, longest, seed, layers, dtype, warnings=warnings)
    if dtype == "bfloat16" and not layers:
        report.lacks("precision: it is judged tap by tap, which takes --layers: only the free run was made in bfloat16")
    if longest < 2 * window:
        report.incomplete.append(
            f"{longest} tokens, but faults of the sliding window ({window}) only show from {2 * window} on:"
            f" use --tokens {2 * window}"
        )
    _Run(port, watched, report, prompt, dtype == "bfloat16", decode, progress).whole()
    if gradients and report.free_run is not None:
        row = int(prompt.valid.sum(axis=1).argmax())
        _gradients(oracle, port, report, prompt.tokens[row : row + 1, :longest])
    if forms != "none":
        fits = gradient_bytes(port) <= (max_memory or psutil.virtual_memory().available // 2)
        compare_forms(port, watched, report, forms, fits=fits, seed=seed, progress=progress)
    if recorder is not None:
        recorder.finish()
    report.seconds = time.monotonic() - start
    report.peak_rss_bytes = peak_rss()
    return report


@dataclasses.dataclass
class _Streams:
    """The residual streams carried from layer to layer, [batch, length, hidden].

    truth: the reference in float32, the oracle. replayed, own: the port in float32, with the reference's routing and
    with its own. port16, reference16: both in bfloat16, with the oracle's routing; None without the precision arm.
    """

    truth: np.ndarray
    replayed: np.ndarray
    own: np.ndarray
    port16: np.ndarray | None = None
    reference16: np.ndarray | None = None


@dataclasses.dataclass
class _Run:
    """One comparison under way."""

    port: Port
    oracle: Oracle
    report: Report
    prompt: Prompt
    precision: bool
    decode: bool
    progress: Progress

    def __post_init__(self):
        self.judge = Judge(self.prompt, self.report)
        self.diagnosis = Diagnosis(self.report, self.judge, self.oracle, self.port)

    def whole(self) -> None:
        count, sizes = self.oracle.sizes.layers, (self.port.sizes.layers, self.port.sizes.vocab)
        self.progress(0, count, "embedding")
        self.diagnosis.configuration(self.port.can.settings or {})
        fits = self.weights(Parameters("", self.oracle.first_parameters, self.port.restore))
        if sizes != (count, self.oracle.sizes.vocab):
            self.report.lacks(_UNFIT)
            fits = False
        streams = self.first() if fits else None
        for n in range(count):
            self.progress(n, count, f"layer {n}")
            streams = self.layer(n, streams)
        self.progress(count, count, "logits")
        if not self.weights(Parameters("", self.oracle.last_parameters, self.port.restore)):
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

    # --- weights ------------------------------------------------------------------------------------------------

    def weights(self, parameters: Parameters) -> bool:
        """Compare parameters; False if one is missing or of another shape, so that nothing can be computed."""
        fits = True
        for one in parameters.expected() if self.port.stored else ():
            name, shape = one.name, one.shape
            found = self.port.stored.get(name)
            if found is None:
                note = "missing in the checkpoint"
            elif found[0] != shape:
                note = f"shape {list(found[0])}, should be {list(shape)}"
            else:
                got = parameters.restore([name])[name]
                self.report.weights.append(Weight(name, one.differs(got)))
                if self.report.weights[-1].note:
                    self.diagnosis.parameter(one, got, parameters)
                continue
            fits = False
            self.report.weights.append(Weight(name, note))
        if not fits:
            self.report.lacks(_UNFIT)
        return fits

    # --- from the first to the last -----------------------------------------------------------------------------

    def first(self) -> _Streams:
        positions = self.oracle.rope_positions
        got, want = self.port.rope_tables(positions), self.oracle.rope_tables(positions)
        self.judge.rope(positions, got, want)
        self.explain("rope", {"positions": positions}, np.stack(want[1:]), np.stack(got))
        tokens = self.prompt.tokens
        truth, ours = self.oracle.embed(tokens, FLOAT32), self.port.embed(tokens, FLOAT32)
        self.judge.tap(None, "embedding", ours, truth)
        self.explain("embedding", {"tokens": tokens}, truth, ours)
        if not self.precision:
            return _Streams(truth, ours, ours)
        return _Streams(truth, ours, ours, self.port.embed(tokens, BFLOAT16), self.oracle.embed(tokens, BFLOAT16))

    def layer(self, n: int, streams: _Streams | None) -> _Streams | None:
        """Everything about one layer, whose parameters are in memory meanwhile; returns the streams after it."""
        layer = self.port.layer(n) if n < self.port.sizes.layers else None
        expected = self.oracle.layer(n)
        reads: SupportsRestore = self.port if layer is None or layer.can.restore is None else layer.can.restore
        parameters = Parameters(f"layers.{n}.", lambda: expected.parameters(self.packed), reads.restore, expected)
        fits = self.weights(parameters)
        return self.activations(n, parameters, layer, streams) if fits and streams is not None and layer is not None else None

    def activations(self, n: int, parameters: Parameters, layer: PortLayer, streams: _Streams) -> _Streams | None:
        expected = parameters.layer
        assert expected is not None
        taps = expected.run(streams.truth)
        routing = {"expert_choice": taps["expert_choice"]}
        if self.report.layers:
            self.semantics(n, parameters, expected, layer, streams.truth, taps)
            if self.precision:
                self.judge.precision(n, taps, *(side.run(streams.truth.astype(BFLOAT16), taps) for side in (layer, expected)))
        free = layer.run(streams.own)
        if not self.shows("free run", free, *ROUTING, "layer_out"):
            return None
        together = streams.replayed is streams.own  # no expert has flipped so far
        if together and np.array_equal(free["expert_choice"], taps["expert_choice"]):
            replay = free  # with the reference's routing it is the same run
        else:
            replay = layer.run(streams.replayed, routing)
            if not self.shows("free run", replay, *ROUTING, "layer_out"):
                return None
        self.judge.flips(n, taps, free if together else replay, free)
        self.judge.growth(n, taps["layer_out"], {"replayed": replay["layer_out"], "own": free["layer_out"]})
        if self.decode:
            self.decoded(n, layer, streams.replayed, taps, replay)
        after = _Streams(taps["layer_out"], replay["layer_out"], free["layer_out"])
        if replay is free:
            after.own = after.replayed
        if streams.port16 is not None and streams.reference16 is not None:
            out16 = layer.run(streams.port16, routing)["layer_out"]
            if self.judge.rounds(out16):
                after.port16, after.reference16 = out16, expected.run(streams.reference16, routing)["layer_out"]
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

    def last(self, streams: _Streams) -> None:
        taps = self.oracle.unembed(streams.truth)
        if self.report.layers:
            got = self.port.unembed(streams.truth, taps)
            for name in ("final_norm", "logits"):
                self.judge.tap(None, name, got.get(name), taps[name])
                self.explain(name, {"x": streams.truth, "final_norm": taps["final_norm"]}, taps[name], got.get(name))
            if self.precision:
                truth16 = streams.truth.astype(BFLOAT16)
                self.judge.precision(None, taps, *(side.unembed(truth16, taps) for side in (self.port, self.oracle)))
        last = self.port.unembed(streams.replayed)
        if not self.shows("free run", last, "logits"):
            return
        logits = {"replayed": last["logits"]}
        logits["own"] = logits["replayed"] if streams.own is streams.replayed else self.port.unembed(streams.own)["logits"]
        if streams.port16 is not None and streams.reference16 is not None:
            logits["bfloat16"] = self.port.unembed(streams.port16)["logits"]
            logits["reference_bfloat16"] = self.oracle.unembed(streams.reference16)["logits"]
        self.judge.free_run(taps["logits"], **logits)

    def explain(self, tap: str, given: Arrays, want: np.ndarray, got: np.ndarray | None) -> None:
        if self.report.taps[-1].verdict == "fail" and got is not None and got.size == want.size:
            both = lambda: (*self.oracle.first_parameters(), *self.oracle.last_parameters())  # noqa: E731
            self.diagnosis.tap(None, tap, Parameters("", both, self.port.restore), given, want, got.reshape(want.shape))

    def semantics(
        self, n: int, parameters: Parameters, expected: OracleLayer, layer: PortLayer, x: np.ndarray, taps: Arrays
    ) -> None:
        got = layer.run(x, taps)
        positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
        for name in LAYER_TAPS:
            have, want = got.get(name), taps.get(name)
            if have is None or want is None or have.size != want.size:
                self.judge.tap(n, name, have, want)
            elif name == "expert_choice":
                self.judge.choice(n, taps, have)
            elif name == "mlp_out":
                self.experts(n, expected, layer, taps, have)
            else:
                self.judge.tap(n, name, have, want)
            if have is not None and want is not None and self.report.taps[-1].verdict == "fail":
                given = {**taps, "x": x, "positions": positions}
                self.diagnosis.tap(n, name, parameters, given, want, have)

    def experts(self, n: int, expected: OracleLayer, layer: PortLayer, taps: Arrays, have: np.ndarray) -> None:
        """The expert sum; experts that no token of the prompt reaches are fed the same tokens directly."""
        want, note = taps["mlp_out"], ""
        missed = np.setdiff1d(np.arange(self.oracle.sizes.experts), taps["expert_choice"])
        if missed.size:
            x = taps["mlp_norm"].reshape(-1, want.shape[-1])
            k = taps["expert_choice"].shape[-1]
            choice = missed[np.arange(x.shape[0] * k).reshape(-1, k) % missed.size]
            weights = np.full(choice.shape, 1 / k, np.float32)
            both = [side.experts(x, choice, weights).reshape(want.shape) for side in (expected, layer)]
            want, have = np.concatenate([want, both[0]]), np.concatenate([have.reshape(want.shape), both[1]])
            note = f"{missed.size} unreached experts fed directly"
        self.judge.tap(n, "mlp_out", have, want, note)


def _gradients(oracle: Oracle, port: Port, report: Report, tokens: np.ndarray) -> None:
    """The gradients arm, on tokens [1, length]; what a side has no gradient of is said to be incomplete."""
    from parity.gradients import compare_gradients

    if port.can.gradients is None:
        report.lacks("gradients: the port has none (parity.protocols.SupportsGradients): they were not compared")
    elif oracle.differentiates is None:
        report.lacks("gradients: the reference has none: they were not compared")
    else:
        want, routing = oracle.differentiates.gradients(tokens)
        got = port.can.gradients.gradients(tokens, routing)
        names = [name for name in port.stored or want if name in want]
        missing = [name for name in names if name not in got]
        if missing:
            report.lacks(f"gradients: the port gave none of {len(missing)} parameters, the first {missing[0]}")
        report.gradients = compare_gradients(want, got, [name for name in names if name in got])


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "numpy")}
