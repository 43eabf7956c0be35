"""Generation: what transformers generates, what the whole forward pass would choose, and nothing after the end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oss_model import InputError, Transformer, create_model_from_checkpoint, eos_tokens, generate, generation
from oss_model.generation import _choose, _faults, _up

PROMPTS = [[7, 301, 44, 9, 250, 13, 2, 91, 433, 120, 18, 77, 203, 64, 5], [400, 3], list(range(20, 60))]


@pytest.fixture(scope="module")
def model(checkpoints, cfg):
    return create_model_from_checkpoint(checkpoints["mxfp4"], cfg)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, 14)


@pytest.mark.long
def test_greedy_is_what_transformers_generates(sources, greedy):
    """Its own decoder, attention mask and cache, on the same MXFP4 checkpoint, padded on the left."""
    import torch
    from transformers import GptOssForCausalLM, Mxfp4Config

    reference = GptOssForCausalLM.from_pretrained(
        sources["hf"], dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    ).float()
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS])
    made = reference.generate(
        ids, attention_mask=mask, max_new_tokens=14, min_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert made[:, longest:].tolist() == greedy


def test_greedy_takes_the_likeliest_token_of_the_whole_forward_pass(model, greedy):
    forward = jax.jit(lambda tokens: model(tokens))
    for prompt, made in zip(PROMPTS[:2], greedy, strict=False):
        for n in range(0, 14, 4):
            row = np.zeros(64, np.int32)
            row[: len(prompt) + n] = prompt + made[:n]
            assert int(forward(jnp.asarray(row)[None])[0, len(prompt) + n - 1].argmax()) == made[n]


def test_a_row_ends_with_the_first_of_the_eos_tokens(model, greedy):
    ends = [greedy[0][4], greedy[1][9]]
    cut = generate(model, PROMPTS, 14, eos=ends)
    for row, whole in zip(cut, greedy, strict=True):
        first = next((n for n, token in enumerate(whole) if token in ends), 13)
        assert row == whole[: first + 1]
    assert len(cut[0]) <= 5


@pytest.mark.long
def test_sampling_is_reproducible_and_one_candidate_is_greedy(model, greedy):
    first, again, other = (generate(model, PROMPTS, 8, temperature=1.5, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert generate(model, PROMPTS, 8, temperature=1.5, top_k=1, key=jax.random.key(2)) == [row[:8] for row in greedy]
    assert generate(model, PROMPTS, 8, temperature=1, top_p=1e-6, key=jax.random.key(2)) == [row[:8] for row in greedy]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, None, None, [0.5, 0.25, 0.15, 0.1]),
        (0.5, None, None, np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
        (1.0, 2, None, [2 / 3, 1 / 3, 0, 0]),
        (1.0, None, 0.8, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),  # 0.5 + 0.25 is not yet 0.8
        (1.0, 3, 0.7, [2 / 3, 1 / 3, 0, 0]),  # of the three left, 0.556 and 0.278 make 0.7
    ],
)
def test_tokens_come_with_the_right_probability(temperature, top_k, top_p, expected):
    logits = jnp.log(jnp.broadcast_to(jnp.array([0.5, 0.25, 0.15, 0.1]), (40_000, 4)))
    drawn = _choose(logits, jax.random.key(3), temperature, top_k, top_p)
    found = np.bincount(np.asarray(drawn), minlength=4) / 40_000
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / 40_000))
    assert all(found[np.asarray(expected) == 0] == 0)


def test_the_end_tokens_of_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 200002}))
    assert eos_tokens(tmp_path) == (200002,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [200002, 199999, 200012]}))
    assert eos_tokens(tmp_path) == (200002, 199999, 200012)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": None}))
    with pytest.raises(InputError, match=r"expected eos_token_id in generation_config.json or config.json, found none"):
        eos_tokens(tmp_path)


def test_every_bad_argument_is_named(model):
    with pytest.raises(InputError) as caught:
        generate(model, [[1], []], 0, temperature=0.7, top_k=0, top_p=1.5)
    assert caught.value.faults == [
        "prompts: expected one or more, each of one token or more, found an empty one or none",
        "max_new_tokens: expected a whole number, 1 or more, found 0",
        "top_k: expected 1 to 509, found 0",
        "top_p: expected more than 0, at most 1, found 1.5",
        "key: expected a jax.random.key where temperature is not 0, found None",
    ]
    for token in (509, 1.5):
        with pytest.raises(InputError, match=f"prompts: expected token ids, whole numbers from 0 to 508, found {token}"):
            generate(model, np.array([[token]]), 1)
    assert _faults(model, [[1]], 1.5, 0.0, None, None, None) == [
        "max_new_tokens: expected a whole number, 1 or more, found 1.5"
    ]


def test_more_positions_than_the_model_was_made_for_are_refused(model):
    with pytest.raises(InputError) as caught:
        generate(model, [[1], [1] * 32762], 7)
    assert caught.value.faults == [
        "prompts: expected at most 32768 positions (max_position_embeddings), found 32762 of the longest prompt and 7 new ones:"
        " shorten it, or ask for fewer"
    ]
    assert not _faults(model, [[1], [1] * 32762], 6, 0, None, None, None)


@pytest.mark.long
def test_few_compilations_serve_prompts_of_any_length(model, monkeypatch):
    """Of 1 to 4,096 tokens, with any number of new ones: what is compiled for is rounded up to these, 8 together."""
    assert len({_up(length, generation.PROMPTS) for length in range(1, 4097)}) == 4
    assert len({_up(size, generation.SIZES) for size in range(2, 131073)}) == 4
    monkeypatch.setattr(generation, "PROMPTS", (4, 8, 16))
    monkeypatch.setattr(generation, "SIZES", (16, 64))
    seen, right = set(), generation._generate
    monkeypatch.setattr(generation, "_generate", lambda *given: seen.add(given[6]) or right(*given))
    for length, count in ((1, 1), (4, 9), (5, 11), (9, 30), (16, 2)):
        made = generate(model, [list(range(length))], count)[0]
        assert len(made) == count
        assert made == generate(model, [list(range(length))], count + 3)[0][:count]
    assert seen == {16, 64}


@pytest.mark.long
def test_prompts_may_be_an_array(model, greedy):
    rows = [[3, 4, 5], [6, 7, 8]]
    assert generate(model, jnp.asarray(rows), 4) == generate(model, np.asarray(rows), 4) == generate(model, rows, 4)
    for one in ([3, 4, 5], jnp.asarray([3, 4, 5])):
        with pytest.raises(InputError, match=r"expected token ids, a list a row, or an array \[batch, length\], found one row"):
            generate.__wrapped__(model, one, 4)  # without the checks of tests, which find it sooner


def test_one_row_without_a_batch_is_refused(model):
    with pytest.raises(InputError, match=r"tokens: expected \[batch, length\], found \[3\]; tokens\[None\] is a batch of one"):
        Transformer.stream.__wrapped__(model, jnp.arange(3))
