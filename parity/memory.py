"""What a comparison needs at the least: how much of both sides is in memory at one time."""

import math
from typing import TYPE_CHECKING

from oss_model.errors import InputError
from oss_model.memory import rss
from parity.protocols import Port

if TYPE_CHECKING:
    from parity.candidate import Candidate

# What libraries, compiled code and allocators keep beyond what is counted: measured on tiny, 20b and 120b sizes.
SLACK_BYTES = 512 << 20
FORMS_BYTES = 640 << 20  # both sides of a small model, or of a replica, and what compiling it in ten ways leaves
FRAGMENTS_BYTES = 1 << 30  # left in the allocator by reading a layer of this size or more


def least_memory(candidate: "Candidate", batch: int, length: int) -> int:
    """Resident bytes at the peak, all in, of comparing this checkpoint on a prompt [batch, length]."""

    def nbytes(prefix: str, itemsize: int | None = None) -> int:
        """As stored; with `itemsize`, as values of that many bytes, two of which are packed in a byte of blocks."""
        total = 0
        for name, (shape, dtype) in candidate.stored.items():
            if name.startswith(prefix) and not (itemsize and name.endswith(".scales")):
                values = math.prod(shape) * (2 if itemsize and name.endswith(".blocks") else 1)
                total += values * (itemsize or dtype.itemsize)
        return total

    cfg, tokens, ours = candidate.cfg, batch * length, nbytes("layers.0.")
    # XLA's lookup goes by way of float32; the unembedding multiplies in it, or in bfloat16 for the precision arm.
    first = nbytes("embedding.") + nbytes("embedding.", 4)
    last = nbytes("lm_head.") + nbytes("lm_head.", 4) + 6 * tokens * cfg.vocab_size * 4
    # Both sides' layer, the reference's decoded to bfloat16; an expert a side in float32, before and after a transposition.
    widest = max(cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim)
    taps = 3 * 16 * tokens * widest * 4 + 3 * batch * cfg.num_attention_heads * length**2 * 4
    layer = ours + nbytes("layers.0.", 2) + 4 * nbytes("layers.0.mlp.", 4) // cfg.num_experts + taps
    reading = 2 * ours  # Orbax's buffers, and the copy of them on the device
    return rss() + SLACK_BYTES + min(FRAGMENTS_BYTES, ours) + max(first, reading, layer, last)


def gradient_bytes(port: Port) -> int:
    """What parameters and gradients of both sides take in float32; a byte of blocks holds two values."""
    values = (math.prod(shape) * (2 if name.endswith(".blocks") else 1) for name, (shape, _) in port.stored.items())
    return 4 * 4 * sum(values)


def fits(port: Port, max_memory: int | None) -> bool:
    """Whether the model is small enough to be held whole, in several ways: in `max_memory`, or in half of what is free.

    On a device with memory of its own: in half of what is free of that, too.
    """
    import psutil

    from parity.device import free_bytes

    there = free_bytes()
    need = gradient_bytes(port)
    return need <= (max_memory or psutil.virtual_memory().available // 2) and (there is None or need <= there // 2)


def check_memory(port: Port, prompt: tuple[int, ...], max_memory: int, gradients: bool, forms: bool = False) -> None:
    """Before the long part. `prompt` is [batch, length].

    Raises:
      InputError: if it takes more than `max_memory` bytes, or if the port does not say what it takes.
    """
    if port.can.least_memory is None:
        raise InputError(
            f"--max-memory: expected a port that says what it takes (parity.protocols.SupportsLeastMemory), found {port}, which"
            " does not; leave it out"
        )
    need = port.can.least_memory.least_memory(*prompt)
    if gradients:
        need = max(need, rss() + SLACK_BYTES + gradient_bytes(port))
    if forms:
        need = max(need, rss() + SLACK_BYTES + FORMS_BYTES)
    if need > max_memory:
        raise InputError(
            f"--max-memory: expected at least {math.ceil(need / 2**20)}M for this checkpoint and {math.prod(prompt)} tokens,"
            f" found {max_memory >> 20}M; fewer tokens take a little less, a checkpoint in mxfp4 takes the most off"
        )


def check_free_memory(port: Port) -> None:
    """Before the long part, of the gradients.

    Raises:
      InputError: if parameters and gradients of both sides, in float32, do not fit in the memory that is free.
    """
    import psutil

    need, free = gradient_bytes(port), psutil.virtual_memory().available
    if need > free:
        raise InputError(
            f"--gradients: expected {need / 1e9:.1f} GB of memory for both sides in float32, found {free / 1e9:.1f} GB free;"
            " use a checkpoint of fewer layers"
        )
