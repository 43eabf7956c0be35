"""On a mesh: every array is cut as promised, and the model computes what it does on one device."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from oss_model import InputError, ModelConfig, Transformer, create_model_from_checkpoint, generate, init_cache, sharding
from oss_model.layouts import parameter_name, parameters
from oss_model.lora import add_lora
from oss_model.params import abstract_model
from oss_model.sharding import partition_specs, shardings
from oss_model.synthetic import write_checkpoint

MESHES = [
    {"fsdp": 8},
    {"tensor": 8},
    {"expert": 8},
    {"fsdp": 2, "tensor": 2, "expert": 2},
    {"fsdp": 2, "expert": 4},
    {"tensor": 4, "fsdp": 2},
]
EVEN, ODD = (8, 21), (3, 13)  # batch, length: the first divides, in the second nothing does


def mesh_of(shape: dict[str, int]) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def name_of(shape: dict[str, int]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in shape.items())


def tokens_of(shape: tuple[int, int]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, 512, shape, dtype=np.int32))


# --- the rules, written out by hand -----------------------------------------------------------------------------

BY_HAND = {
    # mesh: name -> spec, of gpt-oss-20b
    (("fsdp", 8),): {
        "embedding.weight": P("fsdp", None),
        "layers.0.attn.q_proj.weight": P("fsdp", None, None),
        "layers.0.attn.k_proj.bias": P("fsdp", None),
        "layers.0.attn.o_proj.weight": P("fsdp", None, None),
        "layers.0.attn.sinks": P("fsdp"),
        "layers.0.mlp.gate_up.weight": P("fsdp", None, None, None),
        "layers.0.mlp.down.bias": P("fsdp", None),
        "norm.scale": P("fsdp"),
    },
    (("fsdp", 4), ("tensor", 8), ("expert", 2)): {
        "lm_head.weight": P(("expert", "tensor", "fsdp"), None),
        "layers.0.attn.q_proj.weight": P(("tensor", "fsdp"), None, None),
        "layers.0.attn.k_proj.weight": P("tensor", None, "fsdp"),  # 8 kv heads are used up by `tensor`
        "layers.0.attn.o_proj.weight": P("fsdp", "tensor", None),
        "layers.0.mlp.gate_up.weight": P(("expert", "fsdp"), None, "tensor", None),
        "layers.0.mlp.down.weight": P(("expert", "fsdp"), None, "tensor"),
        "layers.0.mlp.down.bias": P(("expert", "fsdp"), None),
    },
    (("fsdp", 7), ("tensor", 11), ("expert", 64)): {  # 7 and 11 divide nothing, 64 is more experts than there are
        "embedding.weight": P("expert", None),
        "layers.0.mlp.gate_up.weight": P(None, None, None, None),
        "layers.0.attn.q_proj.weight": P(None, None, None),
    },
}


@pytest.mark.parametrize("mesh", BY_HAND)
def test_the_rules(mesh):
    specs = partition_specs(ModelConfig.gpt_oss_20b(), dict(mesh))
    assert {name: specs[name] for name in BY_HAND[mesh]} == BY_HAND[mesh]


def test_packed_experts_are_cut_between_blocks_or_by_expert():
    """20b has 2880 / 32 = 90 blocks along the inner axis: two devices share them, eight share the experts instead."""
    cfg = dataclasses.replace(ModelConfig.gpt_oss_20b(), param_dtype="mxfp4")
    two, eight = (partition_specs(cfg, {"tensor": size}) for size in (2, 8))
    assert two["layers.0.mlp.gate_up.blocks"] == P(None, None, "tensor", None, None)
    assert two["layers.0.mlp.down.blocks"] == P(None, None, "tensor", None)
    assert eight["layers.0.mlp.gate_up.blocks"] == P("tensor", None, None, None, None)
    assert eight["layers.0.mlp.down.scales"] == P("tensor", None, None)


@pytest.mark.parametrize(
    ("names", "types", "fault"),
    [
        (("data", "fsdp"), (AxisType.Auto,) * 2, "mesh: expected axes named context, expert, fsdp, tensor, found 'data'"),
        (("expert", "fsdp"), (AxisType.Explicit,) * 2, "mesh: expected axes of type Auto, found Explicit; jax.make_mesh("),
    ],
)
def test_a_mesh_that_would_not_work_is_refused(names, types, fault, even_cfg):
    mesh = jax.make_mesh((2, 4), names, axis_types=types)
    with pytest.raises(InputError, match=re.escape(fault)):
        shardings(even_cfg, mesh)
    model = nnx.eval_shape(lambda: Transformer(even_cfg, rngs=nnx.Rngs(0)))
    with jax.set_mesh(mesh), pytest.raises(InputError, match=re.escape(fault)):
        nnx.eval_shape(lambda m: m(jnp.zeros((1, 4), jnp.int32)), model)


# The largest power of two of devices that a mesh is found for: packed experts are cut by experts and two of 90 blocks.
ACCEPTED = {
    ("20b", "bfloat16"): 512,
    ("20b", "float32"): 512,
    ("20b", "mxfp4"): 64,
    ("120b", "bfloat16"): 512,
    ("120b", "float32"): 512,
    ("120b", "mxfp4"): 256,
}


@pytest.mark.parametrize(("model", "dtype"), ACCEPTED)
def test_there_is_a_mesh_for_every_power_of_two(model, dtype):
    """On which no array over 64 MB is on two devices, by arithmetic."""
    cfg = {"20b": ModelConfig.gpt_oss_20b, "120b": ModelConfig.gpt_oss_120b}[model]()
    cfg = dataclasses.replace(cfg, param_dtype=dtype, num_hidden_layers=1, layer_types=())  # the others are as this one
    for devices in (2**n for n in range(10)):
        shape = sharding.suggestion(cfg, devices)
        if devices > ACCEPTED[model, dtype]:
            assert shape is None
            continue
        assert math.prod(shape.values()) == devices
        for name, (sizes, stored) in parameters(cfg).items():
            cut = partition_specs(cfg, shape)[name]
            parts = math.prod(shape[axis] for n in range(len(sizes)) for axis in sharding.mesh_axes(cut, n))
            assert parts == devices or math.prod(sizes) * stored.itemsize <= 64 << 20, (devices, name)


def test_a_mesh_that_would_copy_a_large_array_is_refused_with_one_that_does_not(even_cfg, monkeypatch):
    """On 256 devices each would hold all of 20b."""
    cfg = dataclasses.replace(ModelConfig.gpt_oss_20b(), param_dtype="bfloat16")
    assert sharding.replication_faults(cfg, {"fsdp": 256}) == [
        "mesh: expected each axis to cut every large array, found copies: fsdp=256 cuts no embedding.weight (1.2 GB),"
        " layers.N.mlp.down.weight (530.8 MB), layers.N.mlp.gate_up.weight (1.1 GB), lm_head.weight (1.2 GB);"
        " use expert=4,fsdp=64"
    ]
    packed = dataclasses.replace(cfg, param_dtype="mxfp4")
    (line,) = sharding.replication_faults(packed, {"fsdp": 128})
    assert line.endswith("use no mesh of so many devices")
    assert sharding.replication_faults(cfg, {"expert": 8}) == []
    odd = dataclasses.replace(even_cfg, vocab_size=509)
    shardings(odd, mesh_of({"fsdp": 8}))
    monkeypatch.setattr(sharding, "WHOLE_BYTES", 64 << 10)
    with pytest.raises(InputError, match=r"tensor=8 cuts no embedding.weight \([\d.]+ KB\), .*lm_head"):
        shardings(odd, mesh_of({"tensor": 8}))


# --- loading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MESHES[:4], ids=name_of)
def test_a_checkpoint_goes_straight_onto_the_mesh(shape, even_cfg, even_checkpoints):
    mesh = mesh_of(shape)
    model = create_model_from_checkpoint(even_checkpoints["float32"], even_cfg, mesh)
    expected = shardings(even_cfg, mesh)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert variable.get_value().sharding == expected[parameter_name(path)]
    gate_up = model.layers[0].mlp.gate_up.weight.get_value()
    assert gate_up.addressable_shards[0].data.size == gate_up.size // 8


def test_safetensors_go_onto_the_mesh_too(even_cfg, even_checkpoints):
    source = even_checkpoints["float32"].parent / "source"
    mesh = mesh_of({"fsdp": 2, "tensor": 2, "expert": 2})
    for dtype in ("float32", "mxfp4"):
        cfg = dataclasses.replace(even_cfg, param_dtype=dtype)
        a, b = (nnx.state(create_model_from_checkpoint(path, cfg, mesh)) for path in (source, even_checkpoints[dtype]))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert x.sharding == y.sharding
            assert np.array_equal(x, y)


def test_flaxs_own_idiom_finds_the_same_cuts(even_cfg):
    """`use_sharding` annotates: `nnx.get_abstract_model` then knows where everything goes."""
    mesh = mesh_of({"fsdp": 2, "tensor": 2, "expert": 2})
    cfg = dataclasses.replace(even_cfg, use_sharding=True)
    _, theirs = nnx.get_abstract_model(lambda: Transformer(cfg, rngs=nnx.Rngs(0)), mesh)
    _, ours = abstract_model(even_cfg, mesh)
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    alone = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    _, state = nnx.get_abstract_model(lambda: Transformer(cfg, rngs=nnx.Rngs(0)), alone)
    assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves(state))


@pytest.mark.parametrize("shape", MESHES, ids=name_of)
def test_an_optimizers_moments_lie_where_the_parameters_do(shape, even_cfg, even_checkpoints):
    import optax

    mesh = mesh_of(shape)
    model = create_model_from_checkpoint(even_checkpoints["mxfp4"], dataclasses.replace(even_cfg, use_sharding=True), mesh)
    with jax.set_mesh(mesh):
        optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    moments = [v for v in jax.tree.leaves(nnx.state(optimizer)) if v.ndim]
    for a, b in zip(moments, jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


# --- computing --------------------------------------------------------------------------------------------------


def loss(model: Transformer, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = model(tokens)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    return -picked.mean(), logits


def compiled_step(model: Transformer, tokens: jax.Array):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)  # a packed model's are bfloat16, and so its gradients

    def step(params, rest, tokens):
        def of(params):
            return loss(nnx.merge(graphdef, params, rest), tokens)

        return jax.value_and_grad(of, has_aux=True)(params)

    compiled = jax.jit(step).lower(params, rest, tokens).compile()
    return compiled, lambda: compiled(params, rest, tokens)


def assert_equal_to_noise(ours, theirs):
    """float32 sums in another order: 1e-5 of each array's largest value."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def gathered_expert_weights(hlo: str, cfg: ModelConfig) -> list[tuple[int, ...]]:
    """Results of the all-gathers in compiled HLO that have the axes of expert weights, values or packed."""
    results = re.findall(r"= ([^\n]*?) all-gather(?:-start)?\(", hlo)  # several, where gathers were combined
    found = [tuple(map(int, dims.split(","))) for result in results for dims in re.findall(r"\[([\d,]+)\]", result)]
    counts = (1, 2, 4, 8, cfg.num_experts)
    # [experts, 2, inner, …] or [experts, hidden, inner, …]; the indices of the embedding are [rows, 2, 1]
    return [dims for dims in found if len(dims) >= 3 and dims[0] in counts and dims[1] in (2, cfg.hidden_size) and dims[2] > 1]


