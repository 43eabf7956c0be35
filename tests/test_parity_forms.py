"""The model as it is run: each way against the reference, and mistakes that only a way of running shows."""

import dataclasses
import functools
import json
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from converter import convert
from oss_model import ModelConfig, attention
from oss_model.buckets import path_of
from oss_model.layers import RotaryEmbedding
from oss_model.synthetic import write_checkpoint
from parity import compare, forms, forms_arm, handing, metrics
from parity.candidate import Candidate
from parity.forms_arm import compare_forms, compare_long, replica, until
from parity.injection.runs import EQUIVALENT_RUNS, RUN_INJECTIONS
from parity.mistakes.catalogue import CATALOGUE
from parity.mistakes.run_catalogue import RUN_CATALOGUE
from parity.prompts import random_prompt
from parity.protocols import Answers, PortCan, Question
from parity.recording import Recorder, Recording
from parity.reference import Reference
from parity.reference.whole import Whole
from parity.reports.report import Report, TapResult

# A mistake of each kind; `check-parity --self-test` has all of them.
SOME = (
    "last-layer-skipped", "layers-run-in-another-order", "logits-of-the-token-before", "sinks-lost-in-loading",
    "windows-lost-in-loading", "rows-see-the-first", "padding-seen", "jit-only", "ragged-wrong", "ring-keeps-the-first",
    "embedding-scaled-in-embed", "rows-rotated-one-more", "padding-is-nan", "padding-counted", "keys-lost-past-32",
    "generate-ignores-eos", "lora-scale-ignored", "remat-applies-a-block-twice",
)  # fmt: skip


class Kept(Reference):
    """Asked once for all forms."""

    kept: Answers | None = None

    def answers(self, question: Question) -> Answers:
        if self.kept is None:
            wanted = question._replace(kinds=("logits", "tokens", "gradients", "updated logits"), updates=self.updates)
            self.kept = super().answers(wanted)
        return self.kept


@pytest.fixture(scope="module")
def subject(checkpoints, sources) -> forms.Forms:
    found = Candidate(checkpoints["bfloat16"], source=sources["hf"]).can.forms
    assert isinstance(found, forms.Forms)
    return found


@pytest.fixture(scope="module")
def reference(sources, subject) -> Kept:
    kept = Kept(sources["hf"])
    kept.updates = subject.updates
    return kept


@pytest.fixture(scope="module")
def candidate(checkpoints, sources) -> Candidate:
    return Candidate(checkpoints["bfloat16"], source=sources["hf"])


def run(subject, reference, names, dtypes=("float32",), candidate=None) -> Report:
    report = Report("source", "checkpoint", "model", 1, 0)
    calls = None if candidate is None else Candidate(candidate.path).can.calls  # loaded anew
    stored, restore = ({}, dict) if candidate is None else (candidate.stored, candidate.restore)
    port = types.SimpleNamespace(can=PortCan(forms=subject, calls=calls), stored=stored, restore=restore)
    compare_forms(port, reference, report, names, fits=True, seed=0, progress=lambda *_: None, dtypes=dtypes)  # type: ignore[arg-type]
    return report


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(forms.table(types.SimpleNamespace(num_experts=9)).keys() - {forms.LONG_FORM}))
def test_a_right_model_is_right_however_it_is_run(name, subject, reference):
    report = run(subject, reference, [name])
    assert [(form.verdict, form.note) for form in report.forms] == [("ok", "")]
    if forms.table(subject.cfg)[name].gives in ("logits", "updated logits"):
        assert 0 < report.forms[0].worst < 1e-5
    assert report.first_divergence is None


@pytest.mark.long
@pytest.mark.parametrize("name", SOME)
def test_what_only_a_way_of_running_shows_is_found_located_and_named(name, subject, reference, candidate):
    mistake = RUN_INJECTIONS[name]
    with mistake.injected():
        report = run(subject, reference, mistake.forms[:1], candidate=candidate)
    form = report.forms[0]
    assert form.verdict == "fail"
    assert report.verdict == "fail"
    if mistake.place is not None:
        assert (form.layer, form.tap) == mistake.place
        assert report.first_divergence == {"layer": form.layer, "tap": form.tap, "form": form.form}
    else:
        assert report.first_divergence == {"layer": None, "tap": "form", "form": form.form}
    assert [one["name"] for one in report.findings] == [mistake.named or name]
    assert report.diagnosis is report.findings[0]
    assert not report.errors
    said = report.table()
    assert f"[{mistake.named or name}]" in said
    assert f"as it is run ({form.form})" in said


