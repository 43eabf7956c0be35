"""LoRA (arXiv:2106.09685) on linear maps and on experts, over parameters stored as values or packed MXFP4.

W·x becomes W·x + alpha / rank · B·(A·x). A and B are `nnx.LoRAParam`s beside the weight: lora_a [rank, *in] and lora_b
[*out, rank], in float32; an expert has its own: [experts, rank, in] and [experts, *out, rank]. Libraries that find linear
maps by intercepting products miss those of the experts, which run inside loops and grouped products, and adapt the router
alone; here a rule names modules, and one that would do that is refused.
"""

import functools
import math
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from oss_model.config import ModelConfig
from oss_model.errors import raise_all
from oss_model.experts import ExpertLinear
from oss_model.layers import Linear, contract
from oss_model.layouts import parameter_name
from oss_model.modeling import Transformer

Adaptable = Linear | ExpertLinear


def add_lora(
    model: Transformer, rules: str | Sequence[str], rank: int, alpha: float | int | None = None, *, rngs: nnx.Rngs
) -> list[str]:
    """Give every linear map that a rule matches low-rank parameters, in place. The model computes what it did: B is zero.

    Args:
      model: its parameters may be on a mesh; those added are placed on it too.
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
    for module in adapted.values():
        _add(module, model.cfg, rank, rank if alpha is None else alpha, rngs)
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
        weight, a, b = module.weight[...], module.lora_a[...], module.lora_b[...]
        if isinstance(module, ExpertLinear):
            update = jax.vmap(lambda b, a: contract("or,ri->oi", b.reshape(-1, b.shape[-1]), a))(b, a)
        else:
            update = contract("or,ri->oi", b.reshape(-1, b.shape[-1]), a.reshape(a.shape[0], -1))
        update = update.reshape(weight.shape)
        module.weight.set_value((weight.astype(jnp.float32) + module.lora_scale * update).astype(weight.dtype))
        del module.lora_a, module.lora_b, module.lora_scale
    return list(modules)


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
    return hasattr(module, "lora_a")


def _add(module: Adaptable, cfg: ModelConfig, rank: int, alpha: float | int, rngs: nnx.Rngs) -> None:
    """A from a normal distribution of variance 1 / in, B zero (§4.1), on the mesh that the module is on."""
    if isinstance(module, ExpertLinear):
        placed = module.bias[...].sharding
        (experts, *out), inputs = module.bias.shape, (cfg.axes[module.width],)
        a_shape, b_shape = (experts, rank, *inputs), (experts, *out, rank)
    else:
        placed = module.weight[...].sharding
        out, inputs = module.weight.shape[: -module.inputs], module.weight.shape[-module.inputs :]
        a_shape, b_shape = (rank, *inputs), (*out, rank)
    where = None
    if isinstance(placed, NamedSharding):
        specs = module.specs(cfg, placed.mesh.shape) if isinstance(module, ExpertLinear) else {}
        where = tuple(NamedSharding(placed.mesh, specs.get(name, PartitionSpec())) for name in ("lora_a", "lora_b"))
    a, b = _initializer(a_shape, b_shape, math.prod(inputs) ** -0.5, where)(rngs.params())
    module.lora_a, module.lora_b, module.lora_scale = nnx.LoRAParam(a), nnx.LoRAParam(b), alpha / rank


@functools.cache  # a module of the same shape in the next layer needs no compilation of its own
def _initializer(a_shape: tuple[int, ...], b_shape: tuple[int, ...], scale: float, where: tuple[NamedSharding, ...] | None):
    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.random.normal(key, a_shape, jnp.float32) * scale, jnp.zeros(b_shape, jnp.float32)

    return jax.jit(init, out_shardings=where)
