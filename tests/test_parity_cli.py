"""check-parity as a command: what it refuses, with which line and which exit code, before the long part."""

import errno
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from parity import cli, progress_bar


def run(*arguments: object) -> tuple[int, list[str]]:
    """Exit code, and the lines on standard error."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    return result.exit_code, result.stderr.splitlines()


@pytest.fixture
def pair(sources, checkpoints) -> tuple[Path, Path]:
    return sources["hf"], checkpoints["bfloat16"]


def test_a_recording_that_cannot_be_made_is_a_line_and_2(pair, tmp_path):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "x"
    problem = "below a file, where only a directory can have anything in it; give another place"
    assert run(*pair, "--record", where) == (2, [f"error: {where}: {problem}"])


def test_a_seed_below_zero_is_refused(pair):
    problem = "Invalid value for '--seed': -1 is not in the range x>=0. (try check-parity --help)"
    assert run(*pair, "--seed", "-1") == (2, [f"error: {problem}"])


def test_more_tokens_than_the_model_has_positions_are_refused(pair, tmp_path):
    problem = "expected at most 32768 tokens, the model's max_position_embeddings, found 32769"
    assert run(*pair, "--tokens", 32769) == (2, [f"error: --tokens or --prompt-file: {problem}"])
    (tmp_path / "prompt.json").write_text(json.dumps([7] * 32769))
    assert run(*pair, "--prompt-file", tmp_path / "prompt.json") == (2, [f"error: --tokens or --prompt-file: {problem}"])


def test_a_random_prompt_beside_one_from_a_file_is_a_contradiction(pair, tmp_path):
    (tmp_path / "prompt.json").write_text("[1, 2, 3]")
    found = run(*pair, "--prompt-file", tmp_path / "prompt.json", "--tokens", 30, "--seed", 0)
    said = "expected no --{} beside it, which is for a random prompt; leave one out"
    assert found == (2, [f"error: --prompt-file: {said.format(name)}" for name in ("seed", "tokens")])


def test_gradients_of_one_token_are_refused(pair):
    problem = "expected a prompt of at least 2 tokens, since the loss is that of the next one, found 1"
    advice = "use --tokens 2 or more, or a longer prompt"
    assert run(*pair, "--gradients", "--tokens", 1) == (2, [f"error: --gradients: {problem}; {advice}"])


def test_a_report_whose_directory_vanishes_is_a_line_and_2(pair, tmp_path, monkeypatch):
    class Report:
        exit_code = 0

        def table(self, width):
            (tmp_path / "reports").rmdir()
            return "PASS"

        def to_json(self):
            return "{}"

    (tmp_path / "reports").mkdir()
    monkeypatch.setattr("parity.comparison.compare", lambda *arguments, **options: Report())
    file = tmp_path / "reports" / "report.json"
    problem = "could not be written (No such file or directory); the comparison itself is done, see above"
    assert run(*pair, "--json", file) == (2, [f"error: {file}: {problem}"])


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (PermissionError(errno.EACCES, "no", "F"), 2, "error: F: permission denied; give another place, or ask for permission"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError("Unable to allocate 9 GiB"), 3, "error: out of memory (Unable to allocate 9 GiB): "),
        (ZeroDivisionError(), 70, "error: this is a bug of convert-oss, not of your input: please report it"),
    ],
)
def test_whatever_happens_on_the_way_is_no_divergence(pair, monkeypatch, error, code, last):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr("parity.comparison.compare", fails)
    found, lines = run(*pair)
    assert found == code
    assert lines[-1].startswith(last)
    assert ("Traceback" in lines[0]) == (code == 70)


def test_without_pytorch_the_advice_is_the_readmes(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, lines = run(*pair)
    assert (code, len(lines)) == (2, 1)
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    install = readme.split("## Install")[1].split("## Convert")[0]
    for part in cli.INSTALL:
        assert f"`{part}`" in lines[0]
        assert part in install
    assert lines[0].startswith(
        "error: check-parity needs PyTorch and transformers (import of torch halted; None in sys.modules): "
    )


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_checkpoint_that_is_not_there_is_one_line(pair, tmp_path, name):
    (tmp_path / "empty").mkdir()
    found = {"nothing": "nothing; ", "empty": "an empty directory; "}[name]
    code, (line,) = run(pair[0], tmp_path / name)
    assert code == 2
    wanted = "an Orbax checkpoint or safetensors (_METADATA, *.safetensors)"
    assert line.startswith(f"error: {tmp_path / name}: expected {wanted}, found {found}")


def test_what_takes_long_says_where_it_is_now_and_then(monkeypatch, capsys):
    """Not in a terminal, where a bar does."""
    now = iter([0, 3, 12, 15, 23])
    monkeypatch.setattr("parity.progress.time.monotonic", lambda: next(now))
    with progress_bar() as show:
        for done, what in enumerate(["healthy", "window-one-long", "no-sinks", "no-bias"]):
            show(done, 993, what)
    assert capsys.readouterr() == (
        "", "1 of 993 done, 12 s: window-one-long\n3 of 993 done, 23 s: no-bias\n"
    )  # fmt: skip
