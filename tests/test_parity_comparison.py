"""Healthy runs pass, differing bytes are named, and reports say what the JSON promises."""

import dataclasses
import json
import shutil
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flax import nnx
from safetensors.torch import load_file, save_file

from converter import convert
from oss_model import (
    Transformer,
    attention,
    create_model_from_checkpoint,
    expert_paths,
    layers,
    mxfp4,
)
from oss_model.synthetic import write_checkpoint
from oss_model.taps import LAYER_TAPS, tapping
from parity import compare, metrics, walk
from parity.arms import Arms
from parity.candidate import Candidate
from parity.cli import main
from parity.prompts import random_prompt
from parity.reference import Reference
from parity.reports import html, junit
from parity.reports.report import Report


@pytest.fixture(scope="module")
def report(sources, checkpoints):
    return compare(sources["hf"], checkpoints["bfloat16"], layers=True)


# --- healthy runs -----------------------------------------------------------------------------------------------


def test_a_right_checkpoint_passes(report):
    assert (report.verdict, report.exit_code, report.first_divergence) == ("pass", 0, None)
    assert len(report.weights) == 88
    found = [(tap.layer, tap.tap) for tap in report.taps]
    layers = [(n, name) for n in range(5) for name in LAYER_TAPS]
    assert found == [(None, "rope"), (None, "embedding"), *layers, (None, "final_norm"), (None, "logits")]
    assert max(tap.worst_token_rel_l2 for tap in report.taps if tap.tap != "rope") < 4e-6
    assert report.free_run["top1"] == 1.0


@pytest.mark.parametrize("layout", ["hf", "hf-bf16", "openai"])
@pytest.mark.parametrize("dtype", ["float32", "mxfp4"])
def test_every_layout_and_stored_dtype_passes(sources, checkpoints, layout, dtype):
    if (layout, dtype) == ("hf-bf16", "mxfp4"):
        report = compare(sources[layout], checkpoints["bfloat16"], layers=True)
    else:
        report = compare(sources[layout], checkpoints[dtype], layers=True)
    assert report.verdict == "pass"
    assert len(report.weights) == (98 if (dtype, layout) in {("mxfp4", "hf"), ("mxfp4", "openai")} else 88)


@pytest.mark.long
def test_another_seed_of_weights_and_prompt_passes(tmp_path, cfg):
    """Different sizes too: layers that do not come in pairs, a vocabulary and window of its own."""
    other = dataclasses.replace(cfg, num_hidden_layers=3, layer_types=(), vocab_size=301, sliding_window=7)
    convert(write_checkpoint(tmp_path / "source", other, seed=7), tmp_path / "checkpoint")
    assert compare(tmp_path / "source", tmp_path / "checkpoint", seed=3).verdict == "pass"


def test_one_layer_at_a_time_is_bitwise_the_whole_reference(sources, prompt):
    from transformers import GptOssForCausalLM

    whole = GptOssForCausalLM.from_pretrained(
        sources["hf"], dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    reference = Reference(sources["hf"])
    x = reference.embed(prompt, np.float32)
    with torch.no_grad():
        want = whole(torch.from_numpy(prompt).long(), output_hidden_states=True)
    for n in range(5):
        np.testing.assert_array_equal(x, want.hidden_states[n])
        x = reference.layer(n).run(x)["layer_out"]
    last = reference.unembed(x)
    np.testing.assert_array_equal(last["final_norm"], want.hidden_states[5])
    np.testing.assert_allclose(last["logits"], want.logits, atol=1e-5)


@pytest.mark.long
def test_candidate_layers_are_the_model_people_train_with(checkpoints, cfg, prompt):
    """Block by block as the harness runs them, against `model(tokens)`: the same taps."""
    candidate = Candidate(checkpoints["bfloat16"])
    x = candidate.embed(prompt, np.float32)
    found = {}
    for n in range(5):
        taps = candidate.layer(n).run(x)
        found |= {(n, name): value for name, value in taps.items()}
        x = taps["layer_out"]

    @nnx.jit
    def watch(model: Transformer, tokens):
        taps = {}

        def hook(layer, name, value):
            taps[f"{layer} {name}"] = value
            return value

        with tapping(hook):
            model(tokens)
        return taps

    seen = watch(create_model_from_checkpoint(checkpoints["bfloat16"], cfg), prompt)
    for (n, name), value in found.items():
        shape = (*prompt.shape, -1)
        error = metrics.token_rel_l2(value.reshape(shape), np.asarray(seen[f"{n} {name}"]).reshape(shape)).max()
        assert error < 2e-5, (n, name, error)  # noise of five layers, sums in another order


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "mxfp4"])
def test_a_layer_at_a_time_is_bitwise_the_model_in_memory(monkeypatch, sources, checkpoints, dtype):
    """The same verdict and numbers, to the last bit, with every parameter of both sides in memory at once."""
    lazily = Candidate(checkpoints[dtype], memory=1)
    assert not lazily.fits
    apart = compare(sources["hf"], lazily, dtype="bfloat16", decode=True)
    candidate, reference = Candidate(checkpoints[dtype], expert_path="loop"), Reference(sources["hf"])
    assert candidate.fits
    together = [reference.layer(n) for n in range(5)]
    monkeypatch.setattr(reference, "layer", lambda n: together[n])
    whole = compare(reference, candidate, dtype="bfloat16", decode=True)
    apart.seconds = whole.seconds = apart.peak_rss_bytes = whole.peak_rss_bytes = 0
    whole.source = str(reference.source)
    assert json.loads(whole.to_json()) == json.loads(apart.to_json())


