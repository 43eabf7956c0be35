"""The whole model against transformers, and under the transformations people train with."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import GptOssForCausalLM

from oss_model import ModelConfig, Transformer, create_model_from_checkpoint, experts, modeling
from oss_model.scanned import scanned
from oss_model.synthetic import write_checkpoint
from oss_model.taps import LAYER_TAPS, MODEL_TAPS, tapping

# Five layers, every size distinct, prompts of three windows: the worst of 16 seeds was 5e-6 of the largest logit.
LOGITS = 1.5e-5


@nnx.jit
def forward(model, *inputs):
    return model(*inputs)


@nnx.jit
def gradients(model, tokens):
    """Of the mean squared logit, in float32: gradients come in their parameter's dtype, and bfloat16 would hide faults."""
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, state)
    return nnx.grad(lambda model: jnp.mean(model(tokens) ** 2))(nnx.merge(graphdef, state))


@pytest.fixture(scope="module")
def reference(sources):
    """transformers' own model, decoded by transformers."""
    model = GptOssForCausalLM.from_pretrained(
        sources["hf"], dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def model(sources, cfg):
    return create_model_from_checkpoint(sources["hf"], dataclasses.replace(cfg, param_dtype="bfloat16"))


@pytest.fixture(scope="module")
def want(reference, prompt):
    with torch.no_grad():
        return reference(torch.from_numpy(prompt).long()).logits.numpy()


def assert_same_logits(got, want, bound=LOGITS):
    assert got.shape == want.shape
    assert np.abs(np.asarray(got) - want).max() <= bound * np.abs(want).max()


@pytest.mark.parametrize("layout", ["hf", "hf-bf16", "openai"])
@pytest.mark.parametrize("path", ["scan", "grouped", "pairs", "ragged"])
def test_float32_logits_equal_transformers(sources, cfg, prompt, want, layout, path):
    model = create_model_from_checkpoint(sources[layout], dataclasses.replace(cfg, expert_path=path, param_dtype="bfloat16"))
    logits = forward(model, prompt)
    assert logits.dtype == jnp.float32
    assert_same_logits(logits, want)


@pytest.mark.parametrize("param_dtype", ["bfloat16", "mxfp4"])
def test_without_jit_the_loop_over_experts_gives_the_same_logits(sources, cfg, prompt, want, param_dtype):
    """As the parity candidate runs; packed experts are decoded one at a time."""
    held = dataclasses.replace(cfg, param_dtype=param_dtype, expert_path="loop")
    model = create_model_from_checkpoint(sources["hf"], held)
    assert_same_logits(model(jnp.asarray(prompt)), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "mxfp4"])
def test_float32_logits_from_orbax_equal_transformers(checkpoints, cfg, prompt, want, dtype):
    assert_same_logits(forward(create_model_from_checkpoint(checkpoints[dtype], cfg), prompt), want)


