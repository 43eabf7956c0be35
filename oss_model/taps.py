"""Named points of the forward pass that can be watched and replaced from outside.

The model hands each intermediate value through `tap(layer, name, value)` and goes on with what comes back. Without
a hook that is the value itself, and nothing is compiled in. With one (`with tapping(hook): model(tokens)`) the hook
sees the value and returns the value to continue with: itself to watch, another of the same shape to feed each part
of the model an input of one's own. Under `jit`, enter `tapping` inside the function that is compiled.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

MODEL_TAPS = ("embedding", "final_norm", "logits")  # layer is None
LAYER_TAPS = (
    "attn_norm", "q", "k", "v", "q_rope", "k_rope", "attn_core", "attn_out",
    "mlp_norm", "router_logits", "expert_choice", "expert_weights", "mlp_out", "layer_out",
)  # fmt: skip

Hook = Callable[[int | None, str, jax.Array], jax.Array]

_hook: ContextVar[Hook | None] = ContextVar("oss_model_tap", default=None)


def tap(layer: int | None, name: str, value: jax.Array) -> jax.Array:
    hook = _hook.get()
    return value if hook is None else hook(layer, name, value)


def watched() -> bool:
    """Whether a hook is set."""
    return _hook.get() is not None


@contextmanager
def tapping(hook: Hook) -> Iterator[None]:
    """Hand every tapped value of the forward passes inside the block to `hook`."""
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)
