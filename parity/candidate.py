"""The side that is judged: our `Transformer`, from an Orbax checkpoint, called as people call it.

It is the model that `create_model_from_checkpoint` makes; `oss_model.taps` watches and feeds its parts (`parity.walk`). One
that does not fit in memory is the same class and the same walk, with a part loaded when it is its turn and freed after.
"""

import contextlib
import dataclasses
import functools
import gc
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oss_model import (
    InputError,
    Transformer,
    TransformerBlock,
    create_model_from_checkpoint,
    eos_tokens,
    experts,
    init_cache,
    mxfp4,
)
from oss_model.attention import Tokens
from oss_model.buckets import path_of
from oss_model.params import Loader, abstract_model, parts
from oss_model.shards import Checkpoint
from oss_model.taps import LAYER_TAPS, tapping
from parity import configs, device, forms, gradients, others, walk
from parity import memory as memory_of
from parity.protocols import Arrays, LayerCan, PortCan, Settings, Sizes

BFLOAT16 = jnp.dtype(jnp.bfloat16)
LARGE = 1 << 30  # bytes of a checkpoint: from here on it is worth a second to have no garbage in memory
Parameters = dict[str, jax.Array]


class Candidate:
    """A converted checkpoint.

    Runs op by op, as written. Where the model does not fit, each expert on its own tokens ("loop"): a layer of the largest
    needs no more memory than its stored parameters and one expert.

    Args:
      checkpoint: the directory; of safetensors too, which `create_model_from_checkpoint` reads as well.
      expert_path: how experts are computed, if not so (`ModelConfig.expert_path`): "auto", or "loop" where it does not fit.
      compiled: whether a layer goes through jit, as in training: float32 sums come in another order.
      source: the safetensors that it was made from, where packed experts are run from if it holds values.
      memory: bytes to be had, in which a model that takes less is held whole; half of what is free if None.
      read_with_orbax: whether all that is compared is read by plain Orbax, and not a chunk of each parameter only.
      values: whether packed experts are held, and shown, as the values that they stand for.

    Attributes:
      cfg: from the checkpoint's own config.json.
      stored: name -> (shape, dtype) of every parameter in the checkpoint.

    Raises:
      InputError: if the directory is no Orbax checkpoint, has no usable config.json, or contradicts it.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        expert_path: str | None = None,
        compiled: bool = False,
        source: Path | None = None,
        memory: int | None = None,
        read_with_orbax: bool = False,
        values: bool = False,
    ):
        self.path = path_of(checkpoint).absolute()
        self.loader = Loader(self.path)
        self.values = values and self.loader.cfg.param_dtype == "mxfp4"
        if self.values:
            self.loader = Loader(self.path, dataclasses.replace(self.loader.cfg, param_dtype="bfloat16"))
        self.stored = self._decoded() if self.values else self.loader.stored
        self.read_with_orbax = read_with_orbax
        self.compiled = compiled
        self.source = source
        self.fits = memory_of.fits(self, memory)
        self.cfg = dataclasses.replace(
            self.loader.cfg, expert_path=expert_path or ("auto" if compiled or self.fits else "loop")
        )
        self.models: dict[np.dtype, Transformer] = {}
        self.parts: walk.Parts | None = None
        self.large: bool = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.stored.values()) > LARGE

    def __str__(self) -> str:
        return str(self.path)

    @property
    def sizes(self) -> Sizes:
        c = self.cfg
        return Sizes(c.num_hidden_layers, c.num_experts, c.vocab_size, c.sliding_window, c.max_position_embeddings)

    @property
    def settings(self) -> Settings:
        """What the checkpoint's own files say: see `parity.configs`."""
        return self._settings

    @functools.cached_property
    def _settings(self) -> Settings:
        found = {name: getattr(self.cfg, name) for name in (*configs.LOGITS, *configs.OTHERS) if hasattr(self.cfg, name)}
        with contextlib.suppress(InputError):  # nothing says where a text ends
            found["eos_token_id"] = list(eos_tokens(self.path))
        return found | {"layer_types": list(self.cfg.layer_types)}

    @property
    def can(self) -> PortCan:
        return self._can

    @functools.cached_property
    def _can(self) -> PortCan:
        return PortCan(
            self.settings,
            gradients=self,
            least_memory=self,
            forms=self._forms(),
            calls=None if self.compiled else self,
            rope_tables16=functools.partial(self.rope_tables, dtype=BFLOAT16),
            noise=None if device.here().platform == "cpu" else device.noise,
        )

    def _forms(self) -> forms.Forms:
        packed = self.source is not None and Checkpoint(self.source, ignore=None).layout.packed
        return forms.Forms(self.path, self.cfg, self.source if packed else None)

    def restore(self, names: Iterable[str]) -> Arrays:
        """These parameters as stored. Of each a chunk is what others read, or all of it (`parity.others`).

        What our model loads, `loaded`, is by our own reader, and is compared with this.
        """
        names = list(names)
        packed = [name for name in names if name not in self.loader.stored]
        kinds = [name.removesuffix("weight") + kind for name in packed for kind in ("blocks", "scales")]
        found = self._stored([name for name in names if name in self.loader.stored] + kinds)
        for name, blocks, scales in zip(packed, kinds[::2], kinds[1::2], strict=True):
            found[name] = mxfp4.decode(found.pop(blocks), found.pop(scales))
        return found

    def _decoded(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """What is stored, packed experts by the name, shape and dtype of their values."""
        found = {}
        for name, (shape, dtype) in self.loader.stored.items():
            if name.endswith(".blocks"):
                found[name.removesuffix("blocks") + "weight"] = (*shape[:-2], shape[-2] * shape[-1] * 2), np.dtype(jnp.bfloat16)
            elif not name.endswith(".scales"):
                found[name] = shape, dtype
        return found

    def _stored(self, names: list[str]) -> Arrays:
        arrays = self.loader.arrays
        if arrays is not None and self.read_with_orbax:
            return others.whole(self.path, {name: self.loader.stored[name] for name in names})
        found = {name: np.asarray(value) for name, value in self._restore(names).items()}
        return found if arrays is None else others.with_a_chunk_each(arrays, found)

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """int [batch, length] -> [batch, length, hidden] in `dtype`."""
        return np.asarray(self.model(np.dtype(dtype)).embedding(jnp.asarray(tokens, jnp.int32)))

    def layer(self, n: int) -> "CandidateLayer":
        return CandidateLayer(self, n)

    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        """`final_norm` and `logits` in the dtype of x, each from its own input where `forced` has one."""
        seen: dict[str, jax.Array] = {}
        with tapping(_watch(seen, forced or {})):
            self.model(x.dtype).unembed(jnp.asarray(x))
        return {name: np.asarray(value) for name, value in seen.items()}

    def rope_tables(self, positions: np.ndarray, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = self.model(np.dtype(dtype)).rope(jnp.asarray(positions, jnp.int32)[None])
        return np.asarray(cos[0]), np.asarray(sin[0])

    def gradients(self, tokens: np.ndarray, routing: list[np.ndarray]) -> Arrays:
        """Of the whole `Transformer`, as `create_model_from_checkpoint` makes it, under jit: see `SupportsGradients`."""
        path = "auto" if self.cfg.expert_path == "loop" else self.cfg.expert_path  # jit knows no loop over experts
        cfg = dataclasses.replace(self.cfg, dtype=np.dtype(np.float32), expert_path=path)
        return gradients.of_model(create_model_from_checkpoint(self.path, cfg), tokens, routing)

    def least_memory(self, batch: int, length: int) -> int:
        """Resident bytes at the peak, all in, of comparing it on a prompt [batch, length]."""
        return memory_of.least_memory(self, batch, length)

    # --- the whole model --------------------------------------------------------------------------------------------

    def call(self, tokens: np.ndarray, positions: np.ndarray | None, dtype: np.dtype) -> walk.Call:
        """`model(tokens, positions)`, or `model(tokens)`: see `SupportsCalls`."""
        model = self.model(np.dtype(dtype))
        ids, places = jnp.asarray(tokens, jnp.int32), None if positions is None else jnp.asarray(positions, jnp.int32)
        return walk.Call(lambda: model(ids) if places is None else model(ids, places))

    def model(self, dtype: np.dtype) -> Transformer:
        """As `create_model_from_checkpoint` makes it; of one that does not fit, a part is loaded when it is its turn."""
        if dtype not in self.models:
            cfg = dataclasses.replace(self.cfg, dtype=dtype)
            if self.fits:
                self.models[dtype] = create_model_from_checkpoint(self.path, cfg)
            else:
                if self.parts is None:
                    self.parts = walk.Parts(Loader(self.path, cfg), collect=self.large)
                held = dataclasses.replace(self.parts.loader.cfg, dtype=dtype)
                self.models[dtype] = self.parts.model(nnx.merge(*abstract_model(held)))
        return self.models[dtype]

    def _part(self, name: str, dtype: Any = np.float32) -> tuple[str, nnx.Module]:
        """The part of the model that a parameter is in."""
        part = ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
        model = self.model(np.dtype(dtype))
        if self.parts is None:
            return part, parts(model)[part]
        self.parts.load(*(("norm", "lm_head") if part in ("norm", "lm_head") else (part,)))
        return part, self.parts.models[list(self.models).index(np.dtype(dtype))][part]

    def loaded(self, names: Iterable[str]) -> Arrays:
        """These parameters as they are in the model."""
        found: dict[str, jax.Array] = {}
        for name in names:
            if name not in found:
                found |= walk.values(*self._part(name))
        return {name: np.asarray(found[name]) for name in names if name in found}

    def replace(self, name: str, value: np.ndarray) -> None:
        """Put a parameter right in the model, where the checkpoint has it wrong."""
        for dtype in self.models:
            part, module = self._part(name, dtype)
            walk.replace(name, part, module, value)

    def _restore(self, names: Iterable[str]) -> Parameters:
        """Straight into JAX's memory: NumPy sees the same bytes, so a layer is in memory once."""
        if self.large:
            gc.collect()  # the layer before, which Flax leaves in reference cycles
        return dict(self.loader.source.read({name: jax.ShapeDtypeStruct(*self.loader.stored[name]) for name in names}))


class CandidateLayer:
    """One `TransformerBlock` of the model."""

    def __init__(self, candidate: Candidate, n: int):
        self.candidate, self.n = candidate, n

    @property
    def can(self) -> LayerCan:
        return LayerCan(decode=self)

    def block(self, dtype: Any) -> TransformerBlock:
        return self.candidate._part(f"layers.{self.n}", dtype)[1]  # type: ignore[return-value]

    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        """Every tap of the layer, in the dtype of x.

        Args:
          x: [batch, length, hidden], its input.
          forced: tap -> value to go on with in place of the block's own.
        """
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
        run = _run_compiled if self.candidate.compiled else _run
        given = {name: jnp.asarray(forced[name]) for name in LAYER_TAPS if name in forced} if forced else {}
        seen = run(self.block(x.dtype), self.candidate.model(x.dtype).rope, jnp.asarray(x), positions, given)
        return {name: np.asarray(value) for name, value in seen.items()}

    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The experts alone, on a routing of one's own: x [tokens, hidden], choice and weights [tokens, k]."""
        mlp = self.block(x.dtype).mlp
        routing = jnp.asarray(choice, jnp.int32), jnp.asarray(weights)
        return np.asarray(experts.experts(jnp.asarray(x)[None], *routing, mlp.gate_up, mlp.down, mlp.cfg))[0]

    def decode(self, x: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """`layer_out` of every token, one at a time on the key-value cache, the routing given.

        Args:
          x: [batch, length, hidden].
          choice: int [batch * length, k].
        """
        block, rope = self.block(x.dtype), self.candidate.model(x.dtype).rope
        cache = init_cache(self.candidate.cfg, x.shape[0], x.shape[1], x.dtype)[self.n]
        experts, outs = choice.reshape(*x.shape[:2], -1), []
        for t in range(x.shape[1]):
            positions = jnp.full((x.shape[0], 1), t, jnp.int32)
            with tapping(_watch({}, {"expert_choice": experts[:, t]})):
                out, cache = block(jnp.asarray(x[:, t : t + 1]), Tokens(positions), rope(positions), cache)
            outs.append(np.asarray(out))
        return np.concatenate(outs, axis=1)


def _run(block: TransformerBlock, rope, x, positions, forced):
    seen: dict[str, jax.Array] = {}
    with tapping(_watch(seen, forced)):
        block(x, Tokens(positions), rope(positions))
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
