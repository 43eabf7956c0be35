"""What the arms ask of the two sides and make of the answers, on a model in NumPy: quick enough to be wrong in every way."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from oss_model import InputError
from parity import compare, metrics, nudging, walk
from parity.gradients import compare_gradients
from parity.judge import Judge
from parity.prompts import Prompt, random_prompt
from parity.protocols import Arrays, Expected, LayerCan, Moved, PortCan, Sizes, Unanswered
from parity.reports.report import Report

HIDDEN, EXPERTS, K, VOCAB, LAYERS, WINDOW = 12, 7, 2, 17, 4, 3
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def parameters(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"embedding.weight": (VOCAB, HIDDEN), "lm_head.weight": (HIDDEN, VOCAB)}
    for n in range(LAYERS):
        shapes |= {f"layers.{n}.{name}": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"layers.{n}.router": (HIDDEN, EXPERTS), f"layers.{n}.experts": (EXPERTS, HIDDEN, HIDDEN)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-5))


def times(x: np.ndarray, matrix: np.ndarray, reordered: bool) -> np.ndarray:
    """x @ matrix; `reordered` adds the same numbers up the other way round."""
    return x[..., ::-1] @ matrix[::-1] if reordered else x @ matrix


class Layer:
    def __init__(self, model: "Model", n: int):
        self.model, self.n = model, n
        self.p = {name: model.values[f"layers.{n}.{name}"] for name in (*"qkvo", "router", "experts")}

    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        given, taps, dtype = forced or {}, {}, x.dtype

        def seen(name: str, value: np.ndarray) -> np.ndarray:
            if value.dtype == np.float32:
                value = value.astype(dtype).astype(np.float32)
            value = self.model.change(self.n, name, value, forced)
            taps[name] = value if value.dtype != np.float32 else value.astype(dtype)
            fits = name in given and given[name].size == value.size
            return given[name].reshape(value.shape).astype(value.dtype) if fits else value

        x = x.astype(np.float32)
        by = lambda a, name: times(a, self.p[name], self.model.reordered)  # noqa: E731
        h = seen("attn_norm", norm(x))
        q, k, v = (seen(name, by(h, name).reshape(*x.shape[:2], 2, -1)) for name in "qkv")
        q, k = seen("q_rope", 2 * q), seen("k_rope", 2 * k)
        before = np.arange(1, x.shape[1] + 1, dtype=np.float32)[None, :, None, None]
        core = seen("attn_core", np.cumsum(v + np.tanh(q * k), axis=1) / before)
        x = x + seen("attn_out", by(core.reshape(x.shape), "o") / 10)
        h = seen("mlp_norm", norm(x)).reshape(-1, HIDDEN)
        logits = seen("router_logits", by(h, "router"))
        choice = seen("expert_choice", np.argsort(-logits, axis=-1, kind="stable")[:, :K])
        chosen = np.exp(np.take_along_axis(logits, choice, -1))
        weights = seen("expert_weights", chosen / chosen.sum(-1, keepdims=True))
        seen("layer_out", x + seen("mlp_out", self.experts(h, choice, weights).reshape(x.shape)))
        return taps

    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        each = np.einsum("th,tkhj->tkj", x.astype(np.float32), self.p["experts"][choice])
        return np.einsum("tkj,tk->tj", each, weights.astype(np.float32))

    def parameters(self, packed: bool):
        return self.model.expected(f"layers.{self.n}.")

    @property
    def can(self) -> LayerCan:
        return LayerCan()


class Model:
    """Both sides of a comparison: as a port its sums come in another order, and `change` may make it wrong.

    `change(layer, tap, value, forced)` gives the value that a tap has instead.
    """

    sizes = Sizes(LAYERS, EXPERTS, VOCAB, WINDOW, 64)
    rope_positions = np.arange(64)
    settings, prompt, differentiates = {}, None, None

    @property
    def can(self) -> PortCan:
        return PortCan()

    def faults(self, port, asked):
        return []

    def elsewhere(self, n, name):
        return ()

    def __init__(self, change=lambda layer, tap, value, forced: value, reordered: bool = False, values: Arrays | None = None):
        self.change, self.reordered = change, reordered
        self.values = parameters() if values is None else values
        self.stored = {name: (value.shape, value.dtype) for name, value in self.values.items()}

    def __str__(self) -> str:
        return "a model in NumPy"

    def restore(self, names) -> Arrays:
        return {name: self.values[name] for name in names}

    def expected(self, prefix: str):
        for name, value in self.values.items():
            if name.startswith(prefix):
                yield Expected(name, value.shape, lambda got, value=value: "" if (got == value).all() else "differs", lambda: 0)

    def first_parameters(self):
        return self.expected("embedding.")

    def last_parameters(self):
        return self.expected("lm_head.")

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return self.change(None, "embedding", self.values["embedding.weight"][tokens], None).astype(dtype)

    def layer(self, n: int) -> Layer:
        return Layer(self, n)

    def moved(self, tokens: np.ndarray) -> Moved:
        return nudging.moved(self, [tokens])[0]

    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        normed = self.change(None, "final_norm", norm(x.astype(np.float32)), forced)
        given = forced["final_norm"].astype(np.float32) if forced else normed
        logits = self.change(None, "logits", times(given, self.values["lm_head.weight"], self.reordered), forced)
        return {"final_norm": normed.astype(x.dtype), "logits": logits.astype(x.dtype)}

    def rope_tables(self, positions: np.ndarray):
        angle = positions[:, None].astype(np.float32) * np.float32(0.5)
        tables = self.change(None, "rope", np.cos(angle), None), np.sin(angle)
        return tables if self.reordered else (np.full(1, 0.5, np.float32), *tables)


class Decoder(Layer):
    @property
    def can(self) -> LayerCan:
        return LayerCan(decode=self)

    def decode(self, x: np.ndarray, choice: np.ndarray) -> np.ndarray:
        found = self.run(x, {"expert_choice": choice})["layer_out"]
        return self.model.change(self.n, "decode", found, None)


class Whole(Model):
    """It can do all that can be asked: decode, differentiate (any numbers do), and say what it takes."""

    @property
    def can(self) -> PortCan:
        return PortCan(gradients=self, least_memory=self)

    @property
    def differentiates(self):
        return self

    def of(self, replica):
        raise Unanswered("it is never wrong on purpose")

    def layer(self, n: int) -> Layer:
        return Decoder(self, n)

    def gradients(self, tokens: np.ndarray, routing: list[np.ndarray] | None = None):
        found = {name: self.change(None, f"d {name}", value * 2, None) for name, value in self.values.items()}
        choices = [np.zeros((tokens.size, K), np.int64)] * LAYERS
        return found if self.reordered else (found, choices)

    def least_memory(self, batch: int, length: int) -> int:
        return 1 << 20


ORACLE = Whole()
TOKENS = 4 * WINDOW


def wrong(layer: int | None, tap: str, make=lambda value: value * np.float32(1.1), when=lambda forced: True):
    """A change of one tap of one layer, where `when` says so of the forced values."""
    return lambda at, name, value, forced: make(value) if (at, name) == (layer, tap) and when(forced) else value


def judged(change=lambda layer, tap, value, forced: value, **options):
    return compare(ORACLE, Whole(change, reordered=True), tokens=TOKENS, **options)


EVERYTHING = {"dtype": "bfloat16", "decode": True, "gradients": True, "max_memory": 1 << 40}


def test_a_right_port_passes_every_arm():
    report = judged(**EVERYTHING)
    assert (report.verdict, report.incomplete, report.first_divergence) == ("pass", [], None)
    assert 0 < max(tap.worst_token_rel_l2 for tap in report.taps) < 4e-6  # sums in another order are noise
    assert len(report.gradients) == len(ORACLE.values)
    assert [tap.layer for tap in report.taps if tap.tap == "decode"] == list(range(LAYERS))
    assert report.precision == "ok"


# --- routing -------------------------------------------------------------------------------------------------------


def tied(nudge: float, layer: int = 0):
    """Values whose first two experts of a layer are an exact tie, and a port whose logits of the second are `nudge` higher."""
    values = parameters()
    values[f"layers.{layer}.router"][:, 1] = values[f"layers.{layer}.router"][:, 0]

    def nudged(logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        logits[:, 1] += np.float32(nudge)
        return logits

    return values, wrong(layer, "router_logits", nudged)


@pytest.mark.parametrize("layers", [True, False])
def test_flips_that_follow_from_a_near_tie_are_told_and_fail_nothing(layers):
    """Noise decides in the first layer, on three rows; the streams part, and no later margin is anywhere near noise."""
    values, change = tied(nudge=2e-6)
    port = Whole(change, reordered=True, values=values)
    report = compare(Whole(values=values), port, prompt=prompt_of(24, 24, 10), layers=layers)
    assert (report.verdict, report.first_divergence) == ("pass", None)
    assert report.judged_flips
    assert all((flip["layer"], flip["margin"], flip["explained"]) == (0, 0.0, True) for flip in report.judged_flips)
    first = [flip for flip in report.flips if flip["layer"] == 0]
    assert first == [flip | {"follows": None} for flip in report.judged_flips]
    later = [flip for flip in report.flips if flip["layer"] > 0]
    assert max(flip["margin"] for flip in later) > 1
    assert {flip["layer"] for flip in later} == {1, 2, 3}
    parted: dict[int, int] = {}
    for flip in report.flips:
        cause = flip["follows"]
        if cause is not None:
            assert flip["explained"]
            assert parted[cause["token"]] == cause["layer"] < flip["layer"]
            assert cause["token"] == flip["token"] if flip["token"] in parted else cause["token"] < flip["token"]
            assert cause["token"] // 24 == flip["token"] // 24  # never of another row
        parted.setdefault(flip["token"], flip["layer"])
    assert any(flip["follows"]["token"] != flip["token"] for flip in later)
    assert max(flip["token"] for flip in report.flips) < 24 + 24 + 10
    json.loads(report.to_json())


def test_ties_and_reordered_sums_pass():
    values = parameters()
    for n in range(LAYERS):  # three pairs of experts that nothing tells apart, in every layer
        for one, other in ((0, 1), (2, 3), (4, 5)):
            values[f"layers.{n}.router"][:, other] = values[f"layers.{n}.router"][:, one]
    assert compare(Whole(values=values), Whole(reordered=True, values=values), tokens=64).verdict == "pass"
    highest = wrong(2, "expert_choice", lambda choice: np.where(choice == 0, 1, np.where(choice == 1, 0, choice)))
    report = compare(Whole(values=values), Whole(highest, reordered=True, values=values), tokens=64)
    assert any(flip["layer"] == 2 for flip in report.judged_flips)
    assert report.verdict == "pass"


def no_better_than_the_next(choice: np.ndarray) -> np.ndarray:
    return (choice + 1) % EXPERTS


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_router_at_fault_fails_at_its_place(layers, before):
    """With or without an explained flip before it, which parts the streams."""
    values, near_tie = tied(nudge=2e-6)
    choose = wrong(2, "expert_choice", no_better_than_the_next, when=lambda forced: not layers or forced is not None)
    port = Whole(
        lambda at, name, value, forced: choose(at, name, near_tie(at, name, value, forced) if before else value, forced),
        reordered=True,
        values=values,
    )
    report = compare(Whole(values=values), port, tokens=24, layers=layers)
    assert (report.verdict, report.first_divergence) == ("fail", {"layer": 2, "tap": "expert_choice"})
    assert {flip["layer"] for flip in report.judged_flips if not flip["explained"]} <= {2}
    assert any(flip["layer"] == 0 for flip in report.judged_flips) == before
    assert report.free_run["verdict"] == "ok"  # the reference's routing was replayed
    assert "first divergence: layer 2, expert_choice" in report.table()


def test_a_router_that_is_wrong_only_when_nothing_is_forced_fails_at_its_place():
    report = judged(wrong(1, "expert_choice", no_better_than_the_next, when=lambda forced: forced is None))
    assert all(tap.verdict == "ok" for tap in report.taps)
    assert (report.verdict, report.first_divergence) == ("fail", {"layer": 1, "tap": "expert_choice"})
    assert {flip["layer"] for flip in report.judged_flips} == {1}
    assert "expert flips  routing replayed 12: 0 near-ties, 12 not explained   FAIL" in report.table()


@pytest.mark.parametrize("layers", [True, False])
def test_a_router_that_chooses_too_few_fails_at_its_place(layers):
    report = judged(wrong(1, "expert_choice", lambda choice: choice[:, :1]), layers=layers)
    assert report.first_divergence == {"layer": 1, "tap": "expert_choice"}
    (wrong_tap,) = (tap for tap in report.taps if (tap.layer, tap.tap) == (1, "expert_choice"))
    assert wrong_tap.note == "shape [12, 1], should be [12, 2]"


def test_an_expert_chosen_twice_is_a_fault_that_json_can_hold():
    report = judged(wrong(1, "expert_choice", lambda choice: choice[:, [0, 0]]), layers=False)
    assert report.first_divergence == {"layer": 1, "tap": "expert_choice"}
    assert json.loads(report.to_json())["judged_flips"][0]["margin"] == metrics.WORST


# --- a fault in one arm alone --------------------------------------------------------------------------------------


def test_a_free_run_that_fails_alone_says_from_which_layer_on():
    """Wrong only where a component is not fed the reference's input: none is at fault by itself."""
    report = judged(wrong(2, "attn_out", when=lambda forced: forced is None or "attn_out" not in forced))
    assert all(tap.verdict == "ok" for tap in report.taps)
    assert report.free_run["verdict"] == "fail"
    assert report.first_divergence == {"layer": 2, "tap": "free run"}
    assert report.growth[1]["replayed"] < metrics.FREE_RUN_NOISE
    assert report.growth[2]["replayed"] > 1e-3


