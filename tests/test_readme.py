"""What the pages claim: exit codes, the example of a model of one's own, who holds a promise. test_docs.py runs their code."""

import importlib.util
import re
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner

from parity import cli as parity_cli

ROOT = Path(__file__).parent.parent


def test_help_says_exit_codes():
    assert "0 pass, 1 diverged, 2 bad input, 3 incomplete" in CliRunner().invoke(parity_cli.main, ["-h"]).output


@pytest.mark.long
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
