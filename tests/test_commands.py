"""What the commands have in common: they are one family."""

import inspect
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

import converter
import oss_model
import parity
from converter import cli
from oss_model.exits import run_click
from parity.cli import _report_diff, diff_main
from parity.cli import main as check_parity

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "examples"))

import finetune
import plan_training

CONVERTING = {"convert-oss": cli._convert_oss, "verify-oss": cli._verify_oss, "inspect-oss": cli._inspect_oss}
COMMANDS = CONVERTING | {"check-parity": check_parity, "report-diff": _report_diff}
EXAMPLES = {"finetune.py": finetune.main, "plan_training.py": plan_training.main}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_says_its_version(name, capsys):
    mains = {"convert-oss": cli.main, "verify-oss": cli.verify_main, "inspect-oss": cli.inspect_main, "report-diff": diff_main}
    if name in mains:
        assert mains[name](["--version"]) == 0
        said = capsys.readouterr().out
    else:
        said = CliRunner().invoke(check_parity, ["--version"]).output
    assert said == f"{name} {version('convert-oss')}\n"
    assert oss_model.__version__ == converter.__version__ == parity.__version__ == version("convert-oss")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_say_theirs_too(name):
    assert CliRunner().invoke(EXAMPLES[name], ["--version"], prog_name=name).output == f"{name} {version('convert-oss')}\n"


@pytest.mark.parametrize(("module", "name"), [("converter", "convert-oss"), ("parity", "check-parity")])
def test_packages_run_as_modules(module, name):
    said = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith(name)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("name", COMMANDS | EXAMPLES)
def test_help_fits_and_examples_and_exit_codes_are_whole(name, width):
    command = (COMMANDS | EXAMPLES)[name]
    widths = {"terminal_width": width, "max_content_width": width}
    text = command.get_help(command.make_context(name, [], resilient_parsing=True, **widths))
    assert max(map(len, text.splitlines())) <= width
    assert "\\b" not in text
    assert "RANGE" not in text
    help_ = inspect.cleandoc(command.help)
    examples, codes = (part.splitlines()[1:] for part in help_.split("\n\n") if part.startswith("\b"))
    assert (examples[0].rstrip("s:"), codes[0]) == ("Example", "Exit status:")
    assert examples[1].startswith(f"    {name} ")
    assert codes[1].startswith("    0 ")
    assert {f"  {line}" for line in examples + codes} <= set(text.splitlines())


SLIPS = [
    ("convert-oss", ["a", "b", "--ovrwrite"], "'--overwrite'?"),
    ("convert-oss", ["a", "b", "--dtype", "bfloat"], "'mxfp4'; did you mean bfloat16? (try convert-oss --help)"),
    ("convert-oss", ["a", "b", "--to", "hf_bf16"], "did you mean hf-bf16?"),
    ("convert-oss", ["{tmp}/gpt-oss-20", "b"], "found nothing; did you mean {tmp}/gpt-oss-20b?"),
    ("convert-oss", ["{tmp}/gpt-oss-20b", "b", "--like", "{tmp}/gpt-os-20b/original", "--to", "hf", "--quantizer", "best"],
     "did you mean {tmp}/gpt-oss-20b/original?"),
    ("verify-oss", ["{tmp}/gpt-oss-20b-orbx"], "found nothing; did you mean {tmp}/gpt-oss-20b-orbax?"),
    ("verify-oss", ["a", "--quite"], "'--quiet'?"),
    ("inspect-oss", ["{tmp}/dts"], "found nothing; did you mean {tmp}/dst?"),
    ("inspect-oss", ["a", "--jsn"], "'--json'?"),
    ("inspect-oss", ["gpt-oss-20b/orignal"], "found nothing; did you mean gpt-oss-20b/original?"),
    ("check-parity", ["--layer"], "'--layer'. Did you mean '--layers'?"),
    ("check-parity", ["--device", "gpus"], "did you mean gpu?"),
    ("check-parity", ["{tmp}/gpt-oss-20b", "{tmp}/gpt-oss-20b-orbx"], "found nothing; did you mean {tmp}/gpt-oss-20b-orbax?"),
    ("report-diff", ["{tmp}/report.json", "{tmp}/report.json", "--jsn"], "'--json'?"),
    ("report-diff", ["{tmp}/reprt.json", "{tmp}/report.json"], "does not exist; did you mean {tmp}/report.json?"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "said"), SLIPS, ids=lambda value: str(value)[:40])
