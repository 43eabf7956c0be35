"""Arrays gathered along axes of the mesh, and sums scattered along them: within `jax.shard_map`, a few devices at a time.

The gradient of a gather is a scattered sum, a reduce-scatter. Of one over all devices of v5p 2x2x2 and 4x4x4 and of v5e 8x8,
XLA for TPUs (libtpu 0.0.42.1) makes an all-reduce, which sends twice as much and holds the whole sum on every device; on v5p
2x2x1 and v6e 4x8 it does not. In two steps, each along a part of the axis, it stays a reduce-scatter, and together they send
what one would: of n = a · b shares, (1 - 1/a) + (1 - 1/b) / a = 1 - 1/n.
"""

import math
from collections.abc import Iterator, Sequence

import jax

WHOLE = 4  # axes of up to so many devices go in one step


def gather(array: jax.Array, names: Sequence[str], axis: int = 0) -> jax.Array:
    """What the devices along these mesh axes have, joined along `axis`: the first name's devices are furthest apart."""
    for name, groups in reversed(list(_steps(names))):
        array = jax.lax.all_gather(array, name, axis=axis, axis_index_groups=groups, tiled=True)
    return array


def scatter_sum(array: jax.Array, names: Sequence[str], axis: int = 0) -> jax.Array:
    """The sum over the devices along these mesh axes, of which each has its part along `axis`, cut as `gather` joins."""
    for name, groups in _steps(names):
        array = jax.lax.psum_scatter(array, name, scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return array


def _steps(names: Sequence[str]) -> Iterator[tuple[str, list[list[int]] | None]]:
    """Mesh axis and groups of its devices (None: all of them), from those furthest apart to neighbours."""
    for name in names:
        count = jax.lax.axis_size(name)
        near = max(n for n in range(1, math.isqrt(count) + 1) if count % n == 0)
        if near == 1 or count <= WHOLE:
            yield name, None
        else:
            yield name, [list(range(n, count, near)) for n in range(near)]
            yield name, [list(range(n, n + near)) for n in range(0, count, near)]
