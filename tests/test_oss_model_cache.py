"""Decoding on the cache gives what the whole prompt gives, at every position, across the sliding window."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oss_model import InputError, create_model_from_checkpoint, init_cache
from oss_model.cache import LayerCache, capacity, next_positions
from oss_model.synthetic import write_checkpoint

# Same sums in other shapes: noise of float32, relative to the largest logit.
SAME = 5e-6


@pytest.fixture(scope="module")
def cfg(cfg):
    """One sliding layer and one full one."""
    return dataclasses.replace(cfg, num_hidden_layers=2, layer_types=())


@pytest.fixture(scope="module")
def model(tmp_path_factory, cfg):
    return create_model_from_checkpoint(write_checkpoint(tmp_path_factory.mktemp("source"), cfg), cfg)


@nnx.jit
def step(model, tokens, positions, cache):
    return model(tokens, positions, cache)


def eagerly(model, tokens, positions, cache):
    return model(jnp.asarray(tokens), None if positions is None else jnp.asarray(positions), cache)


@pytest.fixture(scope="module")
def want(model, prompt):
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, prompt))


@pytest.mark.long
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
    """Of lengths that are compiled for the test above."""
    cache, parts, ends = init_cache(cfg, 2, 40), [], np.cumsum([0, 12, 1, 10, 11])
    for start, stop in itertools.pairwise(ends):
        logits, cache = step(model, prompt[:, start:stop], None, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want[:, : ends[-1]], atol=SAME * np.abs(want).max(), rtol=0)


PADDED = {
    "left": lambda length, width: np.r_[[-1] * (width - length), :length],
    "right": lambda length, width: np.r_[:length, [-1] * (width - length)],
    "middle": lambda length, width: np.r_[: length // 2, [-1] * (width - length), length // 2 : length],
}


@pytest.mark.long
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("side", PADDED)
def test_padded_rows_decode_as_if_alone(model, cfg, prompt, want, side, pieces):
    """Rows of 25, 6 and 12 tokens, padded to 40 with more than a window of 11; each goes on for 8."""
    lengths, of = np.array([25, 6, 12]), [0, 1, 0]
    positions = np.stack([PADDED[side](length, 40) for length in lengths]).astype(np.int32)
    tokens = np.where(positions < 0, 3, prompt[np.array(of)[:, None], positions])
    cache, parts = init_cache(cfg, 3, 48), []
    for part in np.split(np.arange(40), pieces):
        logits, cache = step(model, tokens[:, part], positions[:, part], cache)
        parts.append(logits)
    logits, bound = np.concatenate(parts, axis=1), SAME * np.abs(want).max()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, positions[row] >= 0], want[of[row], :length], atol=bound, rtol=0)
    for more in range(8):
        logits, cache = step(model, prompt[of, lengths + more][:, None], None, cache)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row, -1], want[of[row], length + more], atol=bound, rtol=0)


def test_sliding_layers_keep_only_their_window(cfg):
    cache = init_cache(cfg, 3, 100, jnp.bfloat16)
    assert [layer.positions.shape[1] for layer in cache] == [11, 100]
    assert cache[0].keys.shape == (3, 11, 7, 24)
    assert cache[0].keys.dtype == jnp.bfloat16
    assert init_cache(cfg, 1, 5)[0].positions.shape == (1, 5)


def test_a_ring_keeps_the_newest_by_hand():
    """The last three real positions of each row, wherever its padding is."""
    empty = LayerCache(jnp.zeros((3, 3, 1, 1)), jnp.zeros((3, 3, 1, 1)), jnp.full((3, 3), -1, jnp.int32))
    given = [[0, 1, 2, 3, 4, -1, -1, -1], [-1, -1, 0, 1, -1, 2, 3, -1], [-1, -1, -1, -1, -1, -1, 0, 1]]
    positions = jnp.array(given, jnp.int32)
    new = positions.astype(jnp.float32)[..., None, None]
    ring = empty.store(new, -new, positions)
    np.testing.assert_array_equal(ring.positions, [[3, 4, 2], [3, 1, 2], [0, 1, -1]])
    np.testing.assert_array_equal(ring.keys[..., 0, 0], [[3, 4, 2], [3, 1, 2], [0, 1, 0]])
    np.testing.assert_array_equal(ring.values, -ring.keys)
    padded = ring.store(new[:, :1], new[:, :1], jnp.full((3, 1), -1, jnp.int32))
    np.testing.assert_array_equal(padded.positions, ring.positions)
    np.testing.assert_array_equal(next_positions((ring,), 2), [[5, 6], [4, 5], [2, 3]])


def test_a_piece_longer_than_the_cache_is_refused(model, cfg, prompt):
    fault = "cache: expected at most 8 tokens, as many as it was made for, found 12; init_cache with a larger size"
    for run in (step, eagerly):
        with pytest.raises(InputError) as caught:
            run(model, prompt[:, :12], None, init_cache(cfg, 2, 8))
        assert caught.value.faults == [fault]


@pytest.mark.long
@pytest.mark.parametrize("run", [step, eagerly], ids=["jit", "eager"])
def test_what_a_cache_has_no_place_for_is_nan_and_not_stored(run, model, cfg, prompt, want):
    """Full at 20: from there on every query gives NaN, in its row alone, and position 0 stays where it is."""
    positions = np.array([np.r_[:12], np.r_[[-1] * 4, :8]], np.int32)
    tokens = prompt[[[0], [1]], positions]
    _, cache = run(model, tokens, positions, init_cache(cfg, 2, 20))
    positions = np.array([np.r_[12:24], np.r_[8:20]], np.int32)
    logits, cache = run(model, prompt[[[0], [1]], positions], None, cache)
    assert np.isnan(logits[0, 8:]).all()
    bound = SAME * np.abs(want).max()
    np.testing.assert_allclose(logits[0, :8], want[0, 12:20], atol=bound, rtol=0)
    np.testing.assert_allclose(logits[1], want[1, 8:20], atol=bound, rtol=0)
    for layer in cache:
        assert sorted(layer.positions[0].tolist()) == list(range(20))[-layer.positions.shape[1] :]
        assert np.isfinite(layer.keys).all()
    logits, again = run(model, prompt[:, :1], None, cache)
    assert np.isnan(logits).all()
    np.testing.assert_array_equal(again[1].positions, cache[1].positions)


@pytest.mark.long
def test_sliding_layers_alone_have_room_for_ever_if_they_hold_their_window(cfg):
    assert capacity(init_cache(cfg, 1, 100), cfg) == 100
    sliding = dataclasses.replace(cfg, layer_types=("sliding_attention",) * 2)
    assert capacity(init_cache(sliding, 1, 100), sliding) is None
    assert capacity(init_cache(sliding, 1, 10), sliding) == 10
