"""The table: round trips through every row, masks written by hand, and what `check` says about a wrong checkpoint."""

import dataclasses
import shutil
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from oss_model import ModelConfig, layouts
from oss_model.layouts import HF_BF16, HF_BF16_MISNAMED, HF_MXFP4, LAYOUTS, OPENAI, Layout

# Sizes: 3 layers, vocab 509, hidden 96, intermediate 160, 14 heads, 7 kv heads, head_dim 24, 9 experts.
CFG = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=3, layer_types=())
SETTINGS = settings(derandomize=True, deadline=None, max_examples=25)
ROWS = [
    pytest.param(layout, row, id=f"{layout.name}-{row.checkpoint}-{row.model}")
    for layout in LAYOUTS.values()
    for row in layout.rows
]
BF16, U8 = layouts.BFLOAT16, layouts.UINT8


def entry_of(layout, row, cfg=CFG) -> layouts.Entry:
    """The entry of `row` in the last layer."""
    names = [e for e in layouts.entries(layout, cfg) if e.model == row.model.format(n=cfg.num_hidden_layers - 1)]
    [entry] = names
    assert entry.checkpoint == row.checkpoint.format(n=cfg.num_hidden_layers - 1, part="{part}")
    return entry


def one(layout, model: str, cfg=CFG) -> layouts.Entry:
    [entry] = [e for e in layouts.entries(layout, cfg) if e.model == model]
    return entry


def random_bits(shape, packed: bool, seed: int = 0) -> np.ndarray:
    """Any bits at all, NaNs and -0.0 too: a layout moves bytes and does no arithmetic."""
    integers = np.random.default_rng(seed).integers(0, 256 if packed else 1 << 16, shape, np.uint8 if packed else np.uint16)
    return integers if packed else integers.view(ml_dtypes.bfloat16)


def assert_same_bytes(one: np.ndarray, other: np.ndarray) -> None:
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert one.tobytes() == other.tobytes()


# --- every row, both ways ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "row"), ROWS)
def test_round_trip_of_every_row(layout, row):
    entry = entry_of(layout, row)
    stored = random_bits(entry.checkpoint_shape, entry.packed)
    parameter = entry.to_model(stored)
    assert parameter.shape == entry.model_shape
    assert_same_bytes(entry.to_checkpoint(parameter), stored)
    parameter = random_bits(entry.model_shape, entry.packed, seed=1)
    stored = entry.to_checkpoint(parameter)
    assert stored.shape == entry.checkpoint_shape
    assert_same_bytes(entry.to_model(stored), parameter)


@pytest.mark.parametrize(("layout", "row"), [p for p in ROWS if p.values[1].pattern.startswith("experts")])
def test_a_run_of_experts_is_that_run_of_the_parameter(layout, row):
    entry = entry_of(layout, row)
    stored = random_bits(entry.checkpoint_shape, entry.packed)
    for run in (slice(0, 1), slice(4, 7), slice(8, 9)):
        assert_same_bytes(entry.to_model(stored[run]), entry.to_model(stored)[run])
        assert_same_bytes(entry.to_checkpoint(entry.to_model(stored)[run]), stored[run])


sizes = st.integers(1, 12)