def test_a_free_run_that_is_wrong_after_the_layers_says_so():
    report = judged(wrong(None, "logits", when=lambda forced: not forced))
    assert all(tap.verdict == "ok" for tap in report.taps)
    assert report.first_divergence == {"layer": None, "tap": "logits"}


def test_wrong_gradients_are_placed_at_the_last_layer_that_has_them():
    def stopped(at, name, value, forced):
        """As if no gradient flowed through the q of layer 2: those of all before it are wrong too."""
        before = ("d embedding", "d layers.0.", "d layers.1.", "d layers.2.q")
        return value * np.float32(0.5) if name.startswith(before) else value

    report = judged(stopped, gradients=True)
    assert report.first_divergence == {"layer": 2, "tap": "gradients"}
    assert "FAIL: layers.2.q, layers.1." in report.table()


# --- what a port cannot do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"gradients": True}, "gradients: the port has none (parity.protocols.SupportsGradients): they were not compared"),
        ({"decode": True}, "decode: the port has layers that cannot (parity.protocols.SupportsDecode): they were not decoded"),
    ],
)
def test_what_a_port_cannot_do_is_incomplete_by_name(asked, named):
    """Attributes named like those of our own candidate change nothing: nothing is read from there."""
    port = Model(reordered=True)
    port.path, port.cfg = "/a/right/checkpoint", object()
    report = compare(ORACLE, port, tokens=TOKENS, **asked)
    assert (report.verdict, report.exit_code, report.incomplete) == ("incomplete", 3, [named])
    assert (report.gradients, report.checkpoint) == ([], "a model in NumPy")
    assert f"incomplete: {named}" in report.table()