def test_bfloat16_is_as_close_to_float32_as_transformers_in_bfloat16(reference, sources, prompt, want):
    """bfloat16 end to end says little (experts flip on near-ties), so the bound is the reference's own error."""
    cfg = dataclasses.replace(ModelConfig.tiny(), dtype=jnp.bfloat16)
    got = forward(create_model_from_checkpoint(sources["hf"], cfg), prompt)
    assert got.dtype == jnp.bfloat16
    theirs = GptOssForCausalLM.from_pretrained(
        sources["hf"], dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        their_error = np.abs(theirs(torch.from_numpy(prompt).long()).logits.float().numpy() - want)
    our_error = np.abs(np.asarray(got.astype(jnp.float32)) - want)
    assert np.median(our_error) <= 1.5 * np.median(their_error)


@pytest.mark.long
def test_gradients_equal_torch(reference, model, prompt):
    """Per-parameter relative L2 of d(mean of squared logits), float32; expert gradients transposed back by hand."""
    found = gradients(model, prompt)
    got = {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(found)}
    reference.zero_grad()
    (reference(torch.from_numpy(prompt).long()).logits ** 2).mean().backward()
    theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    heads, kv, dim = 14, 7, 24
    for n in range(5):
        hf, ours = f"model.layers.{n}.", f"layers.{n}."
        up = theirs[hf + "mlp.experts.gate_up_proj"].transpose(0, 2, 1)
        pairs = {
            "attn.sinks": theirs[hf + "self_attn.sinks"],
            "attn.q_proj.weight": theirs[hf + "self_attn.q_proj.weight"].reshape(heads, dim, -1),
            "attn.k_proj.bias": theirs[hf + "self_attn.k_proj.bias"].reshape(kv, dim),
            "attn.norm.scale": theirs[hf + "input_layernorm.weight"],
            "mlp.router.weight": theirs[hf + "mlp.router.weight"],
            "mlp.gate_up.weight": np.stack([up[:, 0::2], up[:, 1::2]], axis=1),
            "mlp.down.weight": theirs[hf + "mlp.experts.down_proj"].transpose(0, 2, 1),
            "mlp.down.bias": theirs[hf + "mlp.experts.down_proj_bias"],
        }
        for name, expected in pairs.items():
            error = np.linalg.norm(got[ours + name] - expected) / np.linalg.norm(expected)
            # A key bias shifts all of a query's logits but the sink's alike: its gradient is small differences of
            # large terms, so it carries more noise than the others.
            assert error < (2e-3 if "k_proj.bias" in name else 2e-4), (ours + name, error)
    pad = reference.config.pad_token_id  # torch gives the padding token's embedding no gradient
    got["embedding.weight"] = np.where(np.arange(509)[:, None] == pad, 0, got["embedding.weight"])
    for name, theirs_name in {"embedding.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}.items():
        assert np.linalg.norm(got[name] - theirs[theirs_name]) < 2e-4 * np.linalg.norm(theirs[theirs_name]), name


@pytest.mark.long
@pytest.mark.parametrize("path", ["pairs", "ragged"])
@pytest.mark.parametrize("packed", [False, True])
def test_expert_paths_have_the_same_gradients(tmp_path, cfg, prompt, path, packed):
    """Of everything that has one: packed experts have none, and gradients flow through them to the rest."""
    cfg = dataclasses.replace(cfg, num_hidden_layers=2, layer_types=(), param_dtype="mxfp4" if packed else "bfloat16")
    source = write_checkpoint(tmp_path / "source", cfg)
    found = []
    for expert_path in ("scan", path):
        model = create_model_from_checkpoint(source, dataclasses.replace(cfg, expert_path=expert_path))
        found.append(gradients(model, prompt[:1, :15]))
    for (name, want), (_, got) in zip(*map(nnx.to_flat_state, found), strict=True):
        want, got = np.asarray(want.get_value()), np.asarray(got.get_value())
        if "k_proj" in name and "bias" in name:
            continue  # rounding noise, see above
        assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want) + 1e-12, name


@pytest.mark.long
def test_padding_on_the_left_changes_nothing(model, prompt):
    whole = forward(model, prompt[:1, :30])
    padded = jnp.asarray(np.concatenate([np.full((1, 7), 3), prompt[:1, :30]], axis=1), jnp.int32)
    positions = jnp.asarray(np.maximum(np.arange(37) - 7, -1)[None], jnp.int32)
    np.testing.assert_allclose(forward(model, padded, positions)[:, 7:], whole, atol=2e-5)


def test_a_token_outside_the_vocabulary_is_not_somebody_elses_embedding(model):
    embedded = np.asarray(model.embed(jnp.asarray([[1, 509], [-1, -509]], jnp.int32)))
    assert np.isfinite(embedded[0, 0]).all()
    assert np.isnan(embedded[[0, 1, 1], [1, 0, 1]]).all()


def test_a_token_outside_the_vocabulary_makes_its_row_nan(model, prompt):
    tokens = prompt.copy()
    tokens[0, 25] = -1
    logits = np.asarray(forward(model, tokens))
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


@pytest.mark.long
def test_split_merge_and_eval_shape(cfg):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))
    assert all(isinstance(v.get_value(), jax.ShapeDtypeStruct) for _, v in nnx.to_flat_state(state))
    model = Transformer(cfg, rngs=nnx.Rngs(0))
    again = nnx.merge(*nnx.split(model))
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(forward(model, tokens), forward(again, tokens))
    assert nnx.split(model)[0] == graphdef


