"""Is a converted or ported gpt-oss right, and if not, where does it first go wrong?"""

from typing import TYPE_CHECKING

from oss_model.lazy import importing

if TYPE_CHECKING:
    from parity.comparison import compare
    from parity.progress import progress_bar
    from parity.reports.report import Report

__all__ = ["Report", "compare", "progress_bar"]

_HOME = {"compare": "comparison", "Report": "reports.report", "progress_bar": "progress"}


__getattr__ = importing(__name__, _HOME)
