"""The model with layers that are compiled once: a loop over equal ones, their parameters stacked.

Compile time then does not grow with depth. For training: what is trained, and its gradients, are stacked from the start, since
stacking inside the step would copy all of it. `unscanned` gives the model back whose state is the tree on disk.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from oss_model.cache import Cache
from oss_model.errors import InputError
from oss_model.modeling import Transformer, TransformerBlock, rematerialized
from oss_model.params import abstract_model
from oss_model.taps import after_turns, in_layer, in_turn


class ScannedTransformer(Transformer):
    """`Transformer` without a cache. `layers` are those of one turn, each parameter stacked over the turns: [turns, ...].

    Names of parameters are of that turn: `layers.0.` the sliding layers of the published models, `layers.1.` the full ones.
    Made by `scanned`.
    """

    def __init__(self, model: Transformer, layers: list[TransformerBlock]):
        self.cfg, self.rope = model.cfg, model.rope
        self.embedding, self.norm, self.lm_head = model.embedding, model.norm, model.lm_head
        self.layers = nnx.List(layers)

    def walk(self, x, at, rope, cache: Cache | None):
        """
        Raises:
          InputError: with a cache.
        """
        if cache is not None:
            raise InputError("cache: expected none for scanned layers, found one; oss_model.scanned.unscanned(model) takes one")
        graphdef, state = nnx.split(self.layers)
        count = len(self.layers)

        def turn(x, given):
            number, state = given
            with in_turn() as kept:
                for n, block in enumerate(nnx.merge(graphdef, state)):
                    with in_layer(number * count + n), jax.named_scope("layer"):
                        x, _ = rematerialized(block, self.cfg.remat == "block")(x, at, rope, None)
            return x, kept

        turns = self.cfg.num_hidden_layers // count
        x, kept = jax.lax.scan(turn, x, (jnp.arange(turns, dtype=jnp.int32), state))
        after_turns(kept)
        return x, None


def period(kinds: Sequence[str]) -> int:
    """Of how many layers a turn is: the fewest that repeat."""
    sizes = (size for size in range(1, len(kinds) + 1) if len(kinds) % size == 0)
    return next(size for size in sizes if tuple(kinds) == tuple(kinds[:size]) * (len(kinds) // size))


def repeats(model: Transformer, trained: Any) -> bool:
    """Whether the layers are more than a turn, all turns alike, and the same of each is trained.

    Args:
      trained: a filter of `flax.nnx`.
    """
    turn, selects = period(model.cfg.layer_types), nnx.filterlib.to_predicate(trained)
    graphs: dict[int, set[Any]] = {}
    found: dict[tuple, set[bool]] = {}
    for n, layer in enumerate(model.layers):
        graphdef, state = nnx.split(layer)
        graphs.setdefault(n % turn, set()).add(graphdef)
        for path, variable in nnx.to_flat_state(state):
            found.setdefault((n % turn, *path), set()).add(selects(("layers", n, *path), variable))
    return len(model.layers) > turn and all(len(alike) == 1 for alike in (*graphs.values(), *found.values()))


def scanned(model: Transformer) -> ScannedTransformer:
    """The same model, its layers stacked. They are moved: `model` has no values in them afterwards.

    One parameter, of all turns, is in memory twice at a time. Adapted layers (`add_lora`) are stacked with their updates.
    """
    turn, layers = period(model.cfg.layer_types), []
    for n in range(turn):
        graphdef, first = nnx.split(model.layers[n])
        stacked = {path: variable.copy() for path, variable in nnx.to_flat_state(first)}
        states = [(layer, nnx.state(layer)) for layer in model.layers[n::turn]]
        held = [(layer, state, dict(nnx.to_flat_state(state))) for layer, state in states]
        for path, variable in stacked.items():
            variable.set_value(_stack([flat[path].get_value() for _, _, flat in held]))
            _annotate(variable, stacked=True)
            for layer, state, flat in held:
                value = flat[path].get_value()
                flat[path].set_value(jax.ShapeDtypeStruct(value.shape, value.dtype))
                nnx.update(layer, state)
        layers.append(nnx.merge(graphdef, nnx.from_flat_state(stacked)))
    return ScannedTransformer(model, layers)


def unscanned(model: ScannedTransformer) -> Transformer:
    """The model with a layer each, whose `nnx.state` is what is saved. They are moved, as `scanned` moves them."""
    single, turn = nnx.merge(*abstract_model(model.cfg)), len(model.layers)
    single.embedding, single.norm, single.lm_head = model.embedding, model.norm, model.lm_head
    layers: list[Any] = [None] * model.cfg.num_hidden_layers
    for n, stacked in enumerate(model.layers):
        graphdef, state = nnx.split(stacked)
        states: list[dict] = [{} for _ in range(n, len(layers), turn)]
        for path, variable in nnx.to_flat_state(state):
            value = variable.get_value()
            for flat, one in zip(states, _unstack(value), strict=True):
                flat[path] = variable.copy()
                flat[path].set_value(one)
                _annotate(flat[path], stacked=False)
            variable.set_value(jax.ShapeDtypeStruct(value.shape, value.dtype))
            nnx.update(stacked, state)
        layers[n::turn] = [nnx.merge(graphdef, nnx.from_flat_state(flat)) for flat in states]
    single.layers = nnx.List(layers)
    return single


def _stack(values: list[Any]) -> Any:
    """Cut as each of them is. Of a model without values: without one too."""
    placed = values[0].sharding
    if isinstance(placed, NamedSharding):
        placed = NamedSharding(placed.mesh, PartitionSpec(None, *placed.spec))
    if isinstance(values[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(values), *values[0].shape), values[0].dtype, sharding=placed)
    return jax.jit(_stacked, out_shardings=placed)(*values)


def _stacked(*values: Any) -> Any:
    return jnp.stack(values)


def _unstack(value: Any) -> Sequence[Any]:
    """Each cut as all were."""
    placed = value.sharding
    if isinstance(placed, NamedSharding):
        placed = NamedSharding(placed.mesh, PartitionSpec(*placed.spec[1:]))
    return jax.jit(tuple, out_shardings=placed)(value)


def _annotate(variable: nnx.Variable, *, stacked: bool) -> None:
    """The spec that `use_sharding` noted, of the array as it is now."""
    spec = variable.get_metadata().get("out_sharding")
    if spec is not None:
        variable.set_metadata(out_sharding=PartitionSpec(None, *spec) if stacked else PartitionSpec(*spec[1:]))
