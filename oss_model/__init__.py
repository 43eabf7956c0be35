"""gpt-oss in JAX: the model, its configuration, and the way from a checkpoint to a `Transformer`."""

from typing import TYPE_CHECKING

from oss_model.lazy import importing

if TYPE_CHECKING:
    from oss_model.cache import init_cache
    from oss_model.config import ModelConfig
    from oss_model.errors import InputError
    from oss_model.generation import eos_tokens, generate
    from oss_model.layers import RMSNorm, RotaryEmbedding
    from oss_model.lora import add_lora, load_lora, merge_lora, save_lora
    from oss_model.loss import cross_entropy
    from oss_model.modeling import AttentionBlock, MLPBlock, Transformer, TransformerBlock
    from oss_model.params import create_model_from_checkpoint

# Imported on first use, so that the command lines, which read only the tables, start without JAX.
_HOME = {
    "init_cache": "cache",
    "ModelConfig": "config",
    "InputError": "errors",
    "AttentionBlock": "modeling",
    "MLPBlock": "modeling",
    "Transformer": "modeling",
    "TransformerBlock": "modeling",
    "RMSNorm": "layers",
    "RotaryEmbedding": "layers",
    "create_model_from_checkpoint": "params",
    "cross_entropy": "loss",
    "add_lora": "lora",
    "load_lora": "lora",
    "merge_lora": "lora",
    "save_lora": "lora",
    "eos_tokens": "generation",
    "generate": "generation",
}

__all__ = [
    "AttentionBlock",
    "InputError",
    "MLPBlock",
    "ModelConfig",
    "RMSNorm",
    "RotaryEmbedding",
    "Transformer",
    "TransformerBlock",
    "add_lora",
    "create_model_from_checkpoint",
    "cross_entropy",
    "eos_tokens",
    "generate",
    "init_cache",
    "load_lora",
    "merge_lora",
    "save_lora",
]


__getattr__ = importing(__name__, _HOME)
