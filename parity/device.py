"""The device that a port of JAX runs on, and what float32 does there.

A GPU multiplies float32 in TF32 unless it is told not to, which is three digits less. The noise of a tap on a device is that
of the equations' own text (`parity.equations`), computed there by JAX with products in full float32.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oss_model.errors import InputError
from parity.protocols import Arrays, Settings


@contextlib.contextmanager
def computing_on(platform: str | None) -> Iterator[Any]:
    """What JAX places nowhere else goes to the first device of this platform meanwhile, in all threads; None: as before.

    Raises:
      InputError: if JAX has none.
    """
    before = jax.config.jax_default_device  # type: ignore[attr-defined]
    if platform is not None:
        try:
            jax.config.update("jax_default_device", jax.local_devices(backend=platform)[0])
        except RuntimeError:
            raise InputError(
                f"--device {platform}: expected one that JAX can use, found {jax.default_backend()} alone: install JAX for"
                f" {platform.upper()}s (docs.jax.dev, Installation), or leave --device out"
            ) from None
    try:
        yield here()
    finally:
        jax.config.update("jax_default_device", before)


def here() -> Any:
    """The `jax.Device` that is computed on."""
    return next(iter(jnp.zeros(()).devices()))


def free_bytes() -> int | None:
    """What is free of the device's own memory; None where it is the host's."""
    stats = here().memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


def noise(name: str, t: Arrays, p: Any, s: Settings) -> np.ndarray:
    """`parity.equations.noise`, computed on the device."""
    as_numpy = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    given = {key: value if value.dtype.kind in "iub" else jnp.asarray(value) for key, value in t.items()}
    with jax.default_matmul_precision("highest"), as_numpy[0], as_numpy[1]:
        return np.asarray(_equations().noise(name, given, p, s))


@functools.cache
def _equations() -> ModuleType:
    """parity.equations once more, where NumPy is JAX's."""
    spec = importlib.util.find_spec("parity.equations")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    here = {"float64": jnp.float32, "errstate": np.errstate, "unique": np.unique, "nonzero": np.nonzero}
    module.np = SimpleNamespace(**vars(jnp) | here)  # type: ignore[attr-defined]
    module.add_rows = lambda total, rows, values: total.at[rows].add(values)  # type: ignore[attr-defined]
    return module
