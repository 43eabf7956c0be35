"""Arrays gathered and sums scattered in steps are those of one step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_oss_model_sharding import mesh_of, name_of

from oss_model.gathering import gather, scatter_sum

MESHES = [{"fsdp": 8}, {"fsdp": 2, "context": 4}, {"context": 2, "fsdp": 4}, {"fsdp": 3}, {"fsdp": 6}, {"tensor": 2, "fsdp": 4}]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("axes", MESHES, ids=name_of)
def test_steps_give_what_one_gives(axes, axis):
    """Forward, backward, and the other way round; numbers are whole, so that sums are equal in any order."""
    names, rng = tuple(name for name in axes if name != "tensor"), np.random.default_rng(0)
    share, whole = P(*(names if n == axis else None for n in range(2))), P()
    array, slope = (jnp.asarray(rng.integers(-9, 9, (24, 24)), jnp.float32) for _ in range(2))

    def own(slope):
        return slope * (1 + jax.lax.axis_index(names)).astype(jnp.float32)

    def stepped(array, slope):
        joined, back = jax.vjp(lambda a: gather(a, names, axis), array)
        mine = own(slope)
        return joined, back(mine)[0], scatter_sum(mine, names, axis)

    def at_once(array, slope):
        joined = jax.lax.all_gather(array, names, axis=axis, tiled=True)
        summed = jax.lax.psum_scatter(own(slope), names, scatter_dimension=axis, tiled=True)
        return joined, summed, summed

    with jax.set_mesh(mesh_of(axes)):
        found, expected = (
            jax.jit(jax.shard_map(f, in_specs=(share, whole), out_specs=(whole, share, share), check_vma=False))(array, slope)
            for f in (stepped, at_once)
        )
    np.testing.assert_array_equal(found[0], array)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("axes", "sizes"), [({"fsdp": 8}, {2, 4}), ({"fsdp": 2, "context": 4}, {2, 4}), ({"fsdp": 4}, {4})], ids=str
)
def test_an_axis_of_more_than_four_devices_goes_in_two_steps(axes, sizes):
    def back(a):
        return jax.vjp(lambda a: gather(a, tuple(axes)), a)[1](jnp.ones((16, 16)))[0]

    with jax.set_mesh(mesh_of(axes)):
        step = jax.jit(jax.shard_map(back, in_specs=P(tuple(axes)), out_specs=P(tuple(axes)), check_vma=False))
        text = str(jax.make_jaxpr(step)(jnp.zeros((16, 16))))
    assert {int(size) for size in re.findall(r"reduce_scatter\[.*?axis_size=(\d+)", text, re.DOTALL)} == sizes