@SETTINGS
@given(
    vocab=sizes, kv=sizes, queries_per_kv=sizes, half_dim=sizes, experts=sizes,
    hidden=st.integers(1, 4), inner=st.integers(1, 4),
    layers=st.integers(1, 3), name=st.sampled_from(sorted(LAYOUTS)), data=st.data(),
)  # fmt: skip
def test_round_trip_at_any_size(vocab, kv, queries_per_kv, half_dim, experts, hidden, inner, layers, name, data):
    """Sizes of one, and sizes that coincide, too."""
    cfg = ModelConfig(
        vocab_size=vocab, num_key_value_heads=kv, num_attention_heads=kv * queries_per_kv, head_dim=2 * half_dim,
        num_experts=experts, num_experts_per_tok=1, hidden_size=32 * hidden, intermediate_size=32 * inner,
        num_hidden_layers=layers,
    )  # fmt: skip
    entries = layouts.entries(LAYOUTS[name], cfg)
    entry = data.draw(st.sampled_from(entries), label="entry")
    stored = random_bits(entry.checkpoint_shape, entry.packed, seed=vocab)
    assert_same_bytes(entry.to_checkpoint(entry.to_model(stored)), stored)
    assert {e.model: e.model_shape for e in entries} == {
        name: shape
        for name, (shape, _) in layouts.parameters(
            dataclasses.replace(cfg, param_dtype="mxfp4" if LAYOUTS[name].packed else "bfloat16")
        ).items()
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_parts_of_every_tensor_fill_it_without_overlap(layout):
    shapes = layouts.checkpoint_shapes(layout, CFG)
    covered = {name: np.zeros(shape[0], int) for name, shape in shapes.items()}
    for entry in layouts.entries(layout, CFG):
        if entry.spread:
            axis = entry.order.index(entry.spread)
            assert len(entry.tensors) == entry.axes[entry.spread]
            for name in entry.tensors:
                assert shapes[name] == tuple(np.delete(entry.checkpoint_shape, axis))
                covered[name] += 1
            continue
        assert entry.checkpoint_shape[1:] == shapes[entry.checkpoint][1:]
        covered[entry.checkpoint][entry.rows] += 1
    for name, count in covered.items():
        assert (count == 1).all(), name


def test_all_layouts_fill_the_same_model():
    floating = {e.model: e.model_shape for e in layouts.entries(HF_BF16, CFG)}
    assert {e.model: e.model_shape for e in layouts.entries(HF_BF16_MISNAMED, CFG)} == floating
    packed = {e.model: e.model_shape for e in layouts.entries(HF_MXFP4, CFG)}
    assert {e.model: e.model_shape for e in layouts.entries(OPENAI, CFG)} == packed
    stems = {name.removesuffix(".blocks").removesuffix(".scales") for name in packed}
    assert {name.removesuffix(".weight") if ("gate_up" in name or "down" in name) else name for name in floating} == stems
    assert all(row.before == () for layout in (HF_BF16, HF_MXFP4) for row in layout.rows)


# --- masks by hand ----------------------------------------------------------------------------------------------

# Five of everything small: 2 kv heads, 4 query heads, head_dim 6, 3 experts, hidden 64, intermediate 32.
HAND = ModelConfig(
    vocab_size=5, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, num_experts=3, num_experts_per_tok=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (HF_MXFP4, "model.layers.0.mlp.experts.gate_up_proj_"),
        (OPENAI, "block.0.mlp.mlp1_weight."),
    ],
    ids=["hf", "openai"],
)
def test_gate_and_up_are_taken_apart_on_packed_bytes(layout, name):
    """Row r of an expert, of 2 x 32: even rows are the gate's, odd rows the up projection's."""
    expert, row, group, byte = np.ogrid[:3, :64, :2, :16]
    entry = one(layout, "layers.0.mlp.gate_up.blocks", HAND)
    assert entry.checkpoint == name + "blocks"
    model = entry.to_model((row + 0 * (expert + group + byte)).astype(np.uint8))
    assert model.shape == (3, 2, 32, 2, 16)
    assert (model[:, 0] == np.arange(0, 64, 2)[None, :, None, None]).all()
    assert (model[:, 1] == np.arange(1, 64, 2)[None, :, None, None]).all()
    # The other axes stay where they were.
    for axis, mask, shape in ((0, expert, (3, 1, 1, 1, 1)), (3, group, (1, 1, 1, 2, 1)), (4, byte, (1, 1, 1, 1, 16))):
        moved = entry.to_model((mask + 0 * (expert + row + group + byte)).astype(np.uint8))
        assert (moved == np.arange(moved.shape[axis], dtype=np.uint8).reshape(shape)).all()
    scales = one(layout, "layers.0.mlp.gate_up.scales", HAND)
    assert scales.checkpoint == name + "scales"
    split = scales.to_model(np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (3, 64, 2)))
    assert split[1, 0, :, 1].tolist() == list(range(0, 64, 2))
    assert split[2, 1, :, 0].tolist() == list(range(1, 64, 2))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gate_and_up_biases_are_interleaved_in_every_layout(layout):
    entry = one(layout, "layers.0.mlp.gate_up.bias", HAND)
    stored = (np.arange(3)[:, None] * 100 + np.arange(64)[None]).astype(np.float32)
    if entry.spread == "glu":  # tensors of their own: nothing is interleaved
        stored = np.stack([stored[:, ::2], stored[:, 1::2]], 1)
    assert entry.to_model(stored)[2, 0].tolist() == list(range(200, 264, 2))
    assert entry.to_model(stored)[1, 1].tolist() == list(range(101, 164, 2))


