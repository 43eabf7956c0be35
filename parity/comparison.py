"""The arms of a comparison, run layer by layer, and their verdicts.

Weights: every stored byte. Semantics: each component fed the reference's input and routing. Free run: the whole
model, its own states carried from layer to layer. PARITY_SPEC's numbers and gates are in `parity.metrics`.
"""

import dataclasses
import math
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from oss_model.taps import LAYER_TAPS
from parity import metrics
from parity.candidate import Arrays, Candidate
from parity.reference import Reference, ReferenceLayer
from parity.report import Report, TapResult, Weight

_PIECE = 1 << 24  # values compared at a time: parameters are up to 4 GB

Progress = Callable[[int, int, str], None]


def compare(
    source: str | Path,
    checkpoint: str | Path,
    *,
    layers: bool = True,
    tokens: int | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> Report:
    """Compare an Orbax checkpoint with the safetensors it was made from, in float32.

    Args:
      source: the safetensors directory; read and computed by transformers alone.
      checkpoint: the Orbax checkpoint; computed by our `Transformer`.
      layers: run the semantics arm, every tap of every layer. Without it: weights and free run only.
      tokens: length of the random prompt; 2.5 times the sliding window if None.
      seed: of the prompt.
      progress: called with (layers done, layers in all, what is being done).

    Raises:
      InputError: if either cannot be read.
    """
    start = time.monotonic()
    candidate = Candidate(checkpoint)
    reference = Reference(source)
    window = int(reference.config.sliding_window or 0)
    length = math.ceil(2.5 * window) if tokens is None else tokens
    report = Report(str(source), str(checkpoint), _title(reference), length, seed, layers)
    if length < 2 * window:
        report.incomplete.append(
            f"{length} tokens, but faults of the sliding window ({window}) only show from {2 * window} on:"
            f" use --tokens {2 * window}"
        )
    prompt = np.random.default_rng(seed).integers(0, reference.config.vocab_size, (1, length))
    _Run(candidate, reference, report, progress).whole(prompt)
    report.seconds = time.monotonic() - start
    report.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report


@dataclasses.dataclass
class _Run:
    """One comparison under way. `same_shape` turns false at the first parameter that does not fit the reference."""

    candidate: Candidate
    reference: Reference
    report: Report
    progress: Progress
    same_shape: bool = True

    def whole(self, prompt: np.ndarray) -> None:
        count = self.reference.config.num_hidden_layers
        config = self.candidate.cfg
        self.same_shape = config.num_hidden_layers == count and config.vocab_size == self.reference.config.vocab_size
        outside = [name for name in self.candidate.stored if not name.startswith("layers.")]
        self.progress(0, count, "embedding")
        arrays = self.candidate.restore(outside)
        self.weights(dict(self.reference.model_parameters()).items(), arrays, None)
        if self.same_shape:
            self.rope()
            truth = self.reference.embed(torch.from_numpy(prompt))
            replayed = own = self.candidate.embed(prompt, arrays)
            self.tap(None, "embedding", np.asarray(own), truth.numpy())
        for n in range(count):
            self.progress(n, count, f"layer {n}")
            expected = self.reference.layer(n)
            stored = self.candidate.restore(self.candidate.layer_names(n))
            self.weights(expected.parameters(self.candidate.packed), stored, n)
            if self.same_shape:
                truth, replayed, own = self.layer(n, expected, stored, truth, replayed, own)
        for name in sorted(set(self.candidate.stored) - {weight.name for weight in self.report.weights}):
            self.report.weights.append(Weight(name, "unexpected: the source has no such parameter"))
        if self.same_shape:
            self.progress(count, count, "logits")
            self.logits(arrays, truth, replayed, own)
        else:
            self.report.incomplete.append("the parameters do not fit the reference, so nothing could be computed with them")

    # --- weights ------------------------------------------------------------------------------------------------

    def weights(self, expected: Iterable[tuple[str, torch.Tensor]], found: Arrays, layer: int | None) -> None:
        for name, want in expected:
            if name not in found:
                note = "missing in the checkpoint"
            elif tuple(want.shape) != found[name].shape:
                note = f"shape {list(found[name].shape)}, should be {list(want.shape)}"
            else:
                self.report.weights.append(Weight(name, _difference(want, found[name])))
                continue
            self.same_shape = False
            self.report.weights.append(Weight(name, note))

    # --- semantics ----------------------------------------------------------------------------------------------

    def layer(self, n: int, expected: ReferenceLayer, stored: Arrays, truth: torch.Tensor, replayed: jax.Array, own: jax.Array):
        """All activations of one layer; returns the three residual streams after it."""
        taps = {name: value.numpy() for name, value in expected.run(truth).items()}
        block = self.candidate.block(n, stored)
        if self.report.layers:
            got = self.candidate.run(block, jax.numpy.asarray(truth.numpy()), taps)
            for name in LAYER_TAPS:
                have, want = got.get(name), taps.get(name)
                if have is None or want is None or have.size != want.size:
                    self.tap(n, name, have, want)
                elif name == "expert_choice":
                    self.choice(n, taps, got)
                elif name == "mlp_out":
                    self.experts(n, expected, block, taps, got)
                else:
                    self.tap(n, name, have, want)
        free = self.candidate.run(block, own, {})
        if replayed is own and np.array_equal(free["expert_choice"], taps["expert_choice"]):
            replay = free  # no expert has flipped so far: with the reference's routing it is the same run
        else:
            replay = self.candidate.run(block, replayed, {"expert_choice": taps["expert_choice"]})
        if free["expert_choice"].shape == taps["expert_choice"].shape:
            routing = (side[tap] for side in (taps, free) for tap in ("router_logits", "expert_choice"))
            self.report.flips += [{"layer": n} | flip for flip in metrics.flips(*routing)]
        error = {
            name: float(metrics.token_rel_l2(run["layer_out"], taps["layer_out"]).max())
            for name, run in (("replayed", replay), ("own", free))
        }
        self.report.growth.append({"layer": n} | {name: min(worst, metrics.WORST) for name, worst in error.items()})
        after = jax.numpy.asarray(free["layer_out"])
        return (
            torch.from_numpy(taps["layer_out"]),
            after if replay is free else jax.numpy.asarray(replay["layer_out"]),
            after,
        )

    def tap(self, layer: int | None, name: str, got: np.ndarray | None, want: np.ndarray | None, note: str = "") -> None:
        """Judge one component. [tokens, ...] and [batch, length, ...] are both taken."""
        if got is None or want is None:
            side = "candidate" if got is None else "reference"
            self.report.taps.append(TapResult(layer, name, 1.0, 0.0, "incomplete", f"the {side} has no such tap"))
            return
        if got.size != want.size:
            note = f"shape {list(got.shape)}, should be {list(want.shape)}"
            self.report.taps.append(TapResult(layer, name, 1.0, 0.0, "fail", note))
            return
        got = got.reshape(want.shape)
        if want.ndim == 2:
            got, want = got[None], want[None]
        errors = metrics.token_rel_l2(got, want)
        worst = min(float(errors.max()), metrics.WORST)
        bad = errors > metrics.SEMANTICS_GATE
        verdict = "fail" if bad.any() else "ok"
        where = _which_tokens(np.any(bad, axis=0)) if bad.any() else ""
        largest = float(metrics.finite(np.abs(got - want)).max())
        note = "; ".join(part for part in (note, where) if part)
        self.report.taps.append(TapResult(layer, name, worst, largest, verdict, note))

    def choice(self, layer: int, taps: Arrays, got: Arrays) -> None:
        """On the reference's own logits the experts must be the same ones; only exact ties may be broken otherwise."""
        logits = taps["router_logits"]
        flips = metrics.flips(logits, taps["expert_choice"], logits, got["expert_choice"])
        bad = [flip for flip in flips if not flip["explained"]]
        verdict, worst = ("fail", 1.0) if bad else ("ok", 0.0)
        note = f"{len(bad)} tokens chose other experts" if bad else ""
        self.report.taps.append(TapResult(layer, "expert_choice", worst, float(len(bad)), verdict, note))

    def experts(self, layer: int, expected: ReferenceLayer, block, taps: Arrays, got: Arrays) -> None:
        """The expert sum; experts that no token of the prompt reaches are fed the same tokens directly."""
        want, have = taps["mlp_out"], got["mlp_out"]
        count = self.reference.config.num_local_experts
        missed = np.setdiff1d(np.arange(count), taps["expert_choice"])
        note = ""
        if missed.size:
            x = taps["mlp_norm"].reshape(-1, want.shape[-1])
            k = taps["expert_choice"].shape[-1]
            choice = missed[np.arange(x.shape[0] * k).reshape(-1, k) % missed.size]
            weights = np.full(choice.shape, 1 / k, np.float32)
            direct = expected.experts(*(torch.from_numpy(a) for a in (x, choice, weights))).numpy()
            want = np.concatenate([want, direct.reshape(want.shape)])
            have = np.concatenate([have, self.candidate.experts(block, x, choice, weights).reshape(want[:1].shape)])
            note = f"{missed.size} unreached experts fed directly"
        self.tap(layer, "mlp_out", have, want, note)

    def rope(self) -> None:
        """cos and sin at every position the model may see, not only the prompt's."""
        positions = np.arange(self.reference.config.max_position_embeddings)
        want = [t[0].numpy() for t in self.reference.rotary(torch.zeros(1), torch.from_numpy(positions)[None])]
        got = self.candidate.rope_tables(positions)
        angle = positions[:, None] * self.reference.rotary.inv_freq.numpy()[None]
        error = np.max([np.abs(g - w) for g, w in zip(got, want, strict=True)], axis=0)
        worst = float((error / (1 + angle)).max())
        verdict = "ok" if worst <= metrics.ROPE_GATE else "fail"
        note = f"cos and sin up to position {positions[-1]}"
        self.report.taps.append(TapResult(None, "rope", worst, float(error.max()), verdict, note))

    # --- free run -----------------------------------------------------------------------------------------------

    def logits(self, arrays: Arrays, truth: torch.Tensor, replayed: jax.Array, own: jax.Array) -> None:
        taps = {name: value.numpy() for name, value in self.reference.unembed(truth).items()}
        if self.report.layers:
            got = self.candidate.unembed(jax.numpy.asarray(truth.numpy()), arrays, taps)
            for name in ("final_norm", "logits"):
                self.tap(None, name, got[name], taps[name])
        logits = self.candidate.unembed(replayed, arrays, {})["logits"]
        run: dict[str, Any] = metrics.free_run(taps["logits"], logits)
        self.report.token_kl = metrics.finite(metrics.kl(taps["logits"], logits)).reshape(-1).tolist()
        run["gate"] = metrics.FREE_RUN_GATE * run["max_logit"]
        run["verdict"] = "ok" if run["max_abs"] <= run["gate"] else "fail"
        run["own_routing"] = metrics.free_run(taps["logits"], self.candidate.unembed(own, arrays, {})["logits"])
        self.report.free_run = run


def _difference(want: torch.Tensor, got: np.ndarray) -> str:
    """How a stored parameter differs from the reference's, bit by bit; empty if it does not.

    bfloat16 against float32 is compared as float32, which holds every bfloat16 exactly.
    """
    have = _torch(got)
    differing, first, largest = 0, None, 0.0
    step = max(1, _PIECE * len(want) // want.numel())
    for start in range(0, len(want), step):
        a, b = want[start : start + step], have[start : start + step]
        if a.dtype != b.dtype:
            a, b = a.float(), b.float()
        unequal = _bits(a) != _bits(b)
        if unequal.any():
            differing += int(unequal.sum())
            row, *rest = unequal.nonzero()[0].tolist()
            first = first or [start + row, *rest]
            largest = max(largest, float((a.double() - b.double()).abs().nan_to_num(nan=math.inf).max()))
    if not differing:
        return ""
    return f"{differing} of {want.numel()} values differ, first at {first}, by at most {largest:.3g}"


def _torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def _bits(t: torch.Tensor) -> torch.Tensor:
    t = t.contiguous()
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def _which_tokens(bad) -> str:
    """Which places of the prompt are wrong, as a person would say it: [length] bool."""
    wrong = np.flatnonzero(bad)
    if len(wrong) == len(bad):
        return "all tokens"
    if bad[wrong[0] :].all():
        return f"only tokens >= {wrong[0]}"
    return f"{len(wrong)} of {len(bad)} tokens, first {wrong[0]}"


def _title(reference: Reference) -> str:
    c = reference.config
    names = {(24, 32, 2880): "gpt-oss-20b", (36, 128, 2880): "gpt-oss-120b"}
    sizes = (c.num_hidden_layers, c.num_local_experts, c.hidden_size)
    return names.get(sizes, f"gpt-oss, {c.num_hidden_layers} layers, {c.num_local_experts} experts, hidden {c.hidden_size}")
