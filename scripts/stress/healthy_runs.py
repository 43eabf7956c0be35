#!/usr/bin/env python
"""Right ports must not be alarmed about: check-parity over seeds, layouts, stored dtypes and ways to compute experts.

    .venv/bin/python scripts/stress/healthy_runs.py --runs 120

Every run has weights, a layout, a prompt and a path of its own, some of them legal and far from usual; half have the precision
arm, every eleventh the run forms that `--layers` has by default, every 99th all of them. Prints the largest of each number
that is judged, over its bound, and how many runs did not pass; exits 1 if any did not.
"""

import argparse
import dataclasses
import itertools
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch
import transformers
from safetensors.torch import load_file, save_file

from converter import convert
from oss_model import ModelConfig
from oss_model.synthetic import write_checkpoint
from parity import Report, compare, metrics
from parity.candidate import Candidate

LAYOUTS = (("hf", "bfloat16"), ("hf-bf16", "float32"), ("openai", "mxfp4"))
PATHS: tuple[dict[str, Any], ...] = (
    {},
    {"expert_path": "scan"},
    {"expert_path": "grouped"},
    {"expert_path": "pairs"},
    {"expert_path": "ragged"},
    {"compiled": True},
)
DTYPES = ("float32", "bfloat16")
# Legal, and far from what is drawn: (of the configuration, of the tensors of a Hugging Face checkpoint whose name matches).
Edit = tuple[str, Callable[[torch.Tensor], torch.Tensor]]
EXTREMES: dict[str, tuple[dict[str, Any], tuple[Edit, ...]]] = {
    "as drawn": ({}, ()),
    "all layers full": ({"layer_types": ("full_attention",) * 5}, ()),
    "all layers sliding": ({"layer_types": ("sliding_attention",) * 5}, ()),
    "one expert a token": ({"num_experts_per_tok": 1}, ()),
    "every expert for every token": ({"num_experts_per_tok": 9}, ()),
    "very sharp attention": ({}, ((r".*q_proj.*", lambda t: t * 100),)),
    "large norms": ({}, ((r".*layernorm.weight", lambda t: t * 10),)),
    "a massive channel": ({}, ((r".*embed_tokens.*", lambda t: torch.cat([t[:, :1] * 1e4, t[:, 1:]], 1)),)),
    "experts never chosen": ({}, ((r".*router.bias", lambda t: torch.cat([t[:-3], t[-3:] - 1e3])),)),
    "near-ties": ({}, ((r".*router.weight", lambda t: t.round(decimals=1) / 8),)),
}


def edited(source: Path, edits: tuple[Edit, ...]) -> None:
    for file in source.glob("*.safetensors") if edits else ():
        tensors = load_file(file)
        for pattern, change in edits:
            for name in tensors:
                if re.fullmatch(pattern, name):
                    tensors[name] = change(tensors[name].float()).to(tensors[name].dtype).contiguous()
        save_file(tensors, file, {"format": "pt"})


def forms_of(run: int) -> str:
    return "all" if run % 99 == 98 else "default" if run % 11 == 10 else "none"  # not in step with EXTREMES


def judged(report: Report) -> dict[str, float]:
    """What is held to a bound, over the bound."""
    assert report.free_run is not None
    ratios = [tap.port_over_reference for tap in report.taps if tap.port_over_reference is not None]
    taps = {tap.tap: tap for tap in report.taps}
    found = {
        "semantics": max(tap.worst_token_rel_l2 / tap.gate for tap in report.taps if tap.tap != "rope"),
        "rope": taps["rope"].worst_token_rel_l2 / metrics.ROPE_GATE,
        "free run": report.free_run["max_abs"] / report.free_run["gate"],
    }
    return found | ({"precision": max(ratios) / metrics.PRECISION_FAIL} if ratios else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=120)
    parser.add_argument("--first", type=int, default=0, help="the number of the first: each has its own seed")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.runs)
    transformers.logging.set_verbosity_error()
    kinds = list(itertools.product(LAYOUTS, PATHS, DTYPES))
    largest: dict[str, float] = {}
    alarms = flips = forms = unknowable = 0
    with tempfile.TemporaryDirectory() as scratch:
        for run in numbers:
            (layout, stored), path, dtype = kinds[run % len(kinds)]
            name, (changes, edits) = list(EXTREMES.items())[run % len(EXTREMES)]
            layout = "hf" if edits or "layer_types" in changes else layout  # OpenAI's configurations have one pattern
            source, checkpoint = Path(scratch) / f"source-{run}", Path(scratch) / f"checkpoint-{run}"
            write_checkpoint(source, dataclasses.replace(ModelConfig.tiny(), **changes), seed=run, layout=layout)
            edited(source, edits)
            convert(source, checkpoint, stored)
            port = Candidate(checkpoint, source=source, **path)
            report = compare(source, port, dtype=dtype, seed=run, forms=forms_of(run))
            for what, ratio in judged(report).items():
                largest[what] = max(largest.get(what, 0.0), ratio)
            shutil.rmtree(source)
            shutil.rmtree(checkpoint)
            if run % 20 == 0:
                jax.clear_caches()  # a process may map 65,530 pieces of memory, and what is compiled takes many
            flips += len(report.flips)
            forms += len(report.forms)
            known = report.verdict == "incomplete" and all("rounding alone" in why for why in report.incomplete)
            unknowable += known
            if report.verdict != "pass" and not known:
                alarms += 1
                print(f"run {run}: {name}, {layout} {stored} {path} {dtype}\n{report.table()}", flush=True)
    for name, ratio in largest.items():
        print(f"{name:<10} at most {ratio:.3f} of its bound")
    print(f"{len(numbers)} healthy runs, {forms} forms, {flips} expert flips, {alarms} false alarms")
    print(f"{unknowable} incomplete, since rounding alone moves PyTorch itself by a tenth and more")
    return int(alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
