"""`ModelConfig`: the sizes and constants of a gpt-oss model. `oss_model.dialects` has the three forms of config.json."""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from oss_model.errors import raise_all

SLIDING, FULL = "sliding_attention", "full_attention"
PARAM_DTYPES = ("bfloat16", "float32", "mxfp4")
EXPERT_PATHS = ("auto", "loop", "scan", "grouped", "pairs", "ragged")
REMATS = ("none", "mlp", "block")
QUANTIZERS = ("best", "ocp", "ceil")  # how values become MXFP4: see `oss_model.quantization`
MOST = {"num_hidden_layers": 1000, "num_experts": 1000}  # what there is a name of each for: a file may claim 2^31
MXFP4_BLOCK = 32  # values that share one scale (OCP Microscaling Formats 1.0, §5.3)


@dataclasses.dataclass(frozen=True, repr=False)  # part of a module's static structure: what jit compiled holds for this one
class ModelConfig:
    """Everything the arithmetic depends on. The defaults are gpt-oss-120b.

    Nothing can be set later; `dataclasses.replace` makes another. One of fewer or more layers needs its layer types too:
    `dataclasses.replace(cfg, num_hidden_layers=2, layer_types=())`.

    `dtype` is the dtype computed in, whatever dtype parameters have. `param_dtype` is theirs: "bfloat16", "float32",
    "mxfp4" (experts packed, everything else bfloat16), or None: as a checkpoint stores them, bfloat16 where there is none.
    A model's own `cfg.param_dtype` says what it holds. Train all of it in "float32": steps of a usual size are lost in
    bfloat16's rounding (docs/training.md).

    Raises `InputError` naming every field that is out of range.
    """

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_experts: int = 128
    num_experts_per_tok: int = 4
    sliding_window: int = 128  # keys a query sees in a sliding layer, itself included
    layer_types: tuple[str, ...] = ()  # one a layer; empty: sliding and full in turn, sliding first
    max_position_embeddings: int = 131072
    rope_theta: float = 150000.0
    # YaRN (arXiv:2309.00071); defaults of the published models
    rope_factor: float = 32.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_original_max_position_embeddings: int = 4096
    rope_truncate: bool = False
    rms_norm_eps: float = 1e-5
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    dtype: Any = ml_dtypes.bfloat16
    param_dtype: Any = None  # None or a name; a dtype becomes its name
    expert_path: str = "auto"  # how expert sums are computed: see `oss_model.expert_paths`
    # Training for MXFP4: experts are computed with the values that an export with this quantizer will have.
    experts_qat: str | None = None
    # Attention: 0 all logits at once, a number in blocks of so many tokens, None by the length (`oss_model.attention`).
    attention_block: int | None = None
    remat: str = "none"  # what training computes twice to save memory: "none", "mlp" (the experts), "block" (everything)
    use_sharding: bool = False  # annotate parameters with the partition specs of `oss_model.sharding`

    def __post_init__(self):
        settle = functools.partial(object.__setattr__, self)  # fields are frozen from here on
        layers = self.num_hidden_layers
        if not self.layer_types and isinstance(layers, int) and layers <= MOST["num_hidden_layers"]:
            settle("layer_types", _in_turn(layers))
        if isinstance(self.layer_types, list):
            settle("layer_types", tuple(self.layer_types))
        with contextlib.suppress(TypeError):  # no dtype at all is a fault like a dtype that is not implemented
            settle("dtype", np.dtype(self.dtype))
            if self.param_dtype not in (None, *PARAM_DTYPES):
                settle("param_dtype", np.dtype(self.param_dtype).name)  # jnp.float32, as dtype takes it
        raise_all(_faults(self))

    def __repr__(self) -> str:
        """What is not as in gpt-oss-120b: every block of a model shows it."""
        usual = {field.name: field.default for field in dataclasses.fields(self)} | {"dtype": "bfloat16"}
        own = {name: getattr(self, name) for name in usual} | {"dtype": self.dtype.name}
        if self.layer_types == _in_turn(self.num_hidden_layers):
            own["layer_types"] = ()
        return f"ModelConfig({', '.join(f'{name}={value!r}' for name, value in own.items() if value != usual[name])})"

    @classmethod
    def default(cls, use_sharding: bool = False) -> "ModelConfig":
        """gpt-oss-120b."""
        return cls(use_sharding=use_sharding)

    @classmethod
    def gpt_oss_120b(cls, use_sharding: bool = False) -> "ModelConfig":
        return cls.default(use_sharding=use_sharding)

    @classmethod
    def gpt_oss_20b(cls, use_sharding: bool = False) -> "ModelConfig":
        return cls(num_hidden_layers=24, num_experts=32, use_sharding=use_sharding)

    @classmethod
    def tiny(cls, use_sharding: bool = False) -> "ModelConfig":
        """For tests: every size is distinct, so that no two axes can be confused and still fit."""
        return cls(
            vocab_size=509,
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=5,
            num_attention_heads=14,
            num_key_value_heads=7,
            head_dim=24,
            num_experts=9,
            num_experts_per_tok=4,
            sliding_window=11,
            max_position_embeddings=32768,
            rope_original_max_position_embeddings=1024,  # YaRN's lower bound is positive, as in the published models
            use_sharding=use_sharding,
        )

    @classmethod
    def from_json(cls, source: "str | os.PathLike | Mapping[str, Any]", ignore: Collection[str] | None = ()) -> "ModelConfig":
        """Read config.json (its path or directory, or the parsed object) in any of its three dialects.

        The dialects: as published on the hub (written by transformers 4), as written by transformers 5
        (`rope_parameters`), and OpenAI's original. Every key is read, or known not to change the arithmetic,
        or refused.

        Args:
          ignore: unknown keys that whoever calls knows to be harmless; None: all that are unknown.

        Raises:
          InputError: naming every key that is missing, of the wrong type, or not implemented.
        """
        from oss_model import dialects

        return cls(**dialects.read(source, ignore))

    def to_json(self, dialect: str = "transformers5") -> dict[str, Any]:
        """What config.json says of this model, as an object.

        Args:
          dialect: "transformers4" (as published on the hub), "transformers5", or "openai" (the original).

        Raises:
          InputError: if the dialect cannot say it: the original has no layer types, no eps and no alpha of its own.
        """
        from oss_model import dialects

        return dialects.write(self, dialect)

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the axes named in `oss_model.layouts` and in shape comments."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "inner": self.intermediate_size,
            "heads": self.num_attention_heads,
            "kv": self.num_key_value_heads,
            "dim": self.head_dim,
            "experts": self.num_experts,
            "glu": 2,
            "hidden_groups": self.hidden_size // MXFP4_BLOCK,
            "inner_groups": self.intermediate_size // MXFP4_BLOCK,
            "bytes": MXFP4_BLOCK // 2,
        }


