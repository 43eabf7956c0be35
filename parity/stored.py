"""Which of two checkpoints is the reference; and two that PyTorch reads neither of, whose bytes alone can be compared."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from oss_model import layouts
from oss_model.buckets import GsPath
from oss_model.memory import peak_rss
from oss_model.params import is_orbax
from oss_model.shards import Checkpoint, Shards
from parity import configs, metrics
from parity.candidate import Candidate
from parity.protocols import Oracle
from parity.recording import Recording
from parity.reports.report import STORED, Report, Weight
from parity.weights import count_apart, is_expected

EXPERTS = tuple(f".mlp.{linear}.{leaf}" for linear in ("gate_up", "down") for leaf in ("weight", "blocks", "scales"))


def arranged(source: Path, checkpoint: Path) -> tuple[Path, Path]:
    """(reference, candidate): the reference is safetensors, which PyTorch reads, where either is."""
    if is_orbax(source) and not is_orbax(checkpoint) and any(checkpoint.glob("*.safetensors")):
        return checkpoint, source
    return source, checkpoint


def layout_faults(source: Path) -> list[str]:
    """A line for safetensors that transformers does not load, or would load wrongly."""
    if isinstance(source, GsPath) and not is_orbax(source):
        return [f"{source}: expected safetensors on a disk, where PyTorch reads them, found a bucket; `gcloud storage cp -r`"]
    layout = None if is_orbax(source) else layouts.recognise(Shards(source).signature())
    if layout is None or not layout.foreign:
        return []
    return [
        f"{source}: expected a layout that transformers loads, found {layout.title}; convert-oss {source} OUT --to hf-bf16 "
        "makes one with the same values: give that as SRC"
    ]


def holds_values(source: "Path | Oracle") -> bool:
    """Whether the reference's experts are values: those of the other side are decoded then, if they are packed."""
    if isinstance(source, Path):
        return not Checkpoint(source, ignore=None).layout.packed
    return isinstance(source, Recording) and not any(name.endswith(".blocks") for name in source.manifest["parameters"])


def compare_stored(
    source: Path,
    checkpoint: Path,
    *,
    seed: int = 0,
    expect_changed: Sequence[str] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Report:
    """The stored bytes of two Orbax checkpoints, a parameter at a time; the report is incomplete at the best."""
    start = time.monotonic()
    want, got = Candidate(source), Candidate(checkpoint)
    report = Report(str(source), str(checkpoint), configs.title(want.sizes, want.settings)[0], 0, seed, oracle=STORED)
    report.configs = configs.differences(got.settings, want.settings)
    names = list(dict.fromkeys((*want.stored, *got.stored)))
    if (want.cfg.param_dtype == "mxfp4") != (got.cfg.param_dtype == "mxfp4"):
        report.lacks("experts are packed in one and values in the other: they were not compared")
        names = [name for name in names if not name.endswith(EXPERTS)]
    for done, name in enumerate(names):
        progress(done, len(names), name)
        sides = want.stored.get(name), got.stored.get(name)
        if sides[0] is None or sides[1] is None:
            note = "missing in the checkpoint" if sides[1] is None else "unexpected: the source has no such parameter"
            report.weights.append(Weight(name, note))
        elif sides[0] != sides[1]:
            right, found = (f"{side[1]}{list(side[0])}" for side in (sides[0], sides[1]))
            report.weights.append(Weight(name, f"{found}, should be {right}"))
        else:
            right, found = (side.restore([name])[name] for side in (want, got))
            report.weights.append(_compared(name, right, found, expect_changed))
    report.lacks(
        "neither is safetensors, which PyTorch reads: stored bytes alone were compared; give the safetensors as one of the two"
    )
    report.seconds, report.peak_rss_bytes = time.monotonic() - start, peak_rss()
    return report


def _compared(name: str, want: np.ndarray, got: np.ndarray, expect_changed: Sequence[str]) -> Weight:
    apart = count_apart(want, got)
    if not apart:
        return Weight(name)
    moved = metrics.rel_l2(got, want) if want.dtype != np.uint8 else float("nan")
    return (
        Weight(name, moved=moved)
        if is_expected(name, expect_changed)
        else Weight(name, f"{apart} of {want.size} values differ")
    )
