"""What the configurations of two sides say, compared; and whether a model of published sizes has the published constants.

Names are those of `oss_model.ModelConfig`, whoever reads the file; values are as JSON has them. Nothing here reads one.
"""

from typing import Any

from parity.protocols import Settings, Sizes

# What the logits depend on, and what else is worth a line where it differs.
LOGITS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_experts", "num_experts_per_tok", "sliding_window", "layer_types", "rms_norm_eps", "swiglu_alpha",
    "swiglu_limit", "rope_theta", "rope_factor", "rope_beta_fast", "rope_beta_slow", "rope_original_max_position_embeddings",
    "rope_truncate",
)  # fmt: skip
OTHERS = ("max_position_embeddings", "eos_token_id")

_NAMES = {(24, 32, 201088): "gpt-oss-20b", (36, 128, 201088): "gpt-oss-120b"}
_PUBLISHED = {  # of both (config.json on the hub)
    "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
    "rope_theta": 150000.0, "rope_factor": 32.0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0,
    "rope_original_max_position_embeddings": 4096, "rope_truncate": False,
}  # fmt: skip


def differences(port: Settings, oracle: Settings) -> list[dict[str, Any]]:
    """{"name", "checkpoint", "source", "logits"} of all that both say and say differently; those that change logits first."""
    return [
        {"name": name, "checkpoint": port[name], "source": oracle[name], "logits": name in LOGITS}
        for name in (*LOGITS, *OTHERS)
        if name in port and name in oracle and port[name] != oracle[name]
    ]


def said(difference: dict[str, Any]) -> str:
    """Of layer types only those that differ, which may be one of 36."""
    ours, theirs = difference["checkpoint"], difference["source"]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        places = [n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        more = f" (and of {len(places) - 1} layers more)" if len(places) > 1 else ""
        return f"DST/config.json says {difference['name']}[{places[0]}] {ours[places[0]]}, SRC says {theirs[places[0]]}{more}"
    return f"DST/config.json says {difference['name']} {ours}, SRC says {theirs}"


def title(sizes: Sizes, settings: Settings) -> tuple[str, list[str]]:
    """The model's name, and a line for each constant that the published model of these sizes has otherwise."""
    generic = f"gpt-oss, {sizes.layers} layers, {sizes.experts} experts, vocabulary {sizes.vocab}"
    name = _NAMES.get((sizes.layers, sizes.experts, sizes.vocab))
    if name is None or not settings:
        return generic, []
    published = _PUBLISHED | {"layer_types": ["sliding_attention", "full_attention"] * (sizes.layers // 2)}
    other = [
        f"SRC has the sizes of {name} and another {constant}: {settings[constant]}, published is {value}"
        for constant, value in published.items()
        if constant in settings and settings[constant] != value
    ]
    return (generic if other else name), other
