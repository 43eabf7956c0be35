"""The weights arm: every parameter as stored against the reference's bytes, and what the port loads against what is stored."""

import math
import re
from collections.abc import Sequence

import numpy as np

from parity import metrics
from parity.design import Design
from parity.mistakes.diagnosis import Diagnosis
from parity.mistakes.parameters import Parameters
from parity.protocols import Expected, Port, SupportsCalls
from parity.recording import digest
from parity.reports.report import Report, Weight

UNFIT = "the parameters do not fit the reference, so nothing was computed from there on"


class Weights:
    """
    Args:
      expect_changed: regular expressions, each matched against whole names of parameters that were trained.
      design: by what rule values may be others, if by any.
    """

    def __init__(
        self, port: Port, report: Report, diagnosis: Diagnosis, expect_changed: Sequence[str], design: Design | None = None
    ):
        self.port, self.report, self.diagnosis = port, report, diagnosis
        self.expect_changed, self.design = expect_changed, design

    def compare(self, parameters: Parameters) -> bool:
        """Compare parameters as stored; False if one is missing or of another shape, so that nothing can be computed.

        What the port then loads must be those bytes. In what it goes by, those that are wrong are put right.
        """
        expected = {one.name: one for one in parameters.expected()} if self.port.stored else {}
        fitting = [name for name, one in expected.items() if self.port.stored.get(name, (None,))[0] == one.shape]
        stored, wrong, digests = parameters.restore(fitting), [], {}
        for name, one in expected.items():
            if name in stored:
                weight = Weight(name, one.differs(stored[name]))
                self.report.weights.append(weight)
                if weight.note:
                    wrong.append(one)
                    by_rule = self.design.moved(one, stored[name]) if self.design else None
                    if by_rule is not None:
                        weight.note, (weight.rule, weight.moved) = "", by_rule
                    elif is_expected(name, self.expect_changed):
                        weight.note, weight.moved = "", _moved(one, stored[name])
                    else:
                        self.diagnosis.parameter(one, stored[name], parameters)
                if self.port.can.calls is not None:
                    digests[name] = digest(stored.pop(name))
            else:
                found = self.port.stored.get(name)
                missing = "missing in the checkpoint"
                note = missing if found is None else f"shape {list(found[0])}, should be {list(one.shape)}"
                self.report.weights.append(Weight(name, note))
        if len(fitting) < len(expected):
            self.report.lacks(UNFIT)
            return False
        del stored
        if self.port.can.calls is not None and digests:
            self._loaded(self.port.can.calls, digests)
            for one in wrong:
                if one.value is not None:
                    self.port.can.calls.replace(one.name, one.value()[:])
                    self.report.righted.append(one.name)
        return True

    def _loaded(self, calls: SupportsCalls, digests: dict[str, str]) -> None:
        """Whether what the calls go by is what is stored."""
        for name in digests:
            got = calls.loaded([name]).get(name)
            self.report.loaded += 1
            if got is None:
                self.report.loading.append(Weight(name, "was not loaded"))
            elif digest(got) != digests[name]:
                self.report.loading.append(Weight(name, told_apart(self.port.restore([name])[name], got)))


def unmatched(patterns: Sequence[str], port: Port) -> list[str]:
    """A line for each pattern of `expect_changed` that matches no parameter."""
    faults = []
    for pattern in patterns:
        try:
            if not any(re.fullmatch(pattern, name) for name in port.stored):
                faults.append(
                    f"--expect-changed {pattern!r}: expected to match a parameter such as norm.scale, found none that it does"
                )
        except re.error as e:
            faults.append(f"--expect-changed {pattern!r}: expected a regular expression, found one that is not ({e})")
    return faults


def is_expected(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def count_apart(want: np.ndarray, got: np.ndarray) -> int:
    """How many values of two arrays of the same shape and dtype differ, bit for bit."""
    return int((got.view(np.uint8).reshape(got.size, -1) != want.view(np.uint8).reshape(want.size, -1)).any(-1).sum())


def _moved(expected: Expected, got: np.ndarray) -> float:
    """How far a parameter is from what it was, relative L2; NaN where that is not known."""
    if expected.value is None or got.dtype == np.uint8:
        return math.nan
    return metrics.rel_l2(got, np.asarray(expected.value()[:]))


def told_apart(want: np.ndarray, got: np.ndarray) -> str:
    """How what was loaded is not what is stored."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"loaded as {got.dtype}{list(got.shape)}, stored as {want.dtype}{list(want.shape)}"
    zero = ", all of them zero" if not got.view(np.uint8).any() else ""
    return f"{count_apart(want, got)} of {want.size} values are not those that are stored{zero}"
