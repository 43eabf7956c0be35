"""The three dialects of config.json, read and written.

As published on the hub (by transformers 4: `rope_scaling`), as written by transformers 5 (`rope_parameters`), and OpenAI's
original. Reading, every key is read, or known not to change the arithmetic, or refused.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any

from oss_model.buckets import path_of
from oss_model.config import CAST, TYPES, ModelConfig, type_fault
from oss_model.errors import InputError, raise_all
from oss_model.files import parse_json

DIALECTS = ("transformers4", "transformers5", "openai")


def read(source: "str | os.PathLike | Mapping[str, Any]", ignore: Collection[str] | None = ()) -> dict[str, Any]:
    """Fields of `ModelConfig` -> values, of config.json (its path or directory, or the parsed object).

    Args:
      ignore: keys that nobody here knows, and that somebody who does says to leave alone; None: all such.

    Raises:
      InputError: naming every key that is missing, of the wrong type, or not implemented; and each of `ignore` that is known,
        or not there.
    """
    if isinstance(source, Mapping):
        return _fields(dict(source), "config.json", ignore)
    path = path_of(source)
    where = path / "config.json" if path.is_dir() else path
    try:
        data = parse_json(where.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{where}: expected a gpt-oss config.json, found no file") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{where}: expected a JSON object, found something unreadable ({e})") from None
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(data).__name__}")
    return _fields(data, str(where), ignore)


def write(cfg: ModelConfig, dialect: str) -> dict[str, Any]:
    """The object that `read` gives `cfg` back from; its dtypes and how it is computed are not in it.

    Raises:
      InputError: if there is no such dialect, or it cannot say something: the original has no layer types, no eps and no
        truncate of its own, and none of them has swiglu's alpha.
    """
    if dialect not in DIALECTS:
        raise InputError(f"dialect: expected one of {', '.join(DIALECTS)}, found {dialect!r}")
    if dialect == "openai":
        found = {key: getattr(cfg, field) for key, field in _OPENAI_KEYS.items()}
    else:
        found = {key: getattr(cfg, field) for key, field in _HF_KEYS.items() if field not in ("swiglu_alpha", "rope_theta")}
        rope = {key: getattr(cfg, field) for key, field in _ROPE_KEYS.items()} | {"rope_type": "yarn"}
        found |= {"layer_types": list(cfg.layer_types), "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
        found |= {"attention_bias": True, "attention_dropout": 0.0, "tie_word_embeddings": False}
        if dialect == "transformers4":
            found["rope_theta"] = rope.pop("rope_theta")
        found["rope_scaling" if dialect == "transformers4" else "rope_parameters"] = rope
    said = ModelConfig(**read(found))
    raise_all(
        [
            f"{field.name}: a config.json of {dialect} can only say {getattr(said, field.name)!r}, not {value!r}"
            for field in dataclasses.fields(cfg)
            if field.name not in _NOT_SAID and (value := getattr(cfg, field.name)) != getattr(said, field.name)
        ]
    )
    return found


# What no dialect says, or not every one: the values of a model's logits do not depend on it.
_NOT_SAID = {"max_position_embeddings", "dtype", "param_dtype", "expert_path", "experts_qat", "attention_block", "remat",
             "use_sharding"}  # fmt: skip

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
# Keys that would change the arithmetic, with the only value that is implemented. Old files of transformers have many.
_ONLY = {"attention_bias": True, "attention_dropout": 0, "tie_word_embeddings": False, "is_encoder_decoder": False,
         "add_cross_attention": False, "cross_attention_hidden_size": None, "is_decoder": False, "pruned_heads": {},
         "tie_encoder_decoder": False, "torchscript": False}  # fmt: skip
# Keys that leave the logits alone. `hidden_act` is among them: the reference does not read it either.
_HARMLESS = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "hidden_act", "id2label", "initializer_range", "label2id", "model_type", "name_or_path", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type", "quantization_config", "return_dict",
    "router_aux_loss_coef", "sep_token_id", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
    # of how it is run, and who trained or pruned it
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "experts_implementation", "finetuning_task",
    "model_name", "pruned_from_num_experts", "pruned_to_num_experts", "task_specific_params", "tf_legacy_loss",
    "unsloth_fixed", "unsloth_version", "use_bfloat16",
    # of generation, which older releases of transformers wrote here
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "prefix", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip


def _fields(data: dict[str, Any], where: str, ignore: Collection[str] | None) -> dict[str, Any]:
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
            wrong = type_fault(field, value, f"{where}: {prefix}{key}")
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
        faults.append(
            f"{where}: quantization_config.quant_method: only 'mxfp4' is implemented, found {quantization!r}; use the model's "
            "bfloat16 or MXFP4 form"
        )
    unknown = sorted(rest.keys() - _HARMLESS)
    for key in unknown:
        if ignore is not None and key not in ignore:
            faults.append(
                f"{where}: {key}: not a key of gpt-oss; it may change the arithmetic, so it is refused; convert-oss "
                f"--ignore-config-key {key} lets it pass, if you know that it does not"
            )
    for key in sorted(set(ignore or ()) - set(unknown)):
        faults.append(
            f"{where}: {key}: expected an unknown key, to be ignored, found {'a known one' if key in data else 'none'}"
        )
    # transformers 4 knows no such key and writes none: its code says 7.
    optional = _OPTIONAL | {"swiglu_limit"} if hf else _OPTIONAL
    for field in sorted(names.keys() - found.keys() - optional):
        faults.append(f"{where}: {names[field]}: missing; is this the config.json of a gpt-oss model?")
    raise_all(faults)
    found = {field: CAST.get(TYPES[field], lambda value: value)(value) for field, value in found.items()}
    try:
        ModelConfig(**found)
    except InputError as e:
        raise InputError(*(f"{where}: {fault}" for fault in e.faults)) from None
    return found
