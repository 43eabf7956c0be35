"""What the two sides computed becomes a verdict: the numbers of `parity.metrics`, held to its bounds, in a report."""

from typing import Any

import ml_dtypes
import numpy as np

from oss_model.terminal import counted
from parity import metrics
from parity.prompts import Prompt
from parity.protocols import Arrays, Moved
from parity.reports.report import Report, TapResult

ROUTING = ("router_logits", "expert_choice")


class Judge:
    """Fills `report`. Padding of `prompt` is left out of every number."""

    def __init__(self, prompt: Prompt, report: Report):
        self.prompt, self.report = prompt, report
        self._parted: dict[int, int] = {}  # token -> the first layer that it flipped in, on the port's own stream

    def tap(
        self,
        layer: int | None,
        name: str,
        got: np.ndarray | None,
        want: np.ndarray | None,
        note: str = "",
        gate: float = metrics.USUAL_GATE,
        channels: np.ndarray | None = None,
    ) -> None:
        """A tap of the port against the reference's, [batch * copies, length, ...] or [batch * length, ...] both.

        `channels` bounds each channel's error over its own scale, [hidden].
        """
        if got is None or want is None:
            side = "candidate" if got is None else "reference"
            self._add(layer, name, 1.0, 0.0, "incomplete", f"the {side} has no such tap")
        elif got.size != want.size:
            self._add(layer, name, 1.0, 0.0, "fail", f"shape {list(got.shape)}, should be {list(want.shape)}")
        else:
            errors = self.errors(got, want)
            bad = errors > gate
            where = _which_tokens(np.any(bad, axis=0)) if bad.any() else ""
            if channels is not None and not bad.any():
                where = self._wrong_channels(got, want, channels)
            largest = float(metrics.finite(np.abs(got.reshape(want.shape).astype(np.float32) - want)).max())
            verdict, notes = "fail" if where else "ok", "; ".join(part for part in (note, where) if part)
            self._add(layer, name, _bounded(errors.max()), largest, verdict, notes, None, float(gate))

    def _wrong_channels(self, got: np.ndarray, want: np.ndarray, bounds: np.ndarray) -> str:
        """Channels that are wrong over their own scale, where the whole token does not show it."""
        rows = np.resize(self.prompt.valid.reshape(-1), want.size // want.shape[-1])
        got, want = (a.reshape(len(rows), -1)[rows] for a in (got, want))
        wrong = np.flatnonzero(metrics.channel_rel_l2(got, want) > bounds)
        if not wrong.size:
            return ""
        places = ", ".join(map(str, wrong[:6])) + (", ..." if wrong.size > 6 else "")
        return f"channels {places} of {want.shape[-1]} over their own scale"

    def not_run(self, layer: int) -> None:
        """Of a layer that the model has and does not run when it is its turn."""
        if not any(tap.layer == layer and tap.verdict == "fail" for tap in self.report.taps):
            self._add(layer, "layer_out", 1.0, 0.0, "fail", "the model does not run this layer when it is its turn")

    def returned(self, shown: np.ndarray, logits: np.ndarray) -> None:
        """What the call gives in the end, against its own last tap: the same values."""
        if (
            shown.dtype == logits.dtype
            and shown.size == logits.size
            and not np.array_equal(shown.reshape(logits.shape)[self.prompt.valid], logits[self.prompt.valid], equal_nan=True)
        ):
            self._add(None, "returned", 1.0, 0.0, "fail", "what the call returns is not what its last tap is")

    def choice(self, layer: int, taps: Arrays, got: np.ndarray) -> None:
        """On the reference's own logits the experts must be the same ones; only exact ties may be broken otherwise."""
        logits = taps["router_logits"]
        flips = self._flips(logits, taps["expert_choice"], logits, got.reshape(taps["expert_choice"].shape))
        bad = [flip for flip in flips if not flip["explained"]]
        verdict, worst = ("fail", 1.0) if bad else ("ok", 0.0)
        note = f"{counted(len(bad), 'token')} chose other experts" if bad else ""
        self._add(layer, "expert_choice", worst, float(len(bad)), verdict, note)

    def rope(self, positions: np.ndarray, got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, ...]) -> None:
        """cos and sin at these positions; `want` has the frequencies before them (`Oracle.rope_tables`)."""
        inv_freq, *tables = want
        error = np.max([np.abs(g - w) for g, w in zip(got, tables, strict=True)], axis=0)
        worst = float(metrics.finite(error / (1 + positions[:, None] * inv_freq[None])).max())
        verdict = "ok" if worst <= metrics.ROPE_GATE else "fail"
        note = f"cos and sin up to position {positions[-1]}"
        self._add(None, "rope", worst, float(metrics.finite(error).max()), verdict, note, None, metrics.ROPE_GATE)

    def precision(self, layer: int | None, truth: Arrays, got: Arrays, reference: Arrays) -> None:
        """Each component in bfloat16 on the oracle's input: its error over the reference's own, noted at its tap.

        Experts are right that have the highest of the logits they were chosen by, rounded; a tie of those goes either way.
        """
        for tap in [tap for tap in self.report.taps if (tap.layer, tap.tap) == (layer, "expert_choice")]:
            routing = {"router_logits", "expert_choice"}
            if routing <= truth.keys() and routing <= got.keys() and self.rounds(got["router_logits"]):
                logits = truth["router_logits"].astype(ml_dtypes.bfloat16).astype(np.float32)
                chosen = got["expert_choice"].reshape(len(logits), -1)
                wrong = self._not_best(logits, chosen, truth["expert_choice"].shape[-1])
                tap.port_over_reference = metrics.WORST if wrong else 1.0
                if wrong:
                    tap.note = "; ".join(part for part in (tap.note, f"in bfloat16 {wrong} tokens chose other experts") if part)
        for tap in [tap for tap in self.report.taps if tap.layer == layer and tap.tap != "expert_choice"]:
            if tap.tap in truth and tap.tap in got and self.rounds(got[tap.tap]):
                ours, theirs = (self._spread(side[tap.tap], truth[tap.tap]) for side in (got, reference))
                tap.port_over_reference = metrics.error_ratio(ours, theirs)

    def rope16(self, positions: np.ndarray, got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...]) -> None:
        """cos and sin in bfloat16, the worst position's error over that of rounding the reference's; see `rope`."""
        truth = np.concatenate(want[1:], axis=-1)[None]
        sides = np.concatenate(got, axis=-1)[None], truth.astype(ml_dtypes.bfloat16)
        if self.rounds(sides[0]):
            ours, theirs = (float(metrics.finite(metrics.token_rel_l2(side, truth)).max()) for side in sides)
            tap = next(tap for tap in self.report.taps if tap.tap == "rope")
            tap.port_over_reference = metrics.error_ratio(ours, theirs)

    def _not_best(self, logits: np.ndarray, choice: np.ndarray, k: int) -> int:
        """How many tokens have other experts than k that no other one's logit is above."""
        wrong = np.array([len(set(row)) != k for row in choice.tolist()]) | (choice.shape[1] != k)
        chosen = np.zeros(logits.shape, bool)
        np.put_along_axis(chosen, choice, True, axis=-1)
        least, best = np.where(chosen, logits, np.inf).min(-1), np.where(chosen, -np.inf, logits).max(-1)
        return int(((wrong | (least < best)) & self.prompt.valid.reshape(-1)).sum())

    def rounds(self, computed: np.ndarray) -> bool:
        """Whether the port did compute in bfloat16, when it was asked to."""
        right = computed.dtype == ml_dtypes.bfloat16
        if not right:
            self.report.lacks(f"precision: asked for bfloat16, the port computed in {computed.dtype}: it was not judged")
        return right

    def flips(self, layer: int, taps: Arrays, replayed: Arrays, own: Arrays) -> None:
        """Tokens that the port sends to other experts than the reference does, in the free run.

        Judged is the choice made on the stream in which every earlier choice was the reference's: there the router's
        input is off by noise alone, and a flip is a near-tie or a fault. On the stream of the port's own choices a flip
        changes all that comes after it: those flips are told, each with what it follows from, and not judged.
        """
        sides = replayed, own
        wrong = [(tap, side[tap]) for side in sides for tap in ROUTING if side[tap].size != taps[tap].size]
        if wrong:
            name, got = wrong[0]
            if not any((tap.layer, tap.tap, tap.verdict) == (layer, name, "fail") for tap in self.report.taps):
                self.tap(layer, name, got, taps[name])
            return
        want = [taps[tap] for tap in ROUTING]
        judged, told = (self._flips(*want, *(side[tap].reshape(taps[tap].shape) for tap in ROUTING)) for side in sides)
        twins = {flip["token"]: flip for flip in judged}
        for flip in told:
            twin = twins.get(flip["token"], flip)
            if twin is not flip and (twin["lost"], twin["took"]) == (flip["lost"], flip["took"]):
                flip.update(explained=twin["explained"], follows=None)  # it flips whatever came before
            else:
                follows = self._origin(flip["token"])
                flip.update(explained=flip["explained"] or follows is not None, follows=follows)
        self.report.judged_flips += [{"layer": layer} | flip for flip in judged]
        self.report.flips += [{"layer": layer} | flip for flip in told]
        for flip in told:
            self._parted.setdefault(flip["token"], layer)

    def _origin(self, token: int) -> dict[str, int] | None:
        """The flip that another one follows from: the token's own first, else that of the nearest token before it."""
        if token not in self._parted:
            start = token - token % self.prompt.tokens.shape[1]  # of the token's row
            before = [other for other in self._parted if start <= other < token]
            if not before:
                return None
            token = max(before)
        return {"layer": self._parted[token], "token": token}

    def growth(self, layer: int, want: np.ndarray, got: dict[str, np.ndarray]) -> None:
        """How far the free run's streams have come from the reference's after a layer."""
        worst = {name: _bounded(self.errors(stream, want).max()) for name, stream in got.items()}
        self.report.growth.append({"layer": layer} | worst)

    def free_run(self, truth: np.ndarray, replayed: np.ndarray, own: np.ndarray, **others: np.ndarray) -> None:
        """Logits of the whole model: the gated run with the reference's routing replayed, and those beside it."""
        want, *got = (logits[self.prompt.valid][None] for logits in (truth, replayed, own, *others.values()))
        run: dict[str, Any] = metrics.free_run(want, got[0])
        self.report.token_kl = metrics.finite(metrics.kl(want, got[0])).reshape(-1).tolist()
        run["gate"] = metrics.FREE_RUN_GATE * run["max_logit"]
        run["verdict"] = "ok" if run["max_abs"] <= run["gate"] else "fail"
        for name, logits in zip(("own_routing", *others), got[1:], strict=True):
            run[name] = metrics.free_run(want, logits)
        self.report.free_run = run

    def as_stored(self, truth: np.ndarray, logits: np.ndarray | None) -> None:
        """Logits of the port's own values, where they are others by design or by training."""
        if logits is not None:
            self.report.as_stored = metrics.free_run(*(np.asarray(a)[self.prompt.valid][None] for a in (truth, logits)))

    def amplified(self, moved: Moved) -> None:
        """The free run again, where the model makes more of rounding than most: by how much the reference itself is moved."""
        run = self.report.free_run
        assert run is not None
        run["amplified"] = float(moved.logits[self.prompt.valid].max())
        run["gate"] = max(run["gate"], metrics.TIMES * run["amplified"])
        run["verdict"] = "ok" if run["max_abs"] <= run["gate"] else "fail"
        if run["gate"] >= run["max_logit"] and run["max_abs"] > metrics.FREE_RUN_GATE * run["max_logit"]:
            run["verdict"] = "incomplete"
            self.report.lacks("free run: rounding alone moves PyTorch's own logits by a tenth and more")
        for flip in (*self.report.judged_flips, *self.report.flips):
            flip["explained"] |= flip["margin"] <= metrics.TIMES * float(moved.routing[flip["layer"], flip["token"]])

    def errors(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """Relative L2 of each token of the prompt, [batch, length]; padding counts as right."""
        batch, length = self.prompt.tokens.shape
        copies = len(want.reshape(-1, length, *want.shape[2:])) // batch if want.ndim > 2 else 1
        shape = (batch * copies, length, -1)
        relative = metrics.token_rel_l2(got.reshape(shape), want.reshape(shape))
        return np.where(np.tile(self.prompt.valid, (copies, 1)), relative, 0.0)

    def _spread(self, got: np.ndarray, want: np.ndarray) -> float:
        """Relative L2 of all tokens together."""
        rows = self.prompt.valid.reshape(-1)
        got, want = (a.reshape(len(rows), -1)[rows] for a in (got, want))
        return min(metrics.rel_l2(got, want), metrics.WORST)

    def _flips(self, *routing: np.ndarray) -> list[dict[str, Any]]:
        return [flip for flip in metrics.flips(*routing) if self.prompt.valid.reshape(-1)[flip["token"]]]

    def _add(self, *result: Any) -> None:
        self.report.taps.append(TapResult(*result))


def _bounded(error: np.floating) -> float:
    return float(min(error, metrics.WORST))


def _which_tokens(bad: np.ndarray) -> str:
    """Which places of the prompt are wrong, as a person would say it: [length] bool."""
    wrong = np.flatnonzero(bad)
    if len(wrong) == len(bad):
        return "all tokens"
    if bad[wrong[0] :].all():
        return f"only tokens >= {wrong[0]}"
    return f"{len(wrong)} of {counted(len(bad), 'token')}, first {wrong[0]}"
