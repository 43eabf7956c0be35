"""A short run of scripts/stress/fuzz.py, and what long ones found."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

from converter.adapters import peft_config
from oss_model import InputError, ModelConfig, hub_answers
from oss_model.files import parse_json
from oss_model.lora_note import read_note

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("fuzz", ROOT / "scripts/stress/fuzz.py")
fuzz = importlib.util.module_from_spec(SPEC)
sys.modules["fuzz"] = fuzz
SPEC.loader.exec_module(fuzz)


@pytest.mark.long
def test_nothing_hostile_ends_in_a_traceback(tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / "work").mkdir()
    targets = fuzz.targets(tmp_path / "work")
    assert tuple(targets) == fuzz.FORMATS
    for name, target in targets.items():
        counts = fuzz.tried(name, target, 60, random.Random(name), tmp_path / "keep")
        assert sum(counts.values()) == 60
        assert counts.keys() <= {"a line", "as before", "accepted"}, (name, counts)
        assert counts["a line"] or name.endswith("inspected"), (name, counts)


def test_a_crash_would_be_seen(tmp_path):
    file = tmp_path / "file.json"
    file.write_text('{"a": 1}')

    def use():
        if file.read_bytes() != b'{"a": 1}':
            raise TypeError("unhashable")

    counts = fuzz.tried("file", fuzz.Target(file, False, use), 20, random.Random(0), tmp_path)
    assert counts["CRASH TypeError"] > 10
    assert len(list(tmp_path.glob("file-*"))) == counts["CRASH TypeError"]
    assert file.read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    ("before", "after", "seen"),
    [
        (b'"ETag": "', b'"ETag": "../../../../x', "writes outside its cache"),
        (b'"status": 200', b'"status": 429', "waits for hours"),
    ],
)
def test_a_hub_that_has_its_way_would_be_seen(tmp_path, monkeypatch, before, after, seen):
    monkeypatch.setattr(hub_answers, "_look", lambda *_: None)
    target = fuzz.hub_targets(tmp_path / "hub")["hub's headers"]
    text = target.file.read_bytes().replace(before, after).replace(b'"Accept-Ranges": "bytes"', b'"Retry-After": "9999"')
    assert after in text
    target.file.write_bytes(text)
    with pytest.raises(AssertionError, match=seen):
        target.use()


def test_nesting_too_deep_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="recursion"):
        parse_json("[" * 100_000)
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match="expected a JSON object, found something unreadable"):
        ModelConfig.from_json(tmp_path)


NOTES = ["null", "3", "[]", '{"rank": 2}', '{"rank": 0, "alpha": 1}', '{"rank": true, "alpha": 1}', '{"rank": 2.5, "alpha": 1}',
         '{"rank": 2, "alpha": NaN}', '{"rank": 2, "alpha": 1e999}', '{"rank": 2, "alpha": "4"}']  # fmt: skip


@pytest.mark.parametrize("about", NOTES)
def test_a_note_that_says_nothing_usable_names_the_module(tmp_path, about):
    (tmp_path / "lora.json").write_text('{"rules": [], "updates": {"layers.0.attn.q_proj": ' + about + "}}")
    with pytest.raises(InputError, match=r"lora\.json: layers\.0\.attn\.q_proj: expected a rank from 1 on and a finite alpha"):
        read_note(tmp_path)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ('"r": 4, "lora_alpha": NaN', "lora_alpha nan"),
        ('"r": 4, "lora_alpha": ' + "9" * 400, "lora_alpha 999"),
        ('"r": -1, "lora_alpha": 8', "r -1"),
        ('"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": null}', "rank_pattern None of q_proj"),
        ('"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 2}', "found something else (missing )"),
        ('"r": 4, "lora_alpha": 8, "alpha_pattern": 7', "found something else"),
    ],
)
def test_ranks_and_alphas_of_an_adapter_are_numbers(tmp_path, said, found):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", ' + said + "}")
    with pytest.raises(InputError) as caught:
        peft_config(tmp_path)
    assert found in str(caught.value)
