"""More than one fault at once, trained parameters, and how small a fault may be."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from oss_model import InputError, attention
from oss_model.taps import LAYER_TAPS
from parity import compare, metrics
from parity.walk import Call


@pytest.fixture
def touched(monkeypatch):
    """Make taps of the port something else: {(layer, tap): change}."""

    def install(changes):
        hook = Call._hook

        def changed(self, layer, name, value):
            change = changes.get((layer, name))
            return hook(self, layer, name, value if change is None else change(value))

        monkeypatch.setattr(Call, "_hook", changed)

    return install


@pytest.mark.long
def test_two_faults_in_two_layers_are_both_named(monkeypatch, sources, checkpoints):
    """A wrong window in the full layers and a wrong swiglu everywhere: each has its own finding."""
    visibility, alpha = attention.visibility, 1.0
    monkeypatch.setattr(attention, "visibility", lambda q, k, window: visibility(q, k, 12 if window == 11 else window))
    from oss_model import expert_paths

    swiglu = expert_paths.swiglu
    monkeypatch.setattr(
        expert_paths, "swiglu", lambda gate, up, cfg: swiglu(gate * 0 + gate, up, _with(cfg, swiglu_alpha=alpha))
    )
    import jax

    jax.clear_caches()
    report = compare(sources["hf"], checkpoints["bfloat16"])
    jax.clear_caches()
    found = {(one["layer"], one["tap"], one["name"]) for one in report.findings}
    assert {(n, "attn_core", "window-one-long") for n in (0, 2, 4)} <= found
    assert {(n, "mlp_out", "swiglu-alpha-one") for n in range(5)} <= found
    assert len(found) == 8  # and nothing else is said
    assert report.diagnosis["name"] == "window-one-long"
    assert "also wrong: layers 0, 1, 2, 3, 4 mlp_out" in report.table()


def _with(cfg, **changes):
    import dataclasses

    return dataclasses.replace(cfg, **changes)


@pytest.mark.long
def test_a_wrong_parameter_and_wrong_code_in_one_layer_are_both_told(monkeypatch, sources, tmp_path, checkpoints):
    checkpoint = rewritten(checkpoints["bfloat16"], tmp_path / "wrong", "layers.0.attn.sinks", np.zeros_like)
    visibility = attention.visibility
    monkeypatch.setattr(attention, "visibility", lambda q, k, window: visibility(q, k, 12 if window == 11 else window))
    report = compare(sources["hf"], checkpoint)
    assert report.first_divergence == {"layer": 0, "tap": "attn_core"}
    assert report.diagnosis["name"] == "window-one-long"
    assert [one["tap"] for one in report.findings if one["cause"] == "weights"] == ["layers.0.attn.sinks"]


def test_what_follows_from_wrong_tables_is_said_to(monkeypatch, sources, checkpoints):
    from oss_model import layers

    right = layers.RotaryEmbedding.__call__
    monkeypatch.setattr(layers.RotaryEmbedding, "__call__", lambda self, at: tuple(one * 1.5 for one in right(self, at)))
    report = compare(sources["hf"], checkpoints["bfloat16"])
    follows = [one for one in report.findings if one["follows"] is not None]
    assert {(one["layer"], one["tap"]) for one in follows} == {(n, tap) for n in range(5) for tap in ("q_rope", "k_rope")}
    assert "also wrong: layers 0, 1, 2, 3, 4 q_rope: follows from rope" in report.table()


def test_nothing_is_said_of_what_merely_comes_after(touched, sources, checkpoints):
    touched({(1, "attn_out"): lambda value: value * 1.5, (3, "k"): lambda value: value + 1})
    report = compare(sources["hf"], checkpoints["bfloat16"])
    assert [(one["layer"], one["tap"]) for one in report.findings] == [(1, "attn_out"), (3, "k")]
    assert {(tap.layer, tap.tap) for tap in report.taps if tap.verdict == "fail"} == {(1, "attn_out"), (3, "k")}


# --- how small a fault may be -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tap", [tap for tap in LAYER_TAPS if tap not in ("expert_choice",)])
def test_a_tap_that_is_off_by_1e_5_is_found(tap, touched, sources, checkpoints):
    touched({(2, tap): lambda value: value * jnp.asarray(1 + 1e-5, value.dtype)})
    assert compare(sources["hf"], checkpoints["bfloat16"]).first_divergence == {"layer": 2, "tap": tap}


@pytest.mark.parametrize(
    ("tap", "part"),
    [("q", (0, 20, 3)), ("v", (0, 20, 2)), ("attn_core", (0, 20, 5)), ("attn_out", (0, 20, 7)), ("mlp_out", (0, 9, 40))],
)
def test_a_head_or_channel_of_one_token_that_is_off_by_1e_3_is_found(tap, part, touched, sources, checkpoints):
    touched({(2, tap): lambda value: value.at[part].multiply(1 + 1e-3)})
    assert compare(sources["hf"], checkpoints["bfloat16"]).first_divergence == {"layer": 2, "tap": tap}


@pytest.mark.long
def test_a_massive_channel_hides_no_other(touched, sources, tmp_path, checkpoints):
    """A channel of the experts' bias is 1e4: what is wrong in another one is a millionth of the token."""
    from safetensors.numpy import load_file, save_file

    from converter import convert

    source = tmp_path / "source"
    source.mkdir()
    for file in sources["hf-bf16"].iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            for name in tensors:
                if name.endswith("self_attn.o_proj.bias"):
                    tensors[name] = tensors[name].copy()
                    tensors[name][0] = 1e4
            save_file(tensors, source / file.name, {"format": "pt"})
        else:
            (source / file.name).write_bytes(file.read_bytes())
    convert(source, tmp_path / "checkpoint")
    assert compare(source, tmp_path / "checkpoint").verdict == "pass"
    touched({(2, "attn_out"): lambda value: value.at[:, :, 5].multiply(1 + 1e-3)})
    report = compare(source, tmp_path / "checkpoint")
    assert report.first_divergence == {"layer": 2, "tap": "attn_out"}
    (failed,) = (tap for tap in report.taps if tap.verdict == "fail")
    assert failed.worst_token_rel_l2 < 2e-6
    assert failed.note == "channels 5 of 96 over their own scale"


