"""The model as tunix's trainers and sampler call it (checked with google-tunix 0.1.7, `scripts/tunix`).

    model = TunixTransformer(create_model_from_checkpoint(path, cfg, mesh), mesh)
    with mesh:  # which tunix itself looks for
        PeftTrainer(model, optax.adamw(1e-5), TrainingConfig(...)).train(...)

The parameters are those of `model.model`, the `Transformer`, and are shared with it.
"""

import contextlib
import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from oss_model.cache import EMPTY, Cache, init_cache
from oss_model.modeling import Transformer


@dataclasses.dataclass
class TunixConfig:
    """The sizes tunix reads, under its names."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_embed: int
    dtype: Any
    remat_config: str


class TunixTransformer(nnx.Module):
    """`mesh`: the one the parameters are on, if they are; set while the model runs, since tunix does not.

    Warns, once, of parameters that full fine-tuning would hardly move.
    """

    def __init__(self, model: Transformer, mesh: jax.sharding.Mesh | None = None):
        self.model, self.mesh = model, mesh
        if model.cfg.param_dtype != "float32" and not jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
            warnings.warn(
                f"parameters are {model.cfg.param_dtype}: that will do for LoRA and sampling, but full fine-tuning loses steps"
                " of a usual size in bfloat16's rounding; load with param_dtype='float32' for it (docs/training.md)",
                stacklevel=5,  # past the frames in which Flax makes a module
            )

    def __call__(
        self,
        input_tokens: Int[Array, "b l"],
        positions: Int[Array, "b l"],
        cache: Cache | None,
        attention_mask: Bool[Array, "b l m"],
        decode_only_last_token: bool = False,
    ) -> tuple[Float[Array, "b _ v"], Cache | None]:
        """(logits, cache after).

        Args:
          input_tokens: int32 [batch, length]: a whole prompt, or the next token of each row.
          positions: int32 [batch, length].
          cache: from `init_cache`, or None.
          attention_mask: True where a query sees a key. It has to be what tunix makes: causal, without padding. What it
            adds to the positions, which places are padding, is read off its diagonal; the windows of sliding layers are
            the model's own.
          decode_only_last_token: logits of the last place alone.
        """
        length = input_tokens.shape[1]
        if cache is None or length > 1:
            real = jnp.diagonal(attention_mask[:, :, :length], axis1=1, axis2=2)
            positions = jnp.where(real, positions, EMPTY)
        with contextlib.nullcontext() if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            x, cache = self.model.stream(input_tokens, positions.astype(jnp.int32), cache)
            return self.model.unembed(x[:, -1:] if decode_only_last_token else x), cache

    def init_cache(self, batch_size: int, cache_size: int, dtype: Any) -> Cache:
        return init_cache(self.model.cfg, batch_size, cache_size, dtype)

    def get_model_input(self) -> dict[str, Any]:
        """Arguments of a call, for libraries that trace the model (qwix)."""
        tokens = jnp.ones((2, 1), jnp.int32)
        return {"input_tokens": tokens, "positions": tokens, "cache": None, "attention_mask": jnp.ones((2, 1, 1), bool)}

    @property
    def num_embed(self) -> int:
        return self.model.cfg.vocab_size

    @property
    def config(self) -> TunixConfig:
        cfg = self.model.cfg
        return TunixConfig(
            num_layers=cfg.num_hidden_layers,
            num_kv_heads=cfg.num_key_value_heads,
            head_dim=cfg.head_dim,
            num_embed=cfg.vocab_size,
            dtype=cfg.dtype,
            remat_config=cfg.remat,
        )
