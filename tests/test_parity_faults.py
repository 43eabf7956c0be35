"""The catalogue: every known mistake is found, located and named, equivalent ones are proved so, and the page lists all."""

import dataclasses
import json
import multiprocessing
import operator
import re
import runpy
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from converter import convert
from oss_model import ModelConfig, attention, experts, layers
from oss_model.errors import Incomplete
from parity import metrics
from parity.candidate import Candidate
from parity.cli import main
from parity.injection import processes, runs, selftest
from parity.injection.blocks import INJECTIONS
from parity.injection.candidate import Faulty
from parity.injection.files import CHECKPOINT, SOURCE
from parity.mistakes import catalogue as faults
from parity.mistakes.edits import EDITS
from parity.mistakes.run_catalogue import RUN_CATALOGUE

ROOT = Path(__file__).parent.parent


def test_every_mistake_is_made_on_both_sides():
    """One that only one side can make would be injected and never named, or named and never tested."""
    injected = {fault.name for fault in (*faults.CODE, *faults.MODEL)}
    assert injected | {fault.name for fault in faults.EQUIVALENT} == INJECTIONS.keys()
    wrong = {fault.name for fault in faults.CATALOGUE.values() if fault.wrong is not None}
    assert wrong == injected | {"norm-eps"}  # eps shows where the stream is small
    edited = {fault.name for fault in faults.CHECKPOINT}
    assert edited == CHECKPOINT.keys() | SOURCE.keys()
    assert edited - EDITS.keys() == {
        "weight-one-block",
        "experts-permuted",
        "embedding-lm-head-swapped",
    }
    assert len(faults.CATALOGUE) - len(faults.EQUIVALENT) >= 48
    assert len(faults.CATALOGUE) == sum(map(len, (faults.CODE, faults.MODEL, faults.CHECKPOINT, faults.EQUIVALENT)))


def test_the_page_is_that_of_the_catalogue():
    page = runpy.run_path(str(ROOT / "scripts/faults_page.py"))["page"]()
    assert (ROOT / "docs/faults.md").read_text(encoding="utf-8") == page, "python scripts/faults_page.py > docs/faults.md"
    names = faults.CATALOGUE.keys() | {row.name for row in RUN_CATALOGUE} | runs.EQUIVALENT_RUNS.keys()
    assert set(re.findall(r"^\| `([a-z0-9-]+)`", page, re.MULTILINE)) == names


SMALL = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=2, layer_types=())


def self_test(tmp_path, only, **options):
    return selftest.self_test(tmp_path, convert, cfg=SMALL, seeds=1, depths=1, only=only, **options)


@pytest.mark.long
@pytest.mark.parametrize("component", ["code", "model and checkpoint"])
def test_every_mistake_is_found_located_and_named(tmp_path, monkeypatch, component):
    """At one layer and seed; `check-parity --self-test` goes on to more of both."""
    code = {fault.name for fault in faults.CODE}
    if component == "code":  # one of the two will do for what is beside the mistakes: the cosine, right ports of every kind
        monkeypatch.setattr(selftest, "HEALTHY", ({},))
        monkeypatch.setattr(selftest, "_last_logits", lambda side, seed: np.ones(1))
    result = self_test(tmp_path, lambda fault: (fault.name in code) == (component == "code"))
    assert result.exit_code == 0, result.table()
    assert all(outcome.named for outcome in result.outcomes), result.table()
    assert len(result.outcomes) >= 40
    assert result.healthy == len(selftest.HEALTHY)
    assert result.equivalent == (0 if component == "code" else len(faults.EQUIVALENT))


# --- the self-test can fail -------------------------------------------------------------------------------------


@pytest.fixture
def one_healthy_run(monkeypatch):
    monkeypatch.setattr(selftest, "HEALTHY", ({},))


def only(*names):
    return lambda fault: fault.name in names


@pytest.mark.long
def test_a_mistake_that_is_missed_fails_the_self_test(tmp_path, monkeypatch, one_healthy_run):
    monkeypatch.setattr(metrics, "TIMES", 1e9)
    monkeypatch.setattr(metrics, "FREE_RUN_GATE", 10.0)
    monkeypatch.setattr(metrics, "FLIP_MARGIN", 1e9)
    result = self_test(tmp_path, only("sinks-zeroed"))
    assert result.exit_code == 4
    assert "MISSED" in result.table()


def test_a_mistake_without_its_name_fails_the_self_test(tmp_path, monkeypatch, one_healthy_run):
    wrong = faults.CATALOGUE["sinks-negated"].wrong
    monkeypatch.setitem(faults.CATALOGUE, "sinks-zeroed", faults.CATALOGUE["sinks-zeroed"]._replace(wrong=wrong))
    result = self_test(tmp_path, only("sinks-zeroed"))
    assert result.exit_code == 4
    assert "not named" in result.table()


