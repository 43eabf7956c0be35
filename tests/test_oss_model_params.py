"""Loading: what fits is loaded exactly as stored, and what does not is named."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from converter import convert
from oss_model import InputError, ModelConfig, Transformer, add_lora, create_model_from_checkpoint, layouts
from oss_model.layouts import parameter_name


def flat(model) -> dict:
    return {parameter_name(path): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "mxfp4"])
def test_both_ways_of_loading_give_the_same_bits(sources, checkpoints, cfg, dtype):
    from_orbax = flat(create_model_from_checkpoint(checkpoints[dtype], cfg))
    held = dataclasses.replace(cfg, param_dtype=dtype)
    for layout in ("hf", "openai"):
        from_safetensors = flat(create_model_from_checkpoint(sources[layout], held))
        assert from_orbax.keys() == from_safetensors.keys() == layouts.parameters(held).keys()
        for name, value in from_orbax.items():
            assert value.dtype == from_safetensors[name].dtype == layouts.parameters(held)[name][1], name
            assert np.asarray(value).tobytes() == np.asarray(from_safetensors[name]).tobytes(), name


@pytest.mark.parametrize("layout", ["orbax", "hf"])
@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("mxfp4", None),
        ("mxfp4", "bfloat16"),
        ("mxfp4", "float32"),
        ("bfloat16", None),
        ("bfloat16", "float32"),
        ("float32", None),
    ],
)
def test_parameters_are_held_as_asked_or_as_they_are_stored(sources, checkpoints, cfg, stored, asked, layout):
    """Bit for bit what a conversion to that dtype holds, and the model says so. No source of ours has float32 values."""
    if layout == "hf" and stored == "float32":
        return
    path = {"orbax": checkpoints[stored], "hf": sources["hf" if stored == "mxfp4" else "hf-bf16"]}[layout]
    model = create_model_from_checkpoint(path, dataclasses.replace(cfg, param_dtype=asked))
    held = asked or stored
    assert model.cfg.param_dtype == held
    want = flat(create_model_from_checkpoint(checkpoints[held], cfg))
    got = flat(model)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype == layouts.parameters(model.cfg)[name][1], name
        assert np.asarray(got[name]).tobytes() == np.asarray(value).tobytes(), name


def test_packed_experts_become_values_on_a_mesh(even_checkpoints, even_cfg):
    """Cut as values are, whatever the packed ones could be cut along."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    asked = dataclasses.replace(even_cfg, param_dtype="float32")
    got = flat(create_model_from_checkpoint(even_checkpoints["mxfp4"], asked, mesh))
    for name, value in flat(create_model_from_checkpoint(even_checkpoints["float32"], even_cfg, mesh)).items():
        assert got[name].sharding == value.sharding, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("stored", "asked", "fault"),
    [
        ("float32", "bfloat16", "expected no float32 parameters for 'bfloat16', which would round them, found 88, the first "),
        ("float32", "mxfp4", "expected packed experts for 'mxfp4', found values; leave param_dtype out"),
        ("bfloat16", "mxfp4", "expected packed experts for 'mxfp4', found values; leave param_dtype out"),
    ],
)
def test_what_would_round_parameters_is_refused(checkpoints, cfg, stored, asked, fault):
    with pytest.raises(InputError) as caught:
        create_model_from_checkpoint(checkpoints[stored], dataclasses.replace(cfg, param_dtype=asked))
    [line] = caught.value.faults
    assert line.startswith(f"{checkpoints[stored]}: param_dtype: {fault}")


def moved(path, cfg, param_dtype: str | None) -> float:
    """The share of values that 20 steps of AdamW at 1e-5 change."""
    model = create_model_from_checkpoint(path, dataclasses.replace(cfg, param_dtype=param_dtype))
    before = {name: np.asarray(value) for name, value in flat(model).items()}
    optimizer = nnx.Optimizer(model, optax.adamw(1e-5), wrt=nnx.Param)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (4, 24)))

    @nnx.jit
    def step(model: Transformer, optimizer: nnx.Optimizer) -> None:
        def loss_fn(model: Transformer) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]).mean()

        optimizer.update(model, nnx.grad(loss_fn)(model))

    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        for _ in range(20):
            step(model, optimizer)
    changed = [np.count_nonzero(np.asarray(value) != before[name]) for name, value in flat(model).items()]
    return sum(changed) / sum(value.size for value in before.values())


