"""What fine-tuning is made of: answers are found, rows packed, batches cut into parts, and the load of experts is told."""

import dataclasses
import datetime
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from chatting import chat, write_chats, write_tokenizer
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from oss_model import InputError, Transformer, create_model_from_checkpoint
from oss_model.layouts import parameter_name
from oss_model.loss import cross_entropy
from oss_model.training import (
    Batch,
    ChatTemplate,
    Data,
    Document,
    Training,
    dead,
    epoch_rows,
    eval_step,
    evenness,
    load_balancing_loss,
    loop,
    optimizer,
    pack,
    read_documents,
    schedule,
    train,
    train_step,
)
from oss_model.training.loop import Log, evaluate

DAY = datetime.date(2026, 11, 27)


# --- chats ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a tokenizer and a template, and the tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    return directory, write_tokenizer(directory)


def spans(document: Document, tokenizer) -> list[str]:
    """Runs of tokens that count, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.counted.astype(np.int8), [0]])))
    return [
        tokenizer.decode(document.tokens[a:b].tolist(), skip_special_tokens=False)
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def test_answers_alone_count_whatever_the_template_leaves_out(home, tmp_path):
    directory, tokenizer = home
    file = write_chats(tmp_path / "x.jsonl", [chat("2 and 3?", "Five.", "and 4?", "It is nine: 5 + 4.", thinking="add")])
    [document] = read_documents(file, directory, DAY)
    assert spans(document, tokenizer) == [
        "<|channel|>final<|message|>Five.<|end|>",  # what was thought here is not there any more
        "<|channel|>analysis<|message|>add<|end|>",
        "<|channel|>final<|message|>It is nine: 5 + 4.<|return|>",
    ]
    whole = tokenizer.decode(document.tokens.tolist(), skip_special_tokens=False)
    assert whole.startswith("<|start|>user<|message|>2 and 3?<|end|><|start|>assistant<|channel|>final")
    assert whole.count("analysis") == 1


def test_what_a_user_says_of_assistants_is_no_answer(home, tmp_path):
    directory, tokenizer = home
    file = write_chats(tmp_path / "x.jsonl", [chat("assistant: hello, assistant", "Yes?")])
    [document] = read_documents(file, directory, DAY)
    assert spans(document, tokenizer) == ["<|channel|>final<|message|>Yes?<|return|>"]


def test_plain_documents_count_whole_and_end(home, tmp_path):
    directory, tokenizer = home
    [document] = read_documents(write_chats(tmp_path / "x.jsonl", [{"text": "Ünder 3 keys"}]), directory, DAY)
    assert document.counted.all()
    assert tokenizer.decode(document.tokens.tolist(), skip_special_tokens=False) == "Ünder 3 keys<|endoftext|>"


def test_every_wrong_line_is_named(home, tmp_path):
    directory, _ = home
    file = tmp_path / "x.jsonl"
    lines = [
        json.dumps(chat("a", "b")),
        "{",
        json.dumps({"prompt": "a"}),
        json.dumps(chat("a <|start|>assistant", "b")),
        "",
        json.dumps(chat("nobody answers")),
        json.dumps({"messages": [{"role": "tool", "content": "x"}]}),
        json.dumps({"messages": ["x"]}),
    ]
    file.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        read_documents(file, directory, DAY)
    assert [fault.removeprefix(f"{file}, line ") for fault in caught.value.faults] == [
        "2: expected JSON, found none (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        '3: expected {"messages": [...]} or {"text": "..."}, found {"prompt": "a"}',
        "4: expected text, found the control token <|start|> in it",
        "6: expected an answer of the assistant, found none",
        "7: the template refuses it: no role tool",
        '8: expected {"messages": [...]} or {"text": "..."}, found {"messages": ["x"]}',
    ]
    file.write_text("{\n" * 20)
    with pytest.raises(InputError) as caught:
        read_documents(file, directory, DAY)
    assert caught.value.faults[8:] == [f"{file}: 12 more lines that are wrong"]
    file.write_text("\n")
    with pytest.raises(InputError, match="expected a document a line, found none"):
        read_documents(file, directory, DAY)


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for n in range(999999999) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
    ],
)
def test_a_template_is_a_strangers_code(hostile):
    with pytest.raises(InputError, match="the template refuses it"):
        ChatTemplate(hostile, DAY).render(chat("a")["messages"])


def test_where_a_template_is_found_and_what_it_may_ask_for(tmp_path):
    with pytest.raises(InputError, match=r"expected chat_template.jinja, to render chats with, found none"):
        ChatTemplate.of(tmp_path, DAY)
    asks = '{{ strftime_now("%Y-%m-%d") }} {{ messages | tojson }} {{ reasoning_effort }}'
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": asks}]
    for said in (asks, named):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
        rendered = ChatTemplate.of(tmp_path, DAY).render([{"content": "<é>"}], reasoning_effort="high")
        assert rendered == '2026-11-27 [{"content": "<é>"}] high'
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(InputError, match="chat template: expected one that Jinja reads"):
        ChatTemplate.of(tmp_path, DAY)


def test_a_template_renders_as_transformers_renders_it(home):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = chat("2 and 3?", "Five.", "and 4?", "Nine.", thinking="add")["messages"]
    ours = ChatTemplate.of(home[0], DAY).render(messages)
    [theirs], _ = render_jinja_template([messages], chat_template=(home[0] / "chat_template.jinja").read_text())
    assert ours == theirs
    lines = [
        "{% for message in messages %}",
        "  {% if loop.index == 3 %}",
        "{% break %}",
        "  {% endif %}",
        "{{ message.content }}",
    ]
    spaced = "\n".join([*lines, "{% endfor %}", ""])
    [theirs], _ = render_jinja_template([messages], chat_template=spaced)
    assert ChatTemplate(spaced, DAY).render(messages) == theirs


# --- rows -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 24), min_size=1, max_size=40), st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_every_document_is_in_one_row_once(sizes, length):
    rng = np.random.default_rng(0)
    documents = [Document(rng.integers(1, 99, size).astype(np.int32), rng.random(size) < 0.5) for size in sizes]
    packed = pack(documents, length)
    found = []
    for tokens, counted, ids in zip(*packed, strict=True):
        assert not counted[ids == 0].any()
        assert not np.diff(np.flatnonzero(ids == 0)).size or (np.diff(np.flatnonzero(ids == 0)) == 1).all()
        for n in range(1, ids.max() + 1):
            at = np.flatnonzero(ids == n)
            assert at[-1] - at[0] + 1 == len(at)
            found.append((tokens[at].tolist(), counted[at].tolist()))
    want = [(one.tokens[:length].tolist(), one.counted[:length].tolist()) for one in documents]
    assert sorted(found) == sorted(want)
    # Best fit wastes less than half: two rows that are both at most half full would have been one.
    assert sum((ids > 0).sum() * 2 <= length for ids in packed.segment_ids) <= 1


def test_what_fits_exactly_shares_a_row():
    documents = [Document(np.full(size, size, np.int32), np.ones(size, bool)) for size in (3, 5, 8, 2, 6)]
    packed = pack(documents, 8)
    assert packed.tokens.tolist() == [[8] * 8, [6] * 6 + [2] * 2, [5] * 5 + [3] * 3]
    assert packed.segment_ids.tolist() == [[1] * 8, [1] * 6 + [2] * 2, [1] * 5 + [2] * 3]


def test_an_epoch_takes_every_row_once_in_an_order_of_its_own():
    taken = np.concatenate([epoch_rows(7, 4, step, seed=0) for step in range(1, 8)])  # four epochs
    epochs = taken.reshape(4, 7)
    assert (np.sort(epochs) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    np.testing.assert_array_equal(epoch_rows(7, 28, 1, seed=0), taken)
    assert (epoch_rows(7, 28, 1, seed=1) != taken).any()


# --- steps ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(even_checkpoints, even_cfg) -> Transformer:
    return create_model_from_checkpoint(even_checkpoints["float32"], even_cfg)


@pytest.fixture(autouse=True)
def as_usual():
    """optax's schedules rely on promotion, which the tests of the model forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Four rows, of which very different numbers of tokens count, and padding."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 512, (4, 17)).astype(np.int32)
    counted = rng.random((4, 17)) < np.array([[0.9], [0.1], [0.5], [0.3]])
    ids = np.where(np.arange(17) < np.array([[17], [9], [12], [15]]), 1, 0).astype(np.int32)
    return Batch(jnp.asarray(tokens), jnp.asarray(counted), jnp.asarray(ids))