@pytest.mark.long
def test_a_training_step_lowers_the_loss(cfg, prompt):
    import optax

    model = Transformer(dataclasses.replace(cfg, param_dtype="float32"), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    tokens = jnp.asarray(prompt)

    @nnx.jit
    def step(model, optimizer):
        def loss_of(model):
            logits = model(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0] - 0.05


def test_taps_come_in_the_order_of_the_forward_pass_and_change_nothing(model, prompt):
    seen = []

    def hook(layer, name, value):
        seen.append((layer, name))
        return value

    @nnx.jit
    def watch(model, tokens):
        with tapping(hook):
            return model(tokens)

    np.testing.assert_array_equal(watch(model, prompt), forward(model, prompt))
    layers = [(n, name) for n in range(5) for name in LAYER_TAPS]
    assert seen == [(None, MODEL_TAPS[0]), *layers, *((None, name) for name in MODEL_TAPS[1:])]


def test_a_tap_can_replace_a_value(model, prompt):
    def hook(layer, name, value):
        return jnp.zeros_like(value) if name in ("attn_out", "mlp_out") else value

    @nnx.jit
    def cut(model, tokens):
        with tapping(hook):
            return model(tokens)

    skipped = nnx.jit(lambda model, tokens: model.unembed(model.embed(tokens)))(model, prompt)
    np.testing.assert_allclose(cut(model, prompt), skipped, rtol=1e-6)


def test_use_sharding_annotates_every_parameter(cfg):
    model = nnx.eval_shape(lambda: Transformer(dataclasses.replace(cfg, use_sharding=True), rngs=nnx.Rngs(0)))
    specs = {".".join(map(str, p)): v.get_metadata()["out_sharding"] for p, v in nnx.to_flat_state(nnx.state(model))}
    assert tuple(specs["layers.0.mlp.gate_up.weight"]) == (("expert", "fsdp", "context"), None, "tensor", None)
    assert tuple(specs["embedding.weight"]) == (("expert", "tensor", "fsdp", "context"), None)


def test_the_model_is_readable_in_one_sitting():
    source = Path(modeling.__file__).read_text()
    assert len(source.splitlines()) <= 300
    assert re.findall(r"^class (\w+)", source, re.M) == ["AttentionBlock", "MLPBlock", "TransformerBlock", "Transformer"]


@pytest.mark.parametrize("tokens", [1, 13])
def test_weights_of_the_chosen_experts_sum_to_one(cfg, tokens):
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, 9)), jnp.float32)
    choice = experts.choose(logits, 4)
    weights = experts.weigh(logits, choice)
    np.testing.assert_array_equal(np.sort(choice), np.sort(np.argsort(-np.asarray(logits))[:, :4]))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    chosen = np.take_along_axis(np.asarray(logits, np.float64), np.asarray(choice), -1)
    np.testing.assert_allclose(weights, np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.long
def test_remat_changes_what_is_kept_and_not_what_is_computed(even_checkpoints, even_cfg):
    tokens = jnp.arange(20, dtype=jnp.int32)[None]

    def residuals_and_gradients(remat: str):
        model = create_model_from_checkpoint(
            even_checkpoints["float32"], dataclasses.replace(even_cfg, remat=remat, expert_path="ragged")
        )
        graphdef, state = nnx.split(model)

        def loss(state):
            return nnx.merge(graphdef, state)(tokens).astype(jnp.float32).var()

        forward, backward = jax.vjp(loss, state)
        kept = sum(residual.size for residual in jax.tree.leaves(backward))
        return kept, backward(jnp.ones_like(forward))

    found = {remat: residuals_and_gradients(remat) for remat in ("none", "mlp", "block")}
    none, mlp, block = (found[remat][0] for remat in ("none", "mlp", "block"))
    model = create_model_from_checkpoint(even_checkpoints["float32"], even_cfg)
    parameters = sum(a.size for a in jax.tree.leaves(nnx.state(model)))
    assert none > mlp > block
    assert block - parameters < 0.3 * (none - parameters)
    for remat in ("mlp", "block"):
        for a, b in zip(jax.tree.leaves(found[remat][1]), jax.tree.leaves(found["none"][1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.long
def test_packed_experts_compute_what_their_values_do(checkpoints, prompt):
    """In bfloat16, the weights being the same bits: equal, and not only to noise."""
    a, b = (
        jax.jit(create_model_from_checkpoint(checkpoints[dtype], ModelConfig.tiny()).__call__)(jnp.asarray(prompt))
        for dtype in ("mxfp4", "bfloat16")
    )
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=2**-6 * float(jnp.abs(b).max()))
    assert float(jnp.median(jnp.abs(a - b).astype(jnp.float32))) == 0


@pytest.mark.parametrize(("backward", "share"), [(False, 0.1), (True, 0.125)])
@pytest.mark.parametrize("path", ["scan", "grouped", "pairs", "ragged"])
def test_packed_experts_stay_packed(path, backward, share):
    """One expert's values at a time: all that a pass needs beside the packed bytes is a small share of a layer's values."""
    sizes = {"num_experts": 32, "intermediate_size": 512, "hidden_size": 512, "num_hidden_layers": 1, "layer_types": ()}
    cfg = dataclasses.replace(ModelConfig.tiny(), param_dtype="mxfp4", expert_path=path, **sizes)
    model, router = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))), nnx.PathContains("router")
    graphdef, trained, frozen = nnx.split(model, router, ...)
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    run = lambda trained, frozen, tokens: nnx.merge(graphdef, trained, frozen)(tokens).astype(jnp.float32).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(run) if backward else run).lower(trained, frozen, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < share * 32 * 3 * 512 * 512 * 2


@pytest.mark.parametrize("form", [lambda model: model, scanned])
def test_operations_carry_the_names_of_their_block_and_tap(cfg, form):
    """As profilers show them, and the compiler's messages."""
    graphdef, state = nnx.split(
        form(Transformer(dataclasses.replace(cfg, num_hidden_layers=4, layer_types=()), rngs=nnx.Rngs(0)))
    )
    tokens = jax.ShapeDtypeStruct((1, 24), jnp.int32)
    lowered = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens)).lower(state, tokens)
    scopes = {name.rpartition("/")[0] for name in re.findall(r'loc\("([^"]*)"', lowered.as_text(debug_info=True))}
    there = {part for scope in scopes for part in scope.split("/")}
    assert there >= {"layer", "attn", "mlp", "rope", *MODEL_TAPS, *LAYER_TAPS} - {"layer_out"}  # which computes nothing
    assert all("layer" in scope.split("/") for scope in scopes if {"attn", "mlp"} & set(scope.split("/")))
