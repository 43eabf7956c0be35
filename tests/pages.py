"""The Markdown pages as a reader uses them: the commands that are typed, the code that is pasted, and what is only shown."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
COMMANDS = ("convert-oss", "verify-oss", "inspect-oss", "check-parity", "report-diff")
# A command is a line of a `bash` block, or in the text something in backquotes that begins with a program and goes on.
PROGRAM = re.compile(
    rf"(\w+=\S* )*(({'|'.join(COMMANDS)}|python|pip|pipx|uvx|docker|vllm|hf|gcloud|aws|eval|finetune\.py|scripts/\S+) "
    r"|\./scripts/\w+( |$))"
)
# Modules, which may be imported here already, and scripts that start others of their kind, or look at their own memory.
APART = ("-m", "scripts/bench/", "scripts/stress/kill_convert.py")


class Piece(NamedTuple):
    kind: str  # "bash" (one command), "python" or "text" (a whole block), "inline" (one command in the text)
    text: str
    line: int
    section: str  # the text from the heading before it to the next

    @property
    def is_command(self) -> bool:
        return self.kind in ("bash", "inline")


def pages() -> list[str]:
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def pieces(page: str) -> list[Piece]:
    """In the order of the page. A command is without its comment."""
    source = (ROOT / page).read_text(encoding="utf-8")
    found: list[Piece] = []
    starts = [0, *(match.start() for match in re.finditer(r"^#+ ", source, re.M)), len(source)]
    for token in MarkdownIt("commonmark").enable("table").parse(source):
        first = (token.map or [0])[0]
        here = len("".join(source.splitlines(keepends=True)[:first]))
        begin = max(start for start in starts if start <= here)
        section = source[begin : next((start for start in starts if start > here), len(source))]
        if token.type == "fence" and token.info == "bash":
            lines = token.content.replace("\\\n", " ").splitlines()
            commands = [" ".join(re.sub(r"(^|\s+)# .*", "", line).split()) for line in lines]
            found += [Piece("bash", command, first + 1, section) for command in commands if command]
        elif token.type == "fence":
            found.append(Piece(token.info, token.content, first + 1, section))
        elif token.type == "inline":
            spans = [child.content for child in token.children or [] if child.type == "code_inline"]
            found += [Piece("inline", span, first + 1, section) for span in spans if PROGRAM.match(span)]
    return found


def run(line: str) -> int:
    """A line for the shell, with its exit code; in this process where that may be: importing everything anew takes longest.

    What stands in brackets is given too.
    """
    words = shlex.split(re.sub(r" \[([^\]]*)\]", r" \1", line))
    settings = {}
    while re.fullmatch(r"\w+=.*", words[0]):
        name, value = words.pop(0).split("=", 1)
        settings[name] = value
    command, *args = words
    if command in COMMANDS:
        [entry] = entry_points(group="console_scripts", name=command)
        return _ended(lambda: entry.load()(), [command, *args])
    if command == "finetune.py":
        command = f"scripts/examples/{command}"
    if command == "python":
        command, *args = args
    script = command if command == "-m" else str(ROOT / command)
    if command.startswith(APART):
        return subprocess.run([sys.executable, script, *args], env=os.environ | settings).returncode
    return _ended(lambda: runpy.run_path(script, run_name="__main__"), [script, *args])


def _ended(begin, argv: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "path", [str(Path(argv[0]).parent), *sys.path])
        try:
            return begin() if argv[0] in COMMANDS else begin() and 0
        except SystemExit as ended:
            return int(ended.code or 0)