# --- trained on purpose -----------------------------------------------------------------------------------------


def rewritten(checkpoint, out, name, change):
    import shutil

    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as plain:
        tree = plain.restore(checkpoint)
    node = tree
    for part in name.split("."):
        node = node[part]
    node["value"] = change(np.array(node["value"]))
    with ocp.PyTreeCheckpointer() as plain:
        plain.save(out, tree)
    shutil.copy(checkpoint / "config.json", out)
    return out


def grown(value: np.ndarray) -> np.ndarray:
    return (value * 1.25).astype(value.dtype)


def test_what_was_trained_is_listed_and_everything_else_must_be_exact(sources, tmp_path, checkpoints):
    trained = rewritten(
        checkpoints["bfloat16"], tmp_path / "trained", "layers.1.attn.q_proj.weight", lambda v: (v * 1.25).astype(v.dtype)
    )
    report = compare(sources["hf"], trained, expect_changed=[r"layers\.\d+\.attn\.q_proj\.weight"])
    assert report.verdict == "pass"
    assert "1 changed, as expected: moved by 2.5e-01 to 2.5e-01 (relative L2)" in report.table()
    assert report.righted == ["layers.1.attn.q_proj.weight"]
    report = compare(sources["hf"], trained, expect_changed=[r".*\.k_proj\.weight"])
    assert report.first_divergence == {"layer": 1, "tap": "weights"}
    with pytest.raises(InputError, match=re.escape("--expect-changed '(': expected a regular expression")):
        compare(sources["hf"], trained, expect_changed=["("])
    with pytest.raises(InputError, match="expected to match a parameter"):
        compare(sources["hf"], trained, expect_changed=["q_proj"])


def test_a_mistake_of_the_code_behind_trained_parameters_is_named(monkeypatch, sources, tmp_path, checkpoints):
    trained = rewritten(
        checkpoints["bfloat16"], tmp_path / "trained", "layers.0.attn.q_proj.weight", lambda v: (v * 1.25).astype(v.dtype)
    )
    visibility = attention.visibility
    monkeypatch.setattr(attention, "visibility", lambda q, k, window: visibility(q, k, 12 if window == 11 else window))
    report = compare(sources["hf"], trained, expect_changed=[".*q_proj.weight"])
    assert report.diagnosis["name"] == "window-one-long"
    assert report.taps[1].gate < metrics.USUAL_GATE
