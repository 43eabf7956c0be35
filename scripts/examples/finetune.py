r"""Fine-tune gpt-oss on text or chats: convert, restore onto a mesh, train, save with plain Orbax.

\b
Examples:
    finetune.py gpt-oss-20b notes.txt run --steps 200
    finetune.py gpt-oss-20b notes.txt run --lora '.*_proj'
    finetune.py gpt-oss-20b chats.jsonl run --mesh fsdp=8

TEXT is a plain text, of which windows are taken, or a .jsonl file, a document a line: {"messages": [...]} is rendered by the
checkpoint's own chat template, and only the assistant's tokens count; of {"text": "..."} all do. Documents are packed into
rows; each sees itself alone.

Without --lora the parameters that --train matches are trained, all held in float32: 16 bytes a value trained, with its
gradient and Adam's moments. With --lora only low-rank updates are, over experts that stay packed MXFP4. The same command
goes on where a killed run, or one of fewer --steps, stopped. Nothing is converted or written before all that was asked for
is found to be possible.

RUN/base is the converted checkpoint, RUN/steps what a resumed run needs, RUN/model the result, in the tree of the checkpoint
that convert-oss makes. Low-rank updates are in RUN/lora, and folded into RUN/model, unless they are of packed experts.
RUN/log.jsonl has a line a step. On several hosts each runs this, with --distributed and the same RUN, on a disk they share.

\b
Exit status:
    0 done, 2 bad input, 3 incomplete,
    70 a bug, 130 interrupted
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import jax
import numpy as np
import orbax.checkpoint as ocp
from click_option_group import optgroup
from flax import nnx
from jax.experimental import multihost_utils

from converter import convert
from converter.configs import TRAINED
from oss_model import (
    InputError,
    ModelConfig,
    Transformer,
    add_lora,
    context_parallel,
    create_model_from_checkpoint,
    hub,
    merge_lora,
    save_lora,
)
from oss_model.errors import place_faults, raise_all
from oss_model.exits import run_click
from oss_model.files import parse_json, write_file
from oss_model.layouts import parameter_name
from oss_model.lora import select
from oss_model.lora_note import NOTE
from oss_model.params import is_orbax
from oss_model.restoring import replace_faults
from oss_model.sharding import check
from oss_model.shards import Checkpoint
from oss_model.training import Data, Training, train
from oss_model.training.steps import SCHEDULES


@dataclasses.dataclass(frozen=True)
class Matching:
    """A filter of `flax.nnx`: the parameters whose whole name matches."""

    pattern: str
    but: str | None = None  # those that match this

    def __call__(self, path: tuple, value: object) -> bool:
        name = parameter_name(path)
        frozen = self.but is not None and re.fullmatch(self.but, name) is not None
        return isinstance(value, nnx.Param) and re.fullmatch(self.pattern, name) is not None and not frozen


def make_mesh(text: str) -> jax.sharding.Mesh:
    """`fsdp=4,expert=2`: the devices there are, cut so; a size of -1 is what is left."""
    if not re.fullmatch(r"\w+=(-1|[1-9]\d*)(,\w+=(-1|[1-9]\d*))*", text):
        raise InputError(f"--mesh: expected axes and sizes such as fsdp=4,expert=2, found {text!r}")
    pairs = [(axis, int(size)) for axis, size in (part.split("=") for part in text.split(","))]
    count, given = jax.device_count(), math.prod(size for _, size in pairs if size > 0)
    sizes = {axis: count // given if size == -1 else size for axis, size in pairs}
    if len(sizes) < len(pairs) or math.prod(sizes.values()) != count:
        raise InputError(f"--mesh: expected sizes that multiply to {count} device{'s' * (count > 1)}, found {text}")
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    check(mesh)
    return mesh


def noted(file: Path) -> dict:
    """What `note` wrote; nothing where a run begins."""
    try:
        found = parse_json(file.read_bytes()) if file.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected the settings of a run, as JSON, found none; use another directory")
    return found


def note(file: Path, settings: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(settings, indent=1).encode(), durable=True)  # half a note would lock the directory


@contextlib.contextmanager
def noted_while(file: Path, begun: bool) -> Iterator[None]:
    """A run that is refused where it begins leaves no note: the next call may ask for something else."""
    try:
        yield
    except (InputError, SystemExit) as error:
        refused = isinstance(error, InputError) or error.code == InputError.exit_code
        if refused and not begun and jax.process_index() == 0:
            file.unlink()
        raise


def others(run: Path, base: Path, begun: bool) -> list[str]:
    """What is not of this run, and would be removed or taken for its own: a line each."""
    if not begun:
        names = ("base", "steps", "model", "model.partial", "lora", "log.jsonl", "tensorboard")
        there = [name for name in names if os.path.lexists(run / name)]
        wanted = f"{run}: expected none of a run's own names where one begins, found"
        return [f"{wanted} {', '.join(there)}; move what is there, or use another directory"] if there else []
    beside = {TRAINED, *(file.name for file in companions(base))}
    models = (run / "model", run / "model.partial")
    return [*(line for path in models for line in replace_faults(path, beside)), *replace_faults(run / "lora", [NOTE])]


def companions(base: Path) -> list[Path]:
    """What a reader needs to use the result, as it lies beside the arrays that were trained."""
    files = base.iterdir() if base.is_dir() else ()
    return [file for file in files if file.is_file() and not file.name.startswith("_") and file.name != "conversion.json"]


def differences(run: Path, before: dict, settings: dict, usual: dict) -> list[str]:
    """What is other than in the run that noted `before`, a line each: a resumed run must be what it was.

    What is as usual is not noted: runs of earlier versions, which knew fewer options, go on.
    """
    if not before:
        return place_faults(run)
    before = usual | before
    return [
        f"{run}: expected {name} {before.get(name)!r} as when it began, found {value!r}; use another directory"
        for name, value in (usual | settings).items()
        if before.get(name) != value
    ]


def first_day(before: dict) -> datetime.date:
    """When the run began, to all processes alike: a chat template may ask for the date."""
    try:
        day = datetime.date.fromisoformat(before.get("began") or datetime.date.today().isoformat())
    except (TypeError, ValueError):
        raise InputError(f"run.json: expected began to be a date, found {before['began']!r}") from None
    if jax.process_count() == 1:
        return day
    return datetime.date.fromordinal(int(multihost_utils.broadcast_one_to_all(np.int32(day.toordinal()))))


def length_faults(length: int, cfg: ModelConfig, devices: jax.sharding.Mesh) -> list[str]:
    most, slices = cfg.max_position_embeddings, devices.shape.get("context", 1)
    found = [f"--length: expected at most {most} (max_position_embeddings), found {length}"] if length > most else []
    return found if slices == 1 else [*found, *context_parallel.length_faults(length, cfg.sliding_window, slices)]


def option_faults(batch: int, accumulate: int, balance: float, remat: str, best: bool, held: Data | None) -> list[str]:
    """Of options beside one another."""
    found = []
    if batch % accumulate:
        found.append(f"--accumulate: expected a number that divides --batch {batch}, found {accumulate}")
    if balance and remat != "none":
        found.append(f"--balance: expected --remat none beside it, which keeps what the router said, found {remat}")
    if best and held is None:
        found.append("--best: expected --eval beside it, to know which is, found none")
    return found


def check_rules(cfg: ModelConfig, lora: tuple[str, ...], rank: int, chosen: str, freeze: str | None = None) -> None:
    """Raise for rules that match nothing, on a model without values."""
    model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    if lora:
        select(model, lora, rank)
        if freeze is not None:
            raise InputError("--freeze: expected --train, of which it takes away, found --lora, which trains no parameter")
        return
    matched, left = (len(nnx.to_flat_state(nnx.state(model, Matching(chosen, but)))) for but in (None, freeze))
    if not matched:
        raise InputError(f"--train {chosen!r}: expected to match a parameter such as norm.scale, found none")
    if freeze is not None and left in (0, matched):
        raise InputError(f"--freeze {freeze!r}: expected to match some of what --train {chosen!r} does, found all or none")


def converted(src: Path, base: Path, dtype: str) -> None:
    """`base`, each process having converted its share.

    Of several, in a child: where JAX knows other processes Orbax waits for all of them, and shares end at different times.
    """
    count = jax.process_count()
    if count == 1:
        convert(src, base, dtype=dtype)
        return
    share = ["--dtype", dtype, "--process", f"{jax.process_index() + 1}/{count}"]
    done = subprocess.run([sys.executable, "-m", "converter", str(src), str(base), *share], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    while not is_orbax(base):  # another process finishes it
        time.sleep(0.1)


def save(model: Transformer, base: Path, out: Path) -> None:
    """The result, beside what a reader needs to use it. Written aside and renamed: it is whole or not there."""
    partial, first = out.with_name(f"{out.name}.partial"), jax.process_index() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    together("clear")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial.absolute(), nnx.state(model))
    if first:
        (partial / TRAINED).write_text(json.dumps({"base": str(base.resolve())}))  # whose bytes an export may keep
        for file in companions(base):
            shutil.copy2(file, partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    together("saved")


def together(name: str) -> None:
    """No process goes on before all are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def say(line: str) -> None:
    """By one process of all."""
    if jax.process_index() == 0:
        click.echo(line)


