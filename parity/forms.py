"""The ways people run the model, each against the reference: compiled, on a mesh, on the cache, generating, training, adapted.

Each takes what the reference answered for its rows, and for how many tokens to generate, and gives its own.
What is run is `create_model_from_checkpoint` and `Transformer` as they are called: nothing here computes a part of the model.
Every form gives what the reference can be asked for too (`parity.protocols.Answers`): logits of rows of unequal length, the
tokens that follow them, gradients, or logits with a low-rank update. Meshes need devices: where there are not enough, a child
process with simulated ones runs those forms (`python -m parity.forms`).
"""

import dataclasses
import functools
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oss_model import ModelConfig, Transformer, add_lora, create_model_from_checkpoint, generate, init_cache, merge_lora
from oss_model.cache import EMPTY
from oss_model.layouts import lora_shapes, parameter_name
from oss_model.lora import select
from oss_model.params import is_orbax, stored_config
from oss_model.scanned import scanned
from oss_model.shards import Checkpoint
from oss_model.taps import Layer, tapping
from parity.device import here
from parity.handing import Job, Result, read_job, read_results, write_job, write_results
from parity.protocols import CALL, RETURNED, Answers, Arrays, Taps, Updates, padding_of

LOGITS, TOKENS, GRADIENTS, UPDATED = "logits", "tokens", "gradients", "updated logits"
LORA_RULES, LORA_RANK, LORA_ALPHA = (r".*attn\.(q|k|v|o)_proj", r".*mlp\.(gate_up|down)"), 3, 6.0


class Subject(NamedTuple):
    """What is loaded, and how it is computed."""

    path: Path
    cfg: ModelConfig


WATCHED = "watched"
BLOCK = 8  # of attention: several of them in a short row
LONG_FORM = "long"  # asked for by itself, never among the others
Run = Callable[[Subject, Answers], list[np.ndarray] | Arrays]


class RunForm(NamedTuple):
    """
    Attributes:
      gives: what it is compared with.
      run: rows of logits [length, vocab] or of tokens, in the order asked, or gradients by name.
      default: whether `--layers` runs it.
      devices: that it needs.
      stored: "packed" or "values" where it takes experts so.
    """

    gives: str
    run: Run
    default: bool = False
    devices: int = 1
    stored: str = ""


# --- a batch ----------------------------------------------------------------------------------------------------


def batch(rows: Sequence[np.ndarray], left: bool = True) -> tuple[jax.Array, jax.Array]:
    """Tokens and positions, int32 [rows, longest]; padding has a negative position."""
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), longest), np.int32)
    positions = np.full((len(rows), longest), EMPTY, np.int32)
    for n, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        tokens[n, place], positions[n, place] = row, np.arange(len(row))
    return jnp.asarray(tokens), jnp.asarray(positions)


def unpadded(values: jax.Array, positions: jax.Array) -> list[np.ndarray]:
    """Of each row what is not padding."""
    real = np.asarray(positions) >= 0
    return [row[kept] for row, kept in zip(np.asarray(values.astype(jnp.float32)), real, strict=True)]