@pytest.mark.long
def test_forms_that_are_wrong_by_the_same_mistake_are_told_together(subject, reference):
    with RUN_INJECTIONS["rows-see-the-first"].injected():
        report = run(subject, reference, ["jit", "eager"])
    assert [(one["name"], one["forms"]) for one in report.findings] == [("rows-see-the-first", ["jit", "eager"])]
    assert report.findings[0]["residual_before"] > 1
    assert report.findings[0]["residual_after"] < 2e-6


@pytest.mark.long
def test_what_follows_from_a_tap_is_said_to_and_what_was_lost_in_loading_too(sources, checkpoints):
    with RUN_INJECTIONS["sinks-lost-in-loading"].injected():
        report = compare(sources["hf"], checkpoints["bfloat16"], forms=("jit", "generate"))  # type: ignore[arg-type]
    assert report.diagnosis is not None
    assert (report.diagnosis["cause"], report.diagnosis["name"]) == ("loading", "lost-in-loading")
    assert report.diagnosis["fault"].startswith("layers.0.attn.sinks is lost in loading: 14 of 14 values are not")
    assert {one["name"] for one in report.findings} == {"lost-in-loading", None}
    follow = [(one["forms"], one["follows"]) for one in report.findings if one["forms"]]
    assert follow == [(["jit", "generate"], {"layer": 0, "tap": "attn_core"})]


@pytest.mark.long
def test_a_form_that_is_wrong_elsewhere_does_not_follow(subject, reference):
    """Than a tap that is wrong by itself."""
    report = Report("source", "checkpoint", "model", 1, 0, taps=[TapResult(3, "mlp_out", 1.0, 1.0, "fail")])
    port = types.SimpleNamespace(can=PortCan(forms=subject), stored={}, restore=dict)
    with RUN_INJECTIONS["rows-see-the-first"].injected():
        compare_forms(port, reference, report, ["jit"], fits=True, seed=0, progress=lambda *_: None, dtypes=("float32",))  # type: ignore[arg-type]
    assert [(one["name"], one["follows"]) for one in report.findings] == [("rows-see-the-first", None)]


@pytest.mark.long
def test_what_nobody_knows_is_located_and_not_named(subject, reference, monkeypatch):
    """Every form is wrong by the same factor: of rows, and of a head alone."""
    right = attention.sink_attention
    monkeypatch.setattr(attention, "sink_attention", lambda q, *rest: right(q, *rest).at[1:, :, 3].multiply(1.03))
    jax.clear_caches()
    report = run(subject, reference, ["jit", "eager"])
    jax.clear_caches()
    assert (report.diagnosis, [one["name"] for one in report.findings]) == (None, [None])
    assert report.findings[0]["pattern"].startswith(
        "row 1 alone, which is padded; all tokens; head 3 of 14; wrong in jit, eager"
    )
    assert (report.explained, report.tried > 10) == ("jit, layer 0 attn_core", True)
    assert "known mistakes of this place explains it; row 1 alone, which is padded" in report.table()


def test_a_form_that_is_right_the_second_time_is_not_reproducible(subject, reference, monkeypatch):
    runs, right = [], forms.jitted

    def jitted(*given, **named):
        runs.append(1)
        return [row * (1.01 if len(runs) == 1 else 1) for row in right(*given, **named)]

    monkeypatch.setattr(forms, "jitted", jitted)
    report = run(subject, reference, ["jit"])
    assert (report.verdict, len(runs), report.findings) == ("incomplete", 2, [])
    assert "not reproducible: wrong the first time" in report.forms[0].note


@pytest.mark.long
def test_a_form_that_is_wrong_in_bfloat16_alone_is_said_to_be(subject, reference, monkeypatch):
    right = attention.sink_attention
    monkeypatch.setattr(
        attention,
        "sink_attention",
        lambda q, *rest: right(q, *rest) * jnp.asarray(1.2 if q.dtype == jnp.bfloat16 else 1, q.dtype),
    )
    jax.clear_caches()
    report = run(subject, reference, ["jit"], ("float32", "bfloat16"))
    jax.clear_caches()
    assert [form.verdict for form in report.forms] == ["ok", "fail"]
    assert [(one["name"], one["pattern"]) for one in report.findings] == [(None, "in bfloat16 alone, right in float32")]


