"""Is a converted or ported gpt-oss right, and if not, where does it first go wrong?"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity.comparison import compare
    from parity.reports.report import Report

__all__ = ["Report", "compare"]

_HOME = {"compare": "comparison", "Report": "reports.report"}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