# --- checks -----------------------------------------------------------------------------------------------------

TYPES = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
CAST = {float: float, tuple[str, ...]: tuple}  # JSON writes 150000 for 150000.0, and has lists


def type_fault(field: str, value: Any, where: str) -> list[str]:
    kind = TYPES[field]
    if kind is int:
        good, expected = type(value) is int, "an integer"
    elif kind is float:
        # Compared, not converted: an integer may be too large for a float.
        good, expected = type(value) in (int, float) and abs(value) <= sys.float_info.max, "a finite number"
    elif kind is bool:
        good, expected = type(value) is bool, "true or false"
    elif field == "layer_types":
        good = isinstance(value, list | tuple) and all(t in (SLIDING, FULL) for t in value)
        expected = f"a list of {SLIDING!r} and {FULL!r}"
    else:
        return []
    return [] if good else [f"{where}: expected {expected}, found {value!r}"]


def _in_turn(layers: int) -> tuple[str, ...]:
    return tuple(FULL if n % 2 else SLIDING for n in range(layers))


def _faults(cfg: ModelConfig) -> list[str]:
    """Every field of `cfg` that cannot be computed with, one line each."""
    faults = [fault for name in TYPES for fault in type_fault(name, getattr(cfg, name), name)]
    if faults:
        return faults
    for name, kind in TYPES.items():
        if kind in (int, float) and getattr(cfg, name) <= 0:
            faults.append(f"{name}: expected a positive number, found {getattr(cfg, name)}")
    found = {name: getattr(cfg, name) for name in MOST}
    faults += [f"{name}: expected at most {most}, found {found[name]}" for name, most in MOST.items() if found[name] > most]
    if faults:
        return faults
    if len(cfg.layer_types) != cfg.num_hidden_layers:
        faults.append(f"layer_types: expected {cfg.num_hidden_layers} entries, one a layer, found {len(cfg.layer_types)}")
    if cfg.num_attention_heads % cfg.num_key_value_heads:
        faults.append(
            f"num_attention_heads: expected a multiple of num_key_value_heads = {cfg.num_key_value_heads},"
            f" found {cfg.num_attention_heads}"
        )
    if cfg.head_dim % 2:
        faults.append(f"head_dim: expected an even number, for rotation in pairs, found {cfg.head_dim}")
    if cfg.num_experts_per_tok > cfg.num_experts:
        faults.append(f"num_experts_per_tok: expected at most num_experts = {cfg.num_experts}, found {cfg.num_experts_per_tok}")
    if cfg.param_dtype not in (None, *PARAM_DTYPES):
        faults.append(f"param_dtype: expected None or one of {', '.join(PARAM_DTYPES)}, found {cfg.param_dtype!r}")
    if cfg.dtype not in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)):
        faults.append(f"dtype: expected bfloat16 or float32, found {cfg.dtype}")
    if cfg.expert_path not in EXPERT_PATHS:
        faults.append(f"expert_path: expected one of {', '.join(EXPERT_PATHS)}, found {cfg.expert_path!r}")
    if cfg.experts_qat not in (None, *QUANTIZERS):
        faults.append(f"experts_qat: expected None or one of {', '.join(QUANTIZERS)}, found {cfg.experts_qat!r}")
    if not (cfg.attention_block is None or (type(cfg.attention_block) is int and cfg.attention_block >= 0)):
        faults.append(f"attention_block: expected None or a number of tokens, 0 or more, found {cfg.attention_block!r}")
    if cfg.remat not in REMATS:
        faults.append(f"remat: expected one of {', '.join(REMATS)}, found {cfg.remat!r}")
    for name in ("hidden_size", "intermediate_size") if cfg.param_dtype == "mxfp4" or cfg.experts_qat else ():
        if getattr(cfg, name) % MXFP4_BLOCK:
            faults.append(f"{name}: expected a multiple of {MXFP4_BLOCK}, the MXFP4 block, found {getattr(cfg, name)}")
    return faults