class Watch:
    """The taps of every call that is made meanwhile, put together by row and position; of padding by row alone.

    Values leave compiled code by `jax.debug.callback`: what was compiled without it is forgotten before and after.
    """

    def __init__(self):
        self.found: dict[tuple[int | None, str], dict[int, dict[int, np.ndarray]]] = {}
        self.padding: dict[tuple[int | None, str], dict[int, list[np.ndarray]]] = {}
        self.positions, self.calls = np.zeros((0, 0), np.int32), 0

    def __enter__(self) -> "Watch":
        jax.clear_caches()
        self.hook = tapping(self.see)
        self.hook.__enter__()
        self.token = _watch.set(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _watch.reset(self.token)
        self.hook.__exit__(*error)
        jax.clear_caches()

    def see(self, layer: Layer, name: str, value: jax.Array) -> jax.Array:
        numbered = -1 if layer is None else layer  # of scanned layers it is traced
        jax.debug.callback(functools.partial(self.keep, name), numbered, value)
        return value

    def keep(self, name: str, number: Any, value: Any) -> None:
        layer = int(number) if number >= 0 else None
        kept, rows = self.found.setdefault((layer, name), {}), np.asarray(value)
        padding = self.padding.setdefault((layer, padding_of(name)), {})
        if rows.dtype != np.int32:
            rows = rows.astype(np.float32)
        if rows.size % self.positions.size:
            return
        rows = rows.reshape(*self.positions.shape, -1)
        for row, column in np.ndindex(self.positions.shape):
            if (position := int(self.positions[row, column])) >= 0:
                kept.setdefault(row, {})[position] = rows[row, column]
            else:
                padding.setdefault(row, []).append(rows[row, column])

    def called(self, positions: np.ndarray) -> None:
        """A call of the model at these positions is made next."""
        self.positions, self.calls = positions, self.calls + 1
        self.keep(CALL, -1, np.full(positions.shape, self.calls - 1, np.int32))

    def rows(self, lengths: Sequence[int]) -> Taps:
        """Of each tap and row [length, ...]; those that were not seen at every position of every row are left out."""
        whole: Taps = {}
        for place, kept in self.found.items():
            if all(len(kept.get(row, ())) == length for row, length in enumerate(lengths)):
                whole[place] = [np.stack([kept[row][at] for at in range(length)]) for row, length in enumerate(lengths)]
        if (None, CALL) in whole:
            whole[None, CALL] = [calls[:, 0] for calls in whole[None, CALL]]
        for place, kept in self.padding.items():
            whole[place] = [np.stack(kept[row]) if row in kept else np.zeros((0, 1)) for row in range(len(lengths))]
        return whole


_watch: ContextVar[Watch | None] = ContextVar("parity_watch", default=None)


def _call(function: Callable[..., Any], model: Transformer, tokens: jax.Array, positions: jax.Array, *rest: Any) -> Any:
    """A call of the model whose tokens lie at these positions."""
    if (watch := _watch.get()) is not None:
        watch.called(np.asarray(positions))
    out = function(model, tokens, *rest)
    if watch is not None:
        jax.block_until_ready(out)
        jax.effects_barrier()
    return out


# --- logits -----------------------------------------------------------------------------------------------------


@nnx.jit
def _logits(model: Transformer, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    return model(tokens, positions)


def load(subject: Subject, mesh: Any = None, **changes: Any) -> Transformer:
    return create_model_from_checkpoint(subject.path, dataclasses.replace(subject.cfg, **changes), mesh)


def eager(subject: Subject, asked: Answers, left: bool = False, **changes: Any) -> list[np.ndarray]:
    tokens, positions = batch(asked.rows, left)
    model = load(subject, **changes)
    return unpadded(_call(Transformer.__call__, model, tokens, positions, positions), positions)


def jitted(subject: Subject, asked: Answers, left: bool = True, **changes: Any) -> list[np.ndarray]:
    tokens, positions = batch(asked.rows, left)
    return unpadded(_call(_logits, load(subject, **changes), tokens, positions, positions), positions)


def devices() -> list[Any]:
    """Those of the kind that is computed on."""
    return jax.devices(here().platform)


def in_one_loop(subject: Subject, asked: Answers) -> list[np.ndarray]:
    tokens, positions = batch(asked.rows)
    return unpadded(_call(_logits, scanned(load(subject)), tokens, positions, positions), positions)


def on_mesh(subject: Subject, asked: Answers, *, axes: dict[str, int]) -> list[np.ndarray]:
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices()[: math.prod(axes.values())])
    tokens, positions = batch(asked.rows)
    if "context" in axes:  # a length that it can cut into slices longer than the window
        longest, halves = tokens.shape[1], 2 * axes["context"]
        room = math.ceil(max(longest, subject.cfg.sliding_window * axes["context"]) / halves) * halves - longest
        tokens, positions = (
            jnp.pad(a, ((0, 0), (0, room)), constant_values=value) for a, value in ((tokens, 0), (positions, EMPTY))
        )
    with jax.set_mesh(mesh):
        return unpadded(_call(_logits, load(subject, mesh), tokens, positions, positions), positions)


# --- the cache --------------------------------------------------------------------------------------------------


@nnx.jit
def _step(model: Transformer, tokens: jax.Array, positions: jax.Array, cache: Any) -> Any:
    return model(tokens, positions, cache)


@nnx.jit
def _next(model: Transformer, tokens: jax.Array, cache: Any) -> Any:
    return model(tokens, cache=cache)


def cached(
    subject: Subject,
    asked: Answers,
    *,
    left: bool = True,
    pieces: Callable[[int, int], list[int]] = lambda length, window: [],
    **changes: Any,
) -> list[np.ndarray]:
    """A prefill and then a token at a time, each row at its own place; its first part in `pieces` (of length and window)."""
    model, window = load(subject, **changes), subject.cfg.sliding_window
    steps = min(window + 2, min(map(len, asked.rows)) - 1)
    firsts = [row[: len(row) - steps] for row in asked.rows]
    tokens, positions = batch(firsts, left)
    cache, out, start = init_cache(model.cfg, len(firsts), max(map(len, asked.rows))), [], 0
    for size in pieces(tokens.shape[1], window) or [tokens.shape[1]]:
        part = slice(start, start + size)
        logits, cache = _call(_step, model, tokens[:, part], positions[:, part], positions[:, part], cache)
        out.append(logits)
        start += size
    got = unpadded(jnp.concatenate(out, axis=1), positions)
    for t in range(steps):
        places = jnp.asarray([[len(row) - steps + t] for row in asked.rows], jnp.int32)
        new = jnp.asarray([[row[len(row) - steps + t]] for row in asked.rows], jnp.int32)
        logits, cache = _call(_next, model, new, places, cache)
        got = [np.concatenate([row, one]) for row, one in zip(got, np.asarray(logits.astype(jnp.float32)), strict=True)]
    return got


def in_pieces(length: int, window: int) -> list[int]:
    """Around the window: a few tokens, more than a ring holds, and the rest."""
    sizes, left = [], length
    for size in (3, window + 2, 3):
        sizes.append(min(size, left))
        left -= sizes[-1]
    return [size for size in (*sizes, left) if size]


# --- generating -------------------------------------------------------------------------------------------------


def generated(subject: Subject, asked: Answers, ends: bool = False) -> list[np.ndarray]:
    rows = [row.tolist() for row in asked.rows]
    made = generate(load(subject), rows, len(asked.made[0]), eos=asked.eos if ends else ())
    return [np.array(row, np.int64) for row in made]


# --- training ---------------------------------------------------------------------------------------------------


def gradients(subject: Subject, asked: Answers, **changes: Any) -> Arrays:
    """d mean cross entropy of the next token / d parameter, float32, by the model's own routing."""
    model, tokens = load(subject, **changes), jnp.asarray(asked.rows[0][None], jnp.int32)
    graphdef, state = nnx.split(model)
    # Gradients come in their parameter's dtype, and bfloat16 would hide a difference.
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, state)
    found = _gradients(nnx.merge(graphdef, state), tokens)
    return {parameter_name(path): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(found)}


