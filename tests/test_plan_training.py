"""The plan of a training: its FLOPs and collectives against what XLA compiles, and what it says of what does not fit."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

from oss_model import ModelConfig, Transformer, cross_entropy
from oss_model.exits import run_click
from oss_model.params import abstract_model
from oss_model.scanned import scanned

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "examples"))

import plan_training as plans
from collectives import collectives


@pytest.fixture(autouse=True)
def as_usual():
    """optax's schedules rely on promotion, which the tests of the model forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


ASKED = ["--size", "tiny", "--topology", "cpu:8", "--mesh", "fsdp=8", "--length", "64"]


def loss_of(model: Transformer):
    graphdef, state = nnx.split(model)
    length = 256  # all logits at once: XLA counts the body of a loop once
    return jax.value_and_grad(lambda state, tokens: cross_entropy(nnx.merge(graphdef, state), tokens, chunk=length)[0]), state


def test_flops_are_those_that_xla_counts():
    """Of two layers, each operation there once: one expert, attention all at once, logits too, nothing recomputed but these."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_experts": 1, "num_experts_per_tok": 1, "vocab_size": 512}
    cfg = dataclasses.replace(
        ModelConfig.tiny(), num_hidden_layers=2, layer_types=(), dtype=jnp.float32, param_dtype="float32", **sizes
    )
    cfg = dataclasses.replace(cfg, attention_block=0, expert_path="ragged")
    step, state = loss_of(nnx.merge(*abstract_model(cfg)))
    tokens = jax.ShapeDtypeStruct((4, 257), jnp.int32)
    analysis = jax.jit(step).lower(state, tokens).compile().cost_analysis()
    assert sum(plans.flops(cfg, 4, 256, dense=True).values()) == pytest.approx(analysis["flops"], rel=0.02)


def test_what_is_seen_is_less_than_all():
    cfg = ModelConfig.gpt_oss_20b()
    seen, dense = (plans.flops(cfg, 1, 4096, dense=dense)["attention"] for dense in (False, True))
    full, window = 4096 * 4097 / 2, 128 * 129 / 2 + (4096 - 128) * 128
    assert seen / dense == pytest.approx((full + window) / 2 / 4096**2)


@pytest.mark.long
def test_collectives_in_a_loop_count_as_often_as_it_runs():
    """The parameters of four layers are gathered as often whether there are four or two turns of a loop over two."""
    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=4, layer_types=(), num_experts=16, dtype=jnp.float32)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    tokens, found = jax.ShapeDtypeStruct((8, 65), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("fsdp"))), []
    for change in (lambda model: model, scanned):
        step, state = loss_of(change(nnx.merge(*abstract_model(cfg, mesh))))
        with jax.set_mesh(mesh):
            sent = collectives(jax.jit(step).lower(state, tokens).compile().as_text())
        found.append(sum(one.nbytes * one.times for one in sent if one.kind == "all-gather" and "16,2,160,96" in one.shape))
    assert found[0] == found[1] == 4 * 16 * 2 * 160 * 96 * 4


def test_a_loop_in_a_loop_counts_times_both_and_one_without_a_noted_count_goes_by_its_condition():
    text = """
%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %collective-permute.1 = f32[2]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %while.2 = (s32[], f32[8]{0}) while(%tuple), condition=%other, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %all-gather.1 = f32[8]{0} all-gather(%x), replica_groups={{0,1}}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[] constant(12)
  ROOT %compare.1 = pred[] compare(%i, %constant.1), direction=LT
}

