"""config.json of an export, as the reader of each layout wants it."""

import json
from pathlib import Path

from converter.ends import Source
from converter.form import Form
from oss_model import dialects
from oss_model.config import FULL, SLIDING
from oss_model.files import parse_json

# What a quantizer must leave alone, as published; by this key alone vLLM chooses its loader.
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
}
TRAINED = "trained.json"  # beside a model that was trained: which one it began with
_OF_THE_FORM = {"quantization_config", "torch_dtype", "dtype", "rope_scaling", "rope_parameters", "architectures", "model_type"}


def config_of(source: Source, form: Form) -> bytes | None:
    """The text; None where the source's own is copied.

    What the source's says besides the model (tokens, generation) is kept. Both ways to write the rotation are there, for
    readers old and new.

    Raises:
      InputError: if the form has no way to say something: OpenAI's has no eps and no layer types.
    """
    if form.to == "orbax":
        if not form.ignore:
            return None
        found = parse_json((source.home / "config.json").read_bytes())
        return _text({key: value for key, value in found.items() if key not in form.ignore})
    if form.to == "openai":
        return _text(dialects.write(source.cfg, "openai"))
    found = parse_json((source.home / "config.json").read_bytes())
    kept = {key: value for key, value in found.items() if key not in {*_OF_THE_FORM, *form.ignore} and not key.startswith("_")}
    kept = kept if "model_type" in found or "num_local_experts" in found else {}  # of OpenAI's dialect, nothing
    said = dialects.write(source.cfg, "transformers4") | {
        "rope_parameters": dialects.write(source.cfg, "transformers5")["rope_parameters"]
    }
    said |= {
        "experts_per_token": source.cfg.num_experts_per_tok,
        "torch_dtype": "float32" if form.dtype == "float32" else "bfloat16",
    }
    said |= {"quantization_config": MXFP4} if form.packed else {}
    return _text(dict(sorted((kept | said).items())))


def notes(source: Source, form: Form, companions: list[Path]) -> list[str]:
    """What whoever serves the export should know.

    Args:
      companions: the files that lie beside its tensors.
    """
    found = []
    if form.quantizer and form.like is None:
        base = _base(source.home / TRAINED) or "SRC, the packed checkpoint that it began with,"
        found.append(f"blocks that were MXFP4 may get other bytes of the same values; --like {base} keeps theirs")
    if form.to in ("hf", "hf-bf16"):
        turns = [SLIDING if n % 2 == 0 else FULL for n in range(source.cfg.num_hidden_layers)]
        if list(source.cfg.layer_types) != turns:
            found.append("vLLM cannot serve it: it takes every other layer for a sliding one, whatever layer_types says")
        if not any(file.name.startswith("tokenizer") for file in companions):
            found.append(f"without a tokenizer, which {source.home} has not; --tokenizer DIR copies one")
    return found


def _base(trained: Path) -> str | None:
    """What scripts/examples/finetune.py began with."""
    try:
        return str(parse_json(trained.read_bytes())["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _text(data: dict) -> bytes:
    return json.dumps(data, indent=2).encode() + b"\n"