@pytest.mark.long
def test_compiled_layers_and_every_expert_path_pass(sources, checkpoints):
    for options in (
        {"compiled": True},
        {"expert_path": "scan"},
        {"expert_path": "grouped"},
        {"expert_path": "pairs"},
        {"expert_path": "ragged"},
    ):
        report = compare(sources["hf"], Candidate(checkpoints["bfloat16"], **options))
        assert report.verdict == "pass", options
        assert max(tap.worst_token_rel_l2 for tap in report.taps if tap.tap != "rope") < 4e-6


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_forced_inputs_keep_an_error_where_it_is_made(sources, checkpoints, prompt, side):
    """Both sides alike: fed its own taps a layer gives them back, and a forced q changes what is computed from it only."""
    made = Reference(sources["hf"]) if side == "reference" else Candidate(checkpoints["bfloat16"])
    layer = made.layer(1)
    x = made.embed(prompt, np.float32)
    free = layer.run(x)
    again = layer.run(x, free)
    for name in LAYER_TAPS:
        np.testing.assert_allclose(again[name], free[name], atol=1e-6, err_msg=name)
    changed = layer.run(x, free | {"q": free["q"] + 1})
    wrong = [name for name in LAYER_TAPS if not np.allclose(changed[name], free[name], atol=1e-6)]
    assert wrong == ["q_rope"]


def test_the_reference_routes_by_its_own_code_on_forced_logits(sources, prompt):
    layer = Reference(sources["hf"]).layer(0)
    x = Reference(sources["hf"]).embed(prompt, np.float32)
    free = layer.run(x)
    logits = free["router_logits"][:, ::-1].copy()
    forced = layer.run(x, {"router_logits": logits})
    np.testing.assert_array_equal(forced["expert_choice"], np.argsort(-logits, axis=-1)[:, :4])
    chosen = np.take_along_axis(logits, forced["expert_choice"], -1).astype(np.float64)
    np.testing.assert_allclose(forced["expert_weights"], np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True), rtol=1e-5)
    other = np.tile(np.array([8, 6, 4, 2]), (len(logits), 1))
    replayed = layer.run(x, {"expert_choice": other})
    chosen = np.take_along_axis(free["router_logits"], np.sort(other), -1).astype(np.float64)
    got = np.sort(replayed["expert_weights"], axis=-1)
    np.testing.assert_allclose(got, np.sort(np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True), axis=-1), rtol=1e-5)


def test_experts_no_token_reaches_are_fed_directly(tmp_path, cfg):
    """Routing that never picks the last two experts, and a wrong bias in one of them: only feeding it shows it."""
    source = write_checkpoint(tmp_path / "source", dataclasses.replace(cfg, num_hidden_layers=2, layer_types=()))
    convert(source, tmp_path / "checkpoint")
    reference, candidate = Reference(source), Candidate(tmp_path / "checkpoint")
    prompt = random_prompt(509, 28, 0)
    blank = Report("", "", "", 28, 0, True)
    run = Arms(candidate, reference, blank, prompt, False, False, lambda *_: None)
    expected, layer = reference.layer(0), candidate.layer(0)
    taps = expected.run(reference.embed(prompt.tokens, np.float32))
    taps["expert_choice"] = np.minimum(taps["expert_choice"], 6)
    run.experts(run.judge, 0, expected, layer, taps, taps["mlp_out"])
    assert run.report.taps[-1].verdict == "ok"
    assert run.report.taps[-1].note == "2 unreached experts fed directly"
    bias = layer.block(np.float32).mlp.down.bias
    bias.set_value(bias[...].at[8].add(jnp.ones((), bias.dtype)))
    run.experts(run.judge, 0, expected, layer, taps, taps["mlp_out"])
    assert run.report.taps[-1].verdict == "fail"