def test_a_mistake_found_elsewhere_fails_the_self_test(tmp_path, monkeypatch, one_healthy_run):
    monkeypatch.setitem(faults.CATALOGUE, "sinks-zeroed", faults.CATALOGUE["sinks-zeroed"]._replace(tap="attn_out"))
    result = self_test(tmp_path, only("sinks-zeroed"))
    assert result.exit_code == 4
    assert "MISLOCATED sinks-zeroed, layer 0, seed 0" in result.table()


@pytest.mark.long
def test_a_name_that_is_not_what_was_made_fails_the_self_test(tmp_path, monkeypatch, one_healthy_run):
    right = selftest._run
    monkeypatch.setattr(selftest, "_run", lambda *given: right(*given)._replace(false=["padding-seen"]))
    result = self_test(tmp_path, only("sinks-zeroed"), running=["generate-ignores-eos"])
    assert (result.exit_code, [one.named for one in result.running]) == (4, [True])
    assert "FALSE      generate-ignores-eos, generate, eos, seed 0" in result.table()


@pytest.mark.long
def test_an_alarm_fails_the_self_test(tmp_path, monkeypatch, one_healthy_run):
    monkeypatch.setattr(metrics, "TIMES", 1e-6)
    result = self_test(tmp_path, only("norm-eps", "q-bias-missing"))
    assert result.exit_code == 4
    assert len(result.alarms) == 2


@pytest.mark.long
def test_the_command(monkeypatch, tmp_path, sources, one_healthy_run):
    monkeypatch.setattr(faults, "CATALOGUE", {name: faults.CATALOGUE[name] for name in ("sinks-zeroed",)})
    monkeypatch.setattr(selftest, "CATALOGUE", faults.CATALOGUE)
    monkeypatch.setattr(runs, "RUN_INJECTIONS", {"generate-ignores-eos": runs.RUN_INJECTIONS["generate-ignores-eos"]})
    monkeypatch.setattr(runs, "EQUIVALENT_RUNS", {})
    monkeypatch.setattr(selftest, "_layers", lambda *_: [0])
    monkeypatch.setattr(selftest, "ModelConfig", types.SimpleNamespace(tiny=lambda: SMALL, from_json=ModelConfig.from_json))
    # Another process would know nothing of this.
    monkeypatch.setattr(processes, "in_processes", lambda count, *given, **options: selftest.self_test(*given, **options))
    run = CliRunner().invoke(main, ["--self-test", "--json", str(tmp_path / "out.json")])
    said = json.loads((tmp_path / "out.json").read_text())
    assert [(one["seed"], one["found"], one["named"], one["false"]) for one in said["running"]] == [
        (seed, True, True, []) for seed in range(3)
    ], run.output
    assert (run.exit_code, run.stdout.splitlines()[0]) == (0, "self-test   2 mistakes, 6 runs")
    assert said["exit_code"] == 0
    run = CliRunner().invoke(main, ["--self-test", str(sources["hf"]), "--html", str(tmp_path / "x.html")])
    assert (run.exit_code, len(run.stderr.splitlines())) == (2, 2)


@pytest.mark.long
def test_processes_share_the_runs(tmp_path):
    """And each has simulated devices for the mistakes of meshes."""
    seen, names = [], ["generate-ignores-eos", "mesh-wrong"]
    options = {"cfg": SMALL, "seeds": 1, "depths": 1, "only": operator.attrgetter("equivalent"), "running": names}
    result = processes.in_processes(2, tmp_path, convert, progress=lambda *state: seen.append(state), **options)
    assert (result.healthy, result.equivalent) == (len(selftest.HEALTHY), len(faults.EQUIVALENT))
    assert {(one.mistake, one.found, one.named) for one in result.running} == {(name, True, True) for name in names}
    assert not result.alarms
    count = len(selftest.HEALTHY) + len(faults.EQUIVALENT) + len(names)
    assert {total for _, total, _ in seen} == {count}
    assert seen[-1][0] == count - 2  # each process says what it begins


@pytest.mark.long
def test_what_ends_a_process_ends_the_self_test(tmp_path):
    with pytest.raises(TypeError, match="not_") as caught:
        processes.in_processes(2, tmp_path / "raised", operator.not_, cfg=SMALL, progress=lambda *state: None)
    assert "self_test(scratch, convert" in caught.value.__notes__[0]  # where it was

    def kill(*_):
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(Incomplete, match="was ended, exit code -9, as by a system without memory"):
        processes.in_processes(2, tmp_path / "killed", convert, cfg=SMALL, progress=kill)
    assert not multiprocessing.active_children()


