"""Decoding on the cache gives what the whole prompt gives, at every position, across the sliding window."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oss_model import create_model_from_checkpoint, init_cache
from oss_model.cache import LayerCache, next_positions

# Same sums in other shapes: noise of float32, relative to the largest logit.
SAME = 5e-6


@pytest.fixture(scope="module")
def model(sources, cfg):
    return create_model_from_checkpoint(sources["hf"], cfg)


@nnx.jit
def step(model, tokens, positions, cache):
    return model(tokens, positions, cache)


@pytest.fixture(scope="module")
def want(model, prompt):
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, prompt))


@pytest.mark.parametrize("prefill", [1, 10, 11, 12, 30])
def test_decoding_equals_the_whole_prompt_at_every_position(model, cfg, prompt, want, prefill):
    """Prefills below, at and above the window of 11, then a token at a time to more than three windows."""
    cache = init_cache(cfg, 2, prompt.shape[1])
    logits, cache = step(model, prompt[:, :prefill], None, cache)
    parts = [logits]
    for n in range(prefill, prompt.shape[1]):
        logits, cache = step(model, prompt[:, n : n + 1], None, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=SAME * np.abs(want).max(), rtol=0)


def test_a_prompt_in_pieces(model, cfg, prompt, want):
    cache, parts = init_cache(cfg, 2, 40), []
    for start, stop in ((0, 3), (3, 20), (20, 33), (33, 40)):
        logits, cache = step(model, prompt[:, start:stop], None, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=SAME * np.abs(want).max(), rtol=0)


def test_rows_padded_on_the_left_decode_as_if_alone(model, cfg, prompt, want):
    """Row 0 has 15 tokens, row 1 has 8 and 7 of padding; both go on for 12."""
    lengths = np.array([15, 8])
    tokens = np.zeros((2, 15), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, 15 - length :] = prompt[row, :length]
    positions = np.maximum(np.arange(15)[None] - (15 - lengths)[:, None], -1).astype(np.int32)
    logits, cache = step(model, tokens, positions, init_cache(cfg, 2, 40))
    bound = SAME * np.abs(want).max()
    for more in range(12):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row, -1], want[row, length + more - 1], atol=bound, rtol=0)
        following = np.stack([prompt[row, length + more] for row, length in enumerate(lengths)])[:, None]
        logits, cache = step(model, following, None, cache)


def test_sliding_layers_keep_only_their_window(cfg):
    cache = init_cache(cfg, 3, 100, jnp.bfloat16)
    assert [layer.positions.shape[1] for layer in cache] == [11, 100, 11, 100, 11]
    assert cache[0].keys.shape == (3, 11, 7, 24)
    assert cache[0].keys.dtype == jnp.bfloat16
    assert init_cache(cfg, 1, 5)[0].positions.shape == (1, 5)


def test_a_ring_keeps_the_newest_by_hand():
    ring = LayerCache(jnp.zeros((1, 3, 1, 1)), jnp.zeros((1, 3, 1, 1)), jnp.full((1, 3), -1, jnp.int32))
    new = jnp.arange(5.0).reshape(1, 5, 1, 1)
    ring = ring.store(new, new, jnp.arange(5, dtype=jnp.int32)[None])
    np.testing.assert_array_equal(ring.positions, [[3, 4, 2]])
    np.testing.assert_array_equal(ring.keys[0, :, 0, 0], [3, 4, 2])
    padded = ring.store(new[:, :1], new[:, :1], jnp.full((1, 1), -1, jnp.int32))
    np.testing.assert_array_equal(padded.positions, ring.positions)
    np.testing.assert_array_equal(next_positions((ring,), 2), [[5, 6]])