@pytest.mark.long
@pytest.mark.parametrize("apart", [0.0, 1e-7])
def test_near_ties_of_the_router_and_what_follows_from_them_fail_nothing(tmp_path, cfg, apart):
    """In the first layer experts in pairs, whose router logits are the same, or apart by what sums are rounded by."""
    small = dataclasses.replace(cfg, num_hidden_layers=3, layer_types=())
    source = write_checkpoint(tmp_path / "source", small, "hf-bf16")
    (file,) = (f for f in source.glob("*.safetensors") if "model.layers.0.mlp.router.weight" in load_file(f))
    tensors = load_file(file)
    weight, bias = (tensors[f"model.layers.0.mlp.router.{leaf}"] for leaf in ("weight", "bias"))
    weight[1:8:2] = weight[0:8:2]
    bias[1:8:2] = bias[0:8:2]
    weight[0:8:2, 0], weight[1:8:2, 0] = 0.0, apart
    save_file(tensors, file, metadata={"format": "pt"})
    convert(source, tmp_path / "checkpoint")
    report = compare(source, tmp_path / "checkpoint", tokens=300)
    assert (report.verdict, report.first_divergence) == ("pass", None)
    assert {flip["layer"] for flip in report.judged_flips} == {0}
    assert max(flip["margin"] for flip in report.judged_flips) <= 2e-6
    later = [flip for flip in report.flips if flip["layer"] > 0]
    assert max(flip["margin"] for flip in later) > 1e-2
    assert all(flip["explained"] and flip["follows"]["layer"] < flip["layer"] for flip in later)


# --- differing bytes --------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path, checkpoints, sources):
    """A copy of the checkpoint in which one parameter was changed, rewritten by plain Orbax."""
    import orbax.checkpoint as ocp

    def rewrite(name, change, dtype="bfloat16"):
        with ocp.PyTreeCheckpointer() as plain:
            tree = plain.restore(checkpoints[dtype])
        *branches, leaf = name.split(".")
        node = tree
        for branch in branches:
            node = node[branch]
        value = np.array(node[leaf]["value"])
        node[leaf]["value"] = change(value)
        with ocp.PyTreeCheckpointer() as plain:
            plain.save(tmp_path / "broken", tree)
        shutil.copy(checkpoints[dtype] / "config.json", tmp_path / "broken")
        return tmp_path / "broken"

    return rewrite


def flip_lowest_bit(value):
    value.reshape(-1).view(np.uint8)[2 * 77] ^= 1
    return value


def test_one_flipped_bit_is_named(sources, broken):
    report = compare(sources["hf"], broken("layers.3.mlp.down.weight", flip_lowest_bit), layers=False)
    assert report.exit_code == 1
    assert report.first_divergence == {"layer": 3, "tap": "weights"}
    (wrong,) = (weight for weight in report.weights if weight.note)
    assert wrong.name == "layers.3.mlp.down.weight"
    assert wrong.note.startswith("one bit of one value differs, at [0, 0, 77]: ")


@pytest.mark.long
def test_a_lost_minus_zero_is_a_difference(sources, broken):
    def lose(value):
        value[value == 0] = 0.0
        return value

    report = compare(sources["hf"], broken("layers.1.mlp.gate_up.weight", lose), layers=False)
    assert [weight.name for weight in report.weights if weight.note] == ["layers.1.mlp.gate_up.weight"]
    assert report.free_run["verdict"] == "ok"


