"""A candidate with mistakes in it, for `check-parity --self-test`: none of this runs in a comparison."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from oss_model import Transformer, create_model_from_checkpoint
from oss_model.params import abstract_model
from parity.candidate import Candidate, CandidateLayer
from parity.injection.blocks import INJECTIONS
from parity.protocols import Arrays, Settings
from parity.walk import Call


class Faulty(Candidate):
    """A candidate with a mistake in layer `n`; in all of the model for mistakes that lie outside the layers.

    `read` keeps the right model of this checkpoint, for others of the same one. `others` are put in besides: (mistake, layer).
    """

    def __init__(
        self,
        checkpoint: Any,
        fault: str,
        n: int | None,
        read: dict[Any, Any] | None = None,
        others: Iterable[tuple[str, int | None]] = (),
    ):
        super().__init__(checkpoint, expert_path="loop")
        self.said = super().settings
        self.read = {} if read is None else read
        self.injected = [(INJECTIONS[name], layer) for name, layer in ((fault, n), *others)]
        for injection, _ in self.injected:
            if injection.config is not None:
                self.cfg = dataclasses.replace(self.cfg, **injection.config(self.cfg))

    @property
    def settings(self) -> Settings:
        """What the files say, which are right: a mistake of the code that `cfg` makes is none of theirs."""
        return self.said

    def restore(self, names: Iterable[str]) -> Arrays:
        wanted = list(names)
        missing = [name for name in wanted if name not in self.read]
        if missing:
            self.read |= super().restore(missing)
        return {name: self.read[name] for name in wanted}

    def model(self, dtype: np.dtype) -> Transformer:
        """A copy of the right one, with the mistake in it."""
        if dtype not in self.models:
            if dtype not in self.read:
                self.read[dtype] = create_model_from_checkpoint(self.path, Candidate(self.path, expert_path="loop").cfg)
            cfg = dataclasses.replace(self.cfg, dtype=dtype)
            made = nnx.merge(*abstract_model(cfg))
            nnx.update(made, jax.tree.map(lambda leaf: leaf, nnx.state(self.read[dtype])))
            self.models[dtype] = made
            for injection, n in self.injected:
                if injection.block is not None and n is not None:
                    injection.block(made.layers[n])
                if injection.model is not None:
                    injection.model(made)
        return self.models[dtype]

    def loaded(self, names: Iterable[str]) -> Arrays:
        """As stored: a mistake in a block's parameters is made by the code that goes by them."""
        return self.restore(names)

    def call(self, tokens: np.ndarray, positions: np.ndarray | None, dtype: np.dtype) -> Call:
        return FaultyCall(super().call(tokens, positions, dtype).run, self)

    def layer(self, n: int) -> CandidateLayer:
        return FaultyLayer(self, n)

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        with self.made_in(None):
            return super().embed(tokens, dtype)

    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        with self.made_in(None):
            return super().unembed(x, forced)

    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self.made_in(None):
            return super().rope_tables(positions)

    def made_in(self, part: int | None) -> contextlib.AbstractContextManager:
        stack = contextlib.ExitStack()
        for injection, n in self.injected:
            if n == part:
                stack.enter_context(injection.patched())
        return stack


class FaultyCall(Call):
    """The code is wrong while its part is run."""

    def __init__(self, run: Callable[[], Any], port: Faulty):
        super().__init__(run)
        self.port = port

    def advance(self, part: int | None, forced: Mapping[str, np.ndarray] | None = None) -> Arrays:
        with self.port.made_in(part):
            return super().advance(part, forced)


class FaultyLayer(CandidateLayer):
    candidate: Faulty

    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        with self.candidate.made_in(self.n):
            return super().run(x, forced)

    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        with self.candidate.made_in(self.n):
            return super().experts(x, choice, weights)
