"""config.json as it is written: read back by us, and by transformers."""

import dataclasses
import json

import pytest

from oss_model import InputError, ModelConfig


@pytest.mark.parametrize("dialect", ["transformers4", "transformers5", "openai"])
@pytest.mark.parametrize(
    "cfg", [ModelConfig.gpt_oss_20b(), ModelConfig.gpt_oss_120b(), ModelConfig.tiny()], ids=["20b", "120b", "tiny"]
)
def test_what_is_written_is_read_back(dialect, cfg):
    said = json.loads(json.dumps(cfg.to_json(dialect)))
    positions = {"max_position_embeddings": cfg.max_position_embeddings} if dialect == "openai" else {}
    assert dataclasses.replace(ModelConfig.from_json(said), **positions) == cfg


def test_a_dialect_that_cannot_say_something_says_so():
    cfg = dataclasses.replace(ModelConfig.tiny(), rms_norm_eps=1e-6, rope_truncate=True)
    with pytest.raises(InputError) as caught:
        cfg.to_json("openai")
    assert caught.value.faults == [
        "rope_truncate: a config.json of openai can only say False, not True",
        "rms_norm_eps: a config.json of openai can only say 1e-05, not 1e-06",
    ]
    assert ModelConfig.from_json(cfg.to_json()) == cfg
    with pytest.raises(InputError, match=r"swiglu_alpha: a config\.json of transformers5 can only say 1\.702, not 1\.0"):
        dataclasses.replace(cfg, swiglu_alpha=1.0).to_json()
    with pytest.raises(InputError, match="dialect: expected one of transformers4, transformers5, openai, found 'gguf'"):
        cfg.to_json("gguf")


@pytest.mark.parametrize("dialect", ["transformers4", "transformers5"])
def test_transformers_reads_what_is_written(tmp_path, dialect):
    from transformers import GptOssConfig

    cfg = dataclasses.replace(ModelConfig.tiny(), rope_truncate=True, rope_theta=2e4)
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_json(dialect)))
    read = GptOssConfig.from_pretrained(tmp_path)
    assert (read.num_local_experts, read.sliding_window, read.rms_norm_eps) == (9, 11, 1e-5)
    rope = read.rope_parameters
    assert (rope["rope_theta"], rope["truncate"], rope["factor"]) == (2e4, True, 32.0)