@pytest.mark.long
def test_float32_parameters_move_where_bfloat16_ones_do_not(even_checkpoints, even_cfg, tmp_path):
    """README's full fine-tuning. Embeddings of tokens that no row has are decayed alone: these need not move."""
    source = even_checkpoints["float32"].parent / "source"
    convert(source, tmp_path / "bfloat16")
    assert moved(tmp_path / "bfloat16", even_cfg, None) < 0.3
    assert moved(tmp_path / "bfloat16", even_cfg, "float32") > 0.8


def test_onto_a_mesh(checkpoints, cfg):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    model = create_model_from_checkpoint(checkpoints["bfloat16"], cfg, mesh)
    value = model.layers[0].mlp.gate_up.weight[...]
    assert value.sharding.mesh == mesh
    assert tuple(value.sharding.spec) == (None, None, None, None)  # axes of size 1 cut nothing


def test_another_models_configuration_names_every_parameter(checkpoints):
    with pytest.raises(InputError) as caught:
        create_model_from_checkpoint(checkpoints["bfloat16"], dataclasses.replace(ModelConfig.tiny(), num_experts=8))
    assert len(caught.value.faults) == 6 * 5  # router, gate_up and down: weight and bias, in five layers
    what = "layers.0.mlp.router.weight: expected shape [8, 96] by cfg, found [9, 96]"
    assert f"{checkpoints['bfloat16']}: {what}" in caught.value.faults


def test_fewer_layers_than_stored_are_named(checkpoints, cfg):
    with pytest.raises(InputError) as caught:
        create_model_from_checkpoint(checkpoints["bfloat16"], dataclasses.replace(cfg, num_hidden_layers=4, layer_types=()))
    assert len(caught.value.faults) == 17
    assert all("layers.4." in fault and "unexpected" in fault for fault in caught.value.faults)


def test_safetensors_of_another_shape_are_named(sources):
    with pytest.raises(InputError, match=r"lm_head.weight: expected shape \[201088, 2880\] by cfg, found \[509, 96\]"):
        create_model_from_checkpoint(sources["hf"], ModelConfig.default())


def test_values_cannot_be_loaded_as_packed(sources, cfg):
    with pytest.raises(InputError, match="expected packed experts for 'mxfp4', found values; leave param_dtype out"):
        create_model_from_checkpoint(sources["hf-bf16"], dataclasses.replace(cfg, param_dtype="mxfp4"))


@pytest.mark.long
def test_the_seeds_examples(checkpoints, tmp_path):
    """SEED.md's usage, with our import path and a configuration that matches the checkpoint at hand."""
    from oss_model import ModelConfig, Transformer
    from oss_model.params import create_model_from_checkpoint

    cfg = ModelConfig.from_json(checkpoints["bfloat16"] / "config.json")
    model = create_model_from_checkpoint(checkpoint_path=str(checkpoints["bfloat16"]), cfg=cfg, mesh=None)
    assert isinstance(model, Transformer)
    logits = model(jnp.array([[1, 2, 3, 4, 5]]))
    assert logits.shape == (1, 5, 509)
    assert logits.dtype == jnp.bfloat16
    assert ModelConfig.default(use_sharding=False).num_hidden_layers == 36


@pytest.mark.long
def test_a_plain_restore_leaves_numpy_which_computes_too(checkpoints):
    """Without shardings Orbax restores NumPy arrays. In a process of its own: here every array is checked to be JAX's."""
    code = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from oss_model import ModelConfig, create_model_from_checkpoint
model = create_model_from_checkpoint(sys.argv[1], ModelConfig.from_json(sys.argv[1] + "/config.json"))
graphdef, state = nnx.split(model)
plain = nnx.merge(graphdef, jax.tree.map(np.asarray, state))
tokens = jnp.arange(40)[None]
assert jnp.array_equal(plain(tokens), model(tokens))
"""
    done = subprocess.run([sys.executable, "-c", code, str(checkpoints["bfloat16"])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_adapter_for_tunix_warns_of_parameters_that_would_not_move(even_cfg):
    """Once, and of nothing where LoRA or float32 parameters are trained."""
    from oss_model.tunix import TunixTransformer

    with pytest.warns(UserWarning, match="full fine-tuning loses steps") as caught:
        TunixTransformer(Transformer(even_cfg, rngs=nnx.Rngs(0)))
    assert len(caught) == 1
    TunixTransformer(Transformer(dataclasses.replace(even_cfg, param_dtype="float32"), rngs=nnx.Rngs(0)))
    adapted = Transformer(even_cfg, rngs=nnx.Rngs(0))
    add_lora(adapted, r".*q_proj", rank=2, rngs=nnx.Rngs(1))
    TunixTransformer(adapted)
