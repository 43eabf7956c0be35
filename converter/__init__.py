"""From a gpt-oss safetensors checkpoint to an Orbax one."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converter.conversion import Result, convert

# Imported on first use, so that the command line starts without NumPy.
_HOME = {"Result": "conversion", "convert": "conversion"}

__all__ = ["Result", "convert"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