def test_fused_qkv_is_split_by_rows():
    """4 heads x 6 rows of q, then 2 x 6 of k, then 2 x 6 of v."""
    parts = {name: one(OPENAI, f"layers.0.attn.{name}_proj.weight", HAND) for name in "qkv"}
    assert {entry.checkpoint for entry in parts.values()} == {"block.0.attn.qkv.weight"}
    assert {name: entry.rows for name, entry in parts.items()} == {"q": slice(0, 24), "k": slice(24, 36), "v": slice(36, 48)}
    assert layouts.checkpoint_shapes(OPENAI, HAND)["block.0.attn.qkv.weight"] == (48, 64)
    assert layouts.checkpoint_shapes(OPENAI, HAND)["block.0.attn.qkv.bias"] == (48,)
    fused = np.broadcast_to(np.arange(48)[:, None], (48, 64))
    rows = {name: entry.to_model(fused[entry.rows])[..., 63].tolist() for name, entry in parts.items()}
    assert rows["q"] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10, 11],
        [12, 13, 14, 15, 16, 17],
        [18, 19, 20, 21, 22, 23],
    ]
    assert rows["k"] == [[24, 25, 26, 27, 28, 29], [30, 31, 32, 33, 34, 35]]
    assert rows["v"] == [[36, 37, 38, 39, 40, 41], [42, 43, 44, 45, 46, 47]]
    for name, rows in (("q", slice(0, 24)), ("k", slice(24, 36)), ("v", slice(36, 48))):
        assert one(OPENAI, f"layers.0.attn.{name}_proj.bias", HAND).rows == rows


def test_published_qkv_rows():
    cfg = ModelConfig.gpt_oss_20b()
    rows = {name: one(OPENAI, f"layers.23.attn.{name}_proj.weight", cfg).rows for name in "qkv"}
    assert rows == {"q": slice(0, 4096), "k": slice(4096, 4608), "v": slice(4608, 5120)}


@pytest.mark.parametrize(("layout", "suffix"), [(HF_BF16, ""), (HF_BF16_MISNAMED, "_blocks")], ids=["hf-bf16", "misnamed"])
def test_bf16_experts_are_transposed_back(layout, suffix):
    """Stored for x @ W: [experts, in, out], with gate and up in turn along `out`."""
    entry = one(layout, "layers.0.mlp.gate_up.weight", HAND)
    assert entry.checkpoint == f"model.layers.0.mlp.experts.gate_up_proj{suffix}"
    stored = 10_000 * np.arange(3)[:, None, None] + 100 * np.arange(64)[None, :, None] + np.arange(64)[None, None]
    model = entry.to_model(stored)
    assert model.shape == (3, 2, 32, 64)
    assert model[2, 0, 5, 7] == 20_000 + 100 * 7 + 10  # gate 5 is column 10
    assert model[1, 1, 5, 7] == 10_000 + 100 * 7 + 11
    entry = one(layout, "layers.0.mlp.down.weight", HAND)
    assert entry.checkpoint == f"model.layers.0.mlp.experts.down_proj{suffix}"
    stored = 10_000 * np.arange(3)[:, None, None] + 100 * np.arange(32)[None, :, None] + np.arange(64)[None, None]
    model = entry.to_model(stored)
    assert model.shape == (3, 64, 32)
    assert model[2, 9, 31] == 20_000 + 3100 + 9