def test_a_reference_without_gradients_is_incomplete_by_name():
    report = compare(Model(), Whole(reordered=True), tokens=TOKENS, gradients=True)
    assert report.incomplete == ["gradients: the reference has none: they were not compared"]
    assert report.verdict == "incomplete"


def test_gradients_that_are_not_given_are_not_passed_over(monkeypatch):
    right = Whole.gradients

    def some(self, tokens, routing=None):
        found = right(self, tokens, routing)
        return {name: value for name, value in found.items() if "router" not in name} if self.reordered else found

    monkeypatch.setattr(Whole, "gradients", some)
    report = judged(gradients=True)
    assert report.incomplete == ["gradients: the port gave none of 4 parameters, the first layers.0.router"]
    assert (report.verdict, len(report.gradients)) == ("incomplete", len(ORACLE.values) - 4)


def test_a_gradient_of_another_shape_fails():
    report = judged(wrong(None, "d layers.1.q", lambda value: value[:1]), gradients=True)
    assert [one["name"] for one in report.gradients if one["verdict"] == "fail"] == ["layers.1.q"]
    json.loads(report.to_json())


def test_gradients_that_are_zero_on_both_sides_are_equal():
    """Of an expert that no token goes to, or of the router with one expert a token."""
    zero, some = np.zeros((2, 3), np.float32), np.full((2, 3), 1e-30, np.float32)
    want, got = {"idle": zero, "appeared": zero, "vanished": some}, {"idle": zero, "appeared": some, "vanished": zero}
    found = {one["name"]: (one["relative_l2"], one["verdict"]) for one in compare_gradients(want, got, want)}
    assert found == {"idle": (0.0, "ok"), "appeared": (metrics.WORST, "fail"), "vanished": (1.0, "fail")}


