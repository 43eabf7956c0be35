"""The report as a table of about a screen."""

import itertools
import textwrap
from collections.abc import Iterator

from oss_model.taps import LAYER_TAPS
from oss_model.terminal import INDENT, fit
from parity.reports.report import Report, TapResult
from parity.reports.sections import sections

_HEAD = ("layer", "tap", "worst token", "port/ref", "verdict", "note")
_LEAST = 20  # columns that a note is read in; where there are fewer, it has lines of its own


def table(report: Report, width: int | None = None) -> str:
    """
    Args:
      width: of the terminal; None: lines are as long as they need.
    """
    text = "\n".join(_lines(report, width))
    return text if width is None else fit(text, width)


def _lines(report: Report, width: int | None) -> Iterator[str]:
    device = f"   computed on {report.device}" if report.device else ""
    arms = "check-parity --layers" if report.layers else "check-parity"
    yield f"{arms}   {report.model}   {report.tokens} tokens   oracle: {report.oracle}{device}"
    for section in sections(report):
        yield from _aligned([_HEAD, *_rows(report)], width) if section.name == "taps" else section.table
    yield f"{report.verdict.upper()}   {report.seconds:.1f} s   peak memory {report.peak_rss_bytes / 2**30:.1f} GiB"


def _aligned(rows: list[tuple[str, ...]], width: int | None) -> Iterator[str]:
    """A column is as wide as what is in it, and left out where nothing is. Taps, then notes, take what is left of `width`."""
    used = [n for n in range(len(_HEAD) - 1) if any(row[n] for row in rows[1:])]
    widths = [max(len(row[n]) for row in rows) for n in used]
    widths[0] = len(INDENT) - 2
    if width is not None:
        widths[1] = max(len(_HEAD[1]), min(widths[1], width - sum(widths) + widths[1] - 2 * (len(widths) - 1)))
    before = sum(widths) + 2 * len(widths)
    beside = width is None or width - before >= _LEAST
    for row in rows:
        cells = [textwrap.wrap(row[n], size, break_on_hyphens=False) for n, size in zip(used, widths, strict=True)]
        note = [row[-1]] if width is None else textwrap.wrap(row[-1], width - (before if beside else len(INDENT)))
        for line in itertools.zip_longest(*cells, note if beside else [], fillvalue=""):
            yield "  ".join(f"{cell:<{size}}" for cell, size in zip(line, [*widths, 0], strict=True)).rstrip()
        if not beside and row is not rows[0]:
            yield from (f"{INDENT}{line}" for line in note)


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Consecutive layers that are healthy throughout fold into one row, and so do healthy taps of a bad layer."""
    by_layer = [(layer, list(taps)) for layer, taps in itertools.groupby(report.taps, key=lambda tap: tap.layer)]
    first = next((tap for tap in report.taps if tap.verdict == "fail"), None)
    for folded, stretch in itertools.groupby(by_layer, key=lambda item: item[0] is not None and _healthy(item[1])):
        if folded:
            layers = list(stretch)
            yield _row(_span([layer for layer, _ in layers]), [tap for _, taps in layers for tap in taps])
            continue
        for layer, taps in stretch:
            for healthy, group in itertools.groupby(taps, key=lambda tap: tap.verdict == "ok"):
                members = list(group)
                for row in [members] if healthy else [[tap] for tap in members]:
                    yield _row("model" if layer is None else str(layer), row, row[0] is first)


def _row(layer: str, taps: list[TapResult], first: bool = False) -> tuple[str, ...]:
    worst = max(taps, key=lambda tap: tap.worst_token_rel_l2)
    names = list(dict.fromkeys(tap.tap for tap in taps))
    everything = set(names) >= set(LAYER_TAPS)
    ratios = [tap.port_over_reference for tap in taps if tap.port_over_reference is not None]
    ratio = f"{max(ratios):.2f}" if ratios else ""
    tap = f"all {len(names)} taps" if everything else names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
    notes = dict.fromkeys(tap.note for tap in taps if tap.note)
    verdict = worst.verdict.replace("fail", "FAIL")
    times = f" x{len(taps)}" if len(taps) > 1 else ""
    note = "; ".join(notes)
    note = ("<- first   " if first else "") + (note if len(note) <= 60 else f"{note[:57]}...")
    return layer, tap, f"{worst.worst_token_rel_l2:.1e}", ratio, verdict + times, note.rstrip()


def _healthy(taps: list[TapResult]) -> bool:
    return all(tap.verdict == "ok" for tap in taps)


def _span(layers: list[int | None]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