@pytest.mark.long
@pytest.mark.parametrize(("name", "form"), [(name, form) for name, one in EQUIVALENT_RUNS.items() for form in one.forms])
def test_what_is_called_equivalent_passes(name, form, subject, reference):
    mistake = EQUIVALENT_RUNS[name]
    with mistake.injected():
        report = run(subject, reference, [form])
    assert mistake.equivalent
    assert (report.verdict, report.findings) == ("pass", [])
    assert 0 < report.forms[0].worst < 1e-5


def test_each_mistake_is_of_a_form_that_there_is(cfg):
    there = forms.table(cfg)
    assert {form for mistake in RUN_INJECTIONS.values() for form in mistake.forms} <= there.keys()
    for name, mistake in RUN_INJECTIONS.items():
        gives = there[mistake.forms[0]].gives
        assert (mistake.place is not None) == (gives == "logits") or gives == "tokens", name


def test_what_can_be_named_is_injected_and_what_is_injected_can_be_named():
    made = {mistake.named or name for name, mistake in RUN_INJECTIONS.items()}
    rows = {row.name for row in RUN_CATALOGUE}
    assert rows <= made
    assert made - rows <= CATALOGUE.keys()


def test_in_bfloat16_the_error_is_put_over_the_reference_s(subject, reference, monkeypatch):
    report = run(subject, reference, ["jit"], ("bfloat16",))
    assert [form.dtype for form in report.forms] == ["bfloat16"]
    assert 0.2 < report.forms[0].worst < metrics.PRECISION_WARN
    logits16 = [
        right + (wrong - right) / 8 for wrong, right in zip(reference.kept.logits16, reference.kept.logits, strict=True)
    ]
    monkeypatch.setattr(reference, "kept", reference.kept._replace(logits16=logits16))
    assert run(subject, reference, ["jit"], ("bfloat16",)).forms[0].verdict == "fail"


@pytest.mark.long
def test_meshes_are_simulated_where_there_are_too_few_devices(subject, reference, monkeypatch):
    there = forms.devices
    monkeypatch.setattr(forms, "devices", lambda: there()[:1])
    here = run(subject, reference, ["mesh fsdp × tensor"])
    monkeypatch.setattr(forms, "devices", there)
    assert [form.verdict for form in here.forms] == ["ok"]
    assert here.forms[0].worst == pytest.approx(run(subject, reference, ["mesh fsdp × tensor"]).forms[0].worst, rel=0.5)


def test_what_goes_to_a_child_and_comes_back_is_the_same(tmp_path):
    def array(*shape: int, dtype=np.float32) -> np.ndarray:
        return np.arange(math.prod(shape)).astype(dtype).reshape(shape)

    rows = [array(5, dtype=np.int64), array(3, dtype=np.int64)]
    logits = [array(2, 5).T, array(3, 2)]
    asked = Answers(
        rows, [array(5), array(3)], logits, None, [array(0, dtype=np.int64)], [array(2)], (7,), logits, {"a.b": array(2)}
    )
    bare = asked._replace(logits16=logits, updated=None, gradients=None, eos=())
    cfg = dataclasses.replace(ModelConfig.tiny(), dtype="float32", param_dtype="mxfp4", num_hidden_layers=2, layer_types=())
    gs = path_of("gs://bucket/run")
    for job in (
        handing.Job(gs, cfg, None, [("jit", "bfloat16")], asked),
        handing.Job(tmp_path, ModelConfig.tiny(), gs, [], bare),
    ):
        handing.write_job(tmp_path, job)
        back = handing.read_job(tmp_path)
        assert (back.path, back.cfg, back.packed, back.runs) == (job.path, job.cfg, job.packed, job.runs)
        assert type(back.path) is type(job.path)
        assert_same(back.asked._asdict(), job.asked._asdict())
    assert handing.read_results(tmp_path) is None
    results = [logits, {"a.b": array(2), "c": array()}, {(None, "x"): logits, (3, "y"): rows}, {}, [], "RuntimeError: none"]
    handing.write_results(tmp_path, results)
    assert_same(handing.read_results(tmp_path), results)


def assert_same(got, expected) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (got.dtype, got.shape, got.tolist()) == (expected.dtype, expected.shape, expected.tolist())
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        assert_same(list(got.values()), list(expected.values()))
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert got == expected