def test_a_gradient_may_be_as_far_as_rounding_moves_the_reference():
    """Where that is as far as it is long, it tells nothing."""
    want, got = {"a": np.ones(4, np.float32)}, {"a": np.full(4, 1.05, np.float32)}
    verdicts = [compare_gradients(want, got, want, {"a": moved})[0]["verdict"] for moved in (0, 0.004, 0.006, 0.09, 0.1)]
    assert verdicts == ["fail", "fail", "ok", "ok", "incomplete"]
    for wrong in (np.zeros(4, np.float32), -got["a"]):
        assert [compare_gradients(want, {"a": wrong}, want, {"a": moved})[0]["verdict"] for moved in (0.09, 0.1)] == [
            "fail",
            "incomplete",
        ]


def test_a_flip_that_rounding_makes_of_the_reference_is_a_near_tie():
    judge = Judge(random_prompt(9, TOKENS, 0), Report("source", "checkpoint", "model", 1, 0))
    flip = {"token": 1, "lost": [0], "took": [1], "margin": 1e-2, "explained": False}
    judge.report.judged_flips = [{"layer": n} | flip for n in (0, 1)]
    judge.report.free_run = {"gate": 1e-4, "max_abs": 1e-3, "max_logit": 1.0}
    routing = np.zeros((2, TOKENS))
    routing[1, 1] = 2e-3
    judge.amplified(Moved(np.full((1, TOKENS), 2e-4), routing, np.ones_like(routing), {}))
    assert [flip["explained"] for flip in judge.report.judged_flips] == [False, True]
    assert (judge.report.free_run["verdict"], judge.report.free_run["gate"]) == ("ok", pytest.approx(2e-3))


