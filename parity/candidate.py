"""The side that is judged: our `Transformer`, from an Orbax checkpoint, one layer at a time.

The taps come out of the blocks people train with: `oss_model.taps` watches and feeds them. A layer's parameters are
restored by plain Orbax when it is its turn, and freed after.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from oss_model import ModelConfig, Transformer, TransformerBlock, moe
from oss_model.params import abstract_model, parameter_name, stored_parameters
from oss_model.taps import LAYER_TAPS, tapping

Arrays = dict[str, np.ndarray]
Module = TypeVar("Module", bound=nnx.Module)


class Candidate:
    """A converted checkpoint, computed in float32.

    Attributes:
      cfg: from the checkpoint's own config.json.
      stored: name -> (shape, dtype) of every parameter in the checkpoint.

    Raises:
      InputError: if the directory is no Orbax checkpoint, or has no usable config.json.
    """

    def __init__(self, checkpoint: str | Path):
        self.path = Path(checkpoint).absolute()
        self.stored = stored_parameters(self.path)
        self.packed = any(name.endswith(".blocks") for name in self.stored)
        cfg = ModelConfig.from_json(self.path / "config.json")
        self.cfg = dataclasses.replace(cfg, dtype=jnp.float32, param_dtype="mxfp4" if self.packed else "bfloat16")

    def restore(self, names: list[str]) -> Arrays:
        """Read parameters as stored, with plain Orbax."""
        tree: dict = {}
        for name in names:
            *branches, leaf = name.split(".")
            node = functools.reduce(lambda node, part: node.setdefault(part, {}), branches, tree)
            shape, dtype = self.stored[name]
            node[leaf] = {"value": jax.ShapeDtypeStruct(shape, dtype)}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        request = ocp.args.PyTreeRestore(item=tree, restore_args=as_numpy, partial_restore=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(self.path, args=request)
        found: Arrays = {}
        for name in names:
            node: Any = tree
            for part in (*name.split("."), "value"):
                node = node[part]
            found[name] = node
        return found

    def layer_names(self, n: int) -> list[str]:
        return [name for name in self.stored if name.startswith(f"layers.{n}.")]

    @functools.cached_property
    def structure(self) -> tuple[nnx.GraphDef, nnx.State]:
        return abstract_model(self.cfg)

    def _filled(self, module: Module, arrays: Mapping[str, np.ndarray], prefix: str) -> Module:
        """An abstract module of the real model, with these arrays for parameters."""
        graphdef, state = nnx.split(module)
        for path, variable in nnx.to_flat_state(state):
            variable.set_value(jnp.asarray(arrays[prefix + parameter_name(path)]))
        return nnx.merge(graphdef, state)

    def block(self, n: int, arrays: Arrays) -> TransformerBlock:
        """Layer n of the real model. Every layer of a type is built from the same one, so that jit compiles it once."""
        like = self.cfg.layer_types.index(self.cfg.layer_types[n])
        return self._filled(nnx.merge(*self.structure).layers[like], arrays, f"layers.{n}.")

    def embed(self, tokens: np.ndarray, arrays: Arrays) -> jax.Array:
        return self._filled(nnx.merge(*self.structure).embedding, arrays, "embedding.")(jnp.asarray(tokens, jnp.int32))

    def unembed(self, x: jax.Array, arrays: Arrays, forced: Arrays) -> Arrays:
        """`final_norm` and `logits`, each from its own input where `forced` has one."""
        model: Transformer = nnx.merge(*self.structure)
        model.norm = self._filled(model.norm, arrays, "norm.")
        model.lm_head = self._filled(model.lm_head, arrays, "lm_head.")
        seen: dict[str, jax.Array] = {}
        with tapping(_watch(seen, forced)):
            model.unembed(x)
        return {name: np.asarray(value) for name, value in seen.items()}

    def run(self, block: TransformerBlock, x: jax.Array, forced: Arrays) -> Arrays:
        """Every tap of one layer.

        Args:
          block: the layer.
          x: [batch, length, hidden], its input.
          forced: tap -> value to go on with in place of the block's own.
        """
        length = x.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], x.shape[:2])
        rope = nnx.merge(*self.structure).rope
        given = {name: jnp.asarray(forced[name]) for name in LAYER_TAPS if name in forced}
        return {name: np.asarray(value) for name, value in _run(block, rope, x, positions, given).items()}

    def experts(self, block: TransformerBlock, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The experts alone, on a routing of one's own: x [tokens, hidden], choice and weights [tokens, k]."""
        return np.asarray(_experts(block.mlp, jnp.asarray(x), jnp.asarray(choice, jnp.int32), jnp.asarray(weights)))

    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = nnx.merge(*self.structure).rope(jnp.asarray(positions, jnp.int32)[None])
        return np.asarray(cos[0]), np.asarray(sin[0])


def _watch(seen: dict[str, jax.Array], forced: Mapping[str, jax.Array] | Arrays):
    """A hook that keeps what each part of the model computed, and goes on with `forced` where it is given and fits."""

    def hook(layer: int | None, name: str, value: jax.Array) -> jax.Array:
        seen[name] = value
        if name not in forced or forced[name].size != value.size:
            return value
        return jnp.asarray(forced[name]).reshape(value.shape).astype(value.dtype)

    return hook


@nnx.jit
def _run(block: TransformerBlock, rope, x, positions, forced):
    seen: dict[str, jax.Array] = {}
    with tapping(_watch(seen, forced)):
        block(x, positions, rope(positions))
    return seen


@nnx.jit
def _experts(mlp, x, choice, weights):
    return moe.experts(x, choice, weights, mlp.gate_up, mlp.down, mlp.cfg)