def pattern(_context, _option, value):
    """A click callback: regular expressions only."""
    for text in [value] if isinstance(value, str) else value or ():
        try:
            re.compile(text)
        except re.error as e:
            raise click.BadParameter(f"{text!r} is no regular expression ({e})") from None
    return value


def initialize(_context, _option, text: str | None) -> None:
    """Before anything asks JAX for its devices."""
    if text is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of processes without accelerators
    if text == "auto":
        return jax.distributed.initialize()
    found = re.fullmatch(r"(.+:\d+),([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[2]) > int(found[3]):
        raise click.BadParameter(f"expected auto or HOST:PORT,I/N with I from 1 to N, found {text!r}")
    jax.distributed.initialize(found[1], int(found[3]), int(found[2]) - 1)


AT_LEAST_1 = click.IntRange(min=1)
SHARE = click.FloatRange(min=0)
POSITIVE = click.FloatRange(min=0, min_open=True)
TEXT_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(help=(__doc__ or "").replace("\\b", "\b"), context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("src", type=click.Path())
@click.argument("text", type=TEXT_FILE)
@click.argument("run", type=click.Path(path_type=Path))
@optgroup.group("What is trained")
@optgroup.option("--lora", multiple=True, metavar="REGEX", callback=pattern, help="Modules to adapt; may be repeated.")
@optgroup.option("--rank", default=16, show_default=True, type=AT_LEAST_1, metavar="N", help="Rank of the LoRA updates.")
@optgroup.option(
    "--train", "chosen", default=".*", show_default=True, metavar="REGEX", callback=pattern, help="Parameters, without --lora."
)
@optgroup.option("--freeze", metavar="REGEX", callback=pattern, help="Of the parameters of --train, not these: '.*router.*'.")
@optgroup.option("--experts-qat", type=click.Choice(["best", "ocp", "ceil"]), help="Train for an export with this --quantizer.")
@optgroup.group("The batch")
@optgroup.option("--batch", default=8, show_default=True, type=AT_LEAST_1, metavar="N", help="Rows of a step.")
@optgroup.option("--length", default=256, show_default=True, type=AT_LEAST_1, metavar="N", help="Tokens of a row.")
@optgroup.option(
    "--accumulate", default=1, show_default=True, type=AT_LEAST_1, metavar="N", help="Compute a batch in so many parts."
)
@optgroup.group("The optimizer")
@optgroup.option("--steps", default=100, show_default=True, type=AT_LEAST_1, metavar="N", help="Steps of the whole run.")
@optgroup.option(
    "--learning-rate", default=1e-4, show_default=True, type=POSITIVE, metavar="X", help="The highest rate of AdamW."
)
@optgroup.option(
    "--warmup",
    default=10,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Steps in which the rate rises to that.",
)
@optgroup.option(
    "--schedule", "shape", type=click.Choice(SCHEDULES), default="constant", show_default=True, help="How the rate goes on."
)
@optgroup.option("--clip", default=1.0, show_default=True, type=POSITIVE, metavar="X", help="The largest norm of a gradient.")
@optgroup.option("--weight-decay", default=0.0, show_default=True, type=SHARE, metavar="X", help="Of AdamW, on matrices alone.")
@optgroup.option(
    "--balance", default=0.0, show_default=True, type=SHARE, metavar="X", help="Weight of a loss that evens the experts' load."
)
@optgroup.group("What is kept")
@optgroup.option("--eval", "held_out", type=TEXT_FILE, metavar="FILE", help="Held-out text, of a form that TEXT may have.")
@optgroup.option(
    "--save-every",
    default=50,
    show_default=True,
    type=AT_LEAST_1,
    metavar="N",
    help="Save a state, and evaluate --eval, after so many steps.",
)
@optgroup.option("--keep", default=1, show_default=True, type=AT_LEAST_1, metavar="N", help="How many saved steps to keep.")
@optgroup.option("--best", is_flag=True, help="RUN/model is of the saved step whose loss on --eval is the lowest.")
@optgroup.group("Where it runs")
@optgroup.option(
    "--mesh",
    default="fsdp=-1",
    show_default=True,
    metavar="AXES",
    help="Axes and sizes, such as fsdp=4,expert=2; -1: what is left.",
)
@optgroup.option(
    "--compute",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="The dtype of the computation.",
)
@optgroup.option(
    "--remat",
    type=click.Choice(["none", "mlp", "block"]),
    default="block",
    show_default=True,
    help="What the backward pass computes again.",
)
@optgroup.option(
    "--distributed",
    metavar="auto|HOST:PORT,I/N",
    is_eager=True,
    expose_value=False,
    callback=initialize,
    help="One of several processes: of a TPU pod or Slurm, or the I-th of N, the first of which is at HOST:PORT.",
)
@click.version_option(package_name="convert-oss", message="%(prog)s %(version)s")
def main(
    src, text, run, mesh, lora, rank, chosen, freeze, steps, batch, accumulate, length, learning_rate, warmup, shape, clip,
    weight_decay, balance, held_out, save_every, keep, best, compute, experts_qat, remat,
):  # fmt: skip
    devices = make_mesh(mesh)
    src = hub.local(src)  # OWNER/NAME: from the Hugging Face hub
    source = None if is_orbax(src) else Checkpoint(src)
    if source is not None:
        source.shards.close()
    cfg = ModelConfig.from_json(src / "config.json") if source is None else source.cfg
    # Experts stay packed for LoRA; what is trained is held in float32, where small steps are not rounded away.
    cfg = dataclasses.replace(
        cfg, dtype=np.dtype(compute), remat=remat, param_dtype=None if lora else "float32", experts_qat=experts_qat
    )
    check_rules(cfg, lora, rank, chosen, freeze)
    before = noted(run / "run.json")
    base = src if source is None else run / "base"
    foreign = others(run, base, bool(before))  # before any process goes on, and writes
    day = first_day(before)
    data = Data(text, src, batch, length, day)
    held = None if held_out is None else Data(held_out, src, batch, length, day)
    how = Training(steps, learning_rate, warmup, shape, clip, weight_decay, accumulate, balance, save_every, keep, best)
    what = {"source": str(src.resolve()), "text": str(text.resolve()), "lora": list(lora), "rank": rank, "train": chosen}
    what |= {"batch": batch, "length": length, "learning_rate": learning_rate, "compute": compute, "experts_qat": experts_qat}
    more = {
        "freeze": (freeze, None), "accumulate": (accumulate, 1), "warmup": (warmup, 10), "schedule": (shape, "constant"),
        "clip": (clip, 1.0), "weight_decay": (weight_decay, 0.0), "balance": (balance, 0.0),
        "steps": (None if shape == "constant" else steps, None),  # which a rate that falls depends on
    }  # fmt: skip
    what |= {name: value for name, (value, usual) in more.items() if value != usual}
    raise_all(
        [
            *length_faults(length, cfg, devices),
            *option_faults(batch, accumulate, balance, remat, best, held),
            *data.faults(cfg),
            *([] if held is None else held.faults(cfg)),
            *differences(run, before, what, {name: usual for name, (_, usual) in more.items()}),
            *foreign,
        ]
    )

    if jax.process_index() == 0:
        note(run / "run.json", what | {"began": day.isoformat()})
    with resumable():
        if not is_orbax(base):
            dtype = "mxfp4" if source is not None and source.layout.packed else "bfloat16"
            with noted_while(run / "run.json", bool(before)):
                converted(src, base, dtype)
        model = create_model_from_checkpoint(base, cfg, devices)
        if lora:
            names, trained = add_lora(model, lora, rank, rngs=nnx.Rngs(0)), nnx.LoRAParam
        else:
            trained = Matching(chosen, freeze)
            names = [path for path, _ in nnx.to_flat_state(nnx.state(model, trained))]
        count = sum(a.size for a in jax.tree.leaves(nnx.state(model, trained)))
        say(str(data))
        say(f"{len(names)} {'modules' if lora else 'parameters'}, {count:,} values trained on {dict(devices.shape)}")

        model = train(model, trained, data, held, how, devices, run, say)
        if lora:
            save_lora(model, run / "lora", lora)
            say(f"updates: {run / 'lora'}")
            if model.cfg.param_dtype == "mxfp4" and any(str(name).endswith(("gate_up", "down")) for name in names):
                return  # packed experts cannot take theirs
            merge_lora(model)
        save(model, base, run / "model")
        say(f"model: {run / 'model'}")


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "the same command goes on from where it stopped, and from the last step that was saved"
        ) from None


if __name__ == "__main__":
    sys.exit(run_click(main, "finetune.py"))