def test_a_slip_is_told_what_was_meant_perhaps(tmp_path, monkeypatch, capsys, small, name, arguments, said):
    shutil.copytree(small, tmp_path / "gpt-oss-20b")
    for directory in ("gpt-oss-20b/original", "gpt-oss-20b-orbax", "dst"):
        (tmp_path / directory).mkdir()
    (tmp_path / "report.json").touch()
    monkeypatch.chdir(tmp_path)
    assert run_click(COMMANDS[name], name, [argument.format(tmp=tmp_path) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert said.format(tmp=tmp_path) in err


@pytest.mark.parametrize("path", ["{tmp}/mistral", "{tmp}/gpt-oss-20/mistral", "{tmp}/secret/mistral", "/nowhere/at/all"])
def test_where_nothing_is_alike_nothing_is_asked(tmp_path, monkeypatch, capsys, path):
    (tmp_path / "gpt-oss-20b").mkdir()
    (tmp_path / "secret").mkdir()
    iterdir = Path.iterdir

    def listed(self):
        if self.name == "secret":
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", listed)
    assert run_click(COMMANDS["inspect-oss"], "inspect-oss", [path.format(tmp=tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {path.format(tmp=tmp_path)}: expected a directory, found nothing\n"


def test_json_goes_to_a_file_or_to_standard_output(small, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert cli.main([str(small), str(tmp_path / "out"), "--json-file", str(file), "-q"]) == 0
    assert json.loads(file.read_text())["status"] == "complete"
    assert capsys.readouterr().out == ""
    assert cli.main([str(small), str(tmp_path / "out"), "--json-file", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "already-complete"
    assert cli.verify_main([str(tmp_path / "out"), "--json", "--json-file", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())
    assert cli.main([str(tmp_path / "nothing"), str(tmp_path / "other"), "--json-file", str(file)]) == 2
    assert json.loads(file.read_text())["exit_code"] == 2
    capsys.readouterr()
    assert cli.main([str(small), str(tmp_path / "other"), "--json-file", str(tmp_path / "no/where.json")]) == 2
    assert "expected a file in an existing directory" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_report_on_standard_output_is_alone_there(small, small_out):
    result = CliRunner().invoke(check_parity, [str(small), str(small_out), "--json", "-"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["verdict"] == "pass"
    assert "PASS" in result.stderr


@pytest.mark.parametrize("address", ["s3://bucket/checkpoint", "https://example.org/x"])
def test_an_address_is_no_directory_of_that_name(small, small_out, tmp_path, monkeypatch, capsys, address):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        [str(small), address],
        [address, "out"],
        [str(small), "out", "--like", address, "--quantizer", "best", "--to", "hf"],
    ):
        assert cli.main(arguments) == 2
        assert "expected a path on a disk, found an address" in capsys.readouterr().err
    assert cli.verify_main([address]) == cli.inspect_main([address]) == 2
    result = CliRunner().invoke(check_parity, [str(small), address], standalone_mode=False)
    assert "expected a path on a disk, found an address" in str(result.exception) + result.output + result.stderr
    assert list(tmp_path.iterdir()) == []


def test_file_addresses_and_a_quoted_tilde_are_paths(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main([f"file://{small}", "~/out", "-q"]) == 0
    assert (tmp_path / "out/_METADATA").exists()
    assert cli.verify_main([f"file://{tmp_path}/out", "-q"]) == 0