def taken(model: Transformer, batch: Batch, **how):
    """What a step of plain descent takes from the parameters: their gradient."""
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    step = jax.jit(train_step(graphdef, optax.sgd(1.0), **how))
    after, _, found = step(params, optax.sgd(1.0).init(params), frozen, batch)
    return jax.tree.map(lambda a, b: np.asarray(a - b), params, after), found


@pytest.mark.long
def test_a_batch_in_parts_of_unequal_counts_is_the_batch(model, batch):
    whole, found = taken(model, batch)
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)

    def mean(params):
        total, count = cross_entropy(nnx.merge(graphdef, params, frozen), *batch)
        return total / count

    want, grads = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(found.loss, want, rtol=1e-6)
    for a, b, value in zip(*map(jax.tree.leaves, (whole, grads, params)), strict=True):
        rounding = 2**-23 * float(jnp.abs(value).max())  # of value - gradient, from which it is read
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-3) + rounding)
    parts = jax.tree.map(lambda a: a.reshape(2, 2, -1), batch)
    summed, again = taken(model, parts, accumulate=2)
    assert float(found.tokens) == float(again.tokens) > 0
    np.testing.assert_allclose(found.loss, again.loss, rtol=1e-6)
    np.testing.assert_allclose(found.norm, again.norm, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(a).max(), 1e-3))
    # The mean of the parts' means is something else, or this would not be a test.
    means = [taken(model, jax.tree.map(lambda a, n=n: a[n], parts))[1] for n in range(2)]
    assert abs(sum(float(one.loss) for one in means) / 2 - float(found.loss)) > 1e-3