# --- proofs that what is called equivalent is -------------------------------------------------------------------


def rng():
    return np.random.default_rng(0)


def test_casting_before_the_scale_is_nothing_in_float32_and_something_in_bfloat16(cfg):
    norm, patch = layers.RMSNorm(cfg), INJECTIONS["norm-cast-first"].patch
    assert patch is not None
    owner, attribute, make = patch
    norm.scale.set_value(jnp.asarray(rng().normal(size=cfg.hidden_size), norm.scale[...].dtype))
    cast_first = make(getattr(owner, attribute))
    x = jnp.asarray(rng().normal(size=(1, 6, cfg.hidden_size)), jnp.float32)
    np.testing.assert_array_equal(norm(x), cast_first(norm, x))
    x = x.astype(jnp.bfloat16)
    assert np.mean(np.asarray(norm(x)) != np.asarray(cast_first(norm, x))) > 0.1


def test_a_softmax_over_all_renormalised_is_one_over_the_chosen():
    logits = jnp.asarray(rng().normal(size=(50, 9)) * 4, jnp.float32)
    choice = experts.choose(logits, 4)
    all_of_them = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), choice, axis=-1)
    again = all_of_them / all_of_them.sum(-1, keepdims=True)
    np.testing.assert_allclose(experts.weigh(logits, choice), again, rtol=2e-6)


@pytest.mark.parametrize("name", ["sinks-softmax-rescaled", "mask-finite"])
def test_other_forms_of_the_sink_and_the_mask(cfg, name):
    patch = INJECTIONS[name].patch
    assert patch is not None
    owner, attribute, make = patch
    other = make(getattr(owner, attribute))
    shape = (2, 30, cfg.num_attention_heads, cfg.head_dim)
    q = jnp.asarray(rng().normal(size=shape) * 3, jnp.float32)
    k, v = (jnp.asarray(rng().normal(size=(2, 30, cfg.num_key_value_heads, cfg.head_dim)), jnp.float32) for _ in "kv")
    sinks = jnp.asarray(rng().normal(size=cfg.num_attention_heads) * 3, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(30, dtype=jnp.int32)[None], (2, 30))
    visible = attention.visibility(positions, positions, cfg.sliding_window)
    want = attention.sink_attention(q, k, v, sinks, visible)
    np.testing.assert_allclose(other(q, k, v, sinks, visible), want, atol=2e-5 * float(jnp.abs(want).max()))


def test_an_eps_of_1e_6_is_half_its_difference_over_the_mean_square(cfg):
    """x / sqrt(m + eps): the relative change is (1e-5 - 1e-6) / 2m, below the gate of 2e-6 for streams of m = 2.25 and more."""
    right, wrong = layers.RMSNorm(cfg), layers.RMSNorm(dataclasses.replace(cfg, rms_norm_eps=1e-6))
    for mean_square in (0.05, 1.0, 25.0):
        x = rng().normal(size=(1, 6, cfg.hidden_size))
        x = jnp.asarray(x * np.sqrt(mean_square / (x * x).mean(-1, keepdims=True)), jnp.float32)
        error = metrics.token_rel_l2(np.asarray(wrong(x)), np.asarray(right(x))).max()
        assert error == pytest.approx(4.5e-6 / mean_square, rel=0.1)
        assert (error < metrics.TIMES * metrics.FLOOR) == (mean_square > 2.25)


@pytest.mark.long
def test_injected_mistakes_stay_in_their_layer(checkpoints, prompt):
    """Else the self-test would test less than it says."""
    right, wrong = Candidate(checkpoints["bfloat16"]), Faulty(checkpoints["bfloat16"], "sinks-zeroed", 2)
    x = right.embed(prompt, np.dtype(np.float32))
    for n in range(5):
        same = np.array_equal(right.layer(n).run(x)["attn_core"], wrong.layer(n).run(x)["attn_core"])
        assert same == (n != 2)


@pytest.mark.long
def test_progress_counts_to_what_it_said_at_first(tmp_path, monkeypatch, one_healthy_run):
    seen = []
    monkeypatch.setattr(selftest, "_run", lambda name, *_: name)
    self_test(tmp_path, only("sinks-zeroed"), running=["generate-ignores-eos"], progress=lambda *state: seen.append(state))
    assert seen == [(0, 3, "healthy"), (1, 3, "sinks-zeroed"), (2, 3, "generate-ignores-eos")]
