"""What the commands have in common: they are one family."""

import inspect
import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from click.testing import CliRunner

import converter
import oss_model
import parity
from converter import cli
from parity.cli import _report_diff, diff_main
from parity.cli import main as check_parity

CONVERTING = {"convert-oss": cli._convert_oss, "verify-oss": cli._verify_oss, "inspect-oss": cli._inspect_oss}
COMMANDS = CONVERTING | {"check-parity": check_parity, "report-diff": _report_diff}


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


@pytest.mark.parametrize(("module", "name"), [("converter", "convert-oss"), ("parity", "check-parity")])
def test_packages_run_as_modules(module, name):
    said = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith(name)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_and_examples_and_exit_codes_are_whole(name, width):
    given = ["somewhere", "else"][: 1 if name == "inspect-oss" else 2]
    context = COMMANDS[name].make_context(name, given, terminal_width=width, max_content_width=width)
    text = COMMANDS[name].get_help(context)
    assert max(map(len, text.splitlines())) <= width
    assert "\\b" not in text
    help_ = inspect.cleandoc(COMMANDS[name].help)
    examples, codes = (part.splitlines()[1:] for part in help_.split("\n\n") if part.startswith("\b"))
    assert (examples[0].rstrip("s:"), codes[0]) == ("Example", "Exit status:")
    assert examples[1].startswith(f"    {name} ")
    assert codes[1].startswith("    0 ")
    assert {f"  {line}" for line in examples + codes} <= set(text.splitlines())


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