def test_a_form_that_cannot_be_run_is_incomplete(subject, reference, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such device\nand more")

    monkeypatch.setattr(forms, "create_model_from_checkpoint", broken)
    report = run(subject, reference, ["jit"])
    assert (report.verdict, report.forms[0].verdict) == ("incomplete", "incomplete")
    assert report.incomplete == ["forms: jit in float32 was not compared: RuntimeError: no such device"]


@pytest.mark.long
def test_a_replica_keeps_what_is_no_size(sources, subject, reference, tmp_path):
    cfg = replica(subject.cfg, reference)
    same = ("swiglu_alpha", "swiglu_limit", "rms_norm_eps", "rope_theta", "rope_factor", "rope_beta_fast", "head_dim",
            "rope_original_max_position_embeddings", "max_position_embeddings", "num_experts_per_tok")  # fmt: skip
    assert {name: getattr(cfg, name) for name in same} == {name: getattr(subject.cfg, name) for name in same}
    assert set(cfg.layer_types) == set(subject.cfg.layer_types)
    sizes = [cfg.num_hidden_layers, cfg.vocab_size, cfg.hidden_size, cfg.intermediate_size, cfg.num_experts, cfg.sliding_window,
             cfg.num_key_value_heads, cfg.head_dim]  # fmt: skip
    assert len(set(sizes)) == len(sizes)
    report = Report("source", "checkpoint", "model", 1, 0)
    port = types.SimpleNamespace(can=PortCan(forms=subject))
    compare_forms(
        port, reference.__class__.__mro__[1](sources["hf"]), report, "default", fits=False, seed=0, progress=lambda *_: None
    )
    assert {(form.on, form.verdict) for form in report.forms} == {("replica", "ok")}
    assert len(report.forms) == 10


@pytest.mark.long
def test_a_recording_answers_for_the_forms_it_was_made_with(sources, checkpoints, subject, reference, tmp_path):
    recorder = Recorder(reference, tmp_path / "recording", random_prompt(509, 24, 0), {"dtype": "float32", "layers": False})
    run(subject, recorder, ["jit", "generate"])
    recorder.described["forms"]["kinds"] = ["logits", "tokens"]
    compare(sources["hf"], checkpoints["bfloat16"], layers=False, record=tmp_path / "other", tokens=24)
    manifest = json.loads((tmp_path / "other/manifest.json").read_text())
    assert Recording(tmp_path / "other").manifest.get("forms") is None
    (tmp_path / "other/forms.safetensors").write_bytes((tmp_path / "recording/forms.safetensors").read_bytes())
    (tmp_path / "other/manifest.json").write_text(json.dumps(manifest | {"forms": recorder.described["forms"]}))

    recording = Recording(tmp_path / "other")
    report = run(subject, recording, ["jit", "generate"])
    assert [form.verdict for form in report.forms] == ["ok", "ok"]
    found = json.loads(report.to_json())["forms"][0]
    assert found.keys() >= {"form", "on", "dtype", "verdict", "worst"}
    with RUN_INJECTIONS[
        "jit-only"
    ].injected():  # it is found, and cannot be located: a recording has the taps of its own prompt
        report = run(subject, recording, ["jit"])
    assert report.first_divergence == {"layer": None, "tap": "form", "form": "jit"}
    report = run(subject, recording, ["remat mlp"])
    assert report.incomplete == ["forms: recorded without gradients; --forms default, or SRC and PyTorch"]
    report = run(subject, _without_forms(recording), ["jit"])
    assert report.incomplete == ["forms: recorded without run forms; record it again, or --forms none"]


def _without_forms(recording: Recording) -> Recording:
    recording.manifest.pop("forms")
    return recording


def test_a_text_ends_with_the_first_token_that_ends_it():
    assert until(np.array([4, 7, 9, 7]), (7,)) == 2
    assert until(np.array([4, 7]), (8,)) == 2


def test_the_reference_goes_on_after_a_token_that_ends_a_text(sources):
    """As many tokens as were asked for: where to stop is the other form's."""
    whole, rows = Whole(Reference(sources["hf"])), [np.arange(5)]
    (made,), *_ = whole.generate(rows, 6)
    whole.model.generation_config.eos_token_id = int(made[2])
    (again,), *_ = whole.generate(rows, 6)
    assert made.tolist() == again.tolist()
    assert len(made) == 6


def test_rows_have_no_near_tie_where_that_can_be(reference):
    assert np.concatenate(reference.kept.judged).all()


# --- far from the start -----------------------------------------------------------------------------------------


def _rotated_less(right):
    """Positions past 1,000 are turned as 1,000 is."""
    return lambda self, positions: right(self, jnp.minimum(positions, 1000))


@pytest.mark.long
@pytest.mark.parametrize("fault", [False, True])
def test_a_long_row_shows_what_goes_wrong_past_a_thousand_tokens(checkpoints, sources, monkeypatch, fault):
    monkeypatch.setattr(forms_arm, "LONG", 1100)
    if fault:
        monkeypatch.setattr(RotaryEmbedding, "__call__", _rotated_less(RotaryEmbedding.__call__))
    jax.clear_caches()
    report = Report("", "", "", 0, 0)
    port = types.SimpleNamespace(can=PortCan(forms=forms.Forms(checkpoints["bfloat16"], ModelConfig.tiny())))
    compare_long(port, Reference(sources["hf"]), report, seed=0, progress=lambda *_: None)  # type: ignore[arg-type]
    jax.clear_caches()
    one = report.forms[0]
    assert (one.form, one.on, one.dtype, one.verdict) == ("long", "replica", "float32", "fail" if fault else "ok")
    if fault:
        assert (one.layer, one.tap) == (0, "q_rope")
        assert "tokens from 100" in one.note


# --- a model that makes much of rounding --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharp(tmp_path_factory) -> tuple[Path, Path]:
    """Very sharp attention: PyTorch's logits are moved a hundred times as far by rounding as usually, and its gradients."""
    source, checkpoint = (tmp_path_factory.mktemp("sharp") / name for name in ("source", "checkpoint"))
    write_checkpoint(source, ModelConfig.tiny())
    tensors = load_file(source / "model.safetensors")
    sharper = {name: tensor * 100 if "q_proj" in name else tensor for name, tensor in tensors.items()}
    save_file(sharper, source / "model.safetensors", {"format": "pt"})
    convert(source, checkpoint)
    return source, checkpoint


def _more_under_jit(right):
    """By a third of a percent, so that what follows from it is far larger."""
    return lambda q, *rest: right(q, *rest) * (1.003 if isinstance(q, jax.core.Tracer) else 1)


@pytest.mark.long
def test_a_recording_of_such_a_model_passes_what_passed(sharp, tmp_path):
    """What is recorded is not what the reference said when it was nudged."""
    said = [compare(sharp[0], sharp[1], record=tmp_path / "recording", forms=["jit"])]
    said.append(compare(Recording(tmp_path / "recording"), sharp[1], forms=["jit"]))
    assert [report.verdict for report in said] == ["pass", "pass"]
    assert said[0].free_run["max_abs"] > metrics.FREE_RUN_GATE * said[0].free_run["max_logit"]
    assert [said[0].free_run[key] for key in ("max_abs", "gate")] == [said[1].free_run[key] for key in ("max_abs", "gate")]


@pytest.mark.long
def test_a_form_may_be_as_far_as_rounding_moves_the_reference(sharp, monkeypatch):
    """And no further: a mistake is not excused by it. What rounding makes of gradients there is too much for a name."""
    reference, subject = Kept(sharp[0]), Candidate(sharp[1], source=sharp[0]).can.forms
    reference.updates = subject.updates
    report = run(subject, reference, ["jit", "remat block"])
    assert [form.verdict for form in report.forms] == ["ok", "ok"]
    assert report.forms[0].worst > metrics.FREE_RUN_GATE
    assert report.forms[1].worst > metrics.GRADIENT_GATE
    monkeypatch.setattr(attention, "sink_attention", _more_under_jit(attention.sink_attention))
    jax.clear_caches()
    report = run(subject, reference, ["jit"])
    monkeypatch.undo()
    jax.clear_caches()
    assert (report.verdict, report.first_divergence) == ("fail", {"layer": 0, "tap": "attn_core", "form": "jit"})
    named = {"rows-see-the-first": ("jit", "rows-see-the-first"), "remat-applies-a-block-twice": ("remat block", None)}
    for injected, (form, name) in named.items():
        with RUN_INJECTIONS[injected].injected():
            report = run(subject, reference, [form])
        assert (report.verdict, [one["name"] for one in report.findings]) == ("fail", [name])


def answered(margins, moved_margins, moved=1e-7) -> Answers:
    logits = np.ones((4, 5), np.float32)
    row = np.zeros(4, np.int64)
    some = [np.full(4, 1.0) * moved], [np.array(moved_margins)]
    return Answers([row], [np.array(margins)], [logits], None, [], [], (), None, None, *some)


@pytest.mark.parametrize(
    ("answers", "got", "verdict", "note"),
    [
        (answered([1, 1e-6, 1, 1], [0, 0, 0, 0]), [1, 1, 1, 1], "ok", ""),
        (answered([1, 1e-6, 1, 1], [0, 0, 0, 0]), [1, 1, 1, 2], "ok", "1 of 4 tokens are off where rounding alone decides"),
        (
            answered([1, 1e-6, 1, 1], [0, 0, 0, 0]),
            [1, 2, 2, 2],
            "incomplete",
            "3 of 4 tokens are off where rounding alone decides",
        ),
        (answered([1, 1, 1, 1e-6], [0, 0, 0, 0]), [1, 2, 1, 1], "fail", "row 0, 1 of 4 tokens, the first 1"),
        (answered([1, 1e-2, 1, 1], [0, 0, 0, 0]), [1, 1, 1, 2], "fail", "row 0, tokens from 3 on"),
        (answered([1, 1e-2, 1, 1], [0, 2e-3, 0, 0]), [1, 1, 1, 2], "ok", "1 of 4 tokens are off where rounding alone decides"),
        (answered([1, 1, 1, 1], [0, 0, 0, 0], moved=1e-3), [1, 1, 1, 1.009], "ok", ""),
        (answered([1, 1, 1, 1], [0, 0, 0, 0], moved=1e-3), [1, 1, 1, 1.011], "fail", "row 0, tokens from 3 on"),
        (
            answered([1, 1, 1, 1], [0, 0, 0, 0], moved=[1e-3, 1e-3, 1e-3, 0]),
            [1, 1, 1, 1.009],
            "fail",
            "row 0, tokens from 3 on",
        ),
        (
            answered([1, 1, 1, 1], [0, 0, 0, 0], moved=0.2),
            [-1] * 4,
            "incomplete",
            "4 of 4 tokens are off where rounding alone decides",
        ),
        (answered([1, 1, 1, 1], [0, 0, 0, 0]), [1, 1, 1, 1.009], "fail", "row 0, tokens from 3 on"),
    ],
)
def test_what_is_right_after_a_near_tie_is_judged_and_what_is_not_is_told(answers, got, verdict, note):
    """Which margins are near, and which logits are right, is what rounding makes of them in this model."""
    report = Report("source", "checkpoint", "model", 1, 0)
    arm = forms_arm._Arm(None, None, None, report, "model", None)  # type: ignore[arg-type]
    found = [np.ones((4, 5), np.float32) * np.array(got, np.float32)[:, None]]
    result = arm._judge("jit", "float32", "logits", found, answers)
    assert (result.verdict, result.note) == (verdict, note)


@pytest.mark.parametrize(("took", "verdict"), [(5, "ok"), (6, "fail")])
def test_at_a_near_tie_only_the_next_likeliest_token_may_come(took, verdict):
    made, far = np.array([1, 2, 3, 4]), np.array([1.0, 1.0, 1.0, 1e-6])
    answers = answered([1] * 4, [0] * 4)._replace(made=[made], made_margins=[far], made_seconds=[np.array([7, 7, 7, 5])])
    report = Report("source", "checkpoint", "model", 1, 0)
    arm = forms_arm._Arm(None, None, None, report, "model", None)  # type: ignore[arg-type]
    assert arm._judge("generate", "float32", "tokens", [np.array([1, 2, 3, took])], answers).verdict == verdict
    first = answers._replace(made_margins=[far[::-1]], made_seconds=[np.array([5, 7, 7, 7])])
    assert arm._judge("generate", "float32", "tokens", [np.array([5, 2, 3, 4])], first).verdict == "incomplete"


def test_experts_are_the_same_or_they_are_not():
    """However far a tap may be: their numbers are no sizes."""
    answers = answered([1] * 4, [0] * 4)._replace(moved_taps=[{(0, "expert_choice"): 1.0, (0, "q"): 1.0}])
    row = np.tile([[20, 25, 28, 31]], (4, 1))
    same = functools.partial(forms_arm._Arm._same, 0, answers=answers)
    assert same("expert_choice", [row[:, ::-1]], [row])
    assert not same("expert_choice", [row - [0, 0, 0, 1]], [row])
    assert same("q", [row - [0, 0, 0, 1.0]], [row])
