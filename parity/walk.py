"""Calls of the real model, `model(tokens)`, side by side: each stops where a part of it ends, and goes on when it is told to.

The model owns the walk over its parts. A hook (`oss_model.taps`) sees every tap, and puts in what is forced; where a tap ends
a part, the call waits, so that several calls go through the model together and a model that does not fit in memory has one
part there at a time.
"""

import gc
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oss_model import Transformer
from oss_model.layouts import parameter_name
from oss_model.params import Loader, parts
from oss_model.taps import tapping
from parity.protocols import Arrays, Port

ENDS = ("embedding", "layer_out", "logits")  # the last taps of the parts
_AFTER = "after"


class _Stopped(BaseException):
    """Ends a call that nobody waits for any more."""


class Call:
    """One call under way. `run` is what is called; it must not be entered by more than one thread at a time."""

    def __init__(self, run: Callable[[], Any]):
        self.run = run
        self.seen: dict[str, jax.Array] = {}
        self.forced: Mapping[str, np.ndarray] = {}
        self.come: tuple[int | str | None, dict[str, jax.Array]] | None = None  # a part that was not asked for yet
        self.passed: list[int | None] = []
        self.returned: Any = None
        self.there: queue.SimpleQueue = queue.SimpleQueue()
        self.go: queue.SimpleQueue = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def advance(self, part: int | None, forced: Mapping[str, np.ndarray] | None = None) -> Arrays:
        """Run the next part, and give its taps; none if the model did not run it.

        Args:
          part: a layer's number; None for what comes before the layers, and for what comes after.
          forced: tap -> value to go on with in place of the model's own.
        """
        if self.come is None:
            self.come = self._next(forced or {})
        while self.passed and self.come[0] == self.passed[-1] != part:  # a part that it runs once more
            self.come = self._next(forced or {})
        found, seen = self.come
        if found != part:
            return {}
        self.come = None
        self.passed.append(part)
        return {name: np.asarray(value) for name, value in seen.items()}

    def finish(self) -> Any:
        """What the call returned; None if it stopped somewhere else than after its last part."""
        if self.come is None:
            self.come = self._next({})
        return self.returned if self.come[0] == _AFTER else None

    def close(self) -> None:
        if self.thread is not None and self.thread.is_alive():
            self.go.put(None)
            self.thread.join()

    def _next(self, forced: Mapping[str, np.ndarray]) -> tuple[int | str | None, dict[str, jax.Array]]:
        if self.thread is None:
            self.thread = threading.Thread(target=self._call, daemon=True)
            self.forced = forced
            self.thread.start()
        else:
            self.go.put(forced)
        found = self.there.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _call(self) -> None:
        try:
            with tapping(self._hook):
                self.returned = self.run()
            self.there.put((_AFTER, {}))
        except _Stopped:
            pass
        except BaseException as error:
            self.there.put(error)

    def _hook(self, layer: int | None, name: str, value: jax.Array) -> jax.Array:
        self.seen[name] = value
        given = self.forced.get(name)
        if given is not None and given.size == value.size:
            value = jnp.asarray(given).reshape(value.shape).astype(value.dtype)
        if name in ENDS:
            self.there.put((layer, self.seen))
            self.seen = {}
            forced = self.go.get()
            if forced is None:
                raise _Stopped
            self.forced = forced
        return value


class Assembled:
    """A call of a port that has no walk of its own: its parts, one after the other (`parity.protocols.Call`)."""

    def __init__(self, port: Port, tokens: np.ndarray, dtype: np.dtype):
        self.port, self.tokens, self.dtype = port, tokens, dtype
        self.x: np.ndarray | None = None
        self.logits: np.ndarray | None = None

    def advance(self, part: int | None, forced: Arrays | None = None) -> Arrays:
        if self.x is None:
            taps = {"embedding": self.port.embed(self.tokens, self.dtype)}
            self.x = (forced or {}).get("embedding", taps["embedding"]).astype(taps["embedding"].dtype)
        elif part is None:
            taps = self.port.unembed(self.x, forced)
            self.logits = taps.get("logits")
        else:
            taps = self.port.layer(part).run(self.x, forced)
            if "layer_out" in taps:
                self.x = (
                    (forced or {}).get("layer_out", taps["layer_out"]).reshape(self.x.shape).astype(taps["layer_out"].dtype)
                )
        return taps

    def finish(self) -> np.ndarray | None:
        return self.logits

    def close(self) -> None: ...


class Parts:
    """Models that share parameters, of which one part is in memory at a time: loaded when it is used.

    In each model a part is replaced by what loads it first.
    """

    def __init__(self, loader: Loader, collect: bool):
        self.loader, self.collect = loader, collect
        self.models: list[dict[str, nnx.Module]] = []
        self.there: tuple[str, ...] = ()

    def model(self, model: Transformer) -> Transformer:
        """`model`, which has no values, made to load its parts."""
        own = parts(model)
        self.models.append(own)
        if len(self.models) > 1 and self.there:
            self._share(self.there, own)
        names = [name for name in own if name.startswith("layers.")]
        for name, modules in (("embedding", ("embedding",)), ("norm", _LAST), ("lm_head", _LAST)):
            object.__setattr__(model, name, _Part(self, modules, own[name]))
        object.__setattr__(model, "layers", _Layers(self, names, own))
        return model

    def load(self, *names: str) -> None:
        if self.there == names:
            return
        for model in self.models:
            for name in self.there:
                _empty(model[name])
        self.there = ()
        if self.collect:
            gc.collect()  # the part before, which Flax leaves in reference cycles
        first = self.models[0]
        self.loader.load({name: first[name] for name in names})
        self.there = names
        for other in self.models[1:]:
            self._share(names, other)

    def _share(self, names: tuple[str, ...], other: dict[str, nnx.Module]) -> None:
        for name in names:
            nnx.update(other[name], nnx.state(self.models[0][name]))


_LAST = ("norm", "lm_head")


class _Part:
    """Stands for a module that is loaded before it is called."""

    def __init__(self, parts: Parts, names: tuple[str, ...], module: Any):
        self.parts, self.names, self.module = parts, names, module

    def __call__(self, *given: Any) -> Any:
        self.parts.load(*self.names)
        return self.module(*given)


class _Layers:
    """Stands for a model's layers, each loaded when it is its turn."""

    def __init__(self, parts: Parts, names: list[str], modules: dict[str, Any]):
        self.parts, self.names, self.modules = parts, names, modules

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, n: int) -> Any:
        self.parts.load(self.names[n])
        return self.modules[self.names[n]]

    def __iter__(self) -> Iterator[Any]:
        return (self[n] for n in range(len(self)))


def _empty(module: nnx.Module) -> None:
    state = nnx.state(module)
    for _, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        variable.set_value(jax.ShapeDtypeStruct(value.shape, value.dtype))
    nnx.update(module, state)


def values(name: str, module: nnx.Module) -> dict[str, jax.Array]:
    """The parameters of a part of the model, by their whole names."""
    return {f"{name}.{parameter_name(path)}": variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(module))}


def replace(name: str, part: str, module: nnx.Module, value: Any) -> None:
    """Give one parameter another value, in the dtype that it is held in."""
    state = nnx.state(module)
    for path, variable in nnx.to_flat_state(state):
        if f"{part}.{parameter_name(path)}" == name:
            variable.set_value(jnp.asarray(value).astype(variable.get_value().dtype))
    nnx.update(module, state)