@pytest.fixture(scope="module")
def on_one_device(even_cfg, even_checkpoints):
    return {
        dtype: compiled_step(create_model_from_checkpoint(even_checkpoints[dtype], even_cfg), tokens_of(shape))[1]()
        for dtype, shape in (("float32", EVEN), ("mxfp4", ODD))
    }


CASES = [("float32", EVEN, "auto", mesh) for mesh in MESHES[:4]] + [
    ("mxfp4", ODD, "auto", MESHES[3]),
    ("mxfp4", ODD, "ragged", MESHES[4]),
    ("float32", EVEN, "ragged", MESHES[5]),
    ("float32", EVEN, "pairs", MESHES[3]),
]


@pytest.mark.parametrize(("dtype", "shape", "path", "axes"), CASES, ids=lambda v: name_of(v) if isinstance(v, dict) else str(v))
def test_loss_logits_and_gradients_are_those_of_one_device(dtype, shape, path, axes, even_cfg, even_checkpoints, on_one_device):
    """And with expert parallelism no all-gather of expert weights is compiled; cut by `fsdp` alone they are gathered."""
    mesh = mesh_of(axes)
    model = create_model_from_checkpoint(even_checkpoints[dtype], dataclasses.replace(even_cfg, expert_path=path), mesh)
    with jax.set_mesh(mesh):
        compiled, run = compiled_step(model, tokens_of(shape))
        assert_equal_to_noise(run(), on_one_device[dtype])
    gathered = gathered_expert_weights(compiled.as_text(), even_cfg)
    assert bool(gathered) == ("fsdp" in axes and "expert" not in axes), gathered


