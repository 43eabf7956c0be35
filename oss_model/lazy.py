"""Names of a package that are imported on first use, so that command lines start without what they do not need."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def importing(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`: name -> the module below the package that has it."""

    def find(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("convert-oss")
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return find
