"""The report as a table of about a screen."""

import itertools
from collections.abc import Iterator

from oss_model.taps import LAYER_TAPS
from parity.reports.report import Report, TapResult
from parity.reports.sections import sections

_COLUMNS = "{:<9} {:<18} {:<12} {:<15} {:<36} {}"


def table(report: Report) -> str:
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    device = f"   computed on {report.device}" if report.device else ""
    arms = "check-parity --layers" if report.layers else "check-parity"
    yield f"{arms}   {report.model}   {report.tokens} tokens   oracle: {report.oracle}{device}"
    for section in sections(report):
        yield from _taps(report) if section.name == "taps" else section.table
    yield f"{report.verdict.upper()}   {report.seconds:.1f} s   peak memory {report.peak_rss_bytes / 2**30:.1f} GiB"


def _taps(report: Report) -> Iterator[str]:
    """Consecutive layers that are healthy throughout fold into one row, and so do healthy taps of a bad layer."""
    yield _COLUMNS.format("layer", "tap", "worst token", "port/reference", "note", "verdict")
    by_layer = [(layer, list(taps)) for layer, taps in itertools.groupby(report.taps, key=lambda tap: tap.layer)]
    marked = False
    for folded, stretch in itertools.groupby(by_layer, key=lambda item: item[0] is not None and _healthy(item[1])):
        if folded:
            layers = list(stretch)
            yield _row(_span([layer for layer, _ in layers]), [tap for _, taps in layers for tap in taps])
            continue
        for layer, taps in stretch:
            for healthy, group in itertools.groupby(taps, key=lambda tap: tap.verdict == "ok"):
                members = list(group)
                for row in [members] if healthy else [[tap] for tap in members]:
                    first = not marked and row[0].verdict == "fail"
                    marked = marked or first
                    yield _row("model" if layer is None else str(layer), row) + ("  <- first" if first else "")


def _row(layer: str, taps: list[TapResult]) -> str:
    worst = max(taps, key=lambda tap: tap.worst_token_rel_l2)
    names = list(dict.fromkeys(tap.tap for tap in taps))
    everything = set(names) >= set(LAYER_TAPS)
    ratios = [tap.port_over_reference for tap in taps if tap.port_over_reference is not None]
    ratio = f"{max(ratios):.2f}" if ratios else ""
    tap = f"all {len(names)} taps" if everything else names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
    notes = dict.fromkeys(tap.note for tap in taps if tap.note)
    verdict = "ok" if worst.verdict == "ok" else worst.verdict.upper() if worst.verdict == "fail" else worst.verdict
    times = f" x{len(taps)}" if len(taps) > 1 else ""
    note = "; ".join(notes)
    note = note if len(note) <= 60 else f"{note[:57]}..."
    return _COLUMNS.format(layer, tap, f"{worst.worst_token_rel_l2:.1e}", ratio, note, verdict + times)


def _healthy(taps: list[TapResult]) -> bool:
    return all(tap.verdict == "ok" for tap in taps)


def _span(layers: list[int | None]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
