"""The README's own code runs, and its claims about the commands hold."""

import importlib.util
import re
import shlex
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from converter import cli as converter_cli
from oss_model.exits import run_click
from parity import cli as parity_cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = ("convert-oss", "verify-oss", "check-parity", "python", "pip", "./scripts/demo", "./scripts/test")
NOT_RUN = {
    "./scripts/demo": "this suite is run by what it runs; CONTRIBUTING.md",
    "./scripts/test": "is what runs this",
    "convert-oss gpt-oss-20b-packed published": "needs the hub; tests/test_oss_model_hub.py has one",
    "pip install": "makes environments: the first line of every CI run",
    "check-parity --self-test": "takes minutes; tests/test_parity_faults.py runs it in parts",
}
# What a person's model and text are too large for here: the script's own options, for a test of seconds.
SMALL = ["--batch", "8", "--length", "8", "--steps", "1", "--remat", "none"]


def finetune(*args: str) -> int:
    spec = importlib.util.spec_from_file_location("finetune_of_readme", ROOT / "scripts/examples/finetune.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return run_click(module.main, "finetune.py", [*args, *SMALL])


def run(line: str) -> int:
    """A line for the shell, in this process: importing everything anew for each takes most of the time."""
    command, *args = shlex.split(line, comments=True)
    if command == "python":
        assert args.pop(0) == "scripts/examples/finetune.py"
        return finetune(*args)
    [entry] = entry_points(group="console_scripts", name=command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *args])
        try:
            return entry.load()()
        except SystemExit as ended:
            return int(ended.code or 0)


@pytest.fixture
def at_home(tmp_path, monkeypatch, even_checkpoints):
    """A directory with a small gpt-oss-20b and notes.txt in it."""
    shutil.copytree(even_checkpoints["float32"].parent / "source", tmp_path / "gpt-oss-20b")
    (tmp_path / "notes.txt").write_text("Blocks are pasted in the order that they are read in.\n" * 4)
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield tmp_path


def test_everything_pasted_in_order_works(at_home):
    """All code of one language in one session, as a reader has it, small paths put in and nothing else changed."""
    scope: dict = {}
    ended = {}
    for language, block in FENCES:
        if language == "python":
            exec(block.replace("/path/to/", f"{at_home}/"), scope)
        for line in block.splitlines() if not language else ():
            if line.split() and line.split()[0] in COMMANDS and not line.startswith(tuple(NOT_RUN)) and "oracle:" not in line:
                ended[line] = run(line)
    expected = {line: 1 if "exits 1" in line else 0 for line in ended}
    assert ended == expected
    assert len(ended) == 17
    assert scope["logits"].shape == (1, 5, 512)
    assert len(scope["logits"].sharding.device_set) == jax.device_count() == 8
    assert np.isfinite(scope["loss"])
    assert scope["model"].cfg.param_dtype == "mxfp4"
    assert (at_home / "tuned/model").is_dir()


def test_what_is_not_pasted_is_in_the_readme():
    shell = [line for language, code in FENCES if not language for line in code.splitlines()]
    assert all(any(line.startswith(start) for line in shell) for start in NOT_RUN)


def test_every_option_in_the_readme_exists():
    sources = {
        "convert-oss": Path(converter_cli.__file__),
        "verify-oss": Path(converter_cli.__file__),
        "check-parity": Path(parity_cli.__file__),
    }
    shell = [line for language, code in FENCES if not language for line in code.splitlines()]
    lines = [line.split("#")[0].split() for line in shell if "oracle:" not in line]
    used = [(words[0], word) for words in lines if words and words[0] in sources for word in words if word.startswith("--")]
    assert {command for command, _ in used} >= {"convert-oss", "check-parity"}
    for command, option in used:
        assert f'"{option}"' in sources[command].read_text(encoding="utf-8"), (command, option)


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_help_says_exit_codes():
    assert "Exit status: 0 pass, 1 diverged, 2 bad input, 3 incomplete" in CliRunner().invoke(parity_cli.main, ["-h"]).output


def test_the_example_of_a_model_of_ones_own_passes_and_its_mistakes_do_not(monkeypatch, sources, checkpoints):
    from parity import compare

    spec = importlib.util.spec_from_file_location("compare_own_model", ROOT / "scripts/examples/compare_own_model.py")
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    with jax.numpy_rank_promotion("allow"):
        assert compare(sources["hf"], own.OwnModel(checkpoints["bfloat16"])).verdict == "pass"
        monkeypatch.setattr(own, "rotate", lambda x, cos, sin: x)
        report = compare(sources["hf"], own.OwnModel(checkpoints["bfloat16"]), gradients=True, decode=True)
    assert report.first_divergence == {"layer": 0, "tap": "q_rope"}
    # Its `path` is that of a right checkpoint, whose gradients in our model prove nothing about it.
    assert (report.gradients, [line.split(":")[0] for line in report.incomplete]) == ([], ["decode", "gradients"])


@pytest.mark.parametrize("page", ["docs/guarantees.md", "SECURITY.md"])
def test_what_holds_a_promise_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(re.findall(r"\btest_[a-z_]+\b", text)) | set(re.findall(r"(?:scripts/[a-z_/]+|tests/[a-z_]+)(?:\.py)?", text))
    assert names
    for name in names - {"tests/"}:
        places = [ROOT / name, ROOT / f"tests/{name}.py"]
        assert any(place.exists() for place in places), name
