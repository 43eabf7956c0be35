"""Generating text on the key-value cache: greedy or sampled, rows of a batch padded on the left.

Sampling follows transformers: logits / temperature, then top_k, then top_p (arXiv:1904.09751).
"""

import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from oss_model.buckets import path_of
from oss_model.cache import EMPTY, Cache, grown, init_cache
from oss_model.errors import InputError, raise_all
from oss_model.files import parse_json
from oss_model.modeling import Transformer
from oss_model.sharding import replicated


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array,
    max_new_tokens: int,
    *,
    eos: Sequence[int] = (),
    temperature: float | int = 0.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    key: PRNGKeyArray | None = None,
) -> list[list[int]]:
    """What follows each prompt.

    Args:
      model: the model.
      prompts: token ids, a list a row, of any lengths, or an array [batch, length]; with `max_new_tokens` at most
        `cfg.max_position_embeddings`.
      max_new_tokens: at most so many a row. A row also ends after a token of `eos`, which is returned with it.
      eos: the tokens that end a row (`eos_tokens` reads them from a checkpoint).
      temperature: 0 takes the likeliest token every time.
      top_k: sample from the k likeliest tokens only.
      top_p: sample from the likeliest tokens that have this probability together.
      key: a `jax.random.key`; needed where the temperature is not 0.

    Compiled once for each number of prompts and way to sample, and then once for the longest prompt and once for all that is
    to be there in the end, each rounded up to one of a few sizes (PROMPTS, SIZES).

    Raises:
      InputError: naming every argument that is out of range.
    """
    if any(np.ndim(row) != 1 for row in prompts):
        raise InputError("prompts: expected token ids, a list a row, or an array [batch, length], found one row; [prompt]")
    prompts = [np.asarray(row).tolist() for row in prompts]
    raise_all(_faults(model, prompts, max_new_tokens, temperature, top_k, top_p, key))
    longest = max(len(row) for row in prompts)
    length = _up(longest, PROMPTS)
    size = max(length, _up(longest + max_new_tokens, SIZES))
    tokens, positions = np.zeros((len(prompts), length), np.int32), np.full((len(prompts), length), EMPTY, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        positions[row, length - len(prompt) :] = np.arange(len(prompt))
    sample = (float(temperature), top_k, None if top_p is None else float(top_p))
    key = jax.random.key(0) if key is None else key
    new, cache = _prefill(model, jnp.asarray(tokens), jnp.asarray(positions), key, sample)
    cache, ends = grown(cache, model.cfg, size), jnp.asarray(eos, jnp.int32)
    made, counts = _generate(model, new, cache, key, jnp.asarray(max_new_tokens, jnp.int32), ends, size, sample)
    return [row[:count].tolist() for row, count in zip(np.asarray(made), np.asarray(counts), strict=True)]


PROMPTS, SIZES = (128, 512, 1536, 4096), (1024, 6144, 32768, 131072)


def _up(count: int, sizes: Sequence[int]) -> int:
    """The next of these sizes, or multiple of the last."""
    return next((size for size in sizes if count <= size), -(-count // sizes[-1]) * sizes[-1])


def eos_tokens(checkpoint_path: str | os.PathLike) -> tuple[int, ...]:
    """The tokens that end a text, from generation_config.json beside a checkpoint, or else config.json.

    Raises:
      InputError: if neither says.
    """
    for name in ("generation_config.json", "config.json"):
        file = path_of(checkpoint_path) / name
        try:
            found = parse_json(file.read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as e:
            raise InputError(f"{file}: expected a JSON object, found something unreadable ({e})") from None
        found = [found] if type(found) is int else found
        if found and isinstance(found, list) and all(type(token) is int for token in found):
            return tuple(found)
    raise InputError(f"{checkpoint_path}: expected eos_token_id in generation_config.json or config.json, found none")


def _faults(model, prompts, max_new_tokens, temperature, top_k, top_p, key) -> list[str]:
    vocabulary, faults = model.cfg.vocab_size, []
    if not prompts or any(len(row) == 0 for row in prompts):
        faults.append("prompts: expected one or more, each of one token or more, found an empty one or none")
    outside = [token for row in prompts for token in row if type(token) is not int or not 0 <= token < vocabulary]
    if outside:
        faults.append(f"prompts: expected token ids, whole numbers from 0 to {vocabulary - 1}, found {outside[0]}")
    limit, longest = model.cfg.max_position_embeddings, max(map(len, prompts), default=0)
    if longest + max_new_tokens > limit:
        faults.append(
            f"prompts: expected at most {limit} positions (max_position_embeddings), found {longest} of the longest prompt and"
            f" {max_new_tokens} new ones: shorten it, or ask for fewer"
        )
    for name, value, good, expected in [
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1 and max_new_tokens % 1 == 0, "a whole number, 1 or more"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k is None or 1 <= top_k <= vocabulary, f"1 to {vocabulary}"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "more than 0, at most 1"),
        ("key", key, temperature == 0 or key is not None, "a jax.random.key where temperature is not 0"),
    ]:
        if not good:
            faults.append(f"{name}: expected {expected}, found {value}")
    return faults


@functools.partial(nnx.jit, static_argnums=4)
def _prefill(
    model: Transformer, tokens: Int[Array, "b l"], positions: Int[Array, "b l"], key: PRNGKeyArray, sample: tuple
) -> tuple[Int[Array, " b"], Cache]:
    """The first new token of each row, and the cache of the prompts."""
    x, cache = model.stream(tokens, positions, init_cache(model.cfg, *tokens.shape))
    assert cache is not None
    return _choose(model.unembed(x[:, -1:])[:, 0], jax.random.fold_in(key, 0), *sample), cache


@functools.partial(nnx.jit, static_argnums=(6, 7))
def _generate(
    model: Transformer,
    new: Int[Array, " b"],
    cache: Cache,
    key: PRNGKeyArray,
    count: Int[Array, ""],
    ends: Int[Array, " e"],
    size: int,
    sample: tuple,
) -> tuple[Int[Array, "b n"], Int[Array, " b"]]:
    """New tokens [batch, size], and how many of each row are its own: at most `count`."""

    def step(carry):
        n, made, counts, done, new, cache = carry
        logits, cache = model(new[:, None], cache=cache)
        new = _choose(logits[:, 0], jax.random.fold_in(key, n), *sample)
        made, counts = made.at[:, n].set(new), counts + (~done).astype(jnp.int32)
        return n + 1, made, counts, done | jnp.isin(new, ends), new, cache

    def more(carry) -> Bool[Array, ""]:
        n, _, _, done, _, _ = carry
        return (n < count) & ~done.all()

    made = jnp.zeros((new.shape[0], size), jnp.int32).at[:, 0].set(new)
    start = (jnp.int32(1), made, jnp.ones_like(new), jnp.isin(new, ends), new, cache)
    _, made, counts, *_ = jax.lax.while_loop(more, step, start)
    return replicated(made), replicated(counts)


def _choose(
    logits: Float[Array, "b v"], key: PRNGKeyArray, temperature: float, top_k: int | None, top_p: float | None
) -> Int[Array, " b"]:
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is not None:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if top_p is not None:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ranked), axis=-1) - jax.nn.softmax(ranked)
        least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)