def test_a_model_that_divides_by_little(cfg, checkpoints):
    """9 experts, 14 heads on 7, 5 blocks of 32: most of it is replicated, and it computes the same."""
    few = dataclasses.replace(cfg, expert_path="scan")
    expected = compiled_step(create_model_from_checkpoint(checkpoints["mxfp4"], few), tokens_of(ODD))[1]()
    mesh = mesh_of({"fsdp": 2, "tensor": 2, "expert": 2})
    model = create_model_from_checkpoint(checkpoints["mxfp4"], few, mesh)
    with jax.set_mesh(mesh):
        assert_equal_to_noise(compiled_step(model, tokens_of(ODD))[1](), expected)


@pytest.mark.long
def test_decoding_on_a_mesh(even_cfg, even_checkpoints):
    mesh, tokens = mesh_of({"fsdp": 2, "tensor": 2, "expert": 2}), tokens_of((4, 20))

    @nnx.jit
    def decode(model, tokens):
        logits, cache = model(tokens[:, :-1], cache=init_cache(even_cfg, 4, 20))
        return logits[:, -1], model(tokens[:, -1:], cache=cache)[0][:, 0]

    expected = decode(create_model_from_checkpoint(even_checkpoints["float32"], even_cfg), tokens)
    model = create_model_from_checkpoint(even_checkpoints["float32"], even_cfg, mesh)
    with jax.set_mesh(mesh):
        assert_equal_to_noise(decode(model, tokens), expected)
        made = generate(model, [[5, 6, 7], [8]], 6)
    assert made == generate(create_model_from_checkpoint(even_checkpoints["float32"], even_cfg), [[5, 6, 7], [8]], 6)


