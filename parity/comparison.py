"""The arms of a comparison, run layer by layer, and their verdicts.

Weights: every stored byte. Semantics: each component fed the reference's input and routing, in float32. Precision:
the same in bfloat16, the port's error over the reference's own. Free run: the whole model, its own states carried
from layer to layer. Decode: a token at a time on the key-value cache. Bounds and their reasons are in
`parity.metrics`; what the two sides are in `parity.sides`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from oss_model.errors import raise_all
from oss_model.memory import peak_rss
from oss_model.taps import LAYER_TAPS
from parity import metrics
from parity.prompts import Prompt, random_prompt
from parity.recording import Recorder, Recording
from parity.report import Report, TapResult, Weight
from parity.sides import Arrays, Expected, Layer, Oracle, OracleLayer, Port

Progress = Callable[[int, int, str], None]
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
    record: str | Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Report:
    """Compare a model with the safetensors it was made from.

    Args:
      source: the safetensors directory, read and computed by transformers alone; or a recording of that.
      checkpoint: the Orbax checkpoint, computed by our `Transformer`; or a model of one's own (`parity.sides.Port`).
      layers: run the semantics arm, every tap of every layer. Without it: weights and free run only.
      tokens: length of the random prompt; 2.5 times the sliding window if None.
      seed: of the random prompt.
      prompt: to use in place of a random one.
      dtype: "bfloat16" adds the precision arm and a free run in bfloat16; what is judged otherwise is always float32.
      gradients: also compare every parameter's gradient, of models that fit in memory whole.
      record: a new directory to write what the reference says to, for `parity.recording.Recording`.
      decode: also decode the prompt a token at a time on the key-value cache.
      progress: called with (layers done, layers in all, what is being done).

    Raises:
      InputError: if either cannot be read.
    """
    start = time.monotonic()
    if isinstance(checkpoint, str | Path):
        from parity.candidate import Candidate

        port: Port = Candidate(checkpoint)
    else:
        port = checkpoint
    if isinstance(source, str | Path):
        from parity.reference import Reference

        oracle: Oracle = Reference(source)
    else:
        oracle = source
    if gradients and not isinstance(oracle, Recording):
        from parity.gradients import check_memory

        check_memory(port)  # type: ignore[arg-type]
    window = oracle.sizes.window
    if isinstance(oracle, Recording):
        _check_recording(oracle, port, dtype, gradients)
        prompt = oracle.prompt if prompt is None and tokens is None else prompt
    if prompt is None:
        prompt = random_prompt(oracle.sizes.vocab, math.ceil(2.5 * window) if tokens is None else tokens, seed)
    if record is not None:
        oracle = Recorder(oracle, record, prompt, {"source": str(source), "dtype": "float32", "versions": _versions()})
    longest = int(prompt.valid.sum(axis=1).max())
    names = str(getattr(source, "source", source)), str(getattr(checkpoint, "path", checkpoint))
    report = Report(*names, _title(oracle), longest, seed, layers, dtype)
    if longest < 2 * window:
        report.incomplete.append(
            f"{longest} tokens, but faults of the sliding window ({window}) only show from {2 * window} on:"
            f" use --tokens {2 * window}"
        )
    _Run(port, oracle, report, prompt, dtype == "bfloat16", decode, progress).whole()
    if gradients and report.free_run is not None:
        from parity.gradients import compare_gradients

        reference = oracle.oracle if isinstance(oracle, Recorder) else oracle
        report.gradients = compare_gradients(reference, port, prompt.tokens[:1, : int(prompt.valid[0].sum())])  # type: ignore
    if isinstance(oracle, Recorder):
        oracle.finish()
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

    def whole(self) -> None:
        count, sizes = self.oracle.sizes.layers, (self.port.sizes.layers, self.port.sizes.vocab)
        self.progress(0, count, "embedding")
        fits = sizes == (count, self.oracle.sizes.vocab)
        fits &= self.weights(self.oracle.first_parameters(), self.port.restore)
        streams = self.first() if fits else None
        for n in range(count):
            self.progress(n, count, f"layer {n}")
            expected = self.oracle.layer(n)
            layer = self.port.layer(n) if n < self.port.sizes.layers else None
            stored = getattr(layer, "stored", None)
            read = self.port.restore if stored is None else lambda names, stored=stored: {name: stored[name] for name in names}
            if not self.weights(expected.parameters(self.packed), read):
                streams = None
            if streams is not None and layer is not None:
                streams = self.layer(n, expected, layer, streams)
        self.progress(count, count, "logits")
        if not self.weights(self.oracle.last_parameters(), self.port.restore):
            streams = None
        for name in sorted(self.port.stored.keys() - {weight.name for weight in self.report.weights}):
            self.report.weights.append(Weight(name, "unexpected: the source has no such parameter"))
        if streams is not None:
            self.last(streams)
        else:
            self.report.incomplete.append("the parameters do not fit the reference, so nothing was computed from there on")
        if not self.port.stored:
            self.report.incomplete.append("the port shows no parameters, so none were compared")

    @property
    def packed(self) -> bool:
        return any(name.endswith(".blocks") for name in self.port.stored)

    # --- weights ------------------------------------------------------------------------------------------------

    def weights(self, expected: Iterable[Expected], read: Callable[[list[str]], Arrays]) -> bool:
        """Compare parameters; False if one is missing or of another shape, so that nothing can be computed."""
        fits = True
        for name, shape, differs, _ in expected if self.port.stored else ():
            found = self.port.stored.get(name)
            if found is None:
                note = "missing in the checkpoint"
            elif found[0] != shape:
                note = f"shape {list(found[0])}, should be {list(shape)}"
            else:
                self.report.weights.append(Weight(name, differs(read([name])[name])))
                continue
            fits = False
            self.report.weights.append(Weight(name, note))
        return fits

    # --- from the first to the last -----------------------------------------------------------------------------

    def first(self) -> _Streams:
        self.rope()
        tokens = self.prompt.tokens
        truth, ours = self.oracle.embed(tokens, FLOAT32), self.port.embed(tokens, FLOAT32)
        self.judge(None, "embedding", ours, truth)
        if not self.precision:
            return _Streams(truth, ours, ours)
        return _Streams(truth, ours, ours, self.port.embed(tokens, BFLOAT16), self.oracle.embed(tokens, BFLOAT16))

    def layer(self, n: int, expected: OracleLayer, layer: Layer, streams: _Streams) -> _Streams:
        """All activations of one layer; returns the streams after it."""
        taps = expected.run(streams.truth)
        routing = {"expert_choice": taps["expert_choice"]}
        if self.report.layers:
            self.semantics(n, expected, layer, taps, layer.run(streams.truth, taps))
            if self.precision:
                self.compare_errors(n, taps, *(side.run(streams.truth.astype(BFLOAT16), taps) for side in (layer, expected)))
        free = layer.run(streams.own)
        if streams.replayed is streams.own and np.array_equal(free["expert_choice"], taps["expert_choice"]):
            replay = free  # no expert has flipped so far: with the reference's routing it is the same run
        else:
            replay = layer.run(streams.replayed, routing)
        self.flips(n, taps, free)
        worst = {name: self.errors(run["layer_out"], taps["layer_out"]).max() for name, run in
                 (("replayed", replay), ("own", free))}  # fmt: skip
        self.report.growth.append({"layer": n} | {name: float(min(error, metrics.WORST)) for name, error in worst.items()})
        if self.decode:
            decoded = layer.decode(streams.replayed, taps["expert_choice"])  # type: ignore[attr-defined]
            self.judge(n, "decode", decoded, replay["layer_out"], "one token at a time against the whole prompt")
        after = _Streams(taps["layer_out"], replay["layer_out"], free["layer_out"])
        if replay is free:
            after.own = after.replayed
        if streams.port16 is not None and streams.reference16 is not None:
            after.port16 = layer.run(streams.port16, routing)["layer_out"]
            after.reference16 = expected.run(streams.reference16, routing)["layer_out"]
        return after

    def last(self, streams: _Streams) -> None:
        taps = self.oracle.unembed(streams.truth)
        if self.report.layers:
            got = self.port.unembed(streams.truth, taps)
            for name in ("final_norm", "logits"):
                self.judge(None, name, got.get(name), taps[name])
            if self.precision:
                truth16 = streams.truth.astype(BFLOAT16)
                self.compare_errors(None, taps, *(side.unembed(truth16, taps) for side in (self.port, self.oracle)))
        truth = self.valid(taps["logits"])
        logits = self.valid(self.port.unembed(streams.replayed)["logits"])
        run: dict[str, Any] = metrics.free_run(truth, logits)
        self.report.token_kl = metrics.finite(metrics.kl(truth, logits)).reshape(-1).tolist()
        run["gate"] = metrics.FREE_RUN_GATE * run["max_logit"]
        run["verdict"] = "ok" if run["max_abs"] <= run["gate"] else "fail"
        if streams.own is not streams.replayed:
            logits = self.valid(self.port.unembed(streams.own)["logits"])
        run["own_routing"] = metrics.free_run(truth, logits)
        if streams.port16 is not None and streams.reference16 is not None:
            run["bfloat16"] = metrics.free_run(truth, self.valid(self.port.unembed(streams.port16)["logits"]))
            run["reference_bfloat16"] = metrics.free_run(truth, self.valid(self.oracle.unembed(streams.reference16)["logits"]))
        self.report.free_run = run

    # --- judging ------------------------------------------------------------------------------------------------

    def errors(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """Relative L2 of each token of the prompt, [batch, length]; padding counts as right."""
        batch, length = self.prompt.tokens.shape
        copies = len(want.reshape(-1, length, *want.shape[2:])) // batch if want.ndim > 2 else 1
        shape = (batch * copies, length, -1)
        relative = metrics.token_rel_l2(got.reshape(shape), want.reshape(shape))
        return np.where(np.tile(self.prompt.valid, (copies, 1)), relative, 0.0)

    def valid(self, logits: np.ndarray) -> np.ndarray:
        """Without padding, as one row: [1, tokens, vocab]."""
        return logits[self.prompt.valid][None]

    def judge(self, layer: int | None, name: str, got: np.ndarray | None, want: np.ndarray | None, note: str = "") -> None:
        if got is None or want is None:
            side = "candidate" if got is None else "reference"
            self.report.taps.append(TapResult(layer, name, 1.0, 0.0, "incomplete", f"the {side} has no such tap"))
        elif got.size != want.size:
            note = f"shape {list(got.shape)}, should be {list(want.shape)}"
            self.report.taps.append(TapResult(layer, name, 1.0, 0.0, "fail", note))
        else:
            errors = self.errors(got, want)
            bad = errors > metrics.SEMANTICS_GATE
            where = _which_tokens(np.any(bad, axis=0)) if bad.any() else ""
            largest = float(metrics.finite(np.abs(got.reshape(want.shape).astype(np.float32) - want)).max())
            worst, verdict = min(float(errors.max()), metrics.WORST), "fail" if bad.any() else "ok"
            note = "; ".join(part for part in (note, where) if part)
            self.report.taps.append(TapResult(layer, name, worst, largest, verdict, note))

    def semantics(self, n: int, expected: OracleLayer, layer: Layer, taps: Arrays, got: Arrays) -> None:
        for name in LAYER_TAPS:
            have, want = got.get(name), taps.get(name)
            if have is None or want is None or have.size != want.size:
                self.judge(n, name, have, want)
            elif name == "expert_choice":
                self.choice(n, taps, have)
            elif name == "mlp_out":
                self.experts(n, expected, layer, taps, have)
            else:
                self.judge(n, name, have, want)

    def choice(self, layer: int, taps: Arrays, got: np.ndarray) -> None:
        """On the reference's own logits the experts must be the same ones; only exact ties may be broken otherwise."""
        logits = taps["router_logits"]
        flips = metrics.flips(logits, taps["expert_choice"], logits, got.reshape(taps["expert_choice"].shape))
        bad = [flip for flip in flips if not flip["explained"] and self.prompt.valid.reshape(-1)[flip["token"]]]
        verdict, worst = ("fail", 1.0) if bad else ("ok", 0.0)
        note = f"{len(bad)} tokens chose other experts" if bad else ""
        self.report.taps.append(TapResult(layer, "expert_choice", worst, float(len(bad)), verdict, note))

    def experts(self, n: int, expected: OracleLayer, layer: Layer, taps: Arrays, have: np.ndarray) -> None:
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
        self.judge(n, "mlp_out", have, want, note)

    def compare_errors(self, layer: int | None, truth: Arrays, got: Arrays, reference: Arrays) -> None:
        """The precision arm: each component in bfloat16 on the oracle's input, its error over the reference's own."""
        for tap in self.report.taps:
            if tap.layer == layer and tap.tap in truth and tap.tap in got and tap.tap != "expert_choice":
                ours, theirs = (self.spread(side[tap.tap], truth[tap.tap]) for side in (got, reference))
                tap.port_over_reference = metrics.error_ratio(ours, theirs)

    def spread(self, got: np.ndarray, want: np.ndarray) -> float:
        """Relative L2 of all tokens together."""
        rows = self.prompt.valid.reshape(-1)
        got, want = (a.reshape(len(rows), -1)[rows].astype(np.float64) for a in (got, want))
        return float(metrics.finite(np.asarray(np.linalg.norm(got - want) / np.linalg.norm(want))))

    def flips(self, n: int, taps: Arrays, free: Arrays) -> None:
        if free["expert_choice"].shape != taps["expert_choice"].shape:
            return
        routing = (side[tap] for side in (taps, free) for tap in ("router_logits", "expert_choice"))
        found = metrics.flips(*routing)
        self.report.flips += [{"layer": n} | flip for flip in found if self.prompt.valid.reshape(-1)[flip["token"]]]

    def rope(self) -> None:
        positions = self.oracle.rope_positions
        inv_freq, *want = self.oracle.rope_tables(positions)
        got = self.port.rope_tables(positions)
        angle = positions[:, None] * inv_freq[None]
        error = np.max([np.abs(g - w) for g, w in zip(got, want, strict=True)], axis=0)
        worst = float(metrics.finite(error / (1 + angle)).max())
        verdict = "ok" if worst <= metrics.ROPE_GATE else "fail"
        note = f"cos and sin up to position {positions[-1]}"
        self.report.taps.append(TapResult(None, "rope", worst, float(metrics.finite(error).max()), verdict, note))


