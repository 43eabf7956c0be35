"""`ModelConfig`: the sizes and constants of a gpt-oss model, and the three dialects of config.json."""

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from oss_model.errors import InputError, raise_all

SLIDING, FULL = "sliding_attention", "full_attention"
PARAM_DTYPES = ("bfloat16", "float32", "mxfp4")
EXPERT_PATHS = ("auto", "loop", "scan", "pairs", "ragged")
REMATS = ("none", "mlp", "block")
MXFP4_BLOCK = 32  # values that share one scale (OCP Microscaling Formats 1.0, §5.3)


@dataclasses.dataclass(frozen=True)  # part of a module's static structure: what jit compiled holds for this one
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
    param_dtype: str | None = None
    expert_path: str = "auto"  # how expert sums are computed: see `oss_model.moe`
    remat: str = "none"  # what training computes twice to save memory: "none", "mlp" (the experts), "block" (everything)
    use_sharding: bool = False  # annotate parameters with the partition specs of `oss_model.sharding`

    def __post_init__(self):
        settle = functools.partial(object.__setattr__, self)  # fields are frozen from here on
        if not self.layer_types and isinstance(self.num_hidden_layers, int):
            settle("layer_types", tuple(FULL if n % 2 else SLIDING for n in range(self.num_hidden_layers)))
        if isinstance(self.layer_types, list):
            settle("layer_types", tuple(self.layer_types))
        with contextlib.suppress(TypeError):  # no dtype at all is a fault like a dtype that is not implemented
            settle("dtype", np.dtype(self.dtype))
        raise_all(_faults(self))

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
            max_position_embeddings=4096,
            rope_original_max_position_embeddings=128,
            use_sharding=use_sharding,
        )

    @classmethod
    def from_json(cls, source: "str | os.PathLike | Mapping[str, Any]") -> "ModelConfig":
        """Read config.json (a path, or the parsed object) in any of its three dialects.

        The dialects: as published on the hub (written by transformers 4), as written by transformers 5
        (`rope_parameters`), and OpenAI's original. Every key is read, or known not to change the arithmetic,
        or refused.

        Raises:
          InputError: naming every key that is missing, of the wrong type, or not implemented.
        """
        if isinstance(source, Mapping):
            return _from_dict(dict(source), "config.json")
        where = os.fspath(source)
        try:
            with open(where, encoding="utf-8") as f:
                data = json.load(f)
        except FileNotFoundError:
            raise InputError(f"{where}: expected a gpt-oss config.json, found no file") from None
        except (OSError, ValueError, RecursionError) as e:
            raise InputError(f"{where}: expected a JSON object, found something unreadable ({e})") from None
        if not isinstance(data, dict):
            raise InputError(f"{where}: expected a JSON object, found {type(data).__name__}")
        return _from_dict(data, where)

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


# --- config.json ------------------------------------------------------------------------------------------------

# Each dialect: key in the file -> field of ModelConfig. A key that is in none of these tables is refused.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "sliding_window")  # fmt: skip
_HF_KEYS = {name: name for name in _SIZES} | {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "layer_types": "layer_types",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "swiglu_alpha": "swiglu_alpha",
    "swiglu_limit": "swiglu_limit",
    "rope_theta": "rope_theta",
}
_ROPE_KEYS = {  # in `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)
    "rope_theta": "rope_theta",
    "factor": "rope_factor",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
    "truncate": "rope_truncate",
}
_HF_ECHOES = {  # said a second time by the published files; transformers does not read them
    "experts_per_token": "num_experts_per_tok",
    "num_experts": "num_experts",
    "initial_context_length": "rope_original_max_position_embeddings",
}
_OPENAI_KEYS = {name: name for name in _SIZES} | {
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "swiglu_limit": "swiglu_limit",
    "initial_context_length": "rope_original_max_position_embeddings",
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "rope_factor",
    "rope_ntk_alpha": "rope_beta_slow",
    "rope_ntk_beta": "rope_beta_fast",
}
_OPTIONAL = {"layer_types", "max_position_embeddings", "rms_norm_eps", "swiglu_alpha", "rope_beta_fast",
             "rope_beta_slow", "rope_truncate"}  # fmt: skip