@nnx.jit
def _gradients(model: Transformer, tokens: jax.Array) -> nnx.State:
    def loss(model: Transformer) -> jax.Array:
        likelihood = jax.nn.log_softmax(model(tokens)[:, :-1], axis=-1)
        return -jnp.mean(jnp.take_along_axis(likelihood, tokens[:, 1:, None], axis=-1))

    return nnx.grad(loss)(model)


# --- LoRA -------------------------------------------------------------------------------------------------------


def updates(cfg: ModelConfig, seed: int = 0) -> Updates:
    """A low-rank update of every map that the rules match, by module: A [rank, in…] and B [out…, rank], of experts each."""
    modules = select(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))), LORA_RULES, LORA_RANK)
    found = {}
    for number, name in enumerate(modules):
        rng, (a, b) = np.random.default_rng([seed, number]), lora_shapes(name, cfg, LORA_RANK)
        inputs = math.prod(a[2:] if name.endswith(("gate_up", "down")) else a[1:])
        values = rng.standard_normal(a) * inputs**-0.5, rng.standard_normal(b) * 0.1
        found[name] = values[0].astype(np.float32), values[1].astype(np.float32)
    return found


def _adapted(model: Transformer) -> Transformer:
    add_lora(model, LORA_RULES, LORA_RANK, LORA_ALPHA, rngs=nnx.Rngs(0))
    return model


