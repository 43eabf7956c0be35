"""Fine-tune gpt-oss on a text file: convert, restore onto a mesh, train, save with plain Orbax.

    python scripts/finetune.py gpt-oss-20b notes.txt run --mesh fsdp=8 --steps 200
    python scripts/finetune.py gpt-oss-20b notes.txt run --lora '.*(q|k|v|o)_proj' --lora '.*mlp\\.(gate_up|down)'

Without --lora every parameter that --train matches is trained, in float32. With --lora the experts stay packed MXFP4 and
only low-rank updates are trained. The same command goes on where a killed run, or one of fewer --steps, stopped.

RUN/base is the converted checkpoint, RUN/steps what a resumed run needs, RUN/model the result: a checkpoint like the one
convert-oss makes. Low-rank updates are in RUN/lora, and folded into RUN/model, unless they are of packed experts.
"""

import dataclasses
import math
import re
import shutil
import time
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from converter import convert
from oss_model import InputError, ModelConfig, Transformer, add_lora, create_model_from_checkpoint, merge_lora
from oss_model.params import is_orbax, parameter_name


def tokenize(text: Path, checkpoint: Path) -> np.ndarray:
    """int32 [tokens]: by the checkpoint's tokenizer, or, where it has none, the bytes themselves."""
    if (checkpoint / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        return np.array(Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text.read_text()).ids, np.int32)
    return np.frombuffer(text.read_bytes(), np.uint8).astype(np.int32)


def batch_of(tokens: np.ndarray, step: int, batch: int, length: int) -> np.ndarray:
    """int32 [batch, length + 1]: windows of the text. The step alone decides which, so a resumed run sees the same ones."""
    starts = np.random.default_rng(step).integers(0, len(tokens) - length, batch)
    return np.stack([tokens[start : start + length + 1] for start in starts])


