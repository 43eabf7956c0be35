"""The example finetune.py, as people run it: it learns, it goes on after a kill, and only what was trained is different."""

import dataclasses
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from chatting import chat, write_chats, write_tokenizer
from click.testing import CliRunner
from flax import nnx

from oss_model import InputError, ModelConfig, create_model_from_checkpoint, hub, layouts, load_lora
from oss_model.errors import Incomplete
from oss_model.synthetic import write_checkpoint
from oss_model.training import Data

SCRIPT = Path(__file__).parent.parent / "scripts/examples/finetune.py"
SPEC = importlib.util.spec_from_file_location("finetune", SCRIPT)
SCRIPT_MODULE = importlib.util.module_from_spec(SPEC)  # type: ignore[arg-type]
sys.modules["finetune"] = SCRIPT_MODULE
SPEC.loader.exec_module(SCRIPT_MODULE)  # type: ignore[union-attr]
COMPILED = Path(tempfile.gettempdir()) / f"finetune-compiled-{os.getpid()}"
ATTENTION = ".*(q|k|v|o)_proj"
GLOO = re.compile(r"\[Gloo\]|peer ranks|^\s*\d*\s*$")  # says to standard output what it connects, pieces of lines by turns
FAST = ["--batch", "2", "--length", "24", "--learning-rate", "1e-2", "--compute", "float32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Every layer is compared with the reference, and the first difference is named.\n" * 8)
    return path


@pytest.fixture(scope="module", autouse=True)
def compiled():
    yield
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(scope="module")
def source(even_cfg, tmp_path_factory) -> Path:
    """Four layers, in MXFP4: two turns of one loop."""
    cfg = dataclasses.replace(even_cfg, num_hidden_layers=4, layer_types=())
    return write_checkpoint(tmp_path_factory.mktemp("source") / "source", cfg)


@pytest.fixture(scope="module")
def single(even_checkpoints) -> Path:
    """Two layers, which are one turn: a layer each."""
    return even_checkpoints["float32"].parent / "source"


def command(src: Path, text: Path, run: Path, *options: str) -> list[str]:
    return [sys.executable, *map(str, (SCRIPT, src, text, run)), *FAST, *options]


