"""What training saved, as a source: plain Orbax, beside an optimizer's state, stacked layers, LoRA updates."""

import dataclasses
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from test_converter_export import tensors, values

from converter import convert
from converter.cli import inspect_main, main
from converter.orbax_source import find
from converter.source import open_checkpoint
from oss_model import Transformer, add_lora, create_model_from_checkpoint, cross_entropy, load_lora, merge_lora, save_lora
from oss_model.layouts import BFLOAT16
from oss_model.scanned import scanned

ATTENTION, EXPERTS = r".*(q|k|v|o)_proj", r".*mlp\.(gate_up|down)"


@pytest.fixture(scope="module")
def trained(checkpoints, cfg) -> nnx.Module:
    """A model whose every parameter has moved, a little, from what was converted."""
    model = create_model_from_checkpoint(checkpoints["float32"], dataclasses.replace(cfg, param_dtype="float32"))
    state = nnx.state(model)
    keys = iter(jax.random.split(jax.random.key(0), 200))
    return nnx.merge(nnx.graphdef(model), jax.tree.map(lambda a: a + 0.01 * jax.random.normal(next(keys), a.shape), state))


def expected(model) -> dict[str, np.ndarray]:
    """Its parameters as bfloat16, rounded once."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    found = {".".join(map(str, path)): variable.get_value() for path, variable in flat}
    return {name: np.asarray(np.asarray(value).astype(BFLOAT16), np.float32) for name, value in found.items()}


def same(directory, model) -> None:
    found, wanted = values(directory), expected(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, name)


@pytest.mark.long
def test_what_plain_orbax_saved_is_exported(trained, checkpoints, tmp_path):
    """One file a process, compressed: as `StandardCheckpointer` does. config.json is put beside it."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(trained))
    shutil.copy(checkpoints["float32"] / "config.json", tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", to="hf-bf16")
    same(tmp_path / "out", trained)
    convert(tmp_path / "model", tmp_path / "orbax", "float32")
    again = create_model_from_checkpoint(tmp_path / "orbax", dataclasses.replace(trained.cfg, param_dtype=None))
    for a, b in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(trained)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert convert(tmp_path / "model", tmp_path / "out", to="hf-bf16").status == "already-complete"


@pytest.mark.long
def test_the_last_step_beside_an_optimizers_state(trained, checkpoints, tmp_path):
    """Adam's moments have the model's own names; the configuration is that of the checkpoint it began with."""
    params = nnx.state(trained, nnx.Param)
    with ocp.CheckpointManager(tmp_path / "run/steps") as manager:
        for step in (4, 10):
            tree = {"params": params, "moments": optax.adam(1e-3).init(params), "step": jnp.int32(step)}
            manager.save(step, args=ocp.args.StandardSave(tree))
    shutil.copytree(checkpoints["float32"], tmp_path / "run/base")
    for place in ("run/steps", "run/steps/10", "run/steps/10/default"):
        source = open_checkpoint(tmp_path / place)
        assert source.directory == tmp_path / "run/steps/10/default"
        assert source.home == tmp_path / "run/base"
    convert(tmp_path / "run/steps", tmp_path / "out", to="hf-bf16")
    same(tmp_path / "out", trained)


def test_of_several_items_the_one_with_a_model_is_meant(checkpoints, tmp_path, capsys):
    """A directory of several checkpoints has no such one."""
    step = tmp_path / "steps/10"
    step.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step / "arrays", {"step": jnp.int32(10)})
        checkpointer.save(step / "opt_state", {"0": {"mu": {"embedding": {"weight": {"value": jnp.zeros(3)}}}}})
    shutil.copytree(checkpoints["bfloat16"], step / "params")
    assert find(tmp_path / "steps") == step / "params"
    shutil.copytree(checkpoints["float32"], step / "params32")
    for command in ([str(step), str(tmp_path / "out")], [str(step)]):
        assert (main if len(command) == 2 else inspect_main)(command) == 2
        said = f"error: {step}: expected one checkpoint, found several in it (params, params32); give one of them\n"
        assert capsys.readouterr().err == said
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_stacked_layers_are_unstacked(tmp_path, even_cfg):
    cfg = dataclasses.replace(even_cfg, num_hidden_layers=4, layer_types=(), param_dtype="float32")
    model = Transformer(cfg, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", {"model": nnx.state(scanned(nnx.merge(graphdef, jax.tree.map(jnp.copy, state))))})
    (tmp_path / "model/config.json").write_text(json.dumps(cfg.to_json()))
    convert(tmp_path / "model", tmp_path / "out", to="hf-bf16")
    same(tmp_path / "out", model)


def test_what_is_missing_or_of_another_model_is_told(trained, checkpoints, tmp_path, capsys):
    state = nnx.state(trained)
    flat = [(path, value) for path, value in nnx.to_flat_state(state) if "sinks" not in path]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.from_flat_state(flat))
        checkpointer.save(tmp_path / "two", {"a": state, "b": state})
        checkpointer.save(tmp_path / "none", {"x": jnp.zeros(3)})
    out = str(tmp_path / "out")
    assert main([str(tmp_path / "model"), out, "--to", "hf-bf16"]) == 2
    assert "config.json: missing, and in the directories above; copy the model's there" in capsys.readouterr().err
    for name in ("model", "two", "none"):
        shutil.copy(checkpoints["float32"] / "config.json", tmp_path / name)
    assert main([str(tmp_path / "model"), out, "--to", "hf-bf16"]) == 2
    err = capsys.readouterr().err
    assert [f"layers.{n}.attn.sinks: missing; config.json says" in err for n in range(5)] == [True] * 5
    assert main([str(tmp_path / "two"), out, "--to", "hf-bf16"]) == 2
    assert "expected one tree of a whole model's parameters" in (err := capsys.readouterr().err)
    assert "found several (a., b.)" in err
    assert main([str(tmp_path / "none"), out, "--to", "hf-bf16"]) == 2
    assert "found none; it has x" in capsys.readouterr().err


