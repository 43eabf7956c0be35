"""Layers in one loop: the same logits and gradients, there and back, compiled once however many there are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oss_model import InputError, ModelConfig, Transformer, add_lora, create_model_from_checkpoint, cross_entropy, init_cache
from oss_model.config import FULL, SLIDING
from oss_model.layouts import parameter_name
from oss_model.scanned import period, scanned, unscanned


@pytest.fixture
def four(cfg) -> ModelConfig:
    return dataclasses.replace(cfg, num_hidden_layers=4, layer_types=())


def test_a_turn_is_the_fewest_layers_that_repeat():
    assert period([SLIDING, FULL] * 3) == 2
    assert period([FULL] * 4) == 1
    assert period([SLIDING, SLIDING, FULL] * 2) == 3
    assert period([SLIDING, FULL, SLIDING, FULL, SLIDING]) == 5  # nothing repeats, and it is as it was


def gradients(model, tokens):
    def loss(model):
        total, count = cross_entropy(model, tokens)
        return total / count

    return nnx.jit(nnx.value_and_grad(loss))(model)


@pytest.mark.long
@pytest.mark.parametrize("remat", ["none", "block"])
def test_logits_and_gradients_are_those_of_single_layers(four, prompt, remat):
    make = lambda: Transformer(dataclasses.replace(four, param_dtype="float32", remat=remat), rngs=nnx.Rngs(0))  # noqa: E731
    single, stacked, tokens = make(), scanned(make()), jnp.asarray(prompt[:, :24])
    np.testing.assert_allclose(stacked(tokens), single(tokens), atol=2e-5)
    (want, of_single), (got, of_stacked) = gradients(single, tokens), gradients(stacked, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    found = {parameter_name(path): variable.get_value() for path, variable in nnx.to_flat_state(of_stacked)}
    for path, variable in nnx.to_flat_state(of_single):
        name, one = parameter_name(path), np.asarray(variable.get_value())
        if name.startswith("layers."):
            _, n, rest = name.split(".", 2)
            other = found[f"layers.{int(n) % 2}.{rest}"][int(n) // 2]
        else:
            other = found[name]
        assert np.abs(one - np.asarray(other)).max() <= 1e-4 * np.abs(one).max(), name


def test_there_and_back_are_the_same_bits(four):
    model = Transformer(four, rngs=nnx.Rngs(0))
    add_lora(model, r".*q_proj", rank=3, rngs=nnx.Rngs(1))
    before = {parameter_name(path): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model))}
    moved = scanned(model)
    assert moved.layers[0].attn.q_proj.lora.a.shape[0] == 2
    assert isinstance(model.layers[3].attn.sinks.get_value(), jax.ShapeDtypeStruct)  # moved, not copied
    after = {parameter_name(path): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(unscanned(moved)))}
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name


def test_on_a_mesh_parameters_stay_cut(even_checkpoints, even_cfg, prompt):
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=axes, devices=jax.devices()[:4])
    cfg = dataclasses.replace(even_cfg, use_sharding=True)
    with jax.set_mesh(mesh):
        single = create_model_from_checkpoint(even_checkpoints["float32"], cfg, mesh)
        tokens = jnp.asarray(prompt[:, :16])
        want = np.asarray(nnx.jit(lambda model: model(tokens))(single))
        model = scanned(single)
        weight = model.layers[0].attn.q_proj.weight
        assert weight.get_value().sharding.spec[0] is None
        assert weight.get_value().addressable_shards[0].data.size * 4 == weight.get_value().size
        np.testing.assert_allclose(nnx.jit(lambda model: model(tokens))(model), want, atol=2e-5)


@pytest.mark.long
def test_compiled_once_however_many_layers_there_are(cfg):
    """Instructions of the compiled step, which its compile time goes by."""
    sizes = []
    for layers in (2, 12):
        deep = dataclasses.replace(cfg, num_hidden_layers=layers, layer_types=(), param_dtype="float32")
        graphdef, state = nnx.split(scanned(Transformer(deep, rngs=nnx.Rngs(0))))
        loss = lambda state, tokens, graphdef=graphdef: cross_entropy(nnx.merge(graphdef, state), tokens)[0]  # noqa: E731
        text = jax.jit(jax.grad(loss)).lower(state, jax.ShapeDtypeStruct((1, 25), jnp.int32)).as_text()
        sizes.append(len(text.splitlines()))
    assert sizes[1] < 1.02 * sizes[0]


def test_a_cache_is_refused(four):
    model = scanned(Transformer(four, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="cache: expected none for scanned layers"):
        model(jnp.zeros((1, 3), jnp.int32), None, init_cache(four, 1, 8))