def lora(subject: Subject, asked: Answers, *, merged: bool) -> list[np.ndarray]:
    model, tokens, positions = _adapted(load(subject, param_dtype="float32")), *batch(asked.rows)
    values = updates(subject.cfg)
    state = nnx.state(model, nnx.LoRAParam)
    for path, variable in nnx.to_flat_state(state):
        name, leaf = parameter_name(path).rsplit(".lora.", 1)
        variable.set_value(jnp.asarray(values[name]["ab".index(leaf)]))
    nnx.update(model, state)
    if merged:
        merge_lora(model)
    return unpadded(_call(_logits, model, tokens, positions, positions), positions)


def lora_zero(subject: Subject, asked: Answers) -> list[np.ndarray]:
    tokens, positions = batch(asked.rows)
    return unpadded(_call(_logits, _adapted(load(subject)), tokens, positions, positions), positions)


# --- the table --------------------------------------------------------------------------------------------------


def _mesh(default: bool = False, **axes: int) -> RunForm:
    return RunForm(LOGITS, functools.partial(on_mesh, axes=axes), default, math.prod(axes.values()))


def table(cfg: ModelConfig) -> dict[str, RunForm]:
    """A form's name -> what it is, for a model of these sizes."""
    experts = next((n for n in range(2, 9) if cfg.num_experts % n == 0), 2)
    return {
        "eager": RunForm(LOGITS, eager),
        "jit": RunForm(LOGITS, jitted, default=True),
        "path loop": RunForm(LOGITS, functools.partial(eager, expert_path="loop")),
        "path scan": RunForm(LOGITS, functools.partial(jitted, expert_path="scan")),
        "path grouped": RunForm(LOGITS, functools.partial(jitted, expert_path="grouped")),
        "path pairs": RunForm(LOGITS, functools.partial(jitted, expert_path="pairs")),
        "path ragged": RunForm(LOGITS, functools.partial(jitted, expert_path="ragged")),
        "scanned": RunForm(LOGITS, in_one_loop),
        "attention in blocks": RunForm(LOGITS, functools.partial(jitted, attention_block=BLOCK)),
        "cache, in blocks": RunForm(LOGITS, functools.partial(cached, pieces=in_pieces, attention_block=BLOCK)),
        "gradients in blocks": RunForm(GRADIENTS, functools.partial(gradients, attention_block=BLOCK)),
        "values": RunForm(LOGITS, jitted, stored="values"),
        "packed": RunForm(LOGITS, jitted, default=True, stored="packed"),
        "mesh fsdp": _mesh(fsdp=2),
        "mesh tensor": _mesh(tensor=2),
        "mesh expert": _mesh(expert=experts),
        "mesh context": _mesh(context=2),
        "mesh fsdp × tensor": _mesh(default=True, fsdp=2, tensor=2),
        "mesh fsdp × tensor × expert": _mesh(fsdp=2, tensor=2, expert=2),
        "cache": RunForm(LOGITS, cached, default=True),
        "cache, padding on the right": RunForm(LOGITS, functools.partial(cached, left=False)),
        "cache, in pieces": RunForm(LOGITS, functools.partial(cached, pieces=in_pieces)),
        "cache, token by token": RunForm(LOGITS, functools.partial(cached, pieces=lambda length, window: [1] * length)),
        "generate": RunForm(TOKENS, generated, default=True),
        "generate, eos": RunForm(TOKENS, functools.partial(generated, ends=True), default=True),
        "remat mlp": RunForm(GRADIENTS, functools.partial(gradients, remat="mlp")),
        "remat block": RunForm(GRADIENTS, functools.partial(gradients, remat="block")),
        "lora zero": RunForm(LOGITS, lora_zero),
        "lora": RunForm(UPDATED, functools.partial(lora, merged=False)),
        "lora merged": RunForm(UPDATED, functools.partial(lora, merged=True)),
        LONG_FORM: RunForm(LOGITS, jitted),
    }


