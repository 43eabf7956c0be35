"""The verification card: what it says, how it is repeated, and that any manifest leaves it whole."""

import re
import shlex

import pytest
from click.testing import CliRunner

from parity.cli import main
from parity.reports import card
from parity.reports.report import FormResult


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line.startswith("| ")
    ]


def test_a_card_says_what_how_and_how_to_repeat_it(healthy):
    healthy.forms = [FormResult("jit", "model", "bfloat16", "ok", 1.04), FormResult("cache", "model", "float32", "ok", 2e-6)]
    text = card.render(healthy, "check-parity SRC DST --layers")
    assert text.startswith("# Verification: PASS\n")
    assert re.search(r"^\d{4}-\d\d-\d\d, by `check-parity` of convert-oss \d", text, re.MULTILINE)
    found = rows(text)
    assert ["model", "gpt-oss, 24 layers"] in found
    assert ["weights", "ok", "all 25 parameters are bit-exact"] in found
    assert ["jit", "bfloat16", "model", "1.04 times PyTorch's own error", "ok"] in found
    assert any(row[0] == "free run" and "KL 1.000e-12 mean" in row[2] for row in found)
    assert "transformers" in next(row[1] for row in found if row[0] == "versions")
    assert text.endswith("```\ncheck-parity SRC DST --layers\n```\n")
    assert len({len(row) for row in found if row[0] in ("arm", "weights", "taps")}) == 1


def test_a_card_of_a_failure_says_so_first(broken):
    text = card.render(broken, "check-parity")
    assert text.startswith("# Verification: FAIL\n")
    assert "### diagnosis" in text
    assert "first divergence: " in text
    assert [row[3] for row in rows(text) if row[0] == "layer 16 attn_core"] == ["fail"]


@pytest.mark.long
def test_the_command_writes_a_card_of_what_it_compared(tmp_path, small, small_out):
    file = tmp_path / "card.md"
    options = ["--card", str(file), "--expect-changed", r".*sinks", "--tokens", "30"]
    result = CliRunner().invoke(main, [str(small), str(small_out), *options])
    assert result.exit_code == 0, result.output
    text = file.read_text()
    *_, typed, end = text.splitlines()
    assert end == "```"
    assert sorted(shlex.split(typed)) == sorted(["check-parity", str(small), str(small_out), *options])
    assert typed.startswith(f"check-parity {small} {small_out} --")
    assert rows(text)[-1][0] == "DST"
    assert re.fullmatch(r"[0-9a-f]{64}", rows(text)[-1][3])
    assert len(rows(text)[-1][1]) == 32


@pytest.mark.parametrize("hub", ['"x"', "[]", "{}", "null", "7"])
def test_a_card_survives_a_manifest_that_is_none(healthy, tmp_path, hub):
    (tmp_path / "conversion.json").write_text('{"tensors": {}, "source": {"layout": "hf", "hub": ' + hub + "}}")
    healthy.checkpoint = str(tmp_path)
    assert card.render(healthy, "check-parity").startswith("# Verification: PASS")
