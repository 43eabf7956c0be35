#!/usr/bin/env python
"""Right ports must not be alarmed about: check-parity over seeds, layouts, stored dtypes and ways to compute experts.

    .venv/bin/python scripts/stress/healthy_runs.py --runs 120

Every run has weights, a layout, a prompt and a path of its own; half have the precision arm. Prints the largest of each
number that is judged, over its bound, and how many runs did not pass; exits 1 if any did not.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers

from converter import convert
from oss_model import ModelConfig
from oss_model.synthetic import write_checkpoint
from parity import Report, compare, metrics
from parity.candidate import Candidate

LAYOUTS = (("hf", "bfloat16"), ("hf-bf16", "float32"), ("openai", "mxfp4"))
PATHS: tuple[dict[str, Any], ...] = (
    {},
    {"expert_path": "scan"},
    {"expert_path": "pairs"},
    {"expert_path": "ragged"},
    {"compiled": True},
)
DTYPES = ("float32", "bfloat16")


def judged(report: Report) -> dict[str, float]:
    """What is held to a bound, over the bound."""
    assert report.free_run is not None
    ratios = [tap.port_over_reference for tap in report.taps if tap.port_over_reference is not None]
    taps = {tap.tap: tap for tap in report.taps}
    found = {
        "semantics": max(tap.worst_token_rel_l2 for tap in report.taps if tap.tap != "rope") / metrics.SEMANTICS_GATE,
        "rope": taps["rope"].worst_token_rel_l2 / metrics.ROPE_GATE,
        "free run": report.free_run["max_abs"] / report.free_run["gate"],
    }
    return found | ({"precision": max(ratios) / metrics.PRECISION_FAIL} if ratios else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=120)
    runs = parser.parse_args().runs
    transformers.logging.set_verbosity_error()
    kinds = list(itertools.product(LAYOUTS, PATHS, DTYPES))
    largest: dict[str, float] = {}
    alarms = flips = 0
    with tempfile.TemporaryDirectory() as scratch:
        for run in range(runs):
            (layout, stored), path, dtype = kinds[run % len(kinds)]
            source, checkpoint = Path(scratch) / f"source-{run}", Path(scratch) / f"checkpoint-{run}"
            write_checkpoint(source, ModelConfig.tiny(), seed=run, layout=layout)
            convert(source, checkpoint, stored)
            report = compare(source, Candidate(checkpoint, **path), dtype=dtype, seed=run)
            for name, ratio in judged(report).items():
                largest[name] = max(largest.get(name, 0.0), ratio)
            flips += len(report.flips)
            if report.verdict != "pass":
                alarms += 1
                print(f"run {run}: {layout} {stored} {path} {dtype}\n{report.table()}", flush=True)
    for name, ratio in largest.items():
        print(f"{name:<10} at most {ratio:.3f} of its bound")
    print(f"{runs} healthy runs, {flips} expert flips, {alarms} false alarms")
    return int(alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
