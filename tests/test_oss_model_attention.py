"""Attention in blocks is the dense form, forward and backward; documents in one row do not see each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oss_model import InputError, Transformer, create_model_from_checkpoint, init_cache
from oss_model.attention import DENSE, Tokens, attend, in_order

KV, GROUPS, DIM = 2, 3, 8


def places(length: int, cached: int, padding: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries and keys of two rows, the second padded; cached ones in any order before them."""
    rng, at = np.random.default_rng(1), np.tile(np.arange(length), (2, 1)) + cached
    if padding == "left":
        at[1] -= 5
        at[1, :5] = -1
    elif padding == "right":
        at[1, -4:] = -1
    elif padding == "between":
        at[1, 5:9], at[1, 9:] = -1, at[1, 9:] - 4
    return at, np.concatenate([np.tile(rng.permutation(cached), (2, 1)), at], axis=1)


def drawn(length: int, keys: int, dtype) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (2, length, KV * GROUPS, DIM), (2, keys, KV, DIM), (2, keys, KV, DIM), (KV * GROUPS,)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def both(given, queries: Tokens, keys: Tokens, window, block):
    """(values, gradients) of the dense form and of blocks, padding left out."""
    rng, real = np.random.default_rng(2), np.asarray(queries.positions >= 0)[:, :, None, None]
    slope = jnp.asarray(rng.standard_normal(given[0].shape) * real, jnp.float32)

    def of(size):
        def loss(*given):
            out = attend(*given, queries, keys, window, size)
            return (out.astype(jnp.float32) * slope).sum(), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*given)
        return [np.asarray(a, np.float32) for a in (out * jnp.asarray(real, out.dtype), *gradients)]

    return of(0), of(block)


@pytest.mark.long
@pytest.mark.parametrize("padding", ["", "left", "right", "between"])
@pytest.mark.parametrize("window", [None, 7, 11])
@pytest.mark.parametrize("cached", [0, 7, 20])
def test_blocks_are_the_dense_form(window, padding, cached):
    if window is not None and cached:
        cached = window  # a ring
    queries, keys = (jnp.asarray(at, jnp.int32) for at in places(40, cached, padding))
    at = Tokens(queries, None, in_order(queries))
    want, got = both(drawn(40, 40 + cached, jnp.float32), at, Tokens(keys), window, 8)
    for one, other in zip(want, got, strict=True):
        assert np.abs(one - other).max() < 2e-6 * np.abs(one).max()


@pytest.mark.long
@pytest.mark.parametrize("window", [None, 11])
def test_in_bfloat16_blocks_are_as_near_to_float32_as_the_dense_form(window):
    queries, keys = (jnp.asarray(at, jnp.int32) for at in places(64, 0, ""))
    at = Tokens(queries, None, True), Tokens(keys)
    given = drawn(64, 64, jnp.bfloat16)
    right = both([a.astype(jnp.float32) for a in given], *at, window, 16)[0]
    dense, blocks = both(given, *at, window, 16)
    for exact, one, other in zip(right[:4], dense[:4], blocks[:4], strict=True):
        assert np.linalg.norm(other - exact) < 1.3 * np.linalg.norm(one - exact) + 1e-6
    # The sinks' own gradient goes by the output, which is kept in bfloat16.
    assert np.linalg.norm(blocks[4] - right[4]) < 0.01 * np.linalg.norm(right[4])


def test_order_is_told_from_positions():
    for padding, right in (("", True), ("left", True), ("right", True), ("between", False)):
        assert bool(in_order(jnp.asarray(places(40, 0, padding)[0], jnp.int32))) is right
    assert not in_order(jnp.asarray([[0, 1, 2, 0, 1, 2]], jnp.int32))  # two documents, and nobody said so
    assert in_order(jnp.asarray([[0, 1, 2, 0, 1, 2]], jnp.int32), jnp.asarray([[1, 1, 1, 2, 2, 2]], jnp.int32))
    assert in_order(jnp.asarray([[0, 2, 7, 8]], jnp.int32))
    assert not in_order(jnp.asarray([[0, 2, 1, 3]], jnp.int32))


def test_memory_is_linear_in_the_length():
    """Temporaries, forward and backward, as XLA counts them."""
    used = []
    for length in (2048, 8192):
        at = Tokens(jnp.arange(length, dtype=jnp.int32)[None])
        given = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (4, 2, 2)]

        def loss(q, k, v, at=at):
            return attend(q, k, v, jnp.zeros(4), at._replace(ordered=True), at, None).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given).compile()
        used.append(compiled.memory_analysis().temp_size_in_bytes)
    assert DENSE < 2048**2
    assert used[1] < 4.4 * used[0]
    assert used[1] < 4 * 8192**2  # one head's logits


# --- the model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(checkpoints, cfg) -> Transformer:
    return create_model_from_checkpoint(checkpoints["bfloat16"], cfg)


@pytest.mark.long
@pytest.mark.parametrize("block", [0, 8])
def test_packed_documents_are_as_if_each_were_alone(checkpoints, cfg, block):
    model = create_model_from_checkpoint(checkpoints["bfloat16"], dataclasses.replace(cfg, attention_block=block))
    rng, lengths = np.random.default_rng(0), (17, 5, 14)
    documents = [rng.integers(0, cfg.vocab_size, length) for length in lengths]
    row = jnp.asarray(np.concatenate([*documents, [0, 0, 0, 0]])[None], jnp.int32)
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [*lengths, 4])[None], jnp.int32)
    packed, start = np.asarray(model(row, segment_ids=segments))[0], 0
    for document in documents:
        alone = np.asarray(model(jnp.asarray(document[None], jnp.int32)))[0]
        np.testing.assert_allclose(packed[start : start + len(document)], alone, atol=2e-5)
        start += len(document)
    assert np.abs(np.asarray(model(row))[0, 17:22] - packed[17:22]).max() > 1e-2  # without segments they see each other


def test_segments_and_a_cache_are_refused(model):
    with pytest.raises(InputError, match="segment_ids: expected none with a cache"):
        model(jnp.zeros((1, 3), jnp.int32), None, init_cache(model.cfg, 1, 8), jnp.ones((1, 3), jnp.int32))
