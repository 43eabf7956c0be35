"""LoRA: the rules name what is adapted, the update is W + alpha/rank · B·A, and nothing else moves."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from oss_model import InputError, create_model_from_checkpoint, layouts
from oss_model.layouts import parameter_name
from oss_model.lora import NOTE, add_lora, load_lora, merge_lora, named_before, save_lora

ATTENTION, EXPERTS = r".*(q|k|v|o)_proj", r".*mlp\.(gate_up|down)"


@pytest.fixture
def tokens(prompt):
    return jnp.asarray(prompt)


def adapted(checkpoints, cfg, dtype: str, rules=(ATTENTION, EXPERTS), path: str = "auto"):
    """A model with LoRA parameters that do something: B is drawn too."""
    model = create_model_from_checkpoint(checkpoints[dtype], dataclasses.replace(cfg, expert_path=path))
    add_lora(model, rules, rank=3, alpha=6, rngs=nnx.Rngs(1))
    state, rng = nnx.state(model, nnx.LoRAParam), np.random.default_rng(0)
    nnx.update(model, jax.tree.map(lambda a: a + 0.02 * rng.standard_normal(a.shape, np.float32), state))
    return model


def values(model, *filters) -> dict[str, np.ndarray]:
    return {parameter_name(path): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model, *filters))}


def test_parameters_start_as_an_update_of_zero(checkpoints, cfg, tokens):
    model = create_model_from_checkpoint(checkpoints["mxfp4"], cfg)
    before = np.asarray(model(tokens))
    names = add_lora(model, [ATTENTION, EXPERTS], rank=3, rngs=nnx.Rngs(0))
    assert len(names) == 6 * cfg.num_hidden_layers
    np.testing.assert_array_equal(model(tokens), before)
    shapes = {name: a.shape for name, a in values(model, nnx.LoRAParam).items() if name.startswith("layers.1.")}
    assert shapes == {
        "layers.1.attn.q_proj.lora.a": (3, 96),
        "layers.1.attn.q_proj.lora.b": (14, 24, 3),
        "layers.1.attn.k_proj.lora.a": (3, 96),
        "layers.1.attn.k_proj.lora.b": (7, 24, 3),
        "layers.1.attn.v_proj.lora.a": (3, 96),
        "layers.1.attn.v_proj.lora.b": (7, 24, 3),
        "layers.1.attn.o_proj.lora.a": (3, 14, 24),
        "layers.1.attn.o_proj.lora.b": (96, 3),
        "layers.1.mlp.gate_up.lora.a": (9, 3, 96),
        "layers.1.mlp.gate_up.lora.b": (9, 2, 160, 3),
        "layers.1.mlp.down.lora.a": (9, 3, 160),
        "layers.1.mlp.down.lora.b": (9, 96, 3),
    }
    assert all(a.dtype == np.float32 for a in values(model, nnx.LoRAParam).values())


@pytest.mark.parametrize("path", ["loop", "scan", "grouped", "pairs", "ragged"])
def test_every_path_adds_the_update(path, checkpoints, cfg, tokens):
    """Against the same model with the update folded into float32 weights, which knows nothing of LoRA."""
    model = adapted(checkpoints, cfg, "float32", path=path)
    plain = create_model_from_checkpoint(checkpoints["float32"], cfg)
    ours, base = model(tokens), plain(tokens)
    assert len(merge_lora(model)) == 6 * cfg.num_hidden_layers
    weights = values(model)
    assert weights.keys() == layouts.parameters(dataclasses.replace(cfg, param_dtype="float32")).keys()
    nnx.update(plain, nnx.state(model))
    folded = plain(tokens)
    assert float(jnp.abs(ours - folded).max()) < 1e-5 * float(jnp.abs(folded).max())  # float32 sums in another order
    assert float(jnp.abs(ours - base).max()) > 0.1


def test_a_merge_is_what_the_paper_says(checkpoints, cfg):
    model = adapted(checkpoints, cfg, "float32")
    q, down = model.layers[1].attn.q_proj, model.layers[1].mlp.down
    expected_q = q.weight[...] + 2 * jnp.einsum("ndr,rh->ndh", q.lora.b[...], q.lora.a[...])
    expected_down = down.weight[...] + 2 * jnp.stack([down.lora.b[e] @ down.lora.a[e] for e in range(9)])
    merge_lora(model)
    np.testing.assert_allclose(q.weight[...], expected_q, atol=1e-6)
    np.testing.assert_allclose(down.weight[...], expected_down, atol=1e-6)


@pytest.mark.long
def test_gradients_reach_the_update_and_everything_that_is_not_packed(checkpoints, cfg, tokens):
    model = adapted(checkpoints, cfg, "mxfp4")

    def loss(model, tokens):
        logits = model(tokens)[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()

    everything = (nnx.Param, nnx.LoRAParam)
    grads = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, everything)))(model, tokens)
    flat = {parameter_name(path): np.asarray(v.get_value(), np.float32) for path, v in nnx.to_flat_state(grads)}
    packed = {name for name in values(model) if name.endswith((".blocks", ".scales"))}
    assert flat.keys() == values(model).keys() - packed
    assert [name for name, grad in flat.items() if not np.abs(grad).max() > 0] == []


@pytest.mark.long
def test_lora_trains_on_packed_experts_and_nothing_else_moves(checkpoints, cfg, tokens):
    import optax

    model = create_model_from_checkpoint(checkpoints["mxfp4"], cfg)
    add_lora(model, [ATTENTION, EXPERTS], rank=3, rngs=nnx.Rngs(0))
    before, optimizer = values(model), nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.LoRAParam)

    def loss(model, tokens):
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]).mean()

    @nnx.jit
    def step(model, optimizer, tokens):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, tokens)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer, tokens)) for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.2
    changed = {name for name, value in values(model).items() if not np.array_equal(value, before[name])}
    assert changed == {name for name in before if ".lora." in name}


@pytest.mark.parametrize(
    ("rules", "faults"),
    [
        (
            ".*attention.*",
            ["LoRA rule '.*attention.*': expected to match a linear map, found no match; there are layers.N.attn.k_"],
        ),
        (".*router", ["LoRA rule '.*router': expected more than the router; the experts are mlp.gate_up and mlp.down"]),
        ([ATTENTION, "norm", ".*mlp.router"], ["LoRA rule 'norm'", "LoRA rule '.*mlp.router'"]),
        ([], ["LoRA: expected at least one rule, found none"]),
    ],
)
def test_a_rule_that_would_adapt_nothing_is_refused(rules, faults, checkpoints, cfg):
    model = create_model_from_checkpoint(checkpoints["bfloat16"], cfg)
    with pytest.raises(InputError) as caught:
        add_lora(model, rules, rank=2, rngs=nnx.Rngs(0))
    assert len(caught.value.faults) == len(faults)
    assert all(found.startswith(expected) for found, expected in zip(caught.value.faults, faults, strict=True))
    assert not values(model, nnx.LoRAParam)


def test_a_second_update_and_a_rank_of_zero_are_refused(checkpoints, cfg):
    model = create_model_from_checkpoint(checkpoints["bfloat16"], cfg)
    add_lora(model, "layers.0.attn.q_proj", rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(InputError) as caught:
        add_lora(model, r"layers.0.attn.(q|k)_proj", rank=0, rngs=nnx.Rngs(0))
    assert caught.value.faults == [
        "LoRA rank: expected 1 or more, found 0",
        "layers.0.attn.q_proj: expected no LoRA parameters yet, found some",
    ]


def test_packed_experts_do_not_take_an_update(checkpoints, cfg):
    model = adapted(checkpoints, cfg, "mxfp4", EXPERTS)
    with pytest.raises(InputError, match=re.escape("layers.0.mlp.down: expected weights, found packed MXFP4")) as caught:
        merge_lora(model)
    assert len(caught.value.faults) == 2 * cfg.num_hidden_layers
    merge = adapted(checkpoints, cfg, "bfloat16", EXPERTS)
    nnx.update(merge, nnx.state(model, nnx.LoRAParam))  # the same parameters fit a model of values
    assert len(merge_lora(merge)) == 2 * cfg.num_hidden_layers


# --- saved and loaded -------------------------------------------------------------------------------------------


def test_saved_updates_are_loaded_with_their_ranks_and_alphas(checkpoints, cfg, tokens, tmp_path):
    model = create_model_from_checkpoint(checkpoints["mxfp4"], cfg)
    add_lora(model, ATTENTION, rank=3, alpha=6, rngs=nnx.Rngs(1))
    add_lora(model, EXPERTS, rank=2, rngs=nnx.Rngs(2))
    state = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda a: a + 0.02, state))
    save_lora(model, tmp_path / "lora", [ATTENTION, EXPERTS])
    noted = json.loads((tmp_path / "lora" / NOTE).read_text())
    assert noted["rules"] == [ATTENTION, EXPERTS]
    assert noted["updates"]["layers.0.attn.q_proj"] == {"rank": 3, "alpha": 6.0}
    assert noted["updates"]["layers.1.mlp.down"] == {"rank": 2, "alpha": 2.0}

    again = create_model_from_checkpoint(checkpoints["mxfp4"], cfg)
    assert sorted(load_lora(again, tmp_path / "lora")) == sorted(noted["updates"])
    np.testing.assert_array_equal(again(tokens), model(tokens))
    with pytest.raises(InputError, match="expected no LoRA parameters yet"):
        load_lora(again, tmp_path / "lora")


def test_updates_saved_under_the_names_of_before_are_loaded(checkpoints, cfg, tokens, tmp_path):
    model = create_model_from_checkpoint(checkpoints["mxfp4"], cfg)
    add_lora(model, [ATTENTION, EXPERTS], rank=3, rngs=nnx.Rngs(1))
    nnx.update(model, jax.tree.map(lambda a: a + 0.02, nnx.state(model, nnx.LoRAParam)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "lora", named_before(nnx.state(model, nnx.LoRAParam)))
    again = create_model_from_checkpoint(checkpoints["mxfp4"], cfg)
    assert len(load_lora(again, tmp_path / "lora")) == 6 * cfg.num_hidden_layers
    np.testing.assert_array_equal(again(tokens), model(tokens))


def test_updates_of_another_model_are_refused(checkpoints, cfg, even_checkpoints, even_cfg, tmp_path):
    model = create_model_from_checkpoint(checkpoints["mxfp4"], cfg)
    with pytest.raises(InputError, match=r"expected a model with LoRA parameters to save, found one without"):
        save_lora(model, tmp_path / "none")
    add_lora(model, ".*q_proj", rank=2, rngs=nnx.Rngs(0))
    save_lora(model, tmp_path / "lora")
    save_lora(model, tmp_path / "lora")  # over those saved before
    (tmp_path / "lora/notes.md").write_text("mine")
    with pytest.raises(InputError, match=r"lora: expected nothing but what was saved there before, found notes\.md: saving"):
        save_lora(model, tmp_path / "lora")
    (tmp_path / "lora/notes.md").unlink()
    other = create_model_from_checkpoint(even_checkpoints["mxfp4"], even_cfg)
    with pytest.raises(InputError, match=r"layers.0.attn.q_proj: expected shapes .*, found \[\(2, 96\), \(14, 24, 2\)\]"):
        load_lora(other, tmp_path / "lora")
    (tmp_path / "lora" / NOTE).unlink()
    with pytest.raises(InputError, match=r"expected the rank and alpha of layers\.0\.attn\.q_proj"):
        load_lora(create_model_from_checkpoint(checkpoints["mxfp4"], cfg), tmp_path / "lora")
    with pytest.raises(InputError, match="expected LoRA parameters, found none"):
        load_lora(other, checkpoints["mxfp4"])
