"""The gradients arm: d loss / d parameter of the whole model, float32, on both sides. For models that fit in memory.

The loss is the mean cross entropy of the next token. The candidate goes by the reference's routing, since which
experts are chosen is not differentiated, and a near-tie must not decide what is compared.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import torch
from flax import nnx
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from oss_model import Transformer, create_model_from_checkpoint
from oss_model.errors import InputError
from oss_model.params import parameter_name
from oss_model.taps import tapping
from parity import metrics
from parity.candidate import Candidate
from parity.reference import Reference, as_in_orbax
from parity.torch_layer import to_numpy

Gradients = dict[str, np.ndarray]


def check_free_memory(candidate: Candidate) -> None:
    """Before the long part.

    Raises:
      InputError: if parameters and gradients of both sides, in float32, do not fit in the memory that is free.
    """
    values = sum(math.prod(s) * (2 if name.endswith("blocks") else 1) for name, (s, _) in candidate.stored.items())
    need, free = 4 * 4 * values, psutil.virtual_memory().available
    if need > free:
        raise InputError(
            f"--gradients: expected {need / 1e9:.1f} GB of memory for both sides in float32, found {free / 1e9:.1f} GB free;"
            " use a checkpoint of fewer layers"
        )


def compare_gradients(reference: Reference, candidate: Candidate, tokens: np.ndarray) -> list[dict[str, Any]]:
    """Per parameter, its gradient's relative L2 error: [{"name", "relative_l2", "verdict"}] in the checkpoint's order.

    Args:
      reference, candidate: the two sides.
      tokens: int [batch, length], without padding.

    """
    want, routing = _reference(reference, tokens)
    got = _candidate(candidate, tokens, routing)
    found = []
    for name in [name for name in candidate.stored if name in got]:
        size = np.linalg.norm(want[name].astype(np.float64))
        error = float(metrics.finite(np.asarray(np.linalg.norm(got[name].astype(np.float64) - want[name]) / size)))
        found.append({"name": name, "relative_l2": error, "verdict": "ok" if error <= metrics.GRADIENT_GATE else "fail"})
    return found


def _reference(reference: Reference, tokens: np.ndarray) -> tuple[Gradients, list[np.ndarray]]:
    """PyTorch's gradients, named and laid out as in Orbax, and each layer's choice of experts."""
    with torch.device("meta"):
        model = gpt_oss.GptOssForCausalLM(reference.config)
    state = reference.outer_state()
    for n in range(reference.sizes.layers):
        state |= {f"model.layers.{n}.{name}": t for name, t in reference.layer(n).decoded.items()}
    model.load_state_dict({name: t.float().contiguous() for name, t in state.items()}, assign=True)
    model.model.rotary_emb = reference.rotary
    model.model.embed_tokens.padding_idx = None  # torch would leave out the padding token's embedding
    model.requires_grad_(True)
    routing: list[np.ndarray] = []
    layers: Any = model.model.layers
    for layer in layers:
        layer.mlp.router.register_forward_hook(lambda module, args, output: routing.append(output[2].numpy()))
    given = torch.from_numpy(tokens).long()
    logits = model(given, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {
        "embedding.weight": to_numpy(grads["model.embed_tokens.weight"]),
        "norm.scale": to_numpy(grads["model.norm.weight"]),
        "lm_head.weight": to_numpy(grads["lm_head.weight"]),
    }
    for n in range(reference.sizes.layers):
        prefix = f"model.layers.{n}."
        layer = {name.removeprefix(prefix): grad for name, grad in grads.items() if name.startswith(prefix)}
        found |= {name: to_numpy(grad) for name, grad in as_in_orbax(reference.config, n, layer)}
    return found, routing


def _candidate(candidate: Candidate, tokens: np.ndarray, routing: list[np.ndarray]) -> Gradients:
    """Ours; packed experts have none."""
    cfg = dataclasses.replace(candidate.cfg, dtype=jnp.float32)
    model = create_model_from_checkpoint(candidate.path, cfg)
    graphdef, state = nnx.split(model)
    # Gradients come in their parameter's dtype, and bfloat16 would hide a difference.
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, state)
    found = _gradients(nnx.merge(graphdef, state), jnp.asarray(tokens, jnp.int32), [jnp.asarray(c) for c in routing])
    return {parameter_name(path): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(found)}


@nnx.jit
def _gradients(model: Transformer, tokens: jax.Array, routing: list[jax.Array]) -> nnx.State:
    def hook(layer: int | None, name: str, value: jax.Array) -> jax.Array:
        return value if name != "expert_choice" or layer is None else routing[layer].astype(value.dtype)

    def loss(model: Transformer) -> jax.Array:
        with tapping(hook):
            logits = model(tokens)
        assert not isinstance(logits, tuple)
        likelihood = jax.nn.log_softmax(logits[:, :-1], axis=-1)
        return -jnp.mean(jnp.take_along_axis(likelihood, tokens[:, 1:, None], axis=-1))

    return nnx.grad(loss)(model)