def loss_fn(model: Transformer, tokens: jax.Array) -> jax.Array:
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def save(model: nnx.Module, base: Path, out: Path) -> None:
    """The result, beside what a reader needs to use it. Written aside and renamed: it is whole or not there."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial.absolute(), nnx.state(model))
    if jax.process_index() == 0:
        for file in base.iterdir():
            if file.is_file() and not file.name.startswith("_") and file.name != "conversion.json":  # that is of the base
                shutil.copy2(file, partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)


def make_mesh(text: str) -> jax.sharding.Mesh:
    """`fsdp=4,expert=2`: the devices there are, cut so; a size of -1 is what is left."""
    found = re.fullmatch(r"\w+=-?\d+(,\w+=-?\d+)*", text)
    if not found:
        raise InputError(f"--mesh: expected axes and sizes such as fsdp=4,expert=2, found {text!r}")
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    count = jax.device_count()
    left = count // math.prod(size for size in sizes.values() if size > 0)
    sizes = {axis: left if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != count:
        raise InputError(f"--mesh: expected sizes that multiply to {count} device{'s' * (count > 1)}, found {text}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


@click.command(help=__doc__)
@click.argument("src", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--mesh", default="fsdp=-1", show_default=True, help="Axes and sizes, such as fsdp=4,expert=2; -1: what is left.")
@click.option("--lora", multiple=True, metavar="REGEX", help="Modules to adapt; may be repeated.")
@click.option("--rank", default=16, show_default=True, help="Of the LoRA updates.")
@click.option("--train", default=".*", show_default=True, metavar="REGEX", help="Parameters to train without --lora.")
@click.option("--steps", default=100, show_default=True)
@click.option("--save-every", default=50, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--length", default=256, show_default=True, help="Tokens a row.")
@click.option("--learning-rate", default=1e-4, show_default=True)
@click.option("--compute", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--remat", type=click.Choice(["none", "mlp", "block"]), default="block", show_default=True)
def main(src, text, run, mesh, lora, rank, train, steps, save_every, batch, length, learning_rate, compute, remat):
    # 1. Convert, once. A checkpoint that is converted already is used as it is.
    base = src if is_orbax(src) else run / "base"
    if not is_orbax(base):
        convert(src, base, dtype="mxfp4" if lora else "float32")
    tokens = tokenize(text, base)
    if len(tokens) <= length:
        raise InputError(f"{text}: expected more than {length} tokens (--length), found {len(tokens)}")

    # 2. Restore straight onto the mesh.
    mesh = make_mesh(mesh)
    cfg = dataclasses.replace(ModelConfig.from_json(base / "config.json"), dtype=np.dtype(compute), remat=remat)
    model = create_model_from_checkpoint(base, cfg, mesh)

    # 3. What is trained, and how.
    if lora:
        names, trained = add_lora(model, lora, rank, rngs=nnx.Rngs(0)), nnx.LoRAParam
    else:
        trained = Matching(train)
        names = [parameter_name(path) for path, _ in nnx.to_flat_state(nnx.state(model, trained))]
        if not names:
            raise InputError(
                f"--train {train!r}: expected to match a parameter such as layers.0.attn.q_proj.weight, found none"
            )
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps=min(10, steps // 4), decay_steps=steps)
    descent = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0))
    graphdef, params, frozen = nnx.split(model, trained, ...)
    everywhere = jax.NamedSharding(mesh, jax.P())  # the optimizer's step counts; its moments are where the parameters are
    moments = jax.tree.map(lambda a: a if a.ndim else jax.device_put(a, everywhere), descent.init(params))
    count = sum(a.size for a in jax.tree.leaves(params))
    click.echo(f"{len(names)} {'modules' if lora else 'parameters'}, {count:,} values trained on {dict(mesh.shape)}")

    def train_step(params, moments, frozen, tokens):
        loss, grads = jax.value_and_grad(lambda params: loss_fn(nnx.merge(graphdef, params, frozen), tokens))(params)
        updates, moments = descent.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    # What comes out of a step is placed as what went in; frozen parameters go in only.
    placed = jax.tree.map(lambda a: a.sharding, (params, moments))
    train_step = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*placed, None))

    # 4. Train; the state of a killed run is taken up.
    options = ocp.CheckpointManagerOptions(save_interval_steps=save_every, max_to_keep=1)
    with ocp.CheckpointManager((run / "steps").absolute(), options=options) as manager, jax.set_mesh(mesh):
        done = manager.latest_step() or 0
        if done:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "moments": moments})
            restored = manager.restore(done, args=ocp.args.StandardRestore(like))
            params, moments = restored["params"], restored["moments"]
            click.echo(f"resumed after step {done}")
        start = time.perf_counter()
        for step in range(done + 1, steps + 1):
            params, moments, loss = train_step(params, moments, frozen, batch_of(tokens, step, batch, length))
            if step % 10 == 0 or step in (done + 1, steps):
                speed = (step - done) * batch * length / (time.perf_counter() - start)
                click.echo(f"step {step:5}   loss {float(loss):.4f}   {speed:,.0f} tokens/s")
            state = ocp.args.StandardSave({"params": params, "moments": moments})
            manager.save(step, args=state, force=step == steps)
        manager.wait_until_finished()
    model = nnx.merge(graphdef, params, frozen)

    # 5. Save the model with plain Orbax.
    if lora:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((run / "lora").absolute(), nnx.state(model, nnx.LoRAParam), force=True)
        click.echo(f"updates: {run / 'lora'}")
        if model.cfg.param_dtype == "mxfp4" and any(name.endswith(("gate_up", "down")) for name in names):
            return  # packed experts cannot take theirs
        merge_lora(model)
    save(model, base, run / "model")
    click.echo(f"model: {run / 'model'}")


@dataclasses.dataclass(frozen=True)
class Matching:
    """A filter of `flax.nnx`: the parameters whose whole name matches."""

    pattern: str

    def __call__(self, path: tuple, value: object) -> bool:
        return isinstance(value, nnx.Param) and re.fullmatch(self.pattern, parameter_name(path)) is not None


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        click.echo("\n".join(e.faults), err=True)
        raise SystemExit(2) from None