@pytest.mark.long
def test_the_balancing_loss_is_the_references(model, batch):
    from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(12, 16)).astype(np.float32) * 3 for _ in range(3)]
    real = np.arange(12) % 6 < 4
    for mask in (None, real):
        want = load_balancing_loss_func(
            tuple(map(torch.tensor, logits)), 16, 4, None if mask is None else torch.tensor(mask.reshape(2, 6).astype(np.int64))
        )
        got = load_balancing_loss([jnp.asarray(a) for a in logits], 4, None if mask is None else jnp.asarray(mask))
        np.testing.assert_allclose(got, float(want), rtol=1e-5)
    plain, _ = taken(model, batch)
    evened, found = taken(model, batch, balance=0.5)
    name = lambda tree: tree["layers"][0]["mlp"]["router"]["weight"][...]  # noqa: E731
    assert np.abs(name(plain) - name(evened)).max() > 1e-4
    assert float(found.loss) == pytest.approx(float(taken(model, batch)[1].loss), rel=1e-6)  # said without it


def test_rates():
    def rates(steps: int, *how):
        return [float(np.asarray(schedule(1.0, steps, *how)(step))) for step in range(steps + 1)]

    assert rates(12, 10)[:3] == pytest.approx([0.1, 0.19, 0.28])
    assert rates(12, 10)[10:] == [1.0, 1.0, 1.0]
    assert rates(4, 0, "linear") == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert rates(6, 2, "cosine") == pytest.approx([0.1, 0.55, 1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)
    with pytest.raises(InputError, match="schedule: expected one of constant, linear, cosine, found 'step'"):
        schedule(1.0, 4, kind="step")


@pytest.mark.long
def test_matrices_decay_and_vectors_do_not(model):
    params = nnx.state(model, nnx.Param)
    descent = optimizer(1.0, weight_decay=0.1)
    updates, _ = descent.update(jax.tree.map(jnp.zeros_like, params), descent.init(params), params)
    moved = {".".join(map(str, path)): np.asarray(value.get_value()).any() for path, value in nnx.to_flat_state(updates)}
    held = {".".join(map(str, path)): np.asarray(value.get_value()).any() for path, value in nnx.to_flat_state(params)}
    assert all(held.values())  # what is zero decays unseen
    vectors = {name for name in held if name.endswith(("bias", "scale", "sinks"))}
    assert {name for name, value in moved.items() if not value} == vectors
    assert len(vectors) > 20
    plain, _ = optimizer(1.0).update(jax.tree.map(jnp.zeros_like, params), optimizer(1.0).init(params), params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(plain))


@pytest.mark.long
def test_held_out_loss_is_of_every_token_once_however_it_is_batched(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Whatever the batch is, each token but the first is predicted once, and padding never counts." * 3)
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    look = jax.jit(eval_step(graphdef))
    found = {}
    for batch in (1, 3, 4):
        data = Data(text, tmp_path, batch, 32, DAY)
        assert sum(int(np.asarray(one.segment_ids[:, 1:] > 0).sum()) for one in data.all()) == len(data.tokens) - 1
        assert {one.tokens.shape for one in data.all()} == {(batch, 33)}  # compiled once
        found[batch] = evaluate(lambda one: look(params, frozen, one), data)
    tokens = Data(text, tmp_path, 1, 32, DAY).tokens
    losses = [cross_entropy(model, jnp.asarray(tokens[None, at : at + 33])) for at in range(0, len(tokens) - 1, 32)]
    want = sum(float(total) for total, _ in losses) / sum(float(count) for _, count in losses)
    for one in found.values():
        assert one["held_out_loss"] == pytest.approx(want, rel=1e-5)
        assert one["dead_experts"] == found[1]["dead_experts"]
        np.testing.assert_allclose(one["router_evenness"], found[1]["router_evenness"])


def test_an_even_load_is_1_and_one_expert_for_all_is_0():
    load = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(evenness(load), [1.0, 0.0, 0.5, 0.0], atol=1e-12)
    assert dead(load).tolist() == [0, 3, 2, 4]


def test_the_load_is_that_of_the_tokens_that_are_no_padding(model, batch):
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    *_, load = jax.jit(eval_step(graphdef))(params, frozen, batch)
    real = int((np.asarray(batch.segment_ids)[:, :-1] != 0).sum())
    assert np.asarray(load).sum(axis=1).tolist() == [real * model.cfg.num_experts_per_tok] * 2


def test_a_log_is_taken_back_to_the_step_that_goes_on(tmp_path):
    log = Log(tmp_path, 0)
    for step in range(1, 6):
        log.add(step, {"loss": 1.0 / step})
    with log.file.open("a") as file:
        file.write('{"step": 6, "lo')  # a kill
    Log(tmp_path, 3).add(4, {"loss": 9.0})
    lines = [json.loads(line) for line in log.file.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]


@pytest.mark.long
def test_the_best_step_is_kept_and_is_the_result(even_checkpoints, even_cfg, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The second of three looks is the best one, and not the last." * 2)
    data, mesh = Data(text, tmp_path, 8, 16, DAY), jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    looks = iter([3.0, 1.0, 2.0])

    def look(_looked_at, _held_out):
        return {"held_out_loss": next(looks), "router_evenness": [1.0], "dead_experts": [0]}

    def result(run: str, steps: int, best: bool = False) -> list[np.ndarray]:
        """The sinks, which alone are trained."""
        model, sinks = create_model_from_checkpoint(even_checkpoints["float32"], even_cfg, mesh), nnx.PathContains("sinks")
        how = Training(steps, save_every=2, best=best)
        model = train(model, sinks, data, data, how, mesh, tmp_path / run, lambda _: None)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, sinks))]

    monkeypatch.setattr(loop, "evaluate", look)
    best = result("best", 6, best=True)
    assert {path.name for path in (tmp_path / "best/steps").iterdir() if path.name.isdigit()} == {"4", "6"}
    looks = iter([3.0, 1.0])
    four = result("four", 4)
    assert all(np.array_equal(a, b) for a, b in zip(best, four, strict=True))
    looks = iter([3.0, 1.0, 2.0])
    assert any((a != b).any() for a, b in zip(result("last", 6), four, strict=True))


