"""What is printed fits the terminal, whose verdicts are in colour; elsewhere it is what it was."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

from oss_model.terminal import columns, fit, shown, takes_bars

ROOT = Path(__file__).parent.parent
PRINT = """
import sys
import reporting
from oss_model.terminal import columns, shown
print(shown(reporting.broken_report().table(columns(sys.stdout)), sys.stdout))
"""
COLOUR = re.compile(r"\033\[\d+m")


def in_terminal(command: list[str], width: int, **environment: str) -> list[str]:
    """What a command writes to a terminal of so many columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    env |= {"TERM": "xterm-256color", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | environment
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    written = b""
    try:
        while data := os.read(ours, 65536):
            written += data
    except OSError:  # at the end, on Linux
        pass
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_parity_table_in_a_terminal(width):
    lines = in_terminal([sys.executable, "-c", PRINT], width)
    plain = [COLOUR.sub("", line) for line in lines]
    assert max(map(len, plain)) <= width
    assert any("\033[31mFAIL\033[0m" in line for line in lines)
    assert any("\033[32mok\033[0m x14" in line for line in lines)
    assert any("\033[33mincomplete\033[0m" in line for line in lines)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_no_colour_gets_none(environment):
    lines = in_terminal([sys.executable, "-c", PRINT], 80, **environment)
    assert not any("\033" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_what_is_no_terminal_gets_the_text_itself(tmp_path):
    text = f"weights   1/2   FAIL\n{'word ' * 50}"
    with (tmp_path / "file").open("w") as file:
        assert columns(file) is None
        assert shown(text, file) == text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_lines_are_broken_between_fields_else_between_words(width):
    path = f"/a/{'long' * 60}/path"
    text = f"free run  routing replayed   worst 1.0e-06 of 4   KL 1e-12 mean   ok\n  to do: {'read this ' * 9}\n{path}: no"
    lines = fit(text, width).splitlines()
    assert [line.strip() for line in lines if len(line) > width] == [path + ":"]  # it can be copied
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert any("worst 1.0e-06 of 4" in line for line in lines)
    assert width != 40 or lines[:2] == ["free run  routing replayed", "          worst 1.0e-06 of 4"]


@pytest.mark.parametrize("text", ["nothing is ok", "ok, or so", "PASSED", "a   okay", "not FAIL"])
def test_only_verdicts_are_in_colour(text, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    ours, its = pty.openpty()
    with open(ours), open(its, "w") as terminal:
        assert columns(terminal) == 80  # it has not been told
        assert shown(text, terminal) == text
        assert shown("PASS -> FAIL\nwhat   ok x2\nFAIL: it", terminal).count("\033[0m") == 4


@pytest.mark.parametrize(
    ("shell", "widgets", "bars"),
    [(None, True, False), ("python", True, False), ("kernel", True, True), ("kernel", False, False)],
)
def test_a_notebook_with_widgets_takes_bars(tmp_path, monkeypatch, shell, widgets, bars):
    """As rich does it, which needs ipywidgets; a shell without a kernel is IPython in a terminal."""
    if shell is not None:
        interactive = SimpleNamespace(**{shell: None})
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: interactive))
    monkeypatch.setitem(sys.modules, "ipywidgets", SimpleNamespace(__spec__="there") if widgets else None)
    with (tmp_path / "file").open("w") as file:
        assert takes_bars(file) == bars


BARS = """
from converter import progress_bar
from converter.progress import Progress
with progress_bar() as show:
    show(Progress("converting", 14_100_000_000, 41_800_000_000, 280, 411))
"""


@pytest.mark.parametrize("width", [60, 76, 80])
def test_a_bar_is_a_line_and_loses_no_figure(width):
    plain = [re.sub(r"\033\[[\d;?]*\w", "", line).split("\r")[-1] for line in in_terminal([sys.executable, "-c", BARS], width)]
    last = [line for line in plain if line][-1]
    assert re.fullmatch(r"converting .*━.* 14\.1/41\.8 GB .* \d+ MiB", last)
    assert ("280/411 tensors" in last) == (width >= 76)
