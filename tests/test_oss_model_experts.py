"""Ways to compute the experts: which one is taken, and that it works without jit, whatever is differentiated."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from oss_model import InputError, MLPBlock, Transformer, add_lora, expert_paths

WRT = {
    "LoRA of the experts": nnx.LoRAParam,
    "router": lambda path, _: path[0] == "router",
    "down.weight": lambda path, _: path == ("down", "weight"),
}
FEW, MANY = 2, 15  # tokens: with 4 experts each, fewer and more than the 9 experts


@pytest.fixture(scope="module")
def block(cfg) -> MLPBlock:
    """With LoRA parameters that do something."""
    model = Transformer(dataclasses.replace(cfg, param_dtype="float32"), rngs=nnx.Rngs(0))
    add_lora(model, r"layers\.0\.mlp\.(gate_up|down)", 3, 6, rngs=nnx.Rngs(1))
    block = model.layers[0].mlp
    for module in (block.gate_up, block.down):
        module.lora.b.set_value(module.lora.b[...] + 0.02)
    return block


def stream(tokens: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((1, tokens, 96), np.float32))


def by(block: MLPBlock, path: str) -> MLPBlock:
    """The same block, its experts computed by this path."""
    block = nnx.merge(*nnx.split(block))
    block.cfg = dataclasses.replace(block.cfg, expert_path=path)
    return block


def squares(block: MLPBlock, x: jax.Array) -> jax.Array:
    return (block(x) ** 2).mean()


@pytest.fixture(scope="module")
def jitted(block) -> dict[int, dict]:
    """Tokens -> every gradient, by path."""
    gradient = nnx.jit(nnx.grad(squares, argnums=nnx.DiffState(0, (nnx.Param, nnx.LoRAParam))))
    return {tokens: dict(nnx.to_flat_state(gradient(block, stream(tokens)))) for tokens in (FEW, MANY)}


@pytest.mark.long
@pytest.mark.parametrize(("wrt", "tokens"), [*((wrt, MANY) for wrt in WRT), ("down.weight", FEW)])
def test_gradients_without_jit_are_those_with_it(block, jitted, wrt, tokens):
    eager = nnx.grad(squares, argnums=nnx.DiffState(0, WRT[wrt]))(block, stream(tokens))
    found = nnx.to_flat_state(eager)
    assert len(found) == {"LoRA of the experts": 4, "router": 2, "down.weight": 1}[wrt]
    for path, got in found:
        want = jitted[tokens][path].get_value()
        assert float(jnp.abs(want).max()) > 0
        np.testing.assert_allclose(got.get_value(), want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.long
@pytest.mark.parametrize(
    ("platform", "tokens", "path"),
    [("cpu", FEW, "grouped"), ("gpu", FEW, "pairs"), ("gpu", MANY, "grouped"), ("tpu", FEW, "pairs"), ("tpu", MANY, "ragged")],
)
def test_auto_goes_by_platform_and_shape_alone(block, monkeypatch, platform, tokens, path):
    """The same in eager code, under jit, and under grad with respect to a part of the parameters."""
    taken: list[str] = []

    def noted(name, compute):
        return lambda *args: taken.append(name) or compute(*args)

    monkeypatch.setattr(expert_paths, "PATHS", {name: noted(name, compute) for name, compute in expert_paths.PATHS.items()})
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = stream(tokens)
    for call in (squares, nnx.jit(squares), nnx.grad(squares, argnums=nnx.DiffState(0, WRT["down.weight"]))):
        call(block, x)
    assert taken == [path] * 3


@pytest.mark.long
def test_without_jit_the_experts_are_traced_once(block, monkeypatch):
    """Otherwise every eager call would compile the loop over experts anew."""
    traces = []
    swiglu = expert_paths.swiglu
    monkeypatch.setattr(expert_paths, "swiglu", lambda *args: traces.append(args) or swiglu(*args))
    for path in ("scan", "grouped", "pairs", "ragged"):
        module, x = by(block, path), stream(13)
        module(x)
        first = len(traces)
        assert first > 0
        module(x + 1)
        assert len(traces) == first, path
        traces.clear()


def test_the_loop_computes_what_the_others_do(block):
    x = stream(MANY)
    np.testing.assert_allclose(by(block, "loop")(x), by(block, "scan")(x), atol=1e-6)


@pytest.mark.parametrize("what", ["jit", *WRT, "stream", "mesh"])
def test_the_loop_over_experts_is_refused_where_values_are_not_at_hand(block, what):
    module, x = by(block, "loop"), stream(MANY)
    if what == "mesh":
        mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
        module.down.bias.set_value(jax.device_put(module.down.bias[...], NamedSharding(mesh, PartitionSpec())))
        call = squares
    elif what == "stream":
        call = nnx.grad(squares, argnums=1)
    else:
        call = nnx.jit(squares) if what == "jit" else nnx.grad(squares, argnums=nnx.DiffState(0, WRT[what]))
    fault = "expert_path: expected values on one device for 'loop', found some that are traced (jit, grad) or on several"
    with pytest.raises(InputError, match=re.escape(fault)) as caught:
        call(module, x)
    assert len(str(caught.value).splitlines()) == 1


def test_on_a_cpu_few_pairs_go_alone_where_experts_are_cheap_to_copy(cfg):
    path = lambda tokens, dtype, packed: expert_paths._path(jnp.zeros((tokens, 96), dtype), packed, cfg)  # noqa: E731
    assert path(2, jnp.bfloat16, False) == path(2, jnp.float32, True) == "pairs"
    assert path(2, jnp.float32, False) == path(3, jnp.bfloat16, False) == "grouped"


@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_one_packed_map_is_as_if_both_were(cfg, which):
    """As where `experts_qat` has made values of the other: its packed experts are dequantized one at a time, too."""
    rng = np.random.default_rng(0)
    cfg = dataclasses.replace(cfg, num_experts=32, num_experts_per_tok=4, expert_path="ragged")
    shapes = {"gate_up": (32, 2, 512, 16, 16), "down": (32, 512, 16, 16)}
    packed = {name: jnp.asarray(rng.integers(0, 256, shape, np.uint8)) for name, shape in shapes.items()}
    maps = {}
    for name, blocks in packed.items():
        scales, bias = jnp.full(blocks.shape[:-1], 118, jnp.uint8), jnp.zeros(blocks.shape[:-2], jnp.float32)
        values = {"weight": expert_paths.dequantize(blocks, scales, jnp.bfloat16), "bias": bias}
        maps[name] = values, {"blocks": blocks, "scales": scales, "bias": bias}
    x = jnp.asarray(rng.standard_normal((16, 512)), jnp.bfloat16)
    choice, weights = jnp.asarray(rng.integers(0, 32, (16, 4)), jnp.int32), jnp.full((16, 4), 0.25, jnp.bfloat16)
    run = jax.jit(expert_paths.add_up, static_argnums=5)
    mixed = [maps[name][name == which] for name in maps]
    want = run(x, choice, weights, *(maps[name][0] for name in maps), cfg)
    np.testing.assert_allclose(run(x, choice, weights, *mixed, cfg), want, atol=2**-6 * float(jnp.abs(want).max()))
    text, one = run.lower(x, choice, weights, *mixed, cfg).as_text(), "x".join(map(str, shapes[which][1:]))
    assert f"tensor<{one}xui32>" in text  # looked up, of one expert
    assert f"tensor<32x{one}xui32>" not in text


@pytest.mark.parametrize("asked", ["auto", "ragged"])
def test_the_kernel_of_tpus_is_for_values(cfg, monkeypatch, asked):
    """It wants those of all experts at once."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    x, cfg = jnp.zeros((64, 96), jnp.bfloat16), dataclasses.replace(cfg, expert_path=asked)
    assert expert_paths._path(x, False, cfg) == "ragged"
    assert expert_paths._path(x, True, cfg) == "grouped"


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("held", [9, 4])
@pytest.mark.parametrize("bias", [0, 30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_groups_are_the_same_sum(cfg, packed, held, bias, dtype):
    """Balanced, and where one expert gets more than its rows; all experts here, and some on other devices."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.1, dtype)  # noqa: E731
    gate_up, down = {"bias": draw(held, 2, 160)}, {"bias": draw(held, 96)}
    if packed:
        for stored, rows in ((gate_up, (held, 2, 160, 3)), (down, (held, 96, 5))):
            stored["blocks"] = jnp.asarray(rng.integers(0, 256, (*rows, 16)), jnp.uint8)
            stored["scales"] = jnp.asarray(rng.integers(118, 124, rows), jnp.uint8)
    else:
        gate_up["weight"], down["weight"] = draw(held, 2, 160, 96), draw(held, 96, 160)
    x, logits = draw(40, 96) * jnp.asarray(10, dtype), rng.standard_normal((40, 9)) + bias * np.eye(9)[0]
    choice = jax.lax.top_k(jnp.asarray(logits, jnp.float32), 4)[1]
    weights = jax.nn.softmax(draw(40, 4)).astype(dtype)
    slope = jnp.asarray(rng.standard_normal((40, 96)), jnp.float32)

    def found(path):
        def of(x, weights, biases):
            stored = ({**a, "bias": b} for a, b in zip((gate_up, down), biases, strict=True))
            return (expert_paths.PATHS[path](x, choice, weights, *stored, cfg) * slope).sum()

        out = expert_paths.PATHS[path](x, choice, weights, gate_up, down, cfg)
        return out, jax.grad(of, argnums=(0, 1, 2))(x, weights, (gate_up["bias"], down["bias"]))

    bound = 2e-6 if dtype == jnp.float32 else 2e-2
    for one, other in zip(jax.tree.leaves(found("scan")), jax.tree.leaves(found("grouped")), strict=True):
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        assert np.abs(one - other).max() <= bound * np.abs(one).max() + 1e-12
