"""Tokens go to the devices that have their experts: once to each, all of them, and no more than travel."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_oss_model_sharding import mesh_of, name_of

from oss_model import ModelConfig
from oss_model.expert_parallel import capacity
from oss_model.experts import ExpertLinear, choose, experts, weigh


@pytest.fixture(scope="module")
def routed(even_cfg):
    """Of a config, tokens a device and a preference for the last experts: what to compile, and its arguments."""

    def make(path, rows, length, skew, **sizes):
        cfg = dataclasses.replace(even_cfg, expert_path=path, param_dtype="float32", **sizes)
        gate_up = ExpertLinear(("glu", "inner"), "hidden", cfg, rngs=nnx.Rngs(0))
        down = ExpertLinear(("hidden",), "inner", cfg, rngs=nnx.Rngs(1))
        graphdef, params = nnx.split((gate_up, down))
        rng = np.random.default_rng(0)
        x, slope = (jnp.asarray(rng.standard_normal((rows, length, cfg.hidden_size)), jnp.float32) for _ in range(2))
        logits = rng.standard_normal((rows * length, cfg.num_experts)) + skew * np.arange(cfg.num_experts)

        def of(params, x, logits):
            choice = choose(logits, cfg.num_experts_per_tok)
            out = experts(x, choice, weigh(logits, choice), *nnx.merge(graphdef, params), cfg)
            return (out * slope).sum(), out

        given = params, x, jnp.asarray(logits, jnp.float32)
        return functools.partial(jax.jit, jax.grad(of, argnums=(0, 1, 2), has_aux=True)), given

    return make


@pytest.mark.long
@pytest.mark.parametrize("skew", [0, 3])
@pytest.mark.parametrize(
    ("path", "axes"),
    [
        ("grouped", {"expert": 8}),
        ("ragged", {"expert": 4, "tensor": 2}),
        ("pairs", {"expert": 2, "fsdp": 4}),
        ("scan", {"context": 4, "expert": 2}),
    ],
    ids=lambda v: name_of(v) if isinstance(v, dict) else v,
)
def test_sums_and_gradients_are_those_of_one_device(path, axes, skew, routed):
    """With a router that sends nearly all tokens to the last experts, too, which takes further rounds."""
    compiled, given = routed(path, 8, 24, skew)
    want = compiled()(*given)
    with jax.set_mesh(mesh_of(axes)):
        got = compiled()(*given)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def test_what_travels_is_little_more_than_the_tokens_that_do(routed, even_cfg):
    """512 tokens a device: the rows of the largest buffers, by those that a random routing sends, in both directions."""
    compiled, given = routed("grouped", 8, 512, 0)
    with jax.set_mesh(mesh_of({"expert": 8})):
        text = compiled().lower(*given).compile().as_text()
    choice = np.asarray(choose(given[2], even_cfg.num_experts_per_tok)).reshape(8, 512, -1) // (even_cfg.num_experts // 8)
    rows = (choice[..., None] == np.arange(8)).any(axis=2).sum(axis=(1, 2)).mean()  # a device sends, its own included
    sent = [
        sum(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", result))
        for result in re.findall(r"= (.*?) all-to-all\(", text)
    ]
    assert 1.0 < max(sent) / even_cfg.hidden_size / rows <= 1.3
    gathered = re.findall(rf"= f32\[[\d,]*,{even_cfg.hidden_size}\]\S* (?:all-gather|reduce-scatter)\(", text)
    assert not gathered


@pytest.mark.parametrize(("rows", "length", "travels"), [(8, 8, "tokens"), (8, 256, "weights"), (2, 1024, "context")])
@pytest.mark.parametrize("axes", [{"expert": 2, "fsdp": 4}, {"expert": 2, "context": 4}, {"expert": 2, "fsdp": 2, "tensor": 2}],
                         ids=name_of)  # fmt: skip
def test_within_an_expert_the_smaller_travels(axes, rows, length, travels, routed):
    """Two experts, and four devices for each: their slices are gathered, or the tokens are, whichever has fewer bytes.

    Two rows are cut by `expert` and `context` alone: along `fsdp` each device computes its slice, and none the whole.
    """
    compiled, given = routed("grouped", rows, length, 0, num_experts=2, num_experts_per_tok=1)
    want = compiled()(*given)
    with jax.set_mesh(mesh_of(axes)):
        text, got = compiled().lower(*given).compile().as_text(), compiled()(*given)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", text)
    weights = [dims for dims in gathered if dims.count(",") >= 2 and dims.startswith("1,")]  # [experts here, …]
    assert bool(weights) == (travels == "weights" or travels in axes), gathered


@pytest.mark.parametrize(("devices", "share"), [(2, 1), (4, 0.9), (8, 0.55), (32, 0.16)])  # 1: gathered, which sends no more
def test_where_there_are_few_devices_tokens_are_gathered(devices, share):
    assert share - 0.02 < capacity(4096, ModelConfig.gpt_oss_20b(), devices) / 4096 <= share
