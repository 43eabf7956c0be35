"""Prompts of several lengths, of text, and those that cannot be used."""

import json

import numpy as np
import pytest

from oss_model import InputError
from parity import compare
from parity.prompts import read_prompt


def test_a_batch_of_prompts_of_different_lengths(tmp_path, sources, checkpoints):
    file = tmp_path / "prompts.json"
    rows = [list(range(5, 40)), list(range(100, 111)), [7]]
    file.write_text(json.dumps(rows))
    prompt = read_prompt(file, 509, tmp_path / "tokenizer.json")
    report = compare(sources["hf"], checkpoints["bfloat16"], prompt=prompt)
    assert (report.verdict, report.tokens) == ("pass", 35)
    assert len(report.token_kl) == 35 + 11 + 1


def test_text_prompts_use_the_checkpoints_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"up": 3, "down": 4}, unk_token="down"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "prompt.txt").write_text("up down up")
    np.testing.assert_array_equal(read_prompt(tmp_path / "prompt.txt", 509, tmp_path / "tokenizer.json").tokens, [[3, 4, 3]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 509]", "expected token ids from 0 to 508, found 1 others, the first 509"),
        ("[[1], []]", "expected at least one token a prompt, found an empty one"),
        ("[1, true]", "found 1 others, the first True"),
        ("hello", "expected a JSON list of token ids, found text, and there is no"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "prompt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompt(tmp_path / "prompt", 509, tmp_path / "tokenizer.json")