@pytest.mark.long
def test_swapped_nibbles_in_a_packed_checkpoint_are_named(sources, broken):
    wrong = broken("layers.2.mlp.gate_up.blocks", lambda value: (value << 4 | value >> 4).astype(np.uint8), "mxfp4")
    report = compare(sources["hf"], wrong, layers=True)
    assert report.first_divergence == {"layer": 2, "tap": "weights"}
    assert [weight.name for weight in report.weights if weight.note] == ["layers.2.mlp.gate_up.blocks"]
    assert report.righted == ["layers.2.mlp.gate_up.blocks"]
    assert all(tap.verdict == "ok" for tap in report.taps)


def test_the_code_is_judged_behind_a_matrix_that_is_wrong(sources, broken):
    """Sizes are distinct here, so a square is cut out: the q/k heads exchanged instead."""
    report = compare(sources["hf"], broken("layers.4.attn.k_proj.weight", lambda value: value[::-1].copy()), layers=True)
    assert report.first_divergence == {"layer": 4, "tap": "weights"}
    assert report.righted == ["layers.4.attn.k_proj.weight"]
    assert all(tap.verdict == "ok" for tap in report.taps)
    assert report.free_run["verdict"] == "ok"


def test_a_source_of_another_shape_is_a_divergence_not_a_usage_error(tmp_path, cfg, checkpoints):
    other = write_checkpoint(tmp_path / "other", dataclasses.replace(cfg, num_hidden_layers=4, layer_types=()))
    report = compare(other, checkpoints["bfloat16"], layers=True)
    assert report.exit_code == 1
    notes = {weight.name: weight.note for weight in report.weights if weight.note}
    assert notes["layers.4.attn.sinks"] == "unexpected: the source has no such parameter"


def test_a_tap_without_a_partner_is_incomplete(monkeypatch, sources, checkpoints):
    advance = walk.Call.advance

    def without_core(self, *args):
        return {name: value for name, value in advance(self, *args).items() if name != "attn_core"}

    monkeypatch.setattr(walk.Call, "advance", without_core)
    report = compare(sources["hf"], checkpoints["bfloat16"], layers=True)
    assert (report.verdict, report.exit_code) == ("incomplete", 3)
    assert {tap.tap for tap in report.taps if tap.verdict == "incomplete"} == {"attn_core"}


# --- metrics ----------------------------------------------------------------------------------------------------


def test_the_worst_token_counts_not_the_average():
    want = np.ones((1, 100, 8), np.float32)
    got = want.copy()
    got[0, 42, 3] += 1e-2
    errors = metrics.token_rel_l2(got, want)
    assert errors[0, 42] == pytest.approx(1e-2 / np.sqrt(8), rel=1e-4)
    assert errors.sum() == errors[0, 42]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_a_number_is_never_right(poison):
    got = np.ones((1, 2, 4), np.float32)
    got[0, 1, 0] = poison
    assert metrics.token_rel_l2(got, np.ones_like(got))[0, 1] == np.inf


def test_kl_by_hand():
    want, got = np.log([[[0.5, 0.5]]]), np.log([[[0.25, 0.75]]])
    assert metrics.kl(want, got)[0, 0] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_what_is_no_noise_explains_no_flip():
    """Router logits that are wrong by half: the margin is within four times that, and still it is a fault."""
    want = np.array([[3.0, 2.0, 1.0, 0.0]])
    (flip,) = metrics.flips(want, np.array([[0, 1]]), np.array([[3.0, 1.0, 2.0, 0.0]]), np.array([[0, 2]]))
    assert not flip["explained"]


def test_a_flip_is_explained_by_a_margin_within_the_noise():
    want = np.array([[3.0, 2.0, 1.9999, 0.0]])
    noisy = np.array([[3.0, 1.9999, 2.0, 0.0]])
    (flip,) = metrics.flips(want, np.array([[0, 1]]), noisy, np.array([[0, 2]]))
    assert (flip["lost"], flip["took"], flip["explained"]) == ([1], [2], True)
    (flip,) = metrics.flips(want, np.array([[0, 1]]), noisy, np.array([[0, 3]]))
    assert not flip["explained"]