def environment(devices: int = 1) -> dict[str, str]:
    """The same for every run: flags of XLA may change the last bit. What one run compiles, the next one finds."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(COMPILED), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return os.environ | kept | {"XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}


def finetune(src: Path, text: Path, run: Path, *options: str, devices: int = 1) -> str:
    done = subprocess.run(command(src, text, run, *options), capture_output=True, text=True, env=environment(devices))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(line.split()[3]) for line in output.splitlines() if line.startswith("step ")]


def differing(source: Path, model: Path, tmp_path: Path) -> set[str]:
    """Names of the tensors that check-parity says differ."""
    from parity.cli import main

    report = tmp_path / "report.json"
    result = CliRunner().invoke(main, [str(source), str(model), "--json", str(report)])
    assert result.exit_code == 1, result.output
    return {tensor["name"] for tensor in json.loads(report.read_text())["weights"]["differing"]}


@pytest.mark.long
def test_full_fine_tuning_on_a_mesh_changes_what_was_asked_for(source, text, tmp_path):
    output = finetune(
        source, text, tmp_path / "run", "--steps", "20", "--train", r"layers\.\d\.attn\.q_proj\..*|lm_head.weight",
        "--mesh", "fsdp=2,expert=2", "--remat", "mlp", devices=4,
    )  # fmt: skip
    found = losses(output)
    assert found[-1] < found[0] - 1
    expected = {f"layers.{n}.attn.q_proj.{kind}" for n in range(4) for kind in ("weight", "bias")}
    assert differing(source, tmp_path / "run/model", tmp_path) == expected | {"lm_head.weight"}
    assert json.loads((tmp_path / "run/model/trained.json").read_text()) == {"base": str((tmp_path / "run/base").resolve())}


@pytest.mark.long
def test_lora_over_packed_experts_goes_on_after_a_kill(source, text, tmp_path, start):
    """To the same values, bit for bit, as a run that nobody killed."""
    options = ["--steps", "24", "--save-every", "4", "--lora", ATTENTION]
    whole = finetune(source, text, tmp_path / "whole", *options)
    assert losses(whole)[-1] < losses(whole)[0] - 0.5

    killed = start(
        command(source, text, tmp_path / "killed", *options),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any((tmp_path / "killed/steps" / str(step)).is_dir() for step in range(4, 24, 4)):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/model").exists()
    output = finetune(source, text, tmp_path / "killed", *options)
    assert "resumed after step" in output
    assert losses(output)[-1] == losses(whole)[-1]

    packed = ModelConfig.from_json(tmp_path / "whole/model/config.json")
    a, b = (nnx.state(create_model_from_checkpoint(tmp_path / run / "model", packed)) for run in ("whole", "killed"))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    names = {f"layers.{n}.attn.{part}_proj.weight" for n in range(4) for part in "qkvo"}
    assert differing(source, tmp_path / "whole/model", tmp_path) == names


@pytest.mark.long
def test_more_steps_go_on_and_updates_of_experts_stay_apart(source, text, tmp_path):
    rules = [r".*attn\.(q|o)_proj", r".*mlp\.(gate_up|down)"]
    options = [word for rule in rules for word in ("--lora", rule)]
    finetune(source, text, tmp_path / "run", "--steps", "4", *options)
    output = finetune(source, text, tmp_path / "run", "--steps", "8", *options)
    assert "resumed after step 4" in output
    other = [*options[:-1], r".*mlp\.down", "--steps", "2", "--rank", "8"]
    done = subprocess.run(command(source, text, tmp_path / "run", *other), capture_output=True, text=True)
    assert done.returncode == 2
    assert [line.split(" as when")[0] for line in done.stderr.splitlines()] == [
        f"error: {tmp_path / 'run'}: expected lora {rules!r}",
        f"error: {tmp_path / 'run'}: expected rank 16",
    ]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/model").exists()
    model = create_model_from_checkpoint(tmp_path / "run/base", ModelConfig.from_json(tmp_path / "run/base/config.json"))
    load_lora(model, tmp_path / "run/lora")
    assert all(float(abs(block.mlp.down.lora.b[...]).max()) > 0 for block in model.layers)
    assert layouts.parameters(model.cfg).keys() < {".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(model))}


def test_nothing_is_converted_before_the_options_are_good(source, text, tmp_path):
    done = subprocess.run(command(source, text, tmp_path / "run", "--mesh", "data=1"), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: mesh: expected axes named context, expert, fsdp, tensor, found 'data'\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--train", "router"], "--train 'router': expected to match a parameter such as norm.scale, found none"),
        (["--train", "("], "'(' is no regular expression"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--mesh", "fsdp=1,fsdp=1"], "--mesh: expected sizes that multiply to 8 devices, found fsdp=1,fsdp=1"),
        (["--lora", "nothing"], "LoRA rule 'nothing': expected to match a linear map, found no match; there are "),
        (["--lora", ".*router"], "LoRA rule '.*router': expected more than the router"),
        (["--length", "100000"], "expected more than 100000 tokens (--length), found"),
        (["--mesh", "context=8", "--length", "40"], "context: expected rows whose length is a multiple of 16, twice"),
        (["--length", "40000"], "--length: expected at most 32768 (max_position_embeddings), found 40000"),
        (["--mesh", "fsdp"], "--mesh: expected axes and sizes such as fsdp=4,expert=2, found 'fsdp'"),
        (["--mesh", "fsdp=3"], "--mesh: expected sizes that multiply to 8 devices, found fsdp=3"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(options, fault, sources, text, tmp_path):
    """In this process, which has 8 devices; what the script makes of an `InputError` is in the tests above."""
    result = CliRunner().invoke(SCRIPT_MODULE.main, [*map(str, (sources["hf"], text, tmp_path / "run")), *FAST, *options])
    assert result.exit_code != 0
    assert fault in (str(result.exception) if isinstance(result.exception, InputError) else result.output)
    assert not (tmp_path / "run").exists()


def test_a_refused_call_does_not_lock_the_directory(sources, text, tmp_path):
    """Whatever is wrong is said at once, the run's directory included."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"source": "elsewhere"}')
    given = [*map(str, (sources["hf"], text, run)), *FAST, "--length", "100000"]
    with pytest.raises(InputError) as caught:
        SCRIPT_MODULE.main.main(given, standalone_mode=False)
    _, first, *_, last = caught.value.faults
    assert first.startswith(f"{text}: expected more than 100000 tokens")
    assert "expected compute None as when it began, found 'float32'; use another directory" in last
    assert [file.name for file in run.iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", ["base", "steps", "model", "lora", "log.jsonl"])
def test_where_a_run_begins_its_names_are_free(sources, text, tmp_path, name):
    """It would remove what is there, or go on from it."""
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run/notes.md").write_text("mine")
    with pytest.raises(InputError, match=f"expected none of a run's own names where one begins, found {name}; move"):
        SCRIPT_MODULE.main.main([*map(str, (sources["hf"], text, tmp_path / "run")), *FAST], standalone_mode=False)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {name, "notes.md"}


def test_what_was_put_beside_a_result_is_not_removed(checkpoints, cfg, tmp_path):
    SCRIPT_MODULE.save(create_model_from_checkpoint(checkpoints["bfloat16"], cfg), checkpoints["bfloat16"], tmp_path / "model")
    assert SCRIPT_MODULE.others(tmp_path, checkpoints["bfloat16"], True) == []
    (tmp_path / "model/thesis.txt").write_text("mine")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/a.txt").write_text("mine")
    assert [line.partition(": saving would")[0] for line in SCRIPT_MODULE.others(tmp_path, checkpoints["bfloat16"], True)] == [
        f"{tmp_path / 'model'}: expected nothing but what was saved there before, found thesis.txt",
        f"{tmp_path / 'lora'}: expected nothing but what was saved there before, found a.txt",
    ]


def test_what_convert_refuses_leaves_no_note(sources, text, tmp_path, monkeypatch):
    """Too little room, for example; what it could not finish keeps its note."""

    def refuse(*_, **__):
        assert (tmp_path / "run/run.json").exists()
        raise error

    monkeypatch.setattr(SCRIPT_MODULE, "convert", refuse)
    for error, left in (
        (InputError("too little room"), []),
        (Incomplete("full"), ["run.json"]),
        (InputError("no"), ["run.json"]),
    ):
        with pytest.raises(type(error)):
            SCRIPT_MODULE.main.main([*map(str, (sources["hf"], text, tmp_path / "run")), *FAST], standalone_mode=False)
        assert [file.name for file in (tmp_path / "run").iterdir()] == left


def test_a_tokenizer_without_its_package_is_one_line(sources, text, tmp_path, monkeypatch):
    source = shutil.copytree(sources["hf"], tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        InputError, match="expected the package tokenizers, to read it with, found none; pip install tokenizers"
    ):
        SCRIPT_MODULE.main.main([*map(str, (source, text, tmp_path / "run")), *FAST], standalone_mode=False)
    assert not (tmp_path / "run").exists()


def test_a_hub_repository_is_a_source(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_snapshot", lambda repository, *_: {"openai/gpt-oss-20b": source}[repository])
    with pytest.raises(InputError, match="LoRA rule 'nothing'"):  # found in what SRC says
        SCRIPT_MODULE.main.main(
            ["openai/gpt-oss-20b", str(text), str(tmp_path / "run"), "--lora", "nothing"], standalone_mode=False
        )


def test_tokens_of_another_models_tokenizer_are_refused(cfg, text, tmp_path):
    data = Data(text, tmp_path, batch=1, length=2, today=datetime.date(2026, 1, 1))
    data.tokens = np.array([1, 509, 3])
    assert data.faults(cfg) == [f"{text}: expected tokens from 0 to 508, found 509; is it that tokenizer?"]


@pytest.mark.long
def test_interrupted_it_says_how_it_goes_on(source, text, tmp_path, start):
    run = tmp_path / "run"
    began = start(command(source, text, run, "--steps", "100000", "--lora", ATTENTION), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "steps").is_dir():
        assert began.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began.send_signal(signal.SIGINT)
    _, said = began.communicate(timeout=60)
    assert began.returncode == 130
    assert said.splitlines()[-1].startswith("error: interrupted; the same command goes on from where it stopped")
    assert "Traceback" not in said


@pytest.mark.long
def test_speed_is_measured_after_compiling(source, text, tmp_path):
    output = finetune(source, text, tmp_path / "run", "--steps", "3", "--lora", ATTENTION)
    first, last = [line for line in output.splitlines() if line.startswith("step ")]
    assert first.endswith(" s, compiling included")
    assert "tokens/s" not in first
    assert last.endswith("tokens/s")


# --- chats, held-out loss, several processes --------------------------------------------------------------------


@pytest.fixture
def chats(source, tmp_path) -> tuple[Path, Path, Path]:
    """The source with a tokenizer and a template, chats to train on, and others."""
    return at_home(source, tmp_path)


def at_home(source: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    home = shutil.copytree(source, tmp_path / "home")
    write_tokenizer(home)
    said = [chat("abcdefgh"[: 1 + n % 8], "yes" if n % 2 else "no") for n in range(40)]
    return home, write_chats(tmp_path / "chats.jsonl", said), write_chats(tmp_path / "others.jsonl", said[::-7])


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


CHATS = [
    "--length", "63", "--batch", "4", "--accumulate", "2", "--schedule", "cosine", "--warmup", "2",
    "--train", ".*(proj|router).*", "--freeze", ".*router.*", "--save-every", "4",
]  # fmt: skip
PROJECTIONS = {f"layers.{n}.attn.{part}_proj.{kind}" for n in range(4) for part in "qkvo" for kind in ("weight", "bias")}


@pytest.mark.long
def test_chats_with_held_out_loss_go_on_bit_for_bit_and_the_best_is_kept(chats, tmp_path):
    source, file, others = chats
    options = [*CHATS, "--eval", str(others), "--steps", "12", "--learning-rate", "3e-2", "--best", "--weight-decay", "0.01"]
    whole = finetune(source, file, tmp_path / "whole", *options)
    assert f"{file}: 40 documents in " in whole
    lines = log(tmp_path / "whole")
    steps = [line for line in lines if "loss" in line]
    looked = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert list(looked) == [4, 8, 12]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert [line["learning_rate"] for line in steps[:3]] == pytest.approx([3e-3, 1.65e-2, 3e-2], rel=1e-5)
    assert steps[-1]["learning_rate"] < 1e-3
    assert all(len(line["router_evenness"]) == len(line["dead_experts"]) == 4 for line in lines if "held_out_loss" in line)
    best = min(looked, key=lambda step: looked[step])
    assert f"the result is that of step {best}, whose held-out loss is the lowest" in whole
    assert {int(path.name) for path in (tmp_path / "whole/steps").iterdir() if path.name.isdigit()} == {best, 12}
    changed = differing(source, tmp_path / "whole/model", tmp_path)
    assert changed == PROJECTIONS

    with pytest.raises(AssertionError, match="expected steps 12 as when it began, found 16"):  # the rate falls with them
        finetune(source, file, tmp_path / "whole", *options, "--steps", "16")
    shutil.rmtree(tmp_path / "whole/model")
    again = finetune(source, file, tmp_path / "whole", *options)
    assert "resumed after step 12" in again
    assert log(tmp_path / "whole") == lines
    assert differing(source, tmp_path / "whole/model", tmp_path) == changed


def together(start, count: int, source: Path, file: Path, run: Path, *options: str) -> list[str]:
    """What each of `count` processes says, of eight devices in all."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    children = []
    for n in range(count):
        flag = ["--distributed", f"localhost:{port},{n + 1}/{count}"] if count > 1 else []
        line, piped = command(source, file, run, *options, *flag), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        children.append(start(line, text=True, env=environment(8 // count), **piped))
    ended = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0] * count, [err[-2000:] for _, err in ended]
    return ["".join(line for line in out.splitlines(True) if not GLOO.search(line)) for out, _ in ended]


def timeless(run: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in log(run)]


@pytest.mark.long
@pytest.mark.parametrize(("layers", "rate"), [("single", "1e-2"), ("source", "3e-3")])  # in four rounding grows faster
def test_two_processes_do_what_one_does_and_go_on_bit_for_bit(layers, rate, request, tmp_path, start):
    source, file, others = at_home(request.getfixturevalue(layers), tmp_path)
    options = [*CHATS, "--batch", "16", "--eval", str(others), "--mesh", "fsdp=8", "--schedule", "constant"]
    options += ["--learning-rate", rate, "--save-every", "3", "--steps"]
    together(start, 1, source, file, tmp_path / "one", *options, "6")
    said = together(start, 2, source, file, tmp_path / "two", *options, "6")
    assert said[0].count("step ") > 3
    assert said[1] == ""
    names = ("loss", "gradient_norm", "held_out_loss")
    one, two = ([line[name] for line in log(tmp_path / run) for name in names if name in line] for run in ("one", "two"))
    assert len(one) == 14
    np.testing.assert_allclose(two, one, rtol=1e-5)

    together(start, 2, source, file, tmp_path / "parts", *options, "3")
    assert "resumed after step 3" in together(start, 2, source, file, tmp_path / "parts", *options, "6")[0]
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "two")
    cfg = ModelConfig.from_json(tmp_path / "two/model/config.json")
    a, b = (nnx.state(create_model_from_checkpoint(tmp_path / run / "model", cfg)) for run in ("two", "parts"))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--accumulate", "3"], "--accumulate: expected a number that divides --batch 4, found 3"),
        (["--balance", "0.1"], "--balance: expected --remat none beside it, which keeps what the router said, found block"),
        (["--best"], "--best: expected --eval beside it, to know which is, found none"),
        (["--freeze", "norm"], "--freeze 'norm': expected to match some of what --train '.*' does, found all or none"),
        (["--freeze", ".*", "--lora", ATTENTION], "--freeze: expected --train, of which it takes away, found --lora"),
        (["--distributed", "here"], "expected auto or HOST:PORT,I/N with I from 1 to N, found 'here'"),
        (["--distributed", "here:1,3/2"], "expected auto or HOST:PORT,I/N with I from 1 to N, found 'here:1,3/2'"),
        (["--length", "8"], "chats.jsonl: expected tokens that count within --length 8, found none"),
    ],
)
def test_options_that_do_not_go_together(chats, options, fault, tmp_path):
    source, file, _ = chats
    given = [*map(str, (source, file, tmp_path / "run")), *FAST, "--batch", "4", "--length", "63", "--mesh", "fsdp=8", *options]
    result = CliRunner().invoke(SCRIPT_MODULE.main, given)
    assert result.exit_code != 0
    assert fault in (str(result.exception) if isinstance(result.exception, InputError) else result.output)
    assert not (tmp_path / "run").exists()


def test_runs_of_before_go_on_as_they_were(tmp_path):
    """Of what they did not know, they did what is usual."""
    before, usual = {"source": "a", "batch": 8}, {"warmup": 10, "freeze": None}
    assert SCRIPT_MODULE.differences(tmp_path, before, {"source": "a", "batch": 8}, usual) == []
    [fault] = SCRIPT_MODULE.differences(tmp_path, before, {"source": "a", "batch": 8, "warmup": 2}, usual)
    assert "expected warmup 10 as when it began, found 2" in fault


@pytest.mark.long
def test_two_processes_save_updates_of_experts(chats, tmp_path, start):
    source, file, _ = chats
    rules = ["--lora", r".*q_proj", "--lora", r".*mlp\.(gate_up|down)"]
    options = ["--length", "63", "--batch", "8", "--mesh", "fsdp=8", "--steps", "2", *rules]
    one, two = (together(start, count, source, file, tmp_path / f"{count}", *options)[0] for count in (1, 2))
    assert "updates: " in one
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    cfg = ModelConfig.from_json(tmp_path / "2/base/config.json")
    found = []
    for run in ("1", "2"):
        model = create_model_from_checkpoint(tmp_path / run / "base", cfg)
        assert len(load_lora(model, tmp_path / run / "lora")) == 12
        found.append(jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # two steps of Adam, which divides by small moments


@pytest.mark.parametrize("found", ["{", "[]", '{"began": "yesterday"}'])
def test_a_note_that_is_none_is_one_line(chats, tmp_path, found):
    source, file, _ = chats
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(found)
    with pytest.raises(InputError, match=r"run.json: expected (the settings of a run, as JSON|began to be a date)"):
        SCRIPT_MODULE.main.main([*map(str, (source, file, tmp_path / "run")), *FAST], standalone_mode=False)


def test_text_that_is_no_text_is_one_line(chats, tmp_path):
    source, *_ = chats
    (tmp_path / "text.txt").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"text.txt: expected UTF-8, found byte 0xff at 3"):
        Data(tmp_path / "text.txt", source, 1, 2, datetime.date(2026, 1, 1))