def test_a_square_down_projection_is_transposed_too():
    """H = I in the published models: the orientation comes from the layout, never from the shape."""
    square = dataclasses.replace(HAND, intermediate_size=64)
    stored = np.random.default_rng(0).standard_normal((3, 64, 64))
    name = "layers.0.mlp.down.weight"
    np.testing.assert_array_equal(one(HF_BF16, name, square).to_model(stored), stored.transpose(0, 2, 1))
    blocks = random_bits((3, 64, 2, 16), packed=True)
    for layout in (HF_MXFP4, OPENAI):
        np.testing.assert_array_equal(one(layout, "layers.0.mlp.down.blocks", square).to_model(blocks), blocks)


def test_output_projection_keeps_its_rows():
    stored = np.broadcast_to(np.arange(24)[None], (64, 24))
    for layout in LAYOUTS.values():
        model = one(layout, "layers.0.attn.o_proj.weight", HAND).to_model(stored)
        assert model.shape == (64, 4, 6)
        assert model[3].tolist() == [
            [0, 1, 2, 3, 4, 5],
            [6, 7, 8, 9, 10, 11],
            [12, 13, 14, 15, 16, 17],
            [18, 19, 20, 21, 22, 23],
        ]


# --- names and shapes by hand -----------------------------------------------------------------------------------

# The promise of the checkpoint on disk. Letters: v vocab 509, h hidden 96, i intermediate 160.
LAYER = {
    "attn.norm.scale": (96,),
    "attn.sinks": (14,),
    "attn.q_proj.weight": (14, 24, 96),
    "attn.q_proj.bias": (14, 24),
    "attn.k_proj.weight": (7, 24, 96),
    "attn.k_proj.bias": (7, 24),
    "attn.v_proj.weight": (7, 24, 96),
    "attn.v_proj.bias": (7, 24),
    "attn.o_proj.weight": (96, 14, 24),
    "attn.o_proj.bias": (96,),
    "mlp.norm.scale": (96,),
    "mlp.router.weight": (9, 96),
    "mlp.router.bias": (9,),
    "mlp.gate_up.bias": (9, 2, 160),
    "mlp.down.bias": (9, 96),
}
FLOATING_EXPERTS = {"mlp.gate_up.weight": (9, 2, 160, 96), "mlp.down.weight": (9, 96, 160)}
PACKED_EXPERTS = {
    "mlp.gate_up.blocks": (9, 2, 160, 3, 16),
    "mlp.gate_up.scales": (9, 2, 160, 3),
    "mlp.down.blocks": (9, 96, 5, 16),
    "mlp.down.scales": (9, 96, 5),
}
OUTSIDE = {"embedding.weight": (509, 96), "norm.scale": (96,), "lm_head.weight": (509, 96)}
TREES = {
    "bfloat16": OUTSIDE | {f"layers.{n}.{name}": s for n in range(2) for name, s in (LAYER | FLOATING_EXPERTS).items()},
    "float32": OUTSIDE | {f"layers.{n}.{name}": s for n in range(2) for name, s in (LAYER | FLOATING_EXPERTS).items()},
    "mxfp4": OUTSIDE | {f"layers.{n}.{name}": s for n in range(2) for name, s in (LAYER | PACKED_EXPERTS).items()},
}


@pytest.mark.parametrize("param_dtype", TREES)
def test_the_tree_on_disk(param_dtype):
    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=2, layer_types=(), param_dtype=param_dtype)
    floating = np.dtype("float32") if param_dtype == "float32" else BF16
    expected = {
        name: (shape, U8 if name.endswith((".blocks", ".scales")) else floating) for name, shape in TREES[param_dtype].items()
    }
    assert layouts.parameters(cfg) == expected


@pytest.mark.parametrize("param_dtype", TREES)
def test_the_tree_is_the_state_of_the_transformer(param_dtype):
    from flax import nnx

    from oss_model import Transformer

    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=2, layer_types=(), param_dtype=param_dtype)
    state = nnx.state(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))
    found = {
        ".".join(map(str, path)): (variable.get_value().shape, variable.get_value().dtype)
        for path, variable in nnx.to_flat_state(state)
    }
    assert found == layouts.parameters(cfg)


