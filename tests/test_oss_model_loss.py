"""Cross entropy a piece at a time is the plain one, in value and gradients, and counts what it is told to."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from oss_model import Transformer, create_model_from_checkpoint, cross_entropy
from oss_model.synthetic import write_checkpoint


@pytest.fixture(scope="module")
def model(checkpoints, cfg) -> Transformer:
    return create_model_from_checkpoint(checkpoints["float32"], dataclasses.replace(cfg, param_dtype="float32"))


def plain(model: Transformer, tokens, mask):
    """Of all logits at once."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]).astype(jnp.float32), tokens[:, 1:])
    return jnp.where(mask[:, 1:], losses, 0).sum() / mask[:, 1:].sum().astype(jnp.float32)


def mean(model: Transformer, tokens, mask, chunk):
    total, count = cross_entropy(model, tokens, mask, chunk=chunk)
    return total / count


@pytest.mark.long
@pytest.mark.parametrize("chunk", [1, 7, 39, 256])
def test_it_is_the_plain_one(model, prompt, chunk):
    mask = jnp.asarray(np.random.default_rng(3).random(prompt.shape) < 0.4)
    want, of_all = nnx.jit(nnx.value_and_grad(plain))(model, jnp.asarray(prompt), mask)
    got, by_chunks = nnx.jit(nnx.value_and_grad(mean), static_argnums=3)(model, jnp.asarray(prompt), mask, chunk)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(of_all), jax.tree.leaves(by_chunks), strict=True):
        assert np.abs(np.asarray(one) - np.asarray(other)).max() <= 1e-5 * np.abs(np.asarray(one)).max()


@pytest.mark.long
def test_documents_in_one_row_are_counted_as_if_alone(model, cfg):
    rng, lengths = np.random.default_rng(0), (9, 14)
    documents = [rng.integers(0, cfg.vocab_size, length) for length in lengths]
    alone = [cross_entropy(model, jnp.asarray(document[None], jnp.int32)) for document in documents]
    row = jnp.asarray(np.concatenate([*documents, [0] * 5])[None], jnp.int32)
    segments = jnp.asarray(np.repeat([1, 2, 0], [*lengths, 5])[None], jnp.int32)
    total, count = cross_entropy(model, row, segment_ids=segments, chunk=8)
    assert int(count) == sum(int(one[1]) for one in alone) == sum(lengths) - 2
    np.testing.assert_allclose(total, sum(float(one[0]) for one in alone), rtol=1e-5)


def test_logits_of_all_tokens_are_never_there(cfg):
    """Temporaries of the loss of a long row, forward and backward, with a vocabulary that is most of the model."""
    wide = dataclasses.replace(cfg, vocab_size=50000, num_hidden_layers=1, layer_types=())
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(wide, rngs=nnx.Rngs(0))))

    def loss(state, tokens):
        return cross_entropy(nnx.merge(graphdef, state), tokens, chunk=64)[0]

    tokens = jax.ShapeDtypeStruct((1, 2049), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(state, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 50000 * 4 / 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "vocab"),
    [
        ({"fsdp": 8}, 512),
        ({"fsdp": 2, "tensor": 2, "expert": 2}, 512),
        ({"expert": 2, "fsdp": 4}, 510),
        ({"expert": 2, "context": 2}, 510),
    ],
    ids=str,
)
def test_on_a_mesh_it_is_the_same_and_no_vocabulary_is_gathered(tmp_path, even_cfg, shape, vocab):
    """What travels a chunk is its tokens: [8 rows, 8 places, hidden], and never the whole of `lm_head` or its gradient.

    Where the vocabulary divides by one axis alone, that one cuts it, and the other goes on cutting rows: along it a device's
    part of `lm_head` is gathered.
    """
    source = write_checkpoint(tmp_path / "source", dataclasses.replace(even_cfg, vocab_size=vocab), "hf-bf16")
    even_cfg = dataclasses.replace(even_cfg, vocab_size=vocab, param_dtype="float32")
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    tokens = np.random.default_rng(2).integers(0, even_cfg.vocab_size, (8, 33), dtype=np.int32)
    mask, found = np.random.default_rng(3).random(tokens.shape) < 0.4, []
    for where in (None, mesh):
        model = create_model_from_checkpoint(source, even_cfg, where)
        graphdef, state = nnx.split(model)

        def loss(state, tokens, mask, graphdef=graphdef):
            total, count = cross_entropy(nnx.merge(graphdef, state), tokens, mask, chunk=8)
            return total / count

        with jax.set_mesh(where) if where is not None else contextlib.nullcontext():
            compiled = jax.jit(jax.value_and_grad(loss)).lower(state, tokens, mask).compile()
            found.append(compiled(state, tokens, mask))
    (want, of_one), (got, of_many) = found
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(of_one), jax.tree.leaves(of_many), strict=True):
        assert np.abs(np.asarray(one) - np.asarray(other)).max() <= 1e-5 * np.abs(np.asarray(one)).max()
    sent = [
        line for line in compiled.as_text().splitlines() if re.search(r"(all-(gather|reduce|to-all)|scatter|permute)\(", line)
    ]
    of_logits = [line.split(" = ")[1].split("{")[0] for line in sent if re.search(r"[/\(]logits", line)]
    assert of_logits
    assert all(f"[{even_cfg.vocab_size},{even_cfg.hidden_size}]" not in shape for shape in of_logits)
    assert all(f",{even_cfg.vocab_size}]" not in shape for shape in of_logits)
