"""convert-oss as a command: exit codes, what goes to which stream, and a quick --help."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from converter.cli import main, verify_main
from converter.store import Store
from oss_model.config import ModelConfig
from oss_model.synthetic import write_checkpoint


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "hf", ModelConfig.tiny())


def test_help_loads_nothing_heavy():
    code = """
import sys
from converter.cli import main
assert main(["--help"]) == 0
heavy = {"jax", "torch", "numpy", "orbax", "rich", "transformers", "flax"} & {name.split(".")[0] for name in sys.modules}
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--dtype [bfloat16|float32|mxfp4]" in done.stdout


def test_json_is_one_object_on_standard_output(hf, tmp_path, capsys):
    start = time.perf_counter()
    assert main([str(hf), str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report.items() >= {"status": "complete", "source_layout": "hf", "tensors": 88, "verified": True}.items()
    assert 0 < report["seconds"] <= time.perf_counter() - start
    assert report["peak_rss_bytes"] > 1 << 20
    assert report["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*/c/**/*") if path.is_file())
    assert report["bytes_read"] == sum(t[1] for t in _sizes(hf))
    assert "converting: " in err
    assert "verifying: " in err


def _sizes(path):
    from oss_model.shards import Shards

    with Shards(path) as shards:
        return [(name, tensor.nbytes) for name, tensor in shards.tensors.items()]


def test_quiet_is_quiet(hf, tmp_path, capsys):
    assert main([str(hf), str(tmp_path / "out"), "-q", "--no-verify"]) == 0
    assert capsys.readouterr() == ("", "")


def test_bad_input_is_a_line_a_fault_and_2(hf, tmp_path, capsys):
    missing = tmp_path / "nowhere"
    assert main([str(missing), str(tmp_path / "out"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert err == f"error: {missing}: expected a directory of safetensors files, found nothing\n"
    assert json.loads(out) == {"status": "failed", "exit_code": 2, "errors": [err.removeprefix("error: ").rstrip()]}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [[], ["a"], ["a", "b", "--dtype", "int4"], ["a", "b", "--nonsense"]])
def test_bad_usage_is_2_without_a_traceback(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


# --- places and signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dst", "problem"),
    [
        ("", "convert-oss: expected no empty argument, found one; is a variable of the shell not set?"),
        (".", "{tmp}: expected a new or empty directory, found one with other files in it; it is not a checkpoint"),
        ("/", "/: expected a new or empty directory, found the root of the file system; give another name"),
        ("{hf}/config.json/x", "{hf}/config.json/x: below a file, where only a directory can have anything in it; give"),
        ("loop/x", "loop/x: symbolic links that lead in a circle; mend them, or give another place"),
        ("n" * 300, "{dst}: a name longer than the file system allows; give a shorter one"),
        ("n" * 252, "{dst}.partial: a name longer than the file system allows; give a shorter one"),
    ],
)
def test_a_place_that_cannot_be_used_is_a_line_and_2(hf, tmp_path, monkeypatch, capsys, dst, problem):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    dst = dst.format(hf=hf)
    assert main([str(hf), dst]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {problem.format(tmp=tmp_path, hf=hf, dst=dst)}")
    assert os.listdir() == ["loop"]


def test_an_empty_source_and_all_that_is_wrong_at_once(hf, tmp_path, capsys):
    assert main(["", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr().err
        == "error: convert-oss: expected no empty argument, found one; is a variable of the shell not set?\n"
    )
    assert main([str(tmp_path / "none"), str(hf / "config.json/x")]) == 2
    assert [line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines()] == [
        f"{tmp_path}/none",
        f"{hf}/config.json/x",
    ]


def test_the_current_directory_is_used_where_it_is_empty(hf, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert main([str(hf), ".", "-q", "--no-verify"]) == 0
    assert (tmp_path / "out" / "conversion.json").is_file()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO])
def test_what_fails_before_the_first_byte_is_bad_input_and_after_it_incomplete(hf, tmp_path, monkeypatch, capsys, number):
    def refuse(self, *arguments, **options):
        raise OSError(number, os.strerror(number))

    def run() -> tuple[int, str]:
        code = main([str(hf), str(tmp_path / "out"), "-q"])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path}/out.partial: ")
        return code, line

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        code, line = run()
    assert (code, "what is written is kept" in line) == (2, False)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_chunk", refuse)
        code, line = run()
    assert (code, "what is written is kept there: " in line) == (3, True)
    assert ("make room" in line) == (number == errno.ENOSPC)


SLOWLY = """
import sys, time
from converter.store import Store
from converter.cli import main
write = Store.write_chunk
def slow(*arguments):
    time.sleep({seconds})
    return write(*arguments)
Store.write_chunk = slow
sys.exit(main(sys.argv[1:]))
"""


def begin(start, hf: Path, out: Path, seconds: float, *options: str, script: str = SLOWLY) -> subprocess.Popen:
    """A conversion in a process of its own, that has written three chunks."""
    command = [sys.executable, "-c", script.format(seconds=seconds), str(hf), str(out), *options]
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal, deadline = out.with_name(f"{out.name}.partial") / "journal.1-of-1", time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"chunk") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_sigterm_ends_in_order_as_ctrl_c_does(hf, tmp_path, start):
    out = tmp_path / "out"
    process = begin(start, hf, out, 0.02, "-q", "--json")
    process.send_signal(signal.SIGTERM)
    output, err = process.communicate()
    line = f"interrupted; what is written is kept in {out}.partial: run the same command again to go on"
    assert (process.returncode, err) == (130, f"error: {line}\n")
    assert json.loads(output) == {"status": "failed", "exit_code": 130, "errors": [line]}
    noted = [line for line in (tmp_path / "out.partial/journal.1-of-1").read_text().splitlines() if line]
    files = [path for path in (tmp_path / "out.partial").glob("checkpoint/*/c/**/*") if path.is_file()]
    assert len(noted) == len(files) < 168  # what was under way has been ended


HANGS = """
import sys, time
from converter.store import Store
from converter.cli import main
write, begun = Store.write_chunk, []
def hanging(*arguments):
    begun.append(0)
    if len(begun) > 6:
        time.sleep(60)
    return write(*arguments)
Store.write_chunk = hanging
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_second_ctrl_c_interrupts_at_once(hf, tmp_path, start):
    out = tmp_path / "out"
    process = begin(start, hf, out, 0, "-q", script=HANGS)
    time.sleep(0.5)  # until all threads hang
    try:
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # the first waits for what is under way
            process.wait(1.5)
        process.send_signal(signal.SIGINT)
        process.wait(10)
    finally:
        process.kill()
        _, err = process.communicate()
    line = f"interrupted; what is written is kept in {out}.partial: run the same command again to go on"
    assert (process.returncode, err) == (130, f"error: {line}\n")


def test_a_reader_who_leaves_changes_nothing(hf, tmp_path):
    command = f"{sys.executable} -m converter.cli {hf} {tmp_path}/out -v 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("converting: ")
    assert (tmp_path / "out" / "conversion.json").is_file()


def test_the_report_is_not_written_where_the_checkpoint_goes(sources, tmp_path, capsys):
    assert main([str(sources["hf"]), str(tmp_path / "out"), "--json-file", f"{tmp_path}/./out"]) == 2
    assert capsys.readouterr().err == f"error: --json-file: expected another place than DST, found {tmp_path}/./out\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("convert-oss {tmp}/gguf {tmp}/out", "GGUF is llama.cpp's, and not read here: give the safetensors"),
        ("convert-oss {tmp}/gguf/model.gguf {tmp}/out", "found a file; GGUF is llama.cpp's, and not read here: give the"),
        ("convert-oss {tmp}/peft {tmp}/out", "found LoRA updates (adapter_config.json): give the model, and these with"),
        ("convert-oss {orbax} {tmp}/out --merge {orbax}", "expected LoRA updates (adapter_config.json of PEFT, or lora.json)"),
        ("convert-oss {tmp}/none {hf}", "found nothing, and there is one at {hf}: SRC comes first, then DST"),
        ("convert-oss {orbax} {hf}", "and holds safetensors (SRC comes first, then DST), so it is never overwritten"),
        ("verify-oss {hf} {orbax}", "found another directory, and {orbax} is one: DST comes first"),
        ("convert-oss openai/gpt-oss-20b {tmp}/out", "install huggingface_hub (`pip install '.[hub]'`), or `hf download` it"),
    ],
)
def test_what_was_meant_is_told(typed, said, sources, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("gguf/model.gguf", "peft/adapter_config.json", "peft/adapter_model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    places = {"tmp": tmp_path, "hf": sources["hf"], "orbax": checkpoints["bfloat16"]}
    command, *arguments = typed.format(**places).split()
    assert (main if command == "convert-oss" else verify_main)(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said.format(**places) in line
    assert "{" not in line
