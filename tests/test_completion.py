"""docs/commands.md: the lines that switch completion on do, and the page is what the commands say."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("commands_page", ROOT / "scripts/commands_page.py")
commands_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(commands_page)
PAGE = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
BIN = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
BASH = re.findall(r'^eval "\$\((_\w+=bash_source [\w-]+)\)"$', PAGE, re.M)


def test_the_page_is_what_the_commands_say():
    assert commands_page.page() == PAGE, "python scripts/commands_page.py > docs/commands.md"


def test_every_command_has_a_line_for_each_shell():
    names = [line.split()[1] for line in BASH]
    assert names == list(commands_page.COMMANDS)
    fish = re.findall(r"^(_\w+)=fish_source ([\w-]+) > ~/.config/fish/completions/([\w-]+).fish$", PAGE, re.M)
    assert fish == [(line.partition("=")[0], name, name) for line, name in zip(BASH, names, strict=True)]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("line", BASH)
def test_the_script_comes_out(line, shell):
    """click asks bash for its version, so bash alone has to be there."""
    said = subprocess.run(
        ["bash", "-c", line.replace("bash_source", f"{shell}_source")], capture_output=True, text=True, env=os.environ | BIN
    )
    assert (said.returncode, said.stderr) == (0, "")
    name = line.split()[1]
    assert {"bash": "complete -o nosort -F", "zsh": f"#compdef {name}", "fish": "complete --no-files"}[shell] in said.stdout


@pytest.mark.parametrize(
    ("name", "typed", "completed"),
    [
        ("convert-oss", "--dt", "--dtype"),
        ("convert-oss", "--dtype mx", "mxfp4"),
        ("verify-oss", "--js", "--json"),
        ("inspect-oss", "--sub", "--subfolder"),
        ("check-parity", "--dt", "--dtype"),
        ("report-diff", "--js", "--json"),
    ],
)
def test_a_tab_completes(name, typed, completed):
    """As bash does it: the page's line is run, then the function that it defines, on what is typed."""
    [line] = [line for line in BASH if line.split()[1] == name]
    function = f"_{name.replace('-', '_')}_completion"
    words = [name, *typed.split()]
    program = f"""
        eval "$({line})"
        COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
        {function} {name} {words[-1]} {words[-2]}
        printf '%s\\n' "${{COMPREPLY[@]}}"
        complete -p {name}
    """
    said = subprocess.run(["bash", "-c", program], capture_output=True, text=True, env=os.environ | BIN)
    assert completed in said.stdout.splitlines(), said.stderr
    assert f"-F {function} {name}" in said.stdout


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_shell_itself_reads_the_script(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for line in BASH:
        script = subprocess.run(
            ["bash", "-c", line.replace("bash_source", f"{shell}_source")], capture_output=True, text=True, env=os.environ | BIN
        ).stdout
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