def _check_recording(recording: Recording, port: Port, dtype: str, gradients: bool) -> None:
    faults = []
    if recording.sizes != port.sizes and recording.sizes.layers != port.sizes.layers:
        faults.append(f"{recording.directory}: recorded of another model: {recording.sizes}, the checkpoint has {port.sizes}")
    if gradients:
        faults.append(f"{recording.directory}: recorded without gradients; --gradients needs SRC and PyTorch")
    if dtype != recording.manifest["dtype"]:
        faults.append(
            f"{recording.directory}: recorded in {recording.manifest['dtype']}; --dtype {dtype} needs SRC and PyTorch"
        )
    raise_all(faults)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "numpy")}


def _which_tokens(bad) -> str:
    """Which places of the prompt are wrong, as a person would say it: [length] bool."""
    wrong = np.flatnonzero(bad)
    if len(wrong) == len(bad):
        return "all tokens"
    if bad[wrong[0] :].all():
        return f"only tokens >= {wrong[0]}"
    return f"{len(wrong)} of {len(bad)} tokens, first {wrong[0]}"


def _title(oracle: Oracle) -> str:
    layers, experts, vocab = oracle.sizes[:3]
    names = {(24, 32, 201088): "gpt-oss-20b", (36, 128, 201088): "gpt-oss-120b"}
    return names.get((layers, experts, vocab), f"gpt-oss, {layers} layers, {experts} experts, vocabulary {vocab}")
