"""The README's own code runs, and its claims about the commands hold."""

import re
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner

from converter import cli as converter_cli
from parity import cli as parity_cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
PYTHON = [code for language, code in FENCES if language == "python"]


@pytest.mark.parametrize("how", [0, 1], ids=["our loader", "plain orbax"])
def test_loading_as_the_readme_says(how, checkpoints):
    """Each way of loading, then the forward pass on the mesh; generation and LoRA once."""
    code = PYTHON[how] + PYTHON[2] + (PYTHON[3] if how == 0 else "")
    names = {"/path/to/gpt-oss-20b-orbax": checkpoints["bfloat16"], "gpt-oss-20b-orbax": checkpoints["bfloat16"]}
    for name, path in names.items():
        code = code.replace(f'"{name}', f'"{path}')
    scope: dict = {}
    exec(code, scope)
    assert scope["logits"].shape == (1, 5, 509)
    assert len(scope["logits"].sharding.device_set) == jax.device_count() == 8


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
    import importlib.util

    from parity import compare

    spec = importlib.util.spec_from_file_location("compare_own_model", ROOT / "scripts" / "compare_own_model.py")
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    with jax.numpy_rank_promotion("allow"):
        assert compare(sources["hf"], own.OwnModel(checkpoints["bfloat16"])).verdict == "pass"
        monkeypatch.setattr(own, "rotate", lambda x, cos, sin: x)
        report = compare(sources["hf"], own.OwnModel(checkpoints["bfloat16"]), gradients=True, decode=True)
    assert report.first_divergence == {"layer": 0, "tap": "q_rope"}
    # Its `path` is that of a right checkpoint, whose gradients in our model prove nothing about it.
    assert (report.gradients, [line.split(":")[0] for line in report.incomplete]) == ([], ["decode", "gradients"])
