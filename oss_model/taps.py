"""Named points of the forward pass that can be watched and replaced from outside.

The model computes each intermediate value by way of `tap(name, compute, *inputs)` and goes on with what comes back. Without
a hook that is the value itself, under a scope of its name. With one (`with tapping(hook): model(tokens)`) the hook
sees the value and returns the value to continue with: itself to watch, another of the same shape to feed each part
of the model an input of one's own. Under `jit`, enter `tapping` inside the function that is compiled.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

MODEL_TAPS = ("embedding", "final_norm", "logits")  # layer is None
LAYER_TAPS = (
    "attn_norm", "q", "k", "v", "q_rope", "k_rope", "attn_core", "attn_out",
    "mlp_norm", "router_logits", "expert_choice", "expert_weights", "mlp_out", "layer_out",
)  # fmt: skip

Layer = int | jax.Array | None  # an array, and traced, where layers are one loop
Hook = Callable[[Any, str, jax.Array], jax.Array]  # of a `Layer`, a name, a value

_hook: ContextVar[Hook | None] = ContextVar("oss_model_tap", default=None)
_layer: ContextVar[Layer] = ContextVar("oss_model_layer", default=None)


def tap(name: str, compute: Callable[..., jax.Array], *inputs: Any) -> jax.Array:
    """compute(*inputs), in a scope that profilers show by this name, and then what the hook makes of it."""
    with jax.named_scope(name):
        value = compute(*inputs)
    hook = _hook.get()
    return value if hook is None else hook(_layer.get(), name, value)


@contextmanager
def in_layer(n: Layer) -> Iterator[None]:
    """Taps inside are of layer n. The number is the caller's: it is no part of a block, so that equal layers are equal."""
    token = _layer.set(n)
    try:
        yield
    finally:
        _layer.reset(token)


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


class _Keeping:
    """A hook that only watches one tap."""

    def __init__(self, name: str):
        self.name, self.values = name, []

    def __call__(self, _layer: Layer, name: str, value: jax.Array) -> jax.Array:
        if name == self.name:
            self.values.append(value)
        return value


@contextmanager
def keeping(name: str) -> Iterator[list[jax.Array]]:
    """A list that gets what one tap has in each layer, in their order, also where layers are one loop."""
    hook = _Keeping(name)
    with tapping(hook):
        yield hook.values


@contextmanager
def in_turn() -> Iterator[list[jax.Array]]:
    """What is kept in a turn of a loop, for it to return: nothing of it may leave otherwise. Empty outside of `keeping`."""
    hook = _hook.get()
    if not isinstance(hook, _Keeping):
        yield []
        return
    with keeping(hook.name) as values:
        yield values


def after_turns(values: list[jax.Array]) -> None:
    """After the loop: what its turns returned, each array [turns, ...]."""
    hook = _hook.get()
    if isinstance(hook, _Keeping) and values:
        hook.values += [value[turn] for turn in range(len(values[0])) for value in values]
