"""The gradients arm: d loss / d parameter of the whole model, float32, on both sides. For models that fit in memory.

The loss is the mean cross entropy of the next token. The port goes by the reference's routing, since which experts
are chosen is not differentiated, and a near-tie must not decide what is compared. PyTorch's half is in
`parity.reference.gradients`.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oss_model import Transformer
from oss_model.layouts import parameter_name
from oss_model.taps import tapping
from parity import metrics
from parity.protocols import Arrays


def compare_gradients(
    want: Arrays, got: Arrays, names: Iterable[str], moved: Mapping[str, float] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Of each of these parameters its gradient's relative L2 error: [{"name", "relative_l2", "verdict"}].

    A gradient that rounding alone may move by its own length tells nothing: "incomplete".

    Args:
      want, got: the reference's and the port's, parameter's name -> float32 array.
      names: parameters that both sides have a gradient of.
      moved: how far rounding alone moves them, where that is known: the bound is so many times this, if that is more.
    """
    found = []
    for name in names:
        error = metrics.WORST
        if got[name].shape == want[name].shape:
            error = min(metrics.rel_l2(got[name], want[name]), metrics.WORST)
        gate = max(metrics.GRADIENT_GATE, metrics.TIMES * moved.get(name, 0.0))
        verdict = "ok" if error <= metrics.GRADIENT_GATE or error <= gate < 1 else "fail" if gate < 1 else "incomplete"
        found.append({"name": name, "relative_l2": error, "verdict": verdict})
    return found


def of_model(model: Transformer, tokens: np.ndarray, routing: list[np.ndarray]) -> Arrays:
    """`parity.protocols.SupportsGradients.gradients` of our model."""
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