# Keys that would change the arithmetic, with the only value that is implemented.
_ONLY = {"attention_bias": True, "attention_dropout": 0, "tie_word_embeddings": False, "is_encoder_decoder": False}
# Keys that leave the logits alone. `hidden_act` is among them: the reference does not read it either.
_HARMLESS = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "hidden_act", "id2label", "initializer_range", "label2id", "model_type", "name_or_path", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type", "quantization_config", "return_dict",
    "router_aux_loss_coef", "sep_token_id", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def _from_dict(data: dict[str, Any], where: str) -> ModelConfig:
    if data.get("model_type", "gpt_oss") != "gpt_oss":
        raise InputError(f"{where}: model_type: expected 'gpt_oss', found {data['model_type']!r}; this is another model")
    hf = "model_type" in data or "num_local_experts" in data
    faults: list[str] = []
    found: dict[str, Any] = {}
    rest = dict(data)
    names = {field: key for key, field in (_HF_KEYS if hf else _OPENAI_KEYS).items()}  # what is missing is called by

    def take(scope: dict[str, Any], keys: Mapping[str, str], prefix: str) -> None:
        for key in [key for key in keys if key in scope]:
            field, value = keys[key], scope.pop(key)
            if value is None and field in _OPTIONAL:
                continue  # null means the default
            wrong = _type_fault(field, value, f"{where}: {prefix}{key}")
            faults.extend(wrong)
            if found.setdefault(field, value) != value and not wrong:
                faults.append(f"{where}: {prefix}{key}: found {value!r}, but {found[field]!r} elsewhere in the file; keep one")

    if hf:
        take(rest, _HF_KEYS, "")
        ropes = [key for key in ("rope_parameters", "rope_scaling") if rest.get(key) is not None]
        if not ropes:
            faults.append(f"{where}: rope_parameters or rope_scaling: missing; without YaRN every position is rotated wrongly")
        for key in ropes:
            if not isinstance(rest[key], dict):
                faults.append(f"{where}: {key}: expected an object, found {rest[key]!r}")
                continue
            # transformers takes an absent `truncate` as true, and null as false; the published files say false.
            scope = {"truncate": True} | {k: v for k, v in rest[key].items() if v is not None or k == "truncate"}
            names |= {field: f"{key}.{name}" for name, field in _ROPE_KEYS.items() if name != "rope_theta"}
            kinds = [scope.pop(name) for name in ("rope_type", "type") if name in scope]  # `type` in older files
            others = [kind for kind in kinds or [None] if kind != "yarn"]
            if others:
                faults.append(f"{where}: {key}.rope_type: only 'yarn' is implemented, found {others[0]!r}")
            take(scope, _ROPE_KEYS, f"{key}.")
            for unknown in sorted(scope):
                faults.append(f"{where}: {key}.{unknown}: not implemented, and it would change the rotation")
        for key in ("rope_parameters", "rope_scaling"):
            rest.pop(key, None)
        take(rest, _HF_ECHOES, "")
    else:
        take(rest, _OPENAI_KEYS, "")
        # The original has no such keys: eps is 1e-5 and YaRN's range is not rounded (gpt_oss/torch/model.py).
        found |= {"rms_norm_eps": 1e-5, "rope_truncate": False}

    for key, only in _ONLY.items():
        if rest.pop(key, only) != only:
            faults.append(f"{where}: {key}: only {only!r} is implemented, found {data[key]!r}")
    quantization = rest.get("quantization_config")
    # Other tools write a form of their own without `quant_method`: {"bits": 4, "group_size": 64}.
    if quantization is not None and not (isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"):
        faults.append(f"{where}: quantization_config.quant_method: only 'mxfp4' is implemented, found {quantization!r}")
    for key in sorted(rest.keys() - _HARMLESS):
        faults.append(f"{where}: {key}: not a key of gpt-oss; it may change the arithmetic, so it is refused")
    # transformers 4 knows no such key and writes none: its code says 7.
    optional = _OPTIONAL | {"swiglu_limit"} if hf else _OPTIONAL
    for field in sorted(names.keys() - found.keys() - optional):
        faults.append(f"{where}: {names[field]}: missing; is this the config.json of a gpt-oss model?")
    raise_all(faults)
    found = {field: _CAST.get(_TYPES[field], lambda value: value)(value) for field, value in found.items()}
    try:
        return ModelConfig(**found)
    except InputError as e:
        raise InputError(*(f"{where}: {fault}" for fault in e.faults)) from None


# --- checks -----------------------------------------------------------------------------------------------------

_TYPES = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
_CAST = {float: float, tuple[str, ...]: tuple}  # JSON writes 150000 for 150000.0, and has lists


def _type_fault(field: str, value: Any, where: str) -> list[str]:
    kind = _TYPES[field]
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


def _faults(cfg: ModelConfig) -> list[str]:
    """Every field of `cfg` that cannot be computed with, one line each."""
    faults = [fault for name in _TYPES for fault in _type_fault(name, getattr(cfg, name), name)]
    if faults:
        return faults
    for name, kind in _TYPES.items():
        if kind in (int, float) and getattr(cfg, name) <= 0:
            faults.append(f"{name}: expected a positive number, found {getattr(cfg, name)}")
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
    if cfg.remat not in REMATS:
        faults.append(f"remat: expected one of {', '.join(REMATS)}, found {cfg.remat!r}")
    for name in ("hidden_size", "intermediate_size") if cfg.param_dtype == "mxfp4" else ():
        if getattr(cfg, name) % MXFP4_BLOCK:
            faults.append(f"{name}: expected a multiple of {MXFP4_BLOCK}, the MXFP4 block, found {getattr(cfg, name)}")
    return faults
