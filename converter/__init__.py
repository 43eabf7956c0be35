"""From a gpt-oss safetensors checkpoint to an Orbax one."""

from typing import TYPE_CHECKING

from oss_model.lazy import importing

if TYPE_CHECKING:
    from converter.conversion import Result, convert

# Imported on first use, so that the command line starts without NumPy.
_HOME = {"Result": "conversion", "convert": "conversion"}

__all__ = ["Result", "convert"]


__getattr__ = importing(__name__, _HOME)