def test_every_axis_of_every_parameter_has_its_name():
    for param_dtype in TREES:
        cfg = dataclasses.replace(CFG, param_dtype=param_dtype)
        axes = layouts.parameter_axes(cfg)
        assert list(axes) == list(layouts.parameters(cfg))
        for name, (shape, _) in layouts.parameters(cfg).items():
            assert tuple(cfg.axes[axis] for axis in axes[name]) == shape
    assert layouts.parameter_axes(CFG)["layers.1.attn.o_proj.weight"] == ("hidden", "heads", "dim")
    assert layouts.parameter_axes(CFG)["layers.1.mlp.gate_up.weight"] == ("experts", "glu", "inner", "hidden")


# The names and shapes of the published files, one layer of 20b.
HF_LAYER = {
    "input_layernorm.weight": (2880,),
    "self_attn.q_proj.weight": (4096, 2880),
    "self_attn.q_proj.bias": (4096,),
    "self_attn.k_proj.weight": (512, 2880),
    "self_attn.k_proj.bias": (512,),
    "self_attn.v_proj.weight": (512, 2880),
    "self_attn.v_proj.bias": (512,),
    "self_attn.o_proj.weight": (2880, 4096),
    "self_attn.o_proj.bias": (2880,),
    "self_attn.sinks": (64,),
    "post_attention_layernorm.weight": (2880,),
    "mlp.router.weight": (32, 2880),
    "mlp.router.bias": (32,),
    "mlp.experts.gate_up_proj_bias": (32, 5760),
    "mlp.experts.down_proj_bias": (32, 2880),
}
HF_OUTSIDE = {"model.embed_tokens.weight": (201088, 2880), "lm_head.weight": (201088, 2880), "model.norm.weight": (2880,)}
OPENAI_LAYER = {
    "attn.norm.scale": (2880,),
    "attn.qkv.weight": (5120, 2880),
    "attn.qkv.bias": (5120,),
    "attn.out.weight": (2880, 4096),
    "attn.out.bias": (2880,),
    "attn.sinks": (64,),
    "mlp.norm.scale": (2880,),
    "mlp.gate.weight": (32, 2880),
    "mlp.gate.bias": (32,),
    "mlp.mlp1_weight.blocks": (32, 5760, 90, 16),
    "mlp.mlp1_weight.scales": (32, 5760, 90),
    "mlp.mlp1_bias": (32, 5760),
    "mlp.mlp2_weight.blocks": (32, 2880, 90, 16),
    "mlp.mlp2_weight.scales": (32, 2880, 90),
    "mlp.mlp2_bias": (32, 2880),
}
PUBLISHED = {
    "hf": HF_OUTSIDE
    | {
        f"model.layers.{n}.{name}": shape
        for n in range(24)
        for name, shape in (
            HF_LAYER
            | {
                "mlp.experts.gate_up_proj_blocks": (32, 5760, 90, 16),
                "mlp.experts.gate_up_proj_scales": (32, 5760, 90),
                "mlp.experts.down_proj_blocks": (32, 2880, 90, 16),
                "mlp.experts.down_proj_scales": (32, 2880, 90),
            }
        ).items()
    },
    "hf-bf16": HF_OUTSIDE
    | {
        f"model.layers.{n}.{name}": shape
        for n in range(24)
        for name, shape in (
            HF_LAYER | {"mlp.experts.gate_up_proj": (32, 2880, 5760), "mlp.experts.down_proj": (32, 2880, 2880)}
        ).items()
    },
    "openai": {"embedding.weight": (201088, 2880), "norm.scale": (2880,), "unembedding.weight": (201088, 2880)}
    | {f"block.{n}.{name}": shape for n in range(24) for name, shape in OPENAI_LAYER.items()},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_the_published_20b(name):
    assert layouts.checkpoint_shapes(LAYOUTS[name], ModelConfig.gpt_oss_20b()) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("layout", "in_20b", "in_120b"),
    [(HF_MXFP4, 459, 687), (HF_BF16, 411, 615), (OPENAI, 363, 543)],
    ids=["hf", "hf-bf16", "openai"],
)
def test_tensor_counts_of_the_published_models(layout, in_20b, in_120b):
    assert len(layouts.checkpoint_shapes(layout, ModelConfig.gpt_oss_20b())) == in_20b
    assert len(layouts.checkpoint_shapes(layout, ModelConfig.gpt_oss_120b())) == in_120b


