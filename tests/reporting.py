"""Reports that no comparison made: one of a right model, and one of every kind of fault."""

from oss_model.taps import LAYER_TAPS
from parity.reports.report import Report, TapResult, Weight

FOLLOWS = {131: {"layer": 16, "token": 131}, 132: {"layer": 16, "token": 131}}  # token of a flip -> the flip it follows from
RUN = {"max_abs": 9.1e-6, "max_logit": 4.1, "kl_mean": 1e-12, "kl_p95": 3e-12, "kl_max": 4e-12, "top1": 1.0}


def healthy_report() -> Report:
    report = Report("gpt-oss", "gpt-oss-orbax", "gpt-oss, 24 layers", 320, 0, True, peak_rss_bytes=2**31, seconds=12.5)
    report.weights = [Weight("embedding.weight"), *(Weight(f"layers.{n}.attn.sinks") for n in range(24))]
    report.taps = [TapResult(None, "rope", 2.3e-7, 1e-6, "ok", "cos and sin up to position 32767")]
    report.taps += [TapResult(n, name, 4e-7, 1e-5, "ok") for n in range(24) for name in LAYER_TAPS]
    report.taps += [TapResult(None, name, 3e-7, 1e-5, "ok") for name in ("final_norm", "logits")]
    report.free_run = RUN | {"gate": 2e-4, "verdict": "ok", "own_routing": dict(RUN)}
    report.growth = [{"layer": n, "replayed": 1e-6 * (n + 1), "own": 1e-6 * (n + 1)} for n in range(24)]
    report.token_kl = [1e-12, 0.0, -1e-17, 3e-12] * 80
    return report


def broken_report() -> Report:
    """Of every kind of fault one, and more flips than are shown at once."""
    healthy = healthy_report()
    taps = {(tap.layer, tap.tap): i for i, tap in enumerate(healthy.taps)}
    healthy.taps[taps[16, "attn_core"]] = TapResult(16, "attn_core", 0.31, 1.2, "fail", "only tokens >= 128", 5.25)
    healthy.taps[taps[18, "attn_core"]] = TapResult(18, "attn_core", 1e9, 1e9, "fail", "all tokens")
    healthy.taps[taps[20, "q"]] = TapResult(20, "q", 1.0, 0.0, "incomplete", "the candidate has no such tap")
    healthy.weights[7] = Weight("layers.6.attn.sinks", "1 of 64 values differ, first at [3], by at most 0.0312")
    healthy.free_run |= {"verdict": "fail", "max_abs": 2.5}
    healthy.growth[20]["own"] = 1e9
    flip = {"layer": 17, "lost": [2, 6], "took": [0, 3], "margin": 1e-7}
    healthy.judged_flips = [flip | {"token": t, "explained": t != 130} for t in (128, 130)]
    healthy.flips = [flip | {"token": t, "explained": True, "follows": FOLLOWS.get(t)} for t in range(128, 167)]
    healthy.flips += [flip | {"token": 167, "explained": False, "follows": None}]
    healthy.diagnosis = {
        "cause": "code",
        "fault": "the sliding window is 129, should be 128",
        "name": "window-one-long",
        "layer": 16,
        "tap": "attn_core",
        "residual_before": 0.31,
        "residual_after": 4e-6,
        "fix": "a query sees `window` keys, itself included",
        "others": [],
        "forms": [],
    }
    healthy.incomplete = ["one reason", "another reason"]
    return healthy
