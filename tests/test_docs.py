"""Every command and every block of code in README and docs/ is run, small paths put in; what is not stands on a list."""

import ast
import importlib
import re
import shutil

import jax
import numpy as np
import pytest
from pages import COMMANDS, PROGRAM, ROOT, pages, pieces, run
from test_commands import COMMANDS as CLICK

# What cannot be run here, and why; what ends in a space is how it begins. The pages say "not run by the tests" beside it: in
# its section, or in their first.
NOT_RUN = {
    "scripts/tpu ": "compiles for TPUs in an environment of its own, minutes; .ci/run has it compile a small model",
    "python scripts/bench/convert.py ": "gigabytes, of the widths of 20b and 120b",
    "python scripts/bench/export.py ": "gigabytes, of the widths of 20b",
    "python scripts/bench/model.py": "gigabytes, of the widths of 20b",
    "python scripts/bench/model.py ": "gigabytes, of the widths of 20b",
    "python scripts/bench/parity.py ": "half a minute: processes of their own, PyTorch in each",
    "check-parity --layers --forms none --device gpu": "needs a GPU",
    "XLA_FLAGS=--xla_gpu_autotune_level=0 check-parity --layers": "needs a GPU",
    "scripts/stress/faults.py ": "minutes, whatever the number",
    "gcloud auth application-default login": "needs an account of Google's",
    "gcloud storage cp -r": "needs an account of Google's",
    "aws s3 cp --recursive": "needs an account of Amazon's",
    "hf auth login": "needs an account of the hub",
    "vllm serve ./served": "needs a GPU",
    "scripts/examples/finetune.py --lora '.*(q|k|v|o)_proj' --length 4096 --batch 4": "needs a GPU",
    "convert-oss tuned/model served --to hf --quantizer best --like openai/gpt-oss-20b --push ": "needs an account",
    "convert-oss gpt-oss-20b-packed published ": "needs an account; test_oss_model_hub has a server",
}
# What is run, but not by this: where, and what stands there.
ELSEWHERE = {
    "./scripts/test": (".ci/run", "./scripts/test"),
    "./scripts/test --all": (".ci/run", "./scripts/test --all"),
    "./scripts/demo": ("scripts/wheel", "check-parity --layers"),  # its commands, from the wheel
    "check-parity --layers": ("scripts/wheel", "check-parity --layers"),
    "./scripts/readers": (".ci/run", "./scripts/readers"),
    "PYTHONPATH=.venv/readers python scripts/examples/compare_mlx_lm.py SRC": ("scripts/readers_check.py", "MlxModel("),
    "./scripts/tunix": (".ci/run", "./scripts/tunix"),
    "./scripts/learn": (".ci/run", "./scripts/learn"),
    "verify-oss gs://…": ("tests/test_converter_bucket.py", "verify_main("),
    'eval "$(_': ("tests/test_completion.py", "bash_source"),
    "pipx install .": ("scripts/wheel", "pipx install"),
    "uvx --from . convert-oss SRC DST": ("scripts/wheel", "uvx --quiet"),
    "pip install ": ("scripts/_venv.sh", "pip install"),
    "check-parity --self-test --json F": ("tests/test_parity_faults.py", "self_test("),
    "check-parity --self-test": ("tests/test_parity_faults.py", "self_test("),
}
# What a person's model, text and time are too large for here: the command's own options.
SMALL = {
    "scripts/examples/finetune.py": "--batch 8 --length 8 --steps 2 --remat none",
    "finetune.py": "--batch 8 --length 8 --steps 2 --remat none",
    "-m oss_model.synthetic": "--size tiny",
    "scripts/stress/kill_convert.py": "--kills 1",
    "scripts/stress/flip_bits.py": "--count 2",
    "scripts/stress/fuzz.py": "--inputs 2",
    "scripts/stress/healthy_runs.py": "--runs 1",
    "scripts/bench/restore.py": "--repeats 1 --devices 1",
    "scripts/bench/processes.py": "--processes 1",
    "scripts/bench/training.py": "--steps 2 --repeats 1",
}
# What is not whole as it stands in a sentence, and what needs something made before: what is run for it.
AS = {
    "convert-oss RUN/model OUT --to hf --quantizer best": ["convert-oss VALUES OUT --to hf --quantizer best"],
    "convert-oss openai/gpt-oss-20b DST": ["convert-oss openai/gpt-oss-20b from-the-hub"],
    "convert-oss --dtype mxfp4": ["convert-oss SRC packed --dtype mxfp4"],
    "convert-oss --to hf --quantizer best": ["convert-oss VALUES quantized --to hf --quantizer best"],
    "convert-oss original gpt-oss-20b --to hf --tokenizer DIR": ["convert-oss original made --to hf --tokenizer DIR"],
    "convert-oss DIR OUT --to peft --base MODEL": ["convert-oss LORA ADAPTER --to peft --base MODEL"],
    "check-parity gpt-oss-20b gpt-oss-20b-orbax --layers --html report.html --junit report.xml --card card.md": [
        "check-parity gpt-oss-20b gpt-oss-20b-orbax --layers --forms none --html report.html --junit report.xml --card card.md"
    ],
    "convert-oss run/model served --to hf --quantizer best": ["convert-oss VALUES served-tuned --to hf --quantizer best"],
    "convert-oss gpt-oss-20b-packed served --to hf": [
        "convert-oss gpt-oss-20b gpt-oss-20b-packed --dtype mxfp4",
        "convert-oss gpt-oss-20b-packed served --to hf",
    ],
    "report-diff BEFORE AFTER": ["check-parity SRC DST --json BEFORE", "report-diff BEFORE BEFORE"],
    "report-diff before.json after.json": [
        "check-parity gpt-oss-20b-orbax --json before.json",
        "report-diff before.json before.json",
    ],
    "check-parity gpt-oss-20b gpt-oss-20b-orbax --layers": ["check-parity gpt-oss-20b gpt-oss-20b-orbax --layers --forms none"],
    "check-parity gpt-oss-20b-orbax --layers": ["check-parity gpt-oss-20b-orbax --layers --forms none"],
    "check-parity --card": ["check-parity SRC DST --card card.md"],
    "check-parity DST --golden F": ["convert-oss SRC DST", "check-parity SRC DST --record F", "check-parity DST --golden F"],
    "report-diff BEFORE.json AFTER.json": ["check-parity DST --json AFTER.json", "report-diff AFTER.json AFTER.json"],
    "report-diff report.json report-after.json": ["report-diff report.json report.json"],
    "finetune.py --experts-qat best": ["finetune.py SRC notes.txt qat --experts-qat best"],
    "scripts/examples/finetune.py SRC TEXT RUN": ["scripts/examples/finetune.py SRC notes.txt RUN"],
    "scripts/stress/kill_convert.py WORK --kills 500 [--to hf] [--from-orbax] [--bucket]": [
        "scripts/stress/kill_convert.py WORK --to hf"
    ],
}
# Pages whose blocks of text are what the commands before them print, line by line, but for numbers; and what is not run here.
PRINTED = ("docs/tutorial.md", "docs/porting.md")
NOT_PRINTED = ("forms ",)
# What does not end with 0, and says so.
ENDS = {"check-parity SRC RUN/model": 1}