def test_a_tap_that_is_zero_on_both_sides_is_exact_in_every_dtype():
    idle = parameters() | {f"layers.{n}.experts": np.zeros((EXPERTS, HIDDEN, HIDDEN), np.float32) for n in range(LAYERS)}
    report = compare(Whole(values=idle), Whole(values=idle, reordered=True), tokens=TOKENS, dtype="bfloat16")
    assert report.verdict == "pass"
    assert {tap.port_over_reference for tap in report.taps if tap.tap == "mlp_out"} == {1.0}


def prompt_of(*lengths: int) -> Prompt:
    valid = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    return Prompt(np.random.default_rng(0).integers(0, VOCAB, valid.shape), valid)


@pytest.mark.parametrize("asked", [{"tokens": 1}, {"prompt": prompt_of(1, 1)}])
def test_gradients_of_a_prompt_without_a_next_token_are_refused_before_anything_runs(asked, tmp_path):
    with pytest.raises(InputError) as e:
        compare(ORACLE, None, gradients=True, record=tmp_path / "recording", **asked)  # no port: nothing may be asked of it
    assert e.value.faults == [
        "--gradients: expected a prompt of at least 2 tokens, since the loss is that of the next one, found 1;"
        " use --tokens 2 or more, or a longer prompt"
    ]
    assert not (tmp_path / "recording").exists()


