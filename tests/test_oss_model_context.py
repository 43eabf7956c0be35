"""On a mesh whose `context` axis cuts the length, rows are computed as on one device, and every device does its part."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_oss_model_sharding import mesh_of, name_of

from oss_model import InputError, create_model_from_checkpoint, layers, sharding
from oss_model.attention import BLOCK, Blocks, Order, Tokens, attend, in_order
from oss_model.context_parallel import attend as attend_on_mesh
from oss_model.layouts import parameters
from oss_model.loss import cross_entropy

LENGTH, WINDOW = 112, 11
MESHES = [{"context": 8}, {"context": 2, "fsdp": 2, "tensor": 2}, {"context": 4, "expert": 2}, {"fsdp": 2, "context": 4}]


def rows(kind: str) -> Tokens:
    """Two rows: padded on a side, or of packed documents that end in the middle of slices."""
    at = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    if kind == "left":
        at[1] = np.where(at[1] < 40, -1, at[1] - 40)
    elif kind == "right":
        at[1, 50:] = -1
    segments = None
    if kind == "packed":
        segments = np.repeat(np.array([[1, 2, 3, 0], [1, 1, 2, 2]], np.int32), [7, 50, 29, 26], axis=1)
        for start in (7, 57):
            at[0, start:] = np.arange(LENGTH - start)
        at[1, 57:] = np.arange(LENGTH - 57)
        at[segments == 0] = -1
        segments = jnp.asarray(segments)
    at = jnp.asarray(at)
    return Tokens(at, segments, in_order(at, segments))


@pytest.mark.long
@pytest.mark.parametrize("axes", [{"context": 8}, {"context": 4, "tensor": 2}, {"context": 2, "tensor": 4}], ids=name_of)
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("kind", ["whole", "left", "right", "packed"])
def test_attention_and_its_gradients_are_those_of_one_device(kind, window, axes):
    """In blocks, too, whose size divides no slice; with four devices a head of keys is on two of them."""
    rng, at = np.random.default_rng(0), rows(kind)
    shapes = (2, LENGTH, 8, 4), (2, LENGTH, 2, 4), (2, LENGTH, 2, 4), (8,)
    given = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    real = (at.positions >= 0)[:, :, None, None].astype(jnp.float32)
    slope = jnp.asarray(rng.standard_normal(shapes[0]), jnp.float32)

    def of(attend):
        def loss(*given):
            out = attend(*given) * real
            return (out * slope).sum(), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*given)
        return [np.asarray(a) for a in (out, *gradients)]

    want = of(lambda *given: attend(*given, at, at, window, 0))
    for block in (0, 5):
        with jax.set_mesh(mesh_of(axes)):
            got = of(lambda *given, block=block: attend_on_mesh(*given, at, window, block))
        for one, other in zip(got, want, strict=True):
            assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def compiled_loss(model, tokens, segments):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)

    def of(params, rest, tokens, segments):
        total, count = cross_entropy(nnx.merge(graphdef, params, rest), tokens, segment_ids=segments, chunk=16)
        return total / count

    compiled = jax.jit(jax.value_and_grad(of)).lower(params, rest, tokens, segments).compile()
    return compiled, compiled(params, rest, tokens, segments)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    segments = np.repeat(np.array([[1, 2, 3, 0]] * 4, np.int32), [7, 50, 29, 27], axis=1)
    return jnp.asarray(rng.integers(0, 512, (4, LENGTH + 1), dtype=np.int32)), jnp.asarray(segments)


@pytest.fixture(scope="module")
def alone(even_cfg, even_checkpoints, batch):
    """dtype -> loss and gradients on one device."""
    return {
        dtype: compiled_loss(create_model_from_checkpoint(even_checkpoints[dtype], even_cfg), *batch)[1]
        for dtype in ("float32", "mxfp4")
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "axes"),
    [*(("float32", axes) for axes in MESHES), ("mxfp4", MESHES[1])],
    ids=lambda v: str(v) if isinstance(v, str) else name_of(v),
)
def test_loss_and_gradients_of_packed_documents(axes, dtype, even_cfg, even_checkpoints, batch, alone, monkeypatch):
    """And no row of the stream is whole on a device: only keys, values and ids travel along the length."""
    cfg = dataclasses.replace(even_cfg, attention_block=8)
    monkeypatch.setattr(layers, "AT_ONCE", 4 * 24)
    with jax.set_mesh(mesh_of(axes)):
        model = create_model_from_checkpoint(even_checkpoints[dtype], cfg, mesh_of(axes))
        compiled, (loss, gradients) = compiled_loss(model, *batch)
    wanted, their_gradients = alone[dtype]
    assert abs(float(loss) - float(wanted)) <= 1e-5 * float(wanted)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(their_gradients), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"[bf]\w*\[([\d,]+)\]", compiled.as_text())}
    stream = {shape for shape in shapes if shape[1:] == (LENGTH, cfg.hidden_size)}
    assert not stream


@pytest.mark.parametrize(
    ("length", "window", "fault"),
    [
        (60, None, "context: expected rows whose length is a multiple of 16, twice the axis, found 60"),
        (64, 11, "context: expected slices of at least the window of 11 tokens, found 64 tokens cut into 8"),
    ],
)
def test_a_length_that_it_cannot_cut_is_refused(length, window, fault):
    q, k = jnp.zeros((1, length, 8, 4)), jnp.zeros((1, length, 2, 4))
    at = Tokens(jnp.arange(length, dtype=jnp.int32)[None], None, True)
    with jax.set_mesh(mesh_of({"context": 8})), pytest.raises(InputError, match=re.escape(fault)):
        attend_on_mesh(q, k, k, jnp.zeros(8), at, window)


@pytest.mark.parametrize("count", [2, 4, 16])
def test_every_device_has_as_much_of_a_full_layer_to_do(count):
    """Blocks of keys that the queries of a device look at, of 131,072 tokens; of one slice each up to 1.94 times the mean."""
    half = 131072 // (2 * count)
    blocks = Blocks(BLOCK, half // BLOCK, 131072 // BLOCK, None)

    def looked_at(piece: int) -> int:
        order = Order(jnp.asarray(True), jnp.asarray(piece * half, jnp.int32))
        first, last = jax.vmap(lambda i: blocks.reach(i, order))(jnp.arange(blocks.queries, dtype=jnp.int32))
        return int((last - first).sum())

    work = [looked_at(n) + looked_at(2 * count - 1 - n) for n in range(count)]
    assert max(work) <= 1.01 * sum(work) / count
    assert sum(work) <= 1.01 * (131072 // BLOCK) * (131072 // BLOCK + 1) / 2


@pytest.mark.parametrize("axes", MESHES, ids=name_of)
def test_it_cuts_parameters_as_fsdp_does(axes, even_cfg):
    specs = sharding.partition_specs(even_cfg, axes)
    for name, (shape, _) in parameters(even_cfg).items():
        cuts = {axis for n in range(len(shape)) for axis in sharding.mesh_axes(specs[name], n)}
        if len(shape) > 1:
            assert "context" in cuts, name