def listed(text: str, table) -> str | None:
    """The entry that this is, or begins with."""
    return next((entry for entry in table if text == entry or (entry.endswith((" ", "(_")) and text.startswith(entry))), None)


def lines(text: str) -> list[str]:
    small = [f" {options}" for program, options in SMALL.items() if text.removeprefix("python ").startswith(program)]
    return AS.get(text, [text]) if not small else [line + small[0] for line in AS.get(text, [text])]


@pytest.fixture(scope="session")
def small_ones(tmp_path_factory, even_checkpoints, even_cfg):
    """A directory with a small model under every name that the pages give one, and a text."""
    from flax import nnx

    from oss_model import add_lora, create_model_from_checkpoint, save_lora
    from oss_model.synthetic import write_checkpoint

    home = tmp_path_factory.mktemp("pages")
    for name in ("gpt-oss-20b", "SRC", "PATH", "MODEL", "DIR"):
        shutil.copytree(even_checkpoints["float32"].parent / "source", home / name)
    write_checkpoint(home / "original", even_cfg, "openai")
    shutil.copytree(even_checkpoints["mxfp4"], home / "CHECKPOINT")
    shutil.copytree(even_checkpoints["float32"], home / "VALUES")
    model = create_model_from_checkpoint(home / "CHECKPOINT", even_cfg)
    add_lora(model, r".*(q|k|v|o)_proj", rank=2, rngs=nnx.Rngs(0))
    save_lora(model, home / "LORA")
    (home / "DIR/tokenizer.json").write_text("{}")
    (home / "notes.txt").write_text("Blocks are pasted in the order that they are read in.\n" * 4)
    return home


