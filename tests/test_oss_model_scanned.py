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
from oss_model.scanned import period, repeats, scanned, unscanned
from oss_model.taps import keeping


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
    assert isinstance(moved.layers[1].mlp.down.bias.get_value(), jax.ShapeDtypeStruct)
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
        cut = tuple(weight.get_value().sharding.spec)
        assert tuple(unscanned(model).layers[0].attn.q_proj.weight.get_value().sharding.spec) == cut[1:]


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


@pytest.mark.parametrize("tap", ["expert_choice", "layer_out", "logits"])
def test_taps_that_are_kept_are_those_of_single_layers_in_their_order(four, prompt, tap):
    make = lambda: Transformer(dataclasses.replace(four, param_dtype="float32"), rngs=nnx.Rngs(0))  # noqa: E731
    tokens = jnp.asarray(prompt[:1, :24])

    @nnx.jit
    def values(model):
        with keeping(tap) as found:
            model(tokens)
        return found

    want, got = values(make()), values(scanned(make()))
    assert len(want) == len(got) == (1 if tap == "logits" else 4)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    if tap == "layer_out":
        assert np.abs(np.asarray(want[0]) - np.asarray(want[2])).max() > 1e-2  # their order could be told


def test_what_can_be_one_loop(four):
    model = Transformer(four, rngs=nnx.Rngs(0))
    assert repeats(model, nnx.Param)
    assert repeats(model, nnx.PathContains("sinks"))
    assert repeats(model, nnx.PathContains("lm_head"))
    assert repeats(model, lambda path, _: path[:2] in (("layers", 1), ("layers", 3)))  # all full ones
    assert not repeats(model, lambda path, _: path[:2] == ("layers", 3))
    turn = dataclasses.replace(four, num_hidden_layers=2, layer_types=())
    assert not repeats(Transformer(turn, rngs=nnx.Rngs(0)), nnx.Param)
    adapted = Transformer(four, rngs=nnx.Rngs(0))
    add_lora(adapted, r"layers\.[02]\..*q_proj", rank=3, rngs=nnx.Rngs(1))
    assert repeats(adapted, nnx.LoRAParam)
    add_lora(model, r"layers\.2\..*q_proj", rank=3, rngs=nnx.Rngs(1))
    assert not repeats(model, nnx.LoRAParam)
    add_lora(model, r"layers\.0\..*q_proj", rank=4, rngs=nnx.Rngs(1))
    assert not repeats(model, nnx.LoRAParam)  # of another rank


def test_a_cache_is_refused(four):
    model = scanned(Transformer(four, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="cache: expected none for scanned layers"):
        model(jnp.zeros((1, 3), jnp.int32), None, init_cache(four, 1, 8))