# --- LoRA -------------------------------------------------------------------------------------------------------


def adapted(path, cfg, rules, rank=3, alpha=6):
    model = create_model_from_checkpoint(path, cfg)
    add_lora(model, rules, rank, alpha, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.LoRAParam)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    nnx.update(model, jax.tree.map(lambda a: 0.05 * jax.random.normal(next(keys), a.shape), state))
    return model


def close(found: np.ndarray, wanted: np.ndarray, name: str) -> None:
    """To one step of bfloat16: sums of a few products may differ in their last bit before they are rounded."""
    np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=1e-6, err_msg=name)
    assert (found != wanted).mean() < 1e-3, name


@pytest.mark.long
def test_updates_of_attention_leave_packed_experts_alone(checkpoints, sources, cfg, tmp_path):
    model = adapted(checkpoints["mxfp4"], cfg, ATTENTION)
    save_lora(model, tmp_path / "lora", [ATTENTION])
    for source in (checkpoints["mxfp4"], sources["openai"]):
        out = tmp_path / source.name
        convert(source, out, to="hf", merge=tmp_path / "lora")
        found, before = tensors(out), tensors(sources["hf"])
        assert {name for name in before if found[name] != before[name]} == {
            f"model.layers.{n}.self_attn.{proj}_proj.weight" for n in range(5) for proj in "qkvo"
        }
        merged = create_model_from_checkpoint(checkpoints["bfloat16"], cfg)
        load_lora(merged, tmp_path / "lora")
        merge_lora(merged)
        ours = values(out)
        for name, value in expected(merged).items():
            close(ours[name], value, name)


@pytest.mark.long
def test_updates_of_experts_are_added_to_values_and_packed_again(checkpoints, sources, cfg, tmp_path, capsys):
    rules = [r"layers\.1\.mlp\.(gate_up|down)", r"layers\.3\.mlp\.(down|router)", r"lm_head"]
    model = adapted(checkpoints["mxfp4"], cfg, rules)
    save_lora(model, tmp_path / "lora", rules)
    asked = [str(checkpoints["mxfp4"]), str(tmp_path / "out"), "--to", "hf", "--merge", str(tmp_path / "lora")]
    assert main(asked) == 2
    assert "layers.1.mlp.down.weight and 2 more are values, which lose something as MXFP4" in capsys.readouterr().err
    assert main([*asked, "--quantizer", "best"]) == 0
    found, before = tensors(tmp_path / "out"), tensors(sources["hf"])
    experts = [(1, "gate_up"), (1, "down"), (3, "down")]
    assert {name for name in before if found[name] != before[name] and "bias" not in name} <= {
        "lm_head.weight",
        "model.layers.3.mlp.router.weight",
        *(f"model.layers.{n}.mlp.experts.{kind}_proj_{part}" for n, kind in experts for part in ("blocks", "scales")),
    }
    # As values, against the model's own merging
    convert(checkpoints["mxfp4"], tmp_path / "values", to="hf-bf16", merge=tmp_path / "lora")
    merged = create_model_from_checkpoint(checkpoints["bfloat16"], cfg)
    load_lora(merged, tmp_path / "lora")
    merge_lora(merged)
    ours = values(tmp_path / "values")
    for name, value in expected(merged).items():
        close(ours[name], value, name)
    assert (
        convert(checkpoints["mxfp4"], tmp_path / "values", to="hf-bf16", merge=tmp_path / "lora").status == "already-complete"
    )