# --- the command ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_writes_what_the_json_promises(tmp_path, sources, checkpoints):
    file = tmp_path / "report.json"
    result = CliRunner().invoke(main, [str(sources["hf"]), str(checkpoints["bfloat16"]), "--layers", "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert {"verdict", "exit_code", "first_divergence", "diagnosis", "weights", "taps", "free_run", "peak_rss_bytes",
            "seconds"} <= report.keys()  # fmt: skip
    assert report["weights"] == {"checked": 88, "exact": 88, "differing": [], "changed": [], "by_design": []}
    assert {"layer", "tap", "worst_token_rel_l2", "max_abs", "port_over_reference", "verdict"} <= report["taps"][0].keys()
    assert {"max_abs", "kl_mean", "kl_p95", "kl_max", "top1"} <= report["free_run"].keys()
    assert "0-4       all 14 taps" in result.stdout
    assert "PASS" in result.stdout.splitlines()[-1]


def test_a_measured_report_has_a_page_and_test_cases(report):
    assert html.render(report).count('class="cell ok') == len(report.taps)
    assert ET.fromstring(junit.render(report)).attrib["failures"] == "0"


def test_dst_alone_finds_its_source_in_the_manifest(checkpoints):
    result = CliRunner().invoke(main, [str(checkpoints["bfloat16"])])
    assert result.exit_code == 0, result.output
    assert "88/88" in result.stdout


def test_without_arguments_the_whole_tool_runs():
    result = CliRunner().invoke(main, ["--layers"])
    assert result.exit_code == 0, result.output


def test_the_first_failing_tap_is_marked(monkeypatch, sources, checkpoints):
    right = attention.sink_attention
    wrong = lambda q, k, v, sinks, visible: right(q, k, v, sinks * 0, visible)  # noqa: E731
    monkeypatch.setattr(attention, "sink_attention", wrong)
    result = CliRunner().invoke(main, [str(sources["hf"]), str(checkpoints["bfloat16"]), "--layers", "--forms", "none"])
    assert result.exit_code == 1
    (marked,) = (line for line in result.stdout.splitlines() if "<- first" in line)
    assert marked.split()[:2] == ["0", "attn_core"]
    assert "FAIL" in marked.split()
    assert "first divergence: layer 0, attn_core" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "{dst}"], "error: {tmp}/none: expected a directory of safetensors files, found nothing"),
        (["{src}", "{tmp}"], "error: {tmp}: expected an Orbax checkpoint or safetensors (_METADATA, *.safetensors), found"),
        (["{src}"], "error: {src}/conversion.json: expected a manifest of convert-oss, found none"),
        (["{tmp}/none"], "error: {tmp}/none: expected a checkpoint, found nothing"),
        (
            ["{moved}"],
            "error: {moved}/conversion.json: says that it was made from {tmp}/gone, where there is none now; give SRC",
        ),
        (["{src}", "{dst}", "--json", "{tmp}/no/f.json"], "error: {tmp}/no/f.json: expected a file in an existing directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, sources, checkpoints, arguments, message):
    moved = tmp_path / "moved"
    places = {"tmp": tmp_path, "src": sources["hf"], "dst": checkpoints["bfloat16"], "moved": moved}
    moved.mkdir()
    (moved / "conversion.json").write_text(json.dumps({"source": {"path": str(tmp_path / "gone")}}))
    result = CliRunner().invoke(main, [argument.format(**places) for argument in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(message.format(**places))
    assert len(result.stderr.splitlines()) == 1


def test_reordered_reductions_do_not_alarm(monkeypatch, report, sources, checkpoints):
    """Sums in another order are noise: every inner axis of every product reversed."""
    contract = layers.contract

    def reordered(spec, x, y):
        a, b = spec.split("->")[0].split(",")
        inner = [letter for letter in a if letter in b and letter not in spec.split("->")[1]]
        x, y = (jnp.flip(z, [letters.index(i) for i in inner]) for letters, z in ((a, x), (b, y)))
        return contract(spec, x, y)

    for module in (layers, attention, expert_paths):
        monkeypatch.setattr(module, "contract", reordered)
    jax.clear_caches()
    again = compare(sources["hf"], checkpoints["bfloat16"], layers=True)
    jax.clear_caches()
    assert again.verdict == "pass"
    assert again.free_run["max_abs"] != report.free_run["max_abs"]  # it did change something


def test_every_value_mxfp4_can_hold_is_in_the_synthetic_scales(sources):
    """So that bit-exact weights say something about the decoder."""
    stored = Reference(sources["hf"]).stored_layer(0)
    blocks = stored["mlp.experts.gate_up_proj_blocks"].numpy()
    assert len(np.unique(blocks)) == 256
    assert mxfp4.bad_scales(stored["mlp.experts.gate_up_proj_scales"].numpy()) is None
