r"""Fine-tune gpt-oss on a text file: convert, restore onto a mesh, train, save with plain Orbax.

\b
    finetune.py openai/gpt-oss-20b notes.txt run --mesh fsdp=8 --steps 200
    finetune.py gpt-oss-20b notes.txt run --lora '.*(q|k|v|o)_proj' --lora '.*mlp\.(gate_up|down)'

Without --lora the parameters that --train matches are trained, all held in float32: 16 bytes a value trained, with its
gradient and Adam's moments. With --lora only low-rank updates are, over experts that stay packed MXFP4. The same command
goes on where a killed run, or one of fewer --steps, stopped. Nothing is converted or written before all that was asked for
is found to be possible.

RUN/base is the converted checkpoint, RUN/steps what a resumed run needs, RUN/model the result, in the tree of the checkpoint
that convert-oss makes. Low-rank updates are in RUN/lora, and folded into RUN/model, unless they are of packed experts.
One process, all its devices; docs/training.md has what changes with several hosts.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from converter import convert
from oss_model import (
    InputError,
    ModelConfig,
    Transformer,
    add_lora,
    create_model_from_checkpoint,
    cross_entropy,
    hub,
    merge_lora,
    save_lora,
)
from oss_model.errors import place_faults, raise_all
from oss_model.exits import run_click
from oss_model.layouts import parameter_name
from oss_model.lora import named_before, named_now, select
from oss_model.params import is_orbax
from oss_model.sharding import check
from oss_model.shards import Checkpoint


@dataclasses.dataclass(frozen=True)
class Matching:
    """A filter of `flax.nnx`: the parameters whose whole name matches."""

    pattern: str

    def __call__(self, path: tuple, value: object) -> bool:
        return isinstance(value, nnx.Param) and re.fullmatch(self.pattern, parameter_name(path)) is not None


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


def differences(file: Path, settings: dict) -> list[str]:
    """What is other than in the run that is noted in `file`, a line each: a resumed run must be what it was."""
    if not file.exists():
        return place_faults(file.parent)
    before = json.loads(file.read_text())
    return [
        f"{file.parent}: expected {name} {before.get(name)!r} as when it began, found {value!r}; use another directory"
        for name, value in settings.items()
        if before.get(name) != value
    ]


def note(file: Path, settings: dict) -> None:
    """Whole, or not at all: half a note would lock the directory."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(settings, indent=1))
    os.replace(partial, file)


def tokenize(text: Path, checkpoint: Path) -> np.ndarray:
    """int32 [tokens]: by the checkpoint's tokenizer, or, where it has none, the bytes themselves."""
    tokenizer = checkpoint / "tokenizer.json"
    if not tokenizer.exists():
        return np.frombuffer(text.read_bytes(), np.uint8).astype(np.int32)
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise InputError(
            f"{tokenizer}: expected the package tokenizers, to read it with, found none; pip install tokenizers"
        ) from None
    return np.array(Tokenizer.from_file(str(tokenizer)).encode(text.read_text("utf-8")).ids, np.int32)


def text_faults(text: Path, tokens: np.ndarray, length: int, cfg: ModelConfig) -> list[str]:
    faults = []
    if len(tokens) <= length:
        faults.append(f"{text}: expected more than {length} tokens (--length), found {len(tokens)}")
    if length > cfg.max_position_embeddings:
        faults.append(f"--length: expected at most {cfg.max_position_embeddings} (max_position_embeddings), found {length}")
    if len(tokens) and tokens.max() >= cfg.vocab_size:
        faults.append(f"{text}: expected tokens from 0 to {cfg.vocab_size - 1}, found {tokens.max()}; is it that tokenizer?")
    return faults


def check_rules(cfg: ModelConfig, lora: tuple[str, ...], rank: int, chosen: str) -> None:
    """Raise for rules that match nothing, on a model without values."""
    model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    if lora:
        select(model, lora, rank)
    elif not nnx.to_flat_state(nnx.state(model, Matching(chosen))):
        raise InputError(f"--train {chosen!r}: expected to match a parameter such as norm.scale, found none")


