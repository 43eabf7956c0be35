"""LoRA (arXiv:2106.09685) on linear maps and on experts, over parameters stored as values or packed MXFP4.

W·x becomes W·x + alpha / rank · B·(A·x). A and B are the `nnx.LoRAParam`s of a submodule `lora` of the map
(`oss_model.layers.LowRank`), in float32; an expert has its own. Libraries that find linear
maps by intercepting products miss those of the experts, which run inside loops and grouped products, and adapt the router
alone; here a rule names modules, and one that would do that is refused.
"""

import functools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from oss_model.config import ModelConfig
from oss_model.errors import raise_all
from oss_model.experts import ExpertLinear
from oss_model.layers import Linear, LowRank, contract
from oss_model.layouts import lora_shapes, parameter_name
from oss_model.lora_note import NOTE, Noted, read_note, write_note
from oss_model.modeling import Transformer
from oss_model.params import stored_parameters
from oss_model.restoring import replace_faults, restoring

Adaptable = Linear | ExpertLinear


def add_lora(
    model: Transformer, rules: str | Sequence[str], rank: int, alpha: float | int | None = None, *, rngs: nnx.Rngs
) -> list[str]:
    """Give every linear map that a rule matches low-rank parameters, in place. The model computes what it did: B is zero.

    Args:
      model: its parameters may be on a mesh; those added are placed on it too. Of one without values (`Loader.model`) they
        have none either.
      rules: regular expressions, each matched against whole module names: `layers.0.attn.q_proj`,
        `layers.0.mlp.gate_up`, …. `r".*(q|k|v|o)_proj"` is the attention of every layer, `r".*mlp\\.(gate_up|down)"` its
        experts.
      rank: of the update.
      alpha: the update is scaled by alpha / rank; `rank` if None.
      rngs: `params` is drawn from.

    Returns:
      The names of the modules adapted.

    Raises:
      InputError: for every rule that matches nothing, or only routers, and for a rank below 1.
    """
    adapted = select(model, rules, rank)
    for name, module in adapted.items():
        _add(module, lora_shapes(name, model.cfg, rank), model.cfg, rank if alpha is None else alpha, rngs)
    return list(adapted)


def select(model: Transformer, rules: str | Sequence[str], rank: int) -> dict[str, Adaptable]:
    """The modules, by name, that `add_lora` would adapt. `model` may be abstract (`nnx.eval_shape`).

    Raises:
      InputError: as `add_lora` does.
    """
    modules = dict(_adaptable(model))
    rules = [rules] if isinstance(rules, str) else list(rules)
    raise_all(_bad_patterns(rules))
    matched = {rule: [name for name in modules if re.fullmatch(rule, name)] for rule in rules}
    kinds = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in modules})
    faults = [f"LoRA rank: expected 1 or more, found {rank}"] if rank < 1 else []
    for rule, names in matched.items():
        if not names:
            faults.append(f"LoRA rule {rule!r}: expected to match a linear map, found no match; there are {', '.join(kinds)}")
        elif all(name.endswith(".router") for name in names):
            faults.append(f"LoRA rule {rule!r}: expected more than the router; the experts are mlp.gate_up and mlp.down")
    adapted = {name: module for name, module in modules.items() if any(name in names for names in matched.values())}
    faults += [f"{name}: expected no LoRA parameters yet, found some" for name, module in adapted.items() if _adapted(module)]
    raise_all(faults if rules else ["LoRA: expected at least one rule, found none"])
    return adapted


def merge_lora(model: Transformer) -> list[str]:
    """Fold the low-rank updates into the weights, in place: W + alpha / rank · B·A, rounded once to the stored dtype.

    Returns:
      The names of the modules that had one.

    Raises:
      InputError: if packed experts have one: their values cannot take it. The same LoRA parameters fit a model of
        bfloat16 experts, and merge there.
    """
    modules = {name: module for name, module in _adaptable(model) if _adapted(module)}
    packed = [name for name, module in modules.items() if hasattr(module, "blocks")]
    raise_all(
        [f"{name}: expected weights, found packed MXFP4, which cannot take an update; merge in bfloat16" for name in packed]
    )
    for module in modules.values():
        assert module.lora is not None
        weight, (a, b) = module.weight[...], module.lora.stored().values()
        if isinstance(module, ExpertLinear):
            update = jax.vmap(lambda b, a: contract("or,ri->oi", b.reshape(-1, b.shape[-1]), a))(b, a)
        else:
            update = contract("or,ri->oi", b.reshape(-1, b.shape[-1]), a.reshape(a.shape[0], -1))
        update = update.reshape(weight.shape)
        module.weight.set_value((weight.astype(jnp.float32) + update).astype(weight.dtype))
        del module.lora
    return list(modules)