@pytest.mark.long
def test_layers_in_one_loop_are_trained_as_single_ones_and_old_runs_stay_as_they_were(even_cfg, tmp_path, monkeypatch):
    """Their weight decay, the balancing loss and the router's load too, each of which looks at single layers."""
    cfg = dataclasses.replace(even_cfg, num_hidden_layers=4, layer_types=(), param_dtype="float32", remat="none")
    text, mesh = tmp_path / "text.txt", jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    text.write_text("Each layer is compiled once, or all of them in one loop." * 4)
    data, once = Data(text, tmp_path, 8, 16, DAY), loop.repeats

    def result(run: str, steps: int, single: bool, trained=nnx.Param) -> dict[str, np.ndarray]:
        monkeypatch.setattr(loop, "repeats", (lambda *_: False) if single else once)
        model = create_model_from_checkpoint(checkpoint, cfg, mesh)
        how = Training(steps, 1e-2, warmup=0, weight_decay=0.5, balance=0.1, save_every=2)
        model = train(model, trained, data, data, how, mesh, tmp_path / run, lambda _: None)
        assert type(model) is Transformer
        return {parameter_name(path): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model))}

    def lines(run: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]

    checkpoint = tmp_path / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(checkpoint, nnx.state(Transformer(cfg, rngs=nnx.Rngs(0))))
    single, looped = result("single", 4, True), result("looped", 4, False)
    one_each = {run: loop._one_each(tmp_path / run / "steps/4", 2) for run in ("single", "looped")}
    assert one_each == {"single": True, "looped": False}
    assert single.keys() == looped.keys()
    for name, value in single.items():
        # Where a gradient is next to nothing, Adam makes much of its rounding.
        assert np.quantile(np.abs(looped[name] - value), 0.99) < 1e-4, name
    norms = [name for name in single if name.endswith(".scale") and name.startswith("layers")]
    assert all(np.abs(single[name] - 1).max() > 1e-3 for name in norms)  # trained, so decay would have been seen
    for one, other in zip(lines("single"), lines("looped"), strict=True):
        for name in ("loss", "gradient_norm", "held_out_loss", "router_evenness", "dead_experts"):
            if name in one:
                np.testing.assert_allclose(other[name], one[name], rtol=1e-4)
    assert len(lines("looped")[-1]["router_evenness"]) == 4

    for run, whole in (("single in two parts", single), ("looped in two parts", looped)):
        result(run, 2, whole is single)
        again = result(run, 4, False)
        assert loop._one_each(tmp_path / run / "steps/4", 2) == (whole is single)
        assert all(value.tobytes() == again[name].tobytes() for name, value in whole.items())

    full = lambda path, _: path[:2] in (("layers", 1), ("layers", 3))  # noqa: E731
    result("full ones", 2, True, full)
    result("full ones", 4, False, full)  # as many as a turn has, and yet a layer each
