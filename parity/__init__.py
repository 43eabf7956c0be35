"""Is a converted or ported gpt-oss right, and if not, where does it first go wrong?"""

from typing import TYPE_CHECKING

from oss_model.lazy import importing

if TYPE_CHECKING:
    from parity.comparison import compare
    from parity.reports.report import Report

__all__ = ["Report", "compare"]

_HOME = {"compare": "comparison", "Report": "reports.report"}


__getattr__ = importing(__name__, _HOME)
