"""What people read in a terminal: lines that its width takes, verdicts in colour. Anywhere else text is what it was."""

import importlib.util
import io
import os
import re
import sys
import textwrap
from typing import TextIO

INDENT = " " * 10  # of what a line goes on with: behind the label that most lines begin with
_GREEN, _RED, _YELLOW = 32, 31, 33
_VERDICTS = {
    **dict.fromkeys(("ok", "PASS", "better"), _GREEN),
    **dict.fromkeys(("FAIL", "MISSED", "MISLOCATED", "ALARM", "worse", "error"), _RED),
    **dict.fromkeys(("incomplete", "INCOMPLETE", "not named", "warn", "warning"), _YELLOW),
}
# As a field of its own, or the first word of one: two spaces part fields.
_VERDICT = re.compile(rf"(?:^|(?<=  )|(?<=-> ))({'|'.join(_VERDICTS)})(?=  | x\d| ->|:|$)", re.MULTILINE)
_FIELD = re.compile(r"\S+(?: \S+)+")


def counted(number: int, noun: str) -> str:
    """`1 tap`, `2 taps`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def columns(stream: TextIO | io.TextIOBase) -> int | None:
    """How wide the terminal is; None where `stream` is none."""
    return os.get_terminal_size(stream.fileno()).columns or 80 if stream.isatty() else None


def takes_bars(stream: TextIO | io.TextIOBase) -> bool:
    """Whether rich draws progress there: `stream` is a terminal, or this is a notebook that has widgets."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return stream.isatty() or (hasattr(shell, "kernel") and importlib.util.find_spec("ipywidgets") is not None)


def shown(text: str, stream: TextIO | io.TextIOBase) -> str:
    """`text`, as it is printed to `stream`."""
    width = columns(stream)
    if width is None:
        return text
    text = fit(text, width)
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return _VERDICT.sub(lambda found: f"\033[{_VERDICTS[found[1]]}m{found[1]}\033[0m", text)


def fit(text: str, width: int) -> str:
    """Longer lines are broken: between fields where these fit, else between words. A word, such as a path, stays whole."""
    return "\n".join(part for line in text.splitlines() for part in _broken(line, width))


def _broken(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    room = width - len(INDENT)
    whole = _FIELD.sub(lambda found: found[0].replace(" ", "\0") if len(found[0]) <= room else found[0], line)
    parts = textwrap.wrap(whole, width, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False)
    return [part.replace("\0", " ") for part in parts]