def test_gradients_are_of_the_longest_row(monkeypatch):
    asked, right = [], Whole.gradients
    monkeypatch.setattr(Whole, "gradients", lambda self, tokens, *rest: (asked.append(tokens), right(self, tokens, *rest))[1])
    prompt = prompt_of(1, 9, 4)
    report = compare(ORACLE, Whole(reordered=True), prompt=prompt, gradients=True)
    assert (report.verdict, len(report.gradients)) == ("pass", len(ORACLE.values))
    assert len(asked) == 2
    for tokens in asked:
        np.testing.assert_array_equal(tokens, prompt.tokens[1:2])


def test_memory_is_not_promised_for_a_port_that_does_not_say_what_it_takes():
    port = Model(reordered=True)
    port.cfg = object()
    with pytest.raises(InputError) as e:
        compare(ORACLE, port, tokens=TOKENS, max_memory=1 << 40)
    assert e.value.faults == [
        "--max-memory: expected a port that says what it takes (parity.protocols.SupportsLeastMemory), found a model in NumPy,"
        " which does not; leave it out"
    ]
    with pytest.raises(InputError, match=r"--max-memory: expected at least 1M .*, found 0M"):
        judged(max_memory=1 << 19)


def test_a_port_that_computes_in_float32_is_not_judged_in_bfloat16(monkeypatch):
    run = Layer.run

    def wide(self, x, forced=None):
        return run(self, x.astype(np.float32) if self.model.reordered else x, forced)

    monkeypatch.setattr(Layer, "run", wide)
    report = judged(dtype="bfloat16")
    assert report.incomplete == ["precision: asked for bfloat16, the port computed in float32: it was not judged"]
    assert report.verdict == "incomplete"
    assert "bfloat16" not in report.free_run
    assert all(tap.port_over_reference is None for tap in report.taps if tap.layer is not None)


def test_precision_without_its_taps_is_incomplete():
    report = judged(dtype="bfloat16", layers=False)
    assert report.verdict == "incomplete"
    assert report.incomplete == [
        "precision: it is judged tap by tap, which takes --layers: only the free run was made in bfloat16"
    ]


@pytest.mark.parametrize("tap", ["router_logits", "expert_choice", "layer_out"])
def test_taps_that_the_free_run_goes_on_from(monkeypatch, tap):
    run = Layer.run

    def without(self, x, forced=None):
        found = run(self, x, forced)
        return {name: value for name, value in found.items() if name != tap} if self.model.reordered else found

    monkeypatch.setattr(Layer, "run", without)
    for layers in (True, False):
        report = judged(layers=layers)
        assert report.verdict == "incomplete"
        assert f"free run: the port shows no {tap}, so it was not run to its end" in report.incomplete


@pytest.mark.parametrize("times", [1, 1000])
def test_a_tap_that_fails_is_measured_twice(sources, checkpoints, monkeypatch, times):
    """A wrong value that does not come again says nothing of the port, and is not called a mistake of it."""
    seen, right = [], walk.Call._hook

    def hook(self, layer, name, value):
        if (layer, name) == (2, "attn_core"):
            seen.append(1)
            value = value * jnp.asarray(1.01 if len(seen) <= times else 1, value.dtype)
        return right(self, layer, name, value)

    monkeypatch.setattr(walk.Call, "_hook", hook)
    report = compare(sources["hf"], checkpoints["bfloat16"])
    (tap,) = [tap for tap in report.taps if (tap.layer, tap.tap) == (2, "attn_core")]
    if times == 1:
        assert (report.verdict, tap.verdict, report.first_divergence, report.findings) == ("incomplete", "incomplete", None, [])
        assert tap.note.startswith("not reproducible: 1.0e-02 the first time, ")
        assert report.incomplete == [f"layer 2 attn_core: {tap.note}"]
    else:
        assert (report.verdict, tap.verdict, report.explained) == ("fail", "fail", "layer 2 attn_core")
