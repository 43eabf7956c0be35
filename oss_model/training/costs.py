"""What a step of training computes, in FLOPs, and what chips can do."""

from typing import NamedTuple

from oss_model.config import SLIDING, ModelConfig


class Chip(NamedTuple):
    """Published figures of one chip.

    TPUs: https://cloud.google.com/tpu/docs/v5p, /v5e, /v6e (November 2026); GPUs: NVIDIA's data sheets of H100 and H200 SXM,
    without sparsity.
    """

    flops: float  # a second, bfloat16
    memory: float  # bytes
    bandwidth: float  # of it, bytes a second
    network: float  # between chips, bytes a second, all links together


CHIPS = {
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
    "H100": Chip(989e12, 80e9, 3350e9, 450e9),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9),
}
# As JAX calls them (`jax.Device.device_kind`).
KINDS = {"TPU v5": "v5p", "TPU v5p": "v5p", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}
KINDS |= {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}


def chip_of(device_kind: str) -> Chip | None:
    return CHIPS.get(KINDS.get(device_kind, ""))


def flops(cfg: ModelConfig, batch: int, length: int, *, lora: bool = False, dense: bool = False) -> dict[str, float]:
    """Of a step, two a multiplication, by what is multiplied; softmax, norms and the like are left out.

    Forward once, backward twice as much (once where weights are frozen), and layers forward again where `cfg.remat` is "block".

    Args:
      dense: count attention as if each token saw all of its row; else those it sees.
    """
    h, heads, kv = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    window, layers = min(cfg.sliding_window, length), cfg.num_hidden_layers
    seen = {False: length * (length + 1) / 2, True: window * (window + 1) / 2 + (length - window) * window}
    pairs = sum(length**2 if dense else seen[kind == SLIDING] for kind in cfg.layer_types)
    tokens = batch * length
    forward = {
        "attention maps": layers * tokens * 4 * h * (heads + kv),
        "attention": batch * pairs * 4 * heads,
        "experts": layers * tokens * h * (6 * cfg.intermediate_size * cfg.num_experts_per_tok + 2 * cfg.num_experts),
        "vocabulary": tokens * 2 * h * cfg.vocab_size,
    }
    again = {"none": 0, "mlp": 0, "block": 1}[cfg.remat]
    times = {name: 1 + (1 if lora and name != "attention" else 2) + (again if name != "vocabulary" else 1) for name in forward}
    if cfg.remat == "mlp":
        times["experts"] += 1
    return {name: float(count * times[name]) for name, count in forward.items()}