def batch_of(tokens: np.ndarray, step: int, batch: int, length: int) -> np.ndarray:
    """int32 [batch, length + 1]: windows of the text. The step alone decides which, so a resumed run sees the same ones."""
    starts = np.random.default_rng(step).integers(0, len(tokens) - length, batch)
    return np.stack([tokens[start : start + length + 1] for start in starts])


def loss_fn(model: Transformer, tokens: jax.Array) -> jax.Array:
    total, count = cross_entropy(model, tokens)
    return total / count


def optimizer(rate: float) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(rate / 10, rate, transition_steps=10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def step_of(graphdef: nnx.GraphDef, descent: optax.GradientTransformation):
    """A step of training, to be compiled: params, moments, frozen, tokens -> params, moments, loss."""

    def step(params, moments, frozen, tokens):
        loss, grads = jax.value_and_grad(lambda params: loss_fn(nnx.merge(graphdef, params, frozen), tokens))(params)
        updates, moments = descent.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    return step


def restore_step(manager: ocp.CheckpointManager, directory: Path, step: int, now: dict) -> Any:
    """The state of a step, placed as `now` is; of runs begun when LoRA parameters had other names, too."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, now)
    tree = ocp.PyTreeCheckpointHandler().metadata((directory / "default").absolute()).tree  # type: ignore[arg-type]
    before = any("lora_a" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])

    def renamed(rename, tree):
        states = lambda node: isinstance(node, nnx.State)  # noqa: E731
        return jax.tree.map(lambda node: rename(node) if states(node) else node, tree, is_leaf=states)

    if not before:
        return manager.restore(step, args=ocp.args.StandardRestore(like))
    return renamed(named_now, manager.restore(step, args=ocp.args.StandardRestore(renamed(named_before, like))))


def train(model: Transformer, trained, batches, steps: int, rate: float, mesh: jax.sharding.Mesh, state: Path, every: int):
    """The model after `steps` steps of Adam on `batches(step)`; its state is kept in `state`, and taken up from there."""
    descent = optimizer(rate)
    graphdef, params, frozen = nnx.split(model, trained, ...)
    everywhere = jax.NamedSharding(mesh, jax.P())  # the optimizer's step counts; its moments are where the parameters are
    moments = jax.tree.map(lambda a: a if a.ndim else jax.device_put(a, everywhere), descent.init(params))

    # What comes out of a step is placed as what went in; frozen parameters go in only.
    placed = jax.tree.map(lambda a: a.sharding, (params, moments))
    train_step = jax.jit(step_of(graphdef, descent), donate_argnums=(0, 1), out_shardings=(*placed, None))

    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=1)
    with ocp.CheckpointManager(state.absolute(), options=options) as manager, jax.set_mesh(mesh):
        done = manager.latest_step() or 0
        if done > steps:
            raise InputError(f"--steps: expected {done} or more, which {state.parent} has done already, found {steps}")
        if done:
            restored = restore_step(manager, state / str(done), done, {"params": params, "moments": moments})
            params, moments = restored["params"], restored["moments"]
            click.echo(f"resumed after step {done}")
        start = time.perf_counter()
        for step in range(done + 1, steps + 1):
            tokens = batches(step)
            params, moments, loss = train_step(params, moments, frozen, tokens)
            if step == done + 1:  # which is compiled first
                click.echo(f"step {step:5}   loss {float(loss):.4f}   {time.perf_counter() - start:.1f} s, compiling included")
                start = time.perf_counter()
            elif step % 10 == 0 or step == steps:
                loss = float(loss)  # waits for it
                speed = (step - done - 1) * tokens[:, 1:].size / (time.perf_counter() - start)
                click.echo(f"step {step:5}   loss {loss:.4f}   {speed:,.0f} tokens/s")
            manager.save(step, args=ocp.args.StandardSave({"params": params, "moments": moments}), force=step == steps)
        manager.wait_until_finished()
    return nnx.merge(graphdef, params, frozen)


def save(model: Transformer, base: Path, out: Path) -> None:
    """The result, beside what a reader needs to use it. Written aside and renamed: it is whole or not there."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial.absolute(), nnx.state(model))
    (partial / "trained.json").write_text(json.dumps({"base": str(base.resolve())}))  # whose bytes an export may keep
    for file in base.iterdir():
        if file.is_file() and not file.name.startswith("_") and file.name != "conversion.json":  # that is of the base
            shutil.copy2(file, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def pattern(_context, _option, value):
    """A click callback: regular expressions only."""
    for text in [value] if isinstance(value, str) else value:
        try:
            re.compile(text)
        except re.error as e:
            raise click.BadParameter(f"{text!r} is no regular expression ({e})") from None
    return value


AT_LEAST_1 = click.IntRange(min=1)


@click.command(help=(__doc__ or "").replace("\\b", "\b"))
@click.argument("src", type=click.Path())
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--mesh", default="fsdp=-1", show_default=True, help="Axes and sizes, such as fsdp=4,expert=2; -1: what is left.")
@click.option("--lora", multiple=True, metavar="REGEX", callback=pattern, help="Modules to adapt; may be repeated.")
@click.option("--rank", default=16, show_default=True, type=AT_LEAST_1, help="Of the LoRA updates.")
@click.option("--train", "chosen", default=".*", show_default=True, metavar="REGEX", callback=pattern, help="Without --lora.")
@click.option("--steps", default=100, show_default=True, type=AT_LEAST_1)
@click.option("--save-every", default=50, show_default=True, type=AT_LEAST_1)
@click.option("--batch", default=8, show_default=True, type=AT_LEAST_1)
@click.option("--length", default=256, show_default=True, type=AT_LEAST_1, help="Tokens a row.")
@click.option("--learning-rate", default=1e-4, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--compute", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--experts-qat", type=click.Choice(["best", "ocp", "ceil"]), help="Train for an export with this --quantizer.")
@click.option("--remat", type=click.Choice(["none", "mlp", "block"]), default="block", show_default=True)
def main(
    src, text, run, mesh, lora, rank, chosen, steps, save_every, batch, length, learning_rate, compute, experts_qat, remat
):
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
    check_rules(cfg, lora, rank, chosen)
    tokens = tokenize(text, src)
    what = {"source": str(src.resolve()), "text": str(text.resolve()), "lora": list(lora), "rank": rank, "train": chosen}
    how = {"batch": batch, "length": length, "learning_rate": learning_rate, "compute": compute, "experts_qat": experts_qat}
    raise_all([*text_faults(text, tokens, length, cfg), *differences(run / "run.json", what | how)])

    note(run / "run.json", what | how)
    with resumable():
        base = src if source is None else run / "base"
        if not is_orbax(base):
            convert(src, base, dtype="mxfp4" if source is not None and source.layout.packed else "bfloat16")
        model = create_model_from_checkpoint(base, cfg, devices)
        if lora:
            names, trained = add_lora(model, lora, rank, rngs=nnx.Rngs(0)), nnx.LoRAParam
        else:
            names, trained = [path for path, _ in nnx.to_flat_state(nnx.state(model, Matching(chosen)))], Matching(chosen)
        count = sum(a.size for a in jax.tree.leaves(nnx.state(model, trained)))
        click.echo(f"{len(names)} {'modules' if lora else 'parameters'}, {count:,} values trained on {dict(devices.shape)}")

        def batches(step: int) -> np.ndarray:
            return batch_of(tokens, step, batch, length)

        model = train(model, trained, batches, steps, learning_rate, devices, run / "steps", save_every)
        if lora:
            save_lora(model, run / "lora", lora)
            click.echo(f"updates: {run / 'lora'}")
            if model.cfg.param_dtype == "mxfp4" and any(str(name).endswith(("gate_up", "down")) for name in names):
                return  # packed experts cannot take theirs
            merge_lora(model)
        save(model, base, run / "model")
        click.echo(f"model: {run / 'model'}")


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