@pytest.mark.long
@pytest.mark.parametrize("count", [16, 2], ids=["whole", "cut within"])
def test_lora_over_packed_experts_on_a_mesh(even_cfg, tmp_path, count):
    """Of two experts on four devices the slices are gathered along `fsdp`, packed bytes and updates alike."""
    even_cfg = dataclasses.replace(even_cfg, num_experts=count, num_experts_per_tok=min(count, 4), intermediate_size=128)
    source = write_checkpoint(tmp_path / "source", even_cfg)
    even_cfg = dataclasses.replace(even_cfg, param_dtype="mxfp4")

    def gradients(mesh):
        model = create_model_from_checkpoint(source, even_cfg, mesh)
        add_lora(model, r".*(_proj|gate_up|down)", rank=4, rngs=nnx.Rngs(2))
        return nnx.grad(lambda m, t: loss(m, t)[0], argnums=nnx.DiffState(0, nnx.LoRAParam)), model

    tokens = tokens_of(EVEN)
    grad, model = gradients(None)
    expected = nnx.jit(grad)(model, tokens)
    mesh = mesh_of({"fsdp": 2, "tensor": 2, "expert": 2})
    grad, model = gradients(mesh)
    cut = (("expert", "fsdp"), None, "tensor", None) if count == 16 else ("expert", None, ("tensor", "fsdp"), None)
    assert model.layers[0].mlp.gate_up.lora.b.get_value().sharding.spec == P(*cut)
    with jax.set_mesh(mesh):
        assert_equal_to_noise(nnx.jit(grad)(model, tokens), expected)
        text = nnx.jit(grad).lower(model, tokens).compile().as_text()
    assert bool(gathered_expert_weights(text, even_cfg)) == (count == 2)