class Forms:
    """`parity.protocols.FormsSubject` of our model.

    Args:
      path: an Orbax checkpoint, or a safetensors directory.
      cfg: its configuration.
      packed: a safetensors directory with the same experts as MXFP4, where `path` has values; None if there is none.
    """

    def __init__(self, path: Path, cfg: ModelConfig, packed: Path | None = None):
        self.path, self.cfg = path, dataclasses.replace(cfg, expert_path="auto", param_dtype=None, remat="none")
        self.packed = packed

    @functools.cached_property
    def holds_packed(self) -> bool:
        if not is_orbax(self.path):
            return Checkpoint(self.path, ignore=None).layout.packed
        return stored_config(self.path, self.cfg)[0].param_dtype == "mxfp4"

    @property
    def updates(self) -> tuple[Updates, float]:
        return updates(self.cfg), LORA_ALPHA

    def forms(self, everything: bool) -> dict[str, str]:
        there = {"packed": self.holds_packed or self.packed is not None}
        return {
            name: form.gives
            for name, form in table(self.cfg).items()
            if name != LONG_FORM and (everything or form.default) and there.get(form.stored, True)
        }

    def of(self, source: Path) -> "Forms":
        return Forms(source, dataclasses.replace(ModelConfig.from_json(source / "config.json")))

    def run(self, runs: list[tuple[str, str]], asked: Answers) -> Iterator[tuple[str, str, Result]]:
        elsewhere = [one for one in runs if table(self.cfg)[one[0]].devices > len(devices())]
        for form, dtype in runs:
            if (form, dtype) not in elsewhere:
                yield form, dtype, self.one(form, dtype, asked)
        if elsewhere:
            yield from self._simulated(elsewhere, asked)

    def watch(self, form: str, asked: Answers) -> Taps:
        """Of a form that gives logits, each tap's rows [length, ...]; empty where that cannot be."""
        if table(self.cfg)[form].devices > len(devices()):
            found = next(self._simulated([(form, WATCHED)], asked))[2]
        else:
            found = self.one(form, WATCHED, asked)
        return {} if isinstance(found, str) else found  # type: ignore[return-value]

    def one(self, name: str, dtype: str, asked: Answers) -> Any:
        """In this process; with WATCHED for a dtype, what it computes in float32 on the way."""
        if dtype == WATCHED:
            with Watch() as watch:
                returned = self.one(name, "float32", asked)
            found = watch.rows([len(row) for row in asked.rows])
            return found | ({(None, RETURNED): returned} if isinstance(returned, list) else {})
        form, path = table(self.cfg)[name], self.path
        held = {"packed": "mxfp4", "values": "bfloat16" if self.holds_packed else None}.get(form.stored)
        if form.stored == "packed" and not self.holds_packed:
            assert self.packed is not None
            path = self.packed
        try:
            return form.run(Subject(path, dataclasses.replace(self.cfg, dtype=np.dtype(dtype), param_dtype=held)), asked)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _simulated(self, runs: list[tuple[str, str]], asked: Answers) -> Iterator[tuple[str, str, Any]]:
        """In a child process with simulated devices."""
        with tempfile.TemporaryDirectory() as scratch:
            write_job(Path(scratch), Job(self.path, self.cfg, self.packed, runs, asked))
            devices = max(table(self.cfg)[form].devices for form, _ in runs)
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
            environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, "-m", "parity.forms", scratch]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            found = read_results(Path(scratch))
            if found is None:
                last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
                found = [f"its process with {devices} simulated devices ended: {last}"] * len(runs)
            for (form, dtype), one in zip(runs, found, strict=True):
                yield form, dtype, one


def main(scratch: str) -> None:
    """A child's: runs the job in `scratch`, and writes there what that gave."""
    job = read_job(Path(scratch))
    subject = Forms(job.path, job.cfg, job.packed)
    write_results(Path(scratch), [subject.one(form, dtype, job.asked) for form, dtype in job.runs])


if __name__ == "__main__":
    main(*sys.argv[1:])