def save_lora(model: Transformer, directory: str | os.PathLike, rules: str | Sequence[str] = ()) -> None:
    """Write the updates alone, as plain Orbax does, with each one's rank and alpha beside them in lora.json.

    Args:
      directory: a new one, or one written before, which is replaced; one with anything else in it is refused.
      rules: those of `add_lora`, to be noted too.

    Raises:
      InputError: if the model has none, or the directory holds something else.
    """
    modules = {name: module.lora for name, module in _adaptable(model) if module.lora is not None}
    path = Path(directory).absolute()
    without = f"{directory}: expected a model with LoRA parameters to save, found one without"
    raise_all([*([] if modules else [without]), *replace_faults(path, [NOTE])])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, nnx.state(model, nnx.LoRAParam), force=True)
    updates = {name: Noted(update.rank, float(update.alpha)) for name, update in modules.items()}
    if jax.process_index() == 0:
        write_note(path, updates, [rules] if isinstance(rules, str) else list(rules))


def load_lora(model: Transformer, directory: str | os.PathLike) -> list[str]:
    """Give the model the updates that `save_lora` wrote, in place, on the mesh that it is on.

    Those that scripts/examples/finetune.py wrote before there was a lora.json are read too: its alpha was the rank.

    Returns:
      The names of the modules that have one now.

    Raises:
      InputError: if there are none, or they do not fit the model.
    """
    path = Path(directory).absolute()
    found, modules = stored_parameters(path), dict(_adaptable(model))
    noted, before = read_note(path) or {}, any(name.endswith(".lora_b") for name in found)
    ends = (".lora_a", ".lora_b") if before else (".lora.a", ".lora.b")
    ranks = {name.removesuffix(ends[1]): shape[-1] for name, (shape, _) in found.items() if name.endswith(ends[1])}
    faults = [f"{path}: expected LoRA parameters, found none"] if not ranks else []
    for name, rank in ranks.items():
        if name not in modules:
            faults.append(f"{path}: {name}: expected a linear map of the model, found none of this name")
        elif modules[name].lora is not None:
            faults.append(f"{name}: expected no LoRA parameters yet, found some")
        elif name not in noted and not before:
            faults.append(f"{path / NOTE}: expected the rank and alpha of {name}, found neither")
        else:
            shapes = [found.get(name + end, ((), None))[0] for end in ends]
            if shapes != [(want := lora_shapes(name, model.cfg, rank))[0], want[1]]:
                faults.append(f"{path}: {name}: expected shapes {list(want)}, found {shapes}")
    raise_all(faults)
    for name, rank in ranks.items():
        _add(modules[name], lora_shapes(name, model.cfg, rank), model.cfg, rank if before else noted[name].alpha, nnx.Rngs(0))
    state = nnx.state(model, nnx.LoRAParam)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    like = named_before(like) if before else like
    with restoring(path), ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, like)
    nnx.update(model, named_now(restored) if before else restored)
    return list(ranks)


def named_before(state: nnx.State) -> nnx.State:
    """LoRA parameters under the names of releases before 0.1.0: q_proj.lora_a for q_proj.lora.a."""
    return nnx.from_flat_state([((*path[:-2], f"lora_{path[-1]}"), value) for path, value in nnx.to_flat_state(state)])


def named_now(state: nnx.State) -> nnx.State:
    """The way back."""
    return nnx.from_flat_state([((*path[:-1], *str(path[-1]).split("_")), value) for path, value in nnx.to_flat_state(state)])


def _bad_patterns(rules: Sequence[str]) -> list[str]:
    faults = []
    for rule in rules:
        try:
            re.compile(rule)
        except re.error as e:
            faults.append(f"LoRA rule {rule!r}: expected a regular expression, found one that is not ({e})")
    return faults


def _adaptable(model: Transformer) -> Iterator[tuple[str, Adaptable]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear | ExpertLinear):
            yield parameter_name(path), module


def _adapted(module: Adaptable) -> bool:
    return module.lora is not None


def _add(module: Adaptable, shapes: tuple[tuple[int, ...], ...], cfg: ModelConfig, alpha: float | int, rngs: nnx.Rngs) -> None:
    """A from a normal distribution of variance 1 / in, B zero (§4.1), on the mesh that the module is on."""
    expert = isinstance(module, ExpertLinear)
    value = (module.bias if expert else module.weight).get_value()
    placed, rank = value.sharding, shapes[1][-1]
    inputs = math.prod(shapes[0]) // rank // (shapes[0][0] if expert else 1)
    where = None
    if isinstance(placed, NamedSharding):
        specs = module.specs(cfg, placed.mesh.shape) if isinstance(module, ExpertLinear) else {}
        where = tuple(NamedSharding(placed.mesh, specs.get(name, PartitionSpec())) for name in ("lora_a", "lora_b"))
    if isinstance(value, jax.ShapeDtypeStruct):
        a, b = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=to) for s, to in zip(shapes, where or (None, None), strict=True))
    else:
        a, b = _initializer(*shapes, inputs**-0.5, where)(rngs.params())
    module.lora = LowRank(a, b, float(alpha))


@functools.cache  # a module of the same shape in the next layer needs no compilation of its own
def _initializer(a_shape: tuple[int, ...], b_shape: tuple[int, ...], scale: float, where: tuple[NamedSharding, ...] | None):
    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.random.normal(key, a_shape, jnp.float32) * scale, jnp.zeros(b_shape, jnp.float32)

    return jax.jit(init, out_shardings=where)