def test_parameter_counts_of_the_tree():
    for preset, floating, packed in (("gpt_oss_20b", 411, 459), ("gpt_oss_120b", 615, 687)):
        cfg = getattr(ModelConfig, preset)()
        assert len(layouts.parameters(cfg)) == floating
        assert len(layouts.parameters(dataclasses.replace(cfg, param_dtype="mxfp4"))) == packed


# --- recognising ------------------------------------------------------------------------------------------------


def signature(layout, cfg=CFG) -> dict[str, tuple[tuple[int, ...], str]]:
    """What a right checkpoint has."""
    packed = {e.checkpoint for e in layouts.entries(layout, cfg) if e.packed}
    return {name: (shape, "U8" if name in packed else "BF16") for name, shape in layouts.checkpoint_shapes(layout, cfg).items()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_each_layout_is_recognised_and_faultless(layout):
    tensors = signature(layout)
    assert layouts.recognise(tensors) is layout
    assert layouts.recognise(dict(reversed(tensors.items()))) is layout
    assert layouts.check(tensors, layout, CFG, "here") == []
    in_float32 = {name: (shape, "F32" if dtype == "BF16" else dtype) for name, (shape, dtype) in tensors.items()}
    assert layouts.check(in_float32, layout, CFG, "here") == []


def test_square_experts_are_recognised_all_the_same():
    cfg = dataclasses.replace(CFG, hidden_size=160)
    for layout in LAYOUTS.values():
        assert layouts.recognise(signature(layout, cfg)) is layout


def test_misnamed_is_told_by_dtype_and_rank_not_by_name():
    misnamed = signature(HF_BF16_MISNAMED)
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    assert misnamed[name] == ((9, 160, 96), "BF16")
    assert layouts.recognise(misnamed | {name: ((9, 96, 5, 16), "U8")}) is HF_MXFP4
    scales = {"model.layers.0.mlp.experts.down_proj_scales": ((9, 96, 5), "U8")}
    assert layouts.recognise(misnamed | scales) is HF_MXFP4


@pytest.mark.parametrize("tensors", [{}, {"wte.weight": ((5, 3), "F32")}, {"blocks.0.weight": ((1,), "BF16")}])
def test_what_is_no_gpt_oss(tensors):
    assert layouts.recognise(tensors) is None


def test_text_about_what_is_no_gpt_oss():
    fault = "here: expected the tensors of a gpt-oss checkpoint, found {}; is this another model?"
    assert layouts.not_a_checkpoint("here", ["d", "b", "c", "a"]).faults == [fault.format("a, b, c")]
    assert layouts.not_a_checkpoint("here", []).faults == [fault.format("none")]


def assert_same_parameters(first: Path, second: Path, layout: Layout):
    from oss_model.shards import Checkpoint

    written, right = Checkpoint(first), Checkpoint(second)
    with written.shards, right.shards:
        assert (written.layout, right.layout) == (layout, HF_BF16)
        assert written.cfg == right.cfg
        for entry in written.entries():
            same = one(HF_BF16, entry.model, right.cfg)
            assert_same_bytes(entry.to_model(written.read(entry)), same.to_model(right.read(same)))


def test_what_transformers_writes_after_a_dequantized_load(sources, tmp_path):
    """transformers 5.24 writes it under the right names again; 5.5.2 to 5.23 under those of packed experts."""
    import torch
    from transformers import GptOssForCausalLM, Mxfp4Config

    model = GptOssForCausalLM.from_pretrained(
        sources["hf"], quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    right = Version(version("transformers")) >= Version("5.24")
    assert_same_parameters(tmp_path, sources["hf-bf16"], HF_BF16 if right else HF_BF16_MISNAMED)


def test_bfloat16_experts_under_the_names_of_packed_ones(sources, cfg, tmp_path):
    """As transformers 5.5.2 to 5.23 wrote them, and published fine-tunes have them: the values are right."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(sources["hf-bf16"] / "model.safetensors")
    experts = ("experts.gate_up_proj", "experts.down_proj")
    wrong = {f"{name}_blocks" if name.endswith(experts) else name: value for name, value in tensors.items()}
    assert len(wrong.keys() - tensors.keys()) == 2 * cfg.num_hidden_layers
    save_file(wrong, tmp_path / "model.safetensors")
    shutil.copy(sources["hf-bf16"] / "config.json", tmp_path)
    assert_same_parameters(tmp_path, sources["hf-bf16"], HF_BF16_MISNAMED)


# --- checking ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_kind_of_fault_in_one_list(layout):
    tensors = signature(layout)
    names = list(tensors)
    lost, reshaped, retyped, both = names[3], names[5], names[7], names[-1]
    assert {tensors[name][1] for name in (reshaped, retyped, both)} == {"BF16"}
    shape, reshape, both_shape = (list(tensors[name][0]) for name in (reshaped, reshaped, both))
    del tensors[lost]
    tensors[reshaped] = ((*reshape, 1), "BF16")
    tensors[retyped] = (tensors[retyped][0], "F16")
    tensors[both] = ((2,), "U8")
    tensors["model.layers.3.self_attn.sinks"] = ((14,), "BF16")
    assert layouts.check(tensors, layout, CFG, "here") == [
        f"here: {lost}: missing; {layout.title} needs it",
        f"here: {reshaped}: expected shape {shape} by config.json, found {[*shape, 1]}",
        f"here: {retyped}: expected dtype BF16 or F32, found F16",
        f"here: {both}: expected dtype BF16 or F32, found U8",
        f"here: {both}: expected shape {both_shape} by config.json, found [2]",
        f"here: model.layers.3.self_attn.sinks: unexpected; config.json and the layout ({layout.title}) have no such tensor",
    ]


def test_packed_tensors_must_be_bytes():
    tensors = signature(HF_MXFP4)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = (tensors[name][0], "I8")
    assert layouts.check(tensors, HF_MXFP4, CFG, "here") == [f"here: {name}: expected dtype U8, found I8"]


@pytest.mark.parametrize("layout", [HF_BF16, HF_BF16_MISNAMED], ids=lambda layout: layout.name)
def test_experts_in_the_other_orientation_are_refused(layout):
    """Told by the shape here, where H is not I."""
    tensors = signature(layout)
    name = next(name for name in tensors if ".down_proj" in name and not name.endswith("bias"))
    tensors[name] = ((9, 96, 160), "BF16")
    assert layouts.check(tensors, layout, CFG, "d") == [
        f"d: {name}: expected shape [9, 160, 96] by config.json, found [9, 96, 160]"
    ]


@pytest.mark.parametrize("layout", [HF_MXFP4, OPENAI], ids=["hf", "openai"])
def test_mxfp4_needs_whole_blocks(layout):
    """Otherwise [.., hidden // 32, 16] would fit, and hold fewer values than hidden."""
    cfg = dataclasses.replace(CFG, hidden_size=100, intermediate_size=161)
    assert layouts.check(signature(layout, cfg), layout, cfg, "here") == [
        "here: hidden_size: expected a multiple of 32, the MXFP4 block, found 100",
        "here: intermediate_size: expected a multiple of 32, the MXFP4 block, found 161",
    ]
    assert layouts.check(signature(HF_BF16, cfg), HF_BF16, cfg, "here") == []


FIELDS = {
    "vocab_size": 510, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 21,
    "num_key_value_heads": 2, "head_dim": 22, "num_experts": 10,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("field", FIELDS)
def test_a_config_that_contradicts_the_tensors(layout, field):
    cfg = dataclasses.replace(CFG, layer_types=(), **{field: FIELDS[field]})
    faults = layouts.check(signature(layout), layout, cfg, "here")
    assert faults
    spread = field == "num_experts" and any(row.spread == "experts" for row in layout.rows)
    what = ("missing",) if field == "num_hidden_layers" else ("expected shape", "missing") if spread else ("expected shape",)
    assert all(any(f": {one}" in fault for one in what) for fault in faults)
