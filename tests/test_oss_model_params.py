"""Loading: what fits is loaded exactly as stored, and what does not is named."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from oss_model import InputError, ModelConfig, create_model_from_checkpoint, layouts
from oss_model.params import parameter_name


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


def test_the_stored_dtype_wins_over_the_configuration(checkpoints, cfg):
    """`dtype` is what is computed in; a packed checkpoint stays packed."""
    model = create_model_from_checkpoint(checkpoints["mxfp4"], dataclasses.replace(cfg, param_dtype="float32"))
    assert model.cfg.param_dtype == "mxfp4"
    assert model.cfg.dtype == np.float32


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
    with pytest.raises(InputError, match="has no packed experts; use param_dtype='bfloat16'"):
        create_model_from_checkpoint(sources["hf-bf16"], dataclasses.replace(cfg, param_dtype="mxfp4"))


def test_a_missing_chunk_is_an_error_not_zeros(tmp_path, checkpoints):
    """In a process of its own: Orbax drops the reads still under way, and Python reports each of them when it ends."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["bfloat16"], broken)
    shutil.rmtree(broken / "layers.1.mlp.down.weight.value" / "c" / "3")
    code = """
import sys
from oss_model import InputError, ModelConfig, create_model_from_checkpoint
try:
    create_model_from_checkpoint(sys.argv[1], ModelConfig.tiny())
except InputError as e:
    print(e)
"""
    run = subprocess.run([sys.executable, "-c", code, str(broken)], capture_output=True, text=True)
    assert run.stdout.startswith(f"{broken}: expected a whole checkpoint, found one that cannot be read (")
    assert run.stdout.endswith("): try verify-oss\n")


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
