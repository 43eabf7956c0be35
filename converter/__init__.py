"""gpt-oss checkpoints from one form to another: safetensors to Orbax, and the way back."""

from typing import TYPE_CHECKING

from oss_model.lazy import importing

if TYPE_CHECKING:
    from converter.conversion import Result, convert
    from converter.progress import progress_bar

# Imported on first use, so that the command line starts without NumPy.
_HOME = {"Result": "conversion", "convert": "conversion", "progress_bar": "progress"}

__all__ = ["Result", "convert", "progress_bar"]


__getattr__ = importing(__name__, _HOME)
