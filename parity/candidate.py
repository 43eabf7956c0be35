"""The side that is judged: the parts of our `Transformer`, from an Orbax checkpoint, one layer at a time.

The taps come out of the blocks people train with: `oss_model.taps` watches and feeds them. A layer's parameters are
restored by plain Orbax when it is its turn, and freed after. How `Transformer` puts its parts together, and how
`create_model_from_checkpoint` loads them, is run by the gradients arm alone.
"""

import contextlib
import dataclasses
import functools
import gc
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from oss_model import (
    InputError,
    ModelConfig,
    Transformer,
    TransformerBlock,
    create_model_from_checkpoint,
    eos_tokens,
    experts,
    init_cache,
)
from oss_model.layouts import parameter_name
from oss_model.params import abstract_model, as_stored, stored_parameters
from oss_model.restoring import restoring
from oss_model.shards import Checkpoint
from oss_model.taps import LAYER_TAPS, tapping
from parity import configs, forms, gradients, memory
from parity.protocols import Arrays, LayerCan, PortCan, Settings, Sizes

LARGE = 1 << 30  # bytes of a checkpoint: from here on it is worth a second to have no garbage in memory
Parameters = dict[str, jax.Array]
Module = TypeVar("Module", bound=nnx.Module)


class Candidate:
    """A converted checkpoint.

    Runs op by op, as written, each expert on its own tokens: a layer of the largest model needs no more memory than
    its stored parameters and one expert, and the result is bitwise that of the whole model run so.

    Args:
      checkpoint: the directory.
      expert_path: how experts are computed, if not so (`ModelConfig.expert_path`): "loop", or "auto" if compiled.
      compiled: whether a layer goes through jit, as in training: float32 sums come in another order.
      source: the safetensors that it was made from, where packed experts are run from if it holds values.

    Attributes:
      cfg: from the checkpoint's own config.json.
      stored: name -> (shape, dtype) of every parameter in the checkpoint.

    Raises:
      InputError: if the directory is no Orbax checkpoint, has no usable config.json, or contradicts it.
    """

    def __init__(
        self, checkpoint: str | Path, *, expert_path: str | None = None, compiled: bool = False, source: Path | None = None
    ):
        self.path = Path(checkpoint).absolute()
        self.stored = stored_parameters(self.path)
        cfg, _ = as_stored(self.path, ModelConfig.from_json(self.path / "config.json"))
        expert_path = expert_path or ("auto" if compiled else "loop")
        self.cfg, self.compiled = dataclasses.replace(cfg, expert_path=expert_path), compiled
        self.source = source
        self.large = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.stored.values()) > LARGE

    def __str__(self) -> str:
        return str(self.path)

    @property
    def sizes(self) -> Sizes:
        c = self.cfg
        return Sizes(c.num_hidden_layers, c.num_experts, c.vocab_size, c.sliding_window, c.max_position_embeddings)

    @property
    def settings(self) -> Settings:
        """What the checkpoint's own files say: see `parity.configs`."""
        found = {name: getattr(self.cfg, name) for name in (*configs.LOGITS, *configs.OTHERS) if hasattr(self.cfg, name)}
        with contextlib.suppress(InputError):  # nothing says where a text ends
            found["eos_token_id"] = list(eos_tokens(self.path))
        return found | {"layer_types": list(self.cfg.layer_types)}

    @property
    def can(self) -> PortCan:
        return PortCan(self.settings, gradients=self, least_memory=self, forms=self._forms())

    def _forms(self) -> forms.Forms:
        packed = self.source is not None and Checkpoint(self.source).layout.packed
        return forms.Forms(self.path, self.cfg, self.source if packed else None)

    def restore(self, names: Iterable[str]) -> Arrays:
        """These parameters as stored, read by plain Orbax."""
        return {name: np.asarray(value) for name, value in self._restore(names).items()}

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """int [batch, length] -> [batch, length, hidden] in `dtype`."""
        embedding = self._filled(self._model(dtype).embedding, self._restore(["embedding.weight"]), "embedding.")
        return np.asarray(embedding(jnp.asarray(tokens, jnp.int32)))

    def layer(self, n: int) -> "CandidateLayer":
        return CandidateLayer(self, n, self._restore([name for name in self.stored if name.startswith(f"layers.{n}.")]))

    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        """`final_norm` and `logits` in the dtype of x, each from its own input where `forced` has one."""
        model, arrays = self._model(x.dtype), self._restore(["norm.scale", "lm_head.weight"])
        model.norm = self._filled(model.norm, arrays, "norm.")
        model.lm_head = self._filled(model.lm_head, arrays, "lm_head.")
        seen: dict[str, jax.Array] = {}
        with tapping(_watch(seen, forced or {})):
            model.unembed(jnp.asarray(x))
        return {name: np.asarray(value) for name, value in seen.items()}

    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = self._model(np.dtype(np.float32)).rope(jnp.asarray(positions, jnp.int32)[None])
        return np.asarray(cos[0]), np.asarray(sin[0])

    def gradients(self, tokens: np.ndarray, routing: list[np.ndarray]) -> Arrays:
        """Of the whole `Transformer`, as `create_model_from_checkpoint` makes it, under jit: see `SupportsGradients`."""
        path = "auto" if self.cfg.expert_path == "loop" else self.cfg.expert_path  # jit knows no loop over experts
        cfg = dataclasses.replace(self.cfg, dtype=np.dtype(np.float32), expert_path=path)
        return gradients.of_model(create_model_from_checkpoint(self.path, cfg), tokens, routing)

    def least_memory(self, batch: int, length: int) -> int:
        """Resident bytes at the peak, all in, of comparing it on a prompt [batch, length]."""
        return memory.least_memory(self, batch, length)

    def _restore(self, names: Iterable[str]) -> Parameters:
        """Straight into JAX's memory: NumPy sees the same bytes, so a layer is in memory once."""
        names = list(names)
        if self.large:
            gc.collect()  # the layer before, which Flax leaves in reference cycles
        tree: dict = {}
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        for name in names:
            *branches, leaf = name.split(".")
            node = functools.reduce(lambda node, part: node.setdefault(part, {}), branches, tree)
            shape, dtype = self.stored[name]
            node[leaf] = {"value": jax.ShapeDtypeStruct(shape, dtype, sharding=here)}
        arguments = ocp.checkpoint_utils.construct_restore_args(tree)
        request = ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=True)
        nbytes = sum(math.prod(self.stored[name][0]) * self.stored[name][1].itemsize for name in names)
        with restoring(self.path, nbytes):
            with ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.restore(self.path, args=request)
            if self.large:
                jax.block_until_ready(tree)  # the copy out of Orbax's buffers goes on in the background
                gc.collect()  # and they too are in cycles
        return {name: functools.reduce(lambda node, part: node[part], (*name.split("."), "value"), tree) for name in names}  # type: ignore

    def _model(self, dtype: Any) -> Transformer:
        return nnx.merge(*_structure(dataclasses.replace(self.cfg, dtype=np.dtype(dtype))))

    def _filled(self, module: Module, arrays: Parameters, prefix: str) -> Module:
        """An abstract module of the real model, with these arrays for parameters."""
        graphdef, state = nnx.split(module)
        state = jax.tree.map(lambda leaf: leaf, state)  # variables of its own: the structure is kept and used again
        for path, variable in nnx.to_flat_state(state):
            variable.set_value(arrays[prefix + parameter_name(path)])
        return nnx.merge(graphdef, state)


