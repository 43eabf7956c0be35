"""The equations against transformers' own taps and ours, each from the taps before it: what differs is a float32's rounding."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from oss_model import ModelConfig
from oss_model.synthetic import write_checkpoint
from parity import compare, metrics
from parity import equations as eq
from parity.candidate import Candidate
from parity.mistakes import catalogue
from parity.reference import Reference


@pytest.fixture(scope="module")
def reference(sources) -> Reference:
    return Reference(sources["hf"])


@pytest.fixture(scope="module")
def walked(reference, prompt) -> list[dict[str, np.ndarray]]:
    """Of each layer, and of what comes after: transformers' taps, with what they were computed from."""
    x, found = reference.embed(prompt, np.dtype(np.float32)), []
    positions = np.broadcast_to(np.arange(prompt.shape[1]), prompt.shape)
    for n in range(reference.sizes.layers):
        found.append(reference.layer(n).run(x) | {"x": x, "positions": positions})
        x = found[-1]["layer_out"]
    return [*found, reference.unembed(x) | {"x": x}]


def values(expected, prefix: str = "") -> dict:
    return {one.name.removeprefix(prefix): one.value() for one in expected}


def apart(got: np.ndarray, want: np.ndarray, tokens: int) -> float:
    rows = (1, tokens, -1)
    return float(metrics.token_rel_l2(got.reshape(rows), want.reshape(rows)).max())


@pytest.mark.parametrize("n", range(5))
def test_each_tap_of_a_layer_is_its_equation(reference, walked, checkpoints, prompt, n):
    t, s = walked[n], eq.of_layer(reference.settings, n)
    p = values(reference.layer(n).parameters(packed=False), f"layers.{n}.")
    ours = Candidate(checkpoints["bfloat16"]).layer(n).run(t["x"], t)
    for name in eq.LAYER:
        exact, rounded = eq.tap(name, t, p, s), eq.noise(name, t, p, s)
        if name == "expert_choice":
            assert np.array_equal(exact, t[name])
            continue
        noise = max(apart(rounded, exact, prompt.size), metrics.FLOOR)
        assert noise < 2e-6, name
        assert apart(t[name], exact, prompt.size) < 4 * noise, name
        assert apart(ours[name], exact, prompt.size) < 4 * noise, name


def test_what_lies_outside_the_layers_is_its_equation(reference, walked, prompt):
    p, s = values([*reference.first_parameters(), *reference.last_parameters()]), reference.settings
    assert np.array_equal(eq.tap("embedding", {"tokens": prompt}, p, s), walked[0]["x"])
    for name in ("final_norm", "logits"):
        assert apart(walked[-1][name], eq.tap(name, walked[-1], p, s), prompt.size) < 2e-6


@pytest.mark.parametrize("truncate", [False, True])
def test_the_tables_are_transformers_up_to_position_131071(monkeypatch, tmp_path, truncate):
    """Frequencies and angles in float32, as they are defined: in float64, angles at the end are off by 4e-3."""
    cfg = dataclasses.replace(ModelConfig.tiny(), max_position_embeddings=131072, rope_truncate=truncate)
    reference = Reference(write_checkpoint(tmp_path / "source", cfg))
    positions = np.arange(131072)
    inverse, *tables = reference.rope_tables(positions)
    made = eq.tap("rope", {"positions": positions}, {}, reference.settings)
    # Where a frequency is nearly all interpolated, a float32 rounds what is not: 1 - ramp.
    assert np.abs(eq.frequencies(reference.settings) / inverse - 1).max() < 1e-6
    assert (np.abs(made - tables) / (1 + positions[:, None] * inverse)).max() < metrics.ROPE_GATE
    monkeypatch.setattr(eq, "frequencies", lambda s: inverse)  # which pow may round otherwise: then the angles are the same
    made = eq.tap("rope", {"positions": positions}, {}, reference.settings)
    assert np.abs(made - tables).max() < 5e-7
    exactly = np.stack([turn(positions[:, None] * inverse.astype(np.float64)) for turn in (np.cos, np.sin)])
    assert np.abs(exactly * eq.concentration(reference.settings) - tables).max() > 1e-3


def test_every_code_and_scale_of_mxfp4_is_decoded_as_transformers_does():
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (1, 16, 1)).reshape(1, 256, 1, 16)
    scales = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
    scales = np.minimum(scales, 252)  # beyond, a bfloat16 ends
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales)).transpose(1, 2)
    ours = eq.mxfp4(blocks, scales)
    assert ours.dtype == ml_dtypes.bfloat16
    assert np.array_equal(ours.view(np.int16), theirs.contiguous().view(torch.int16).numpy())


def test_the_third_witness_says_who_left_the_equation(monkeypatch, sources, checkpoints):
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    right = gpt_oss.eager_attention_forward

    def wrong(module, *args, **kwargs):
        core, weights = right(module, *args, **kwargs)
        return core * 1.001, weights

    monkeypatch.setattr(gpt_oss, "eager_attention_forward", wrong)
    report = compare(sources["hf"], checkpoints["bfloat16"])
    assert report.witness["left"] == ["PyTorch"]
    assert report.witness["port"] < 1e-6 < 9e-4 < report.witness["reference"]
    assert "layer 0 attn_core: the witnesses disagree: PyTorch is 1.0e-03 from the equation" in report.table()
    assert report.diagnosis is None
    assert report.verdict != "pass"


@pytest.mark.parametrize("name", [one.name for one in catalogue.CATALOGUE.values() if one.wrong and one.tap in eq.LAYER])
def test_a_wrong_equation_is_another_one(reference, walked, name):
    """By more than its noise, in the layer that it can be in; else it would name nothing, or everything."""
    fault, n = catalogue.CATALOGUE[name], 1 if catalogue.CATALOGUE[name].where == "full" else 0
    t, s = walked[n], eq.of_layer(reference.settings, n)
    p = values(reference.layer(n).parameters(packed=False), f"layers.{n}.")
    right, made = eq.tap(fault.tap, t, p, s), fault.wrong.tap(fault.tap, t, p, s)
    assert made.size != right.size or np.abs(made - right).max() > 3e-6 * np.abs(right).max()