# --- PEFT -------------------------------------------------------------------------------------------------------

MODULES = ["q_proj", "v_proj", "o_proj", "lm_head"]
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"]


# peft asks transformers for what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def peft_logits(base, adapter, tokens):
    import torch
    from peft import PeftModel
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter)(torch.from_numpy(tokens)).logits.numpy()


@pytest.fixture(scope="module")
def theirs(sources, tmp_path_factory):
    """What peft saves of a model of transformers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM.from_pretrained(sources["hf-bf16"], dtype=torch.float32)
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 9}}
    config = LoraConfig(r=3, lora_alpha=5, target_modules=MODULES, target_parameters=PARAMETERS, **patterns)
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    out = tmp_path_factory.mktemp("peft") / "adapter"
    adapted.save_pretrained(out, save_embedding_layers=True)  # as it does by itself where the ends are adapted, with a warning
    return out


@pytest.mark.long
def test_an_adapter_of_pefts_is_ours_and_back(theirs, sources, checkpoints, cfg, tmp_path, prompt):
    """Logits in transformers with peft, and here, by what is loaded, by what is merged, and by what is written back."""
    wanted = peft_logits(sources["hf-bf16"], theirs, prompt)
    assert main([str(theirs), str(tmp_path / "ours"), "--to", "orbax-lora", "--base", str(sources["hf"])]) == 0
    model = create_model_from_checkpoint(checkpoints["mxfp4"], cfg)
    assert len(load_lora(model, tmp_path / "ours")) == 5 * 6 + 1
    np.testing.assert_allclose(model(jnp.asarray(prompt)), wanted, atol=2e-4)
    assert main([str(tmp_path / "ours"), str(tmp_path / "peft"), "--to", "peft", "--base", str(sources["hf-bf16"])]) == 0
    np.testing.assert_allclose(peft_logits(sources["hf-bf16"], tmp_path / "peft", prompt), wanted, atol=1e-6)
    convert(sources["hf"], tmp_path / "merged", "float32", to="hf-bf16", merge=theirs)
    merged = create_model_from_checkpoint(tmp_path / "merged", cfg)
    np.testing.assert_allclose(merged(jnp.asarray(prompt)), wanted, atol=2e-4)
    assert np.abs(wanted - np.asarray(create_model_from_checkpoint(checkpoints["mxfp4"], cfg)(jnp.asarray(prompt)))).max() > 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora: only False is implemented, found True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: only None is implemented, found ['lm_head']"),
        ({"peft_type": "LOHA"}, "peft_type: only 'LORA' is implemented, found 'LOHA'"),
        ({"zz_new": 1}, "zz_new: not a key of LoRA that is known here; it may change the updates"),
        ({"r": None}, "expected ranks from 1 on and finite alphas, found r None"),
    ],
)
def test_what_is_not_lora_is_refused_by_its_key(theirs, sources, tmp_path, capsys, change, said):
    other = shutil.copytree(theirs, tmp_path / "other")
    about = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(about | change))
    assert main([str(other), str(tmp_path / "out"), "--to", "orbax-lora", "--base", str(sources["hf"])]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_tensor_of_an_adapter_is_read_or_refused(theirs, sources, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    tensors_of = load_file(theirs / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0"

    def refused(change) -> str:
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(theirs, other)
        again = dict(tensors_of)
        change(again)
        save_file(again, other / "adapter_model.safetensors")
        assert main([str(other), str(tmp_path / "out"), "--to", "orbax-lora", "--base", str(sources["hf"])]) == 2
        return capsys.readouterr().err

    one = np.ones((3, 96), np.float32)
    assert "magnitude: expected lora_A or lora_B of a linear map" in refused(lambda t: t.update({f"{layer}.magnitude": one}))
    strange = {f"{layer}.mlp.experts.3.gate_proj.lora_{part}.weight": one for part in "AB"}
    assert "3.gate_proj: expected a linear map of gpt-oss in transformers" in refused(lambda t: t.update(strange))
    assert "expected lora_A and lora_B, found one" in refused(lambda t: t.pop(f"{layer}.self_attn.q_proj.lora_A.weight"))
    assert "expected shapes [(4, 96)" in refused(
        lambda t: t.update({f"{layer}.mlp.router.lora_B.weight": np.ones((9, 4), np.float32)})
    )
    changed = {"base_model.model.lm_head.base_layer.weight": np.ones((509, 96), np.float32)}
    assert "expected the model's own lm_head.weight, found another" in refused(lambda t: t.update(changed))
    assert main([str(theirs), str(tmp_path / "out"), "--to", "peft", "--quantizer", "best"]) == 2
    assert "expected no option but --base" in capsys.readouterr().err
    assert main([str(sources["hf"]), str(tmp_path / "out"), "--to", "peft"]) == 2
    assert (
        "expected LoRA updates (adapter_config.json of PEFT, or lora.json of save_lora), found neither"
        in capsys.readouterr().err
    )


def test_an_update_is_merged_or_the_command_refuses(checkpoints, cfg, tmp_path, capsys):
    model = adapted(checkpoints["mxfp4"], cfg, ATTENTION)
    save_lora(model, tmp_path / "lora", [ATTENTION])
    note = tmp_path / "lora/lora.json"
    noted = json.loads(note.read_text())
    asked = [str(checkpoints["mxfp4"]), str(tmp_path / "out"), "--to", "hf", "--merge", str(tmp_path / "lora")]

    def refused(change) -> str:
        again = json.loads(json.dumps(noted))
        change(again["updates"])
        note.write_text(json.dumps(again))
        assert main(asked) == 2
        return capsys.readouterr().err

    assert "layers.2.attn.q_proj.lora.a: expected to be noted in lora.json" in refused(lambda u: u.pop("layers.2.attn.q_proj"))
    other = "layers.9.attn.q_proj"
    assert f"{other}: expected a linear map of the model, found none" in refused(
        lambda u: u.update({other: {"rank": 3, "alpha": 1}})
    )
    wrong = {"layers.0.attn.k_proj": {"rank": 2, "alpha": 1}}
    assert "layers.0.attn.k_proj: expected shapes [(2, 96), (7, 24, 2)], found" in refused(lambda u: u.update(wrong))
    note.unlink()
    assert main(asked) == 2
    assert "lora.json: expected the ranks and alphas that save_lora notes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- training for MXFP4 -----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("rules", [None, r"layers\.\d+\.mlp\.(gate_up|down)"])
def test_what_is_served_is_what_was_trained(checkpoints, cfg, tmp_path, rules):
    """Logits of the model as trained, with the exporter's rule in its experts, and of its export: equal."""
    held = "mxfp4" if rules else "float32"
    model = create_model_from_checkpoint(
        checkpoints[held], dataclasses.replace(cfg, experts_qat="best", param_dtype=held, expert_path="scan")
    )
    tokens = jnp.arange(2 * 30, dtype=jnp.int32).reshape(2, 30)
    trained = nnx.Param
    if rules:
        add_lora(model, rules, 2, rngs=nnx.Rngs(0))
        trained = nnx.LoRAParam
    optimizer = nnx.Optimizer(model, optax.adam(3e-2 if rules else 3e-3), wrt=trained)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            total, count = cross_entropy(model, tokens)
            return total / count

        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, trained))(model)
        optimizer.update(model, grads)
        return loss

    with jax.numpy_dtype_promotion("standard"):
        losses = [float(step(model, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1
    logits = jax.jit(lambda tokens: model(tokens))(tokens)
    if rules:
        save_lora(model, tmp_path / "lora", rules)
        convert(checkpoints["mxfp4"], tmp_path / "out", to="hf", merge=tmp_path / "lora", quantizer="best")
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "model", nnx.state(model))
        shutil.copy(checkpoints["float32"] / "config.json", tmp_path / "model")
        convert(tmp_path / "model", tmp_path / "out", to="hf", quantizer="best")
    served = values(tmp_path / "out")
    plain = create_model_from_checkpoint(checkpoints["float32"], dataclasses.replace(cfg, expert_path="scan"))
    state = dict(nnx.to_flat_state(nnx.state(plain)))
    kept = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for path, variable in state.items():  # the experts of the export, and the rest as it was trained, not rounded
        name = ".".join(map(str, path))
        expert = name.endswith(("gate_up.weight", "down.weight"))
        value = jnp.asarray(served[name]) if expert or path not in kept else kept[path].get_value().astype(jnp.float32)
        variable.set_value(value)
    nnx.update(plain, nnx.from_flat_state(list(state.items())))
    served_logits = jax.jit(lambda tokens: plain(tokens))(tokens)
    if rules:  # an update's products are summed in another order: a value on the edge of a code may go to the other one
        assert jnp.linalg.norm(served_logits - logits) < 1e-3 * jnp.linalg.norm(logits)
    else:
        np.testing.assert_array_equal(served_logits, logits)