%all-reduce-scatter.1.clone (p: f32[128]) -> f32[16] {
  %all-reduce.2 = f32[128]{0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[16]{0} dynamic-slice(%all-reduce.2, %n)
}

ENTRY %main (a: f32[4]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%tuple), condition=%condition, body=%body
  %start = (f32[16]{0}, f32[16]{0}) all-reduce-start(%y), to_apply=%add
  %before = f32[64]{0} fusion(%z), kind=kLoop, calls=%other
  %slice = f32[16]{0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1.clone
  %after = (f32[8]{0}, f32[1]{0}) reduce-scatter(%slice, %before), replica_groups=mesh['a'=2,'b'=8] {'b'}, to_apply=%add
  %turned = f32[6]{0} all-to-all(%w), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %done = f32[16]{0} all-reduce-done(%start)
}
"""
    assert [tuple(one) for one in collectives(text)] == [
        ("reduce-scatter", "f32[128]", 512, 1, 8),
        ("collective-permute", "f32[2]", 8, 60, 0),
        ("all-gather", "f32[8]", 32, 12, 2),
        ("reduce-scatter", "f32[16], f32[64]", 256, 1, 8),
        ("all-reduce", "(f32[16], f32[16])", 64, 1, 0),
        ("all-to-all", "f32[6]", 24, 1, 2),
    ]
    assert [one.sent for one in collectives(text)] == [512 * 7 / 8, 480, 12 * 16, 256 * 7 / 8, 128, 12]


def test_memory_is_what_the_compiler_has_laid_out():
    report = "Memory Space: default (color=0)\nTotal bytes: 27080817632 (25.22GiB)\n  cumulative_size;       size;\n"
    assert plans.laid_out(report) == 27080817632
    assert plans.laid_out("Memory Space: vmem (color=1)\nTotal bytes: 12 (12B)\n") == 0
    cost = plans.Cost(30, arguments=10, temporaries=20)
    plan = plans.Plan(plans.ModelConfig.tiny(), "cpu:1", (("fsdp", 1),), 1, 8)
    found = [plans.tell(plan, dataclasses.replace(cost, laid_out=known), None).splitlines()[0] for known in (True, False)]
    assert [line.endswith("as memory_analysis counts, or less") for line in found] == [False, True]


@pytest.mark.long
def test_it_says_what_a_step_takes(capsys):
    assert run_click(plans.main, "plan_training.py", ASKED) == 0
    out = capsys.readouterr().out
    assert "gpt-oss tiny, 5 layers, 8 rows × 64 tokens on cpu:8, mesh fsdp 8" in out
    assert "memory a chip     arguments " in out
    assert "all-gather" in out


@pytest.mark.long
def test_devices_share_a_row_by_context(capsys):
    asked = ["--size", "tiny", "--topology", "cpu:6", "--mesh", "expert=3,context=2", "--length", "64", "--layers", "2"]
    assert run_click(plans.main, "plan_training.py", asked) == 0
    out = capsys.readouterr().out
    assert "3 rows × 64 tokens on cpu:6, mesh expert 3, context 2" in out
    assert "tokens to experts gathered " in out


def test_it_says_what_tokens_take_that_go_to_their_experts():
    """4,096 tokens a device, of which 31 others have each an eighth, and room for a quarter more."""
    cfg = plans.ModelConfig.gpt_oss_20b()
    (line,) = plans.to_experts(plans.Plan(cfg, "", (("expert", 32),), 32, 4096))
    each = 31 * cfg.hidden_size * 2
    assert (
        line == f"tokens to experts sent to their experts {plans.size(640 * each)}, gathered {plans.size(4096 * each)} a layer"
    )
    assert not plans.to_experts(plans.Plan(cfg, "", (("fsdp", 32),), 32, 4096))


def test_what_does_not_fit_exits_1_with_what_would(capsys, monkeypatch):
    """As on a chip that has room for the last of the changes only."""
    asked = []

    def cost(plan):
        asked.append(plan)
        return plans.Cost(used=40 << 30 if plan.lora else 400 << 30)

    monkeypatch.setattr(plans, "cost", cost)
    options = ["--size", "20b", "--topology", "v5p:2x2x2", "--mesh", "fsdp=8", "--batch", "16", "--remat", "none"]
    assert run_click(plans.main, "plan_training.py", options) == 1
    out = capsys.readouterr().out
    said = ["--remat block", "--batch 8", "--param-dtype bfloat16", "--param-dtype mxfp4 --lora '.*(q|k|v|o)_proj'"]
    assert [line.removeprefix("with ") for line in out.splitlines() if line.startswith("with ")] == said
    assert out.count("does not fit") == 4
    assert out.splitlines()[-1].endswith(": fits")
    assert asked[-1].cfg.remat == "block"


def test_too_large_is_read_from_the_compilers_refusal():
    said = (
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 123.50G of 95.74G hbm. Exceeded by 27.8G."
    )
    assert plans._used(RuntimeError(said), 1) == int(123.5 * 2**30)
    said = "Ran out of memory on HBM, the total memory required for HLO temporaries (55.5G) exceeds available HBM (15.75G)."
    assert plans._used(RuntimeError(said), 1) == int(55.5 * 2**30) + 1
    with pytest.raises(RuntimeError, match="another"):
        plans._used(RuntimeError("another"), 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mesh", "fsdp=4"], "--mesh: expected sizes that multiply to 8 devices, found fsdp=4"),
        (["--mesh", "data=8"], "mesh: expected axes named context, expert, fsdp, tensor, found 'data'"),
        (["--topology", "v4:2x2x2"], "--topology: expected cpu:N or one of v5p, v5e, v6e such as v5p:2x2x2, found 'v4:2x2x2'"),
        (["--topology", "cpu:9"], "--topology: expected cpu:N of at most 8 devices, found 'cpu:9'"),
        (["--param-dtype", "mxfp4"], "--param-dtype mxfp4: expected --lora beside it"),
        (["--length", "32769"], "--length: expected at most 32768 (max_position_embeddings), found 32769"),
        (["--lora", "nothing"], "LoRA rule 'nothing': expected to match a linear map, found no match"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, options, said):
    assert run_click(plans.main, "plan_training.py", [*ASKED, *options]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


@pytest.mark.long
def test_low_rank_updates_over_packed_experts(capsys):
    lora = ["--lora", ".*(q|k|v|o)_proj", "--lora", r".*mlp\.(gate_up|down)", "--param-dtype", "mxfp4"]
    assert run_click(plans.main, "plan_training.py", [*ASKED, *lora, "--json"]) == 0
    import json

    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["used"] == found["arguments"] + found["temporaries"] + found["outputs"] - found["donated"]