@functools.lru_cache(maxsize=4)
def _structure(cfg: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return abstract_model(cfg)


class CandidateLayer:
    """One `TransformerBlock` with its parameters, in memory once, as stored."""

    def __init__(self, candidate: Candidate, n: int, arrays: Parameters):
        self.candidate, self.n, self.arrays = candidate, n, arrays

    @property
    def can(self) -> LayerCan:
        return LayerCan(decode=self, restore=self)

    def restore(self, names: Iterable[str]) -> Arrays:
        """These parameters as stored, from memory."""
        return {name: np.asarray(self.arrays[name]) for name in names}

    def block(self, dtype: Any) -> TransformerBlock:
        """The real model's block."""
        return self.candidate._filled(self.candidate._model(dtype).layers[self.n], self.arrays, f"layers.{self.n}.")

    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        """Every tap of the layer, in the dtype of x.

        Args:
          x: [batch, length, hidden], its input.
          forced: tap -> value to go on with in place of the block's own.
        """
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
        run = _run_compiled if self.candidate.compiled else _run
        given = {name: jnp.asarray(forced[name]) for name in LAYER_TAPS if name in forced} if forced else {}
        seen = run(self.block(x.dtype), self.candidate._model(x.dtype).rope, jnp.asarray(x), positions, given)
        return {name: np.asarray(value) for name, value in seen.items()}

    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The experts alone, on a routing of one's own: x [tokens, hidden], choice and weights [tokens, k]."""
        mlp = self.block(x.dtype).mlp
        routing = jnp.asarray(choice, jnp.int32), jnp.asarray(weights)
        return np.asarray(experts.experts(jnp.asarray(x), *routing, mlp.gate_up, mlp.down, mlp.cfg))

    def decode(self, x: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """`layer_out` of every token, one at a time on the key-value cache, the routing given.

        Args:
          x: [batch, length, hidden].
          choice: int [batch * length, k].
        """
        block, rope = self.block(x.dtype), self.candidate._model(x.dtype).rope
        cache = init_cache(self.candidate.cfg, x.shape[0], x.shape[1], x.dtype)[self.n]
        experts, outs = choice.reshape(*x.shape[:2], -1), []
        for t in range(x.shape[1]):
            positions = jnp.full((x.shape[0], 1), t, jnp.int32)
            with tapping(_watch({}, {"expert_choice": experts[:, t]})):
                out, cache = block(jnp.asarray(x[:, t : t + 1]), positions, rope(positions), cache)
            outs.append(np.asarray(out))
        return np.concatenate(outs, axis=1)


def _run(block: TransformerBlock, rope, x, positions, forced):
    seen: dict[str, jax.Array] = {}
    with tapping(_watch(seen, forced)):
        block(x, positions, rope(positions))
    return seen


_run_compiled = nnx.jit(_run)


def _watch(seen: dict[str, jax.Array], forced: Mapping[str, jax.Array] | Arrays):
    """A hook that keeps what each part of the model computed, and goes on with `forced` where it is given and fits."""

    def hook(layer: int | None, name: str, value: jax.Array) -> jax.Array:
        seen[name] = value
        if name not in forced or forced[name].size != value.size:
            return value
        return jnp.asarray(forced[name]).reshape(value.shape).astype(value.dtype)

    return hook