@pytest.fixture
def at_home(small_ones, tmp_path, monkeypatch):
    from oss_model import hub

    real, there = hub._snapshot, {"openai/gpt-oss-20b": small_ones / "gpt-oss-20b"}  # others are of servers that are here
    monkeypatch.setattr(hub, "_snapshot", lambda repository, *rest: there.get(repository) or real(repository, *rest))
    shutil.copytree(small_ones, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield tmp_path


# docs/training.md goes on where README ended.
OF_README = """
import jax, optax
from flax import nnx
from oss_model import ModelConfig, add_lora, create_model_from_checkpoint

model = create_model_from_checkpoint("CHECKPOINT", ModelConfig.from_json("CHECKPOINT"))
tokens = jax.numpy.array([[1, 2, 3, 4, 5]])
"""


def masked(text: str, home: str) -> list[str]:
    """Lines, without numbers, and without how they are spaced."""
    text = re.sub(r"\d[\d.,]*(e[+-]\d+)?", "#", text.replace(home, ""))
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("page", pages())
def test_what_is_typed_and_pasted_runs(page, at_home, monkeypatch, capfd):
    """All of a page in one session, in its order, as a reader has it."""
    monkeypatch.syspath_prepend(ROOT / "scripts/examples")
    scope: dict = {}
    ended = {}
    printed: list[str] = []
    if page == "docs/training.md":
        exec(OF_README, scope)
    for piece in pieces(page):
        if piece.kind == "python":
            exec(piece.text.replace("/path/to/", f"{at_home}/"), scope)
        elif piece.is_command and not listed(piece.text, NOT_RUN | ELSEWHERE):
            for line in lines(piece.text):
                ended[piece.text] = run(line)
                if ended[piece.text]:
                    break
        elif piece.kind == "text" and page in PRINTED:
            printed += masked("".join(capfd.readouterr()), f"{at_home}/")
            shown = [line for line in masked(piece.text, f"{at_home}/") if not line.startswith(NOT_PRINTED)]
            assert [line for line in shown if line not in printed] == []
    assert ended == {text: ENDS.get(text, 0) for text in ended}
    if page == "README.md":
        assert scope["logits"].shape == (1, 5, 512)
        assert len(scope["logits"].sharding.device_set) == jax.device_count() == 8
        assert np.isfinite(scope["loss"])
        assert scope["model"].cfg.param_dtype == "mxfp4"
        assert (at_home / "tuned/model").is_dir()


EVERY = [(page, piece) for page in pages() for piece in pieces(page)]


@pytest.mark.parametrize(("table", "name"), [(NOT_RUN, "NOT_RUN"), (ELSEWHERE, "ELSEWHERE"), (AS, "AS"), (ENDS, "ENDS")])
def test_the_lists_are_of_what_is_there(table, name):
    assert [entry for entry in table if not any(listed(piece.text, [entry]) for _, piece in EVERY if piece.is_command)] == []


def test_what_is_run_elsewhere_is():
    for file, what in ELSEWHERE.values():
        assert what in (ROOT / file).read_text(encoding="utf-8")


def test_what_is_not_run_says_so_beside_it():
    silent = [
        f"{page}:{piece.line}: {piece.text}"
        for page, piece in EVERY
        if piece.is_command and listed(piece.text, NOT_RUN)
        if "not run by the tests" not in piece.section + pieces_first_section(page)
    ]
    assert silent == []


def pieces_first_section(page: str) -> str:
    """What a page says before its second heading is said of all of it."""
    return "\n#".join((ROOT / page).read_text(encoding="utf-8").split("\n#")[:1])


def is_python(text: str) -> bool:
    try:
        return bool(ast.parse(text))
    except SyntaxError:
        return False


def test_a_block_says_what_it_is_and_hides_no_command():
    """`bash` and `python` are run, `fish` by test_completion; `text` is what a command prints, a tree of files or a drawing."""
    directives = {"{toctree}", "{eval-rst}"}  # of the site
    assert {piece.kind for _, piece in EVERY} - directives == {"bash", "python", "text", "inline", "fish"}
    shown = [line for _, piece in EVERY if piece.kind == "text" for line in piece.text.splitlines() if PROGRAM.match(line)]
    assert [line for line in shown if "oracle:" not in line] == []
    assert [piece.text for _, piece in EVERY if piece.kind == "text" and is_python(piece.text)] == []
    assert all(PROGRAM.match(f"{piece.text} ") for _, piece in EVERY if piece.kind == "bash")


def test_every_option_of_what_is_not_run_exists():
    for _, piece in EVERY:
        words = piece.text.split()
        given = {word for word in words if word.startswith("--")}
        if not piece.is_command or not listed(piece.text, NOT_RUN | ELSEWHERE):
            continue
        if words[0] in COMMANDS:
            known = {name for option in CLICK[words[0]].params for name in option.opts}
            assert given <= known, piece.text
        elif script := next((word for word in words if word.endswith(".py")), None):
            assert all(f'"{option}"' in (ROOT / script).read_text(encoding="utf-8") for option in given), piece.text


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("package", ["oss_model", "converter", "parity"])
def test_the_public_names_are_in_the_reference(package):
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"currentmodule:: {package}\n(.*?)\n```", text, re.S)
    assert sorted(re.findall(r"^\.\. auto\w+:: (\w+)", section, re.M)) == sorted(importlib.import_module(package).__all__)
