"""The way back: Orbax to safetensors, and one layout of safetensors to another; what is exact is exact to the byte."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_converter_audit import flip
from test_oss_model_quantization import codes, plain

from converter import convert, plan
from converter.audit import verify_checkpoint
from converter.cli import main, verify_main
from converter.errors import Different
from converter.shard_store import ShardStore
from oss_model import dialects, mxfp4
from oss_model.config import FULL, ModelConfig
from oss_model.errors import InputError
from oss_model.layouts import BFLOAT16, FLOAT32
from oss_model.shards import Checkpoint, Shards, write_shard
from oss_model.synthetic import write_checkpoint
from parity import compare

PACKED = ("hf", "openai")
KINDS = {BFLOAT16: "BF16", FLOAT32: "F32", np.dtype(np.uint8): "U8"}


def tensors(directory: Path) -> dict[str, tuple[str, bytes]]:
    with Shards(directory) as shards:
        return {name: (shards.tensors[name].dtype, shards.read(name).tobytes()) for name in shards.tensors}


def values(directory: Path) -> dict[str, np.ndarray]:
    """Every parameter, by our names; of experts the values, float32."""
    checkpoint = Checkpoint(directory)
    with checkpoint.shards:
        found = {entry.model: entry.to_model(checkpoint.read(entry)) for entry in checkpoint.entries()}
    for name in [name for name in found if name.endswith(".blocks")]:
        stem = name.removesuffix("blocks")
        found[f"{stem}weight"] = mxfp4.decode(found.pop(name), found.pop(f"{stem}scales"))
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def change(source: Path, to: Path, edit) -> Path:
    """A copy of a checkpoint of one file, with `edit(name -> array)` done to it."""
    shutil.copytree(source, to)
    with Shards(source) as shards:
        arrays = {name: shards.read(name) for name in shards.tensors}
    edit(arrays)
    signature = {name: (array.shape, KINDS[array.dtype]) for name, array in arrays.items()}
    write_shard(to / "model.safetensors", signature, arrays.values())
    return to


# --- exact ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "hf-bf16", "openai"])
@pytest.mark.parametrize("source", PACKED)
@pytest.mark.parametrize("by_orbax", [True, False])
def test_every_tensor_comes_back_as_its_bytes(sources, tmp_path, source, to, by_orbax):
    start = sources[source]
    if by_orbax:
        convert(start, tmp_path / "orbax", "mxfp4", verify=False)
        start = tmp_path / "orbax"
    result = convert(start, tmp_path / "out", to=to)
    assert (result.status, result.verified, result.to, result.quantization) == ("complete", True, to, None)
    assert tensors(tmp_path / "out") == tensors(sources[to])
    assert list(tensors(tmp_path / "out")) == list(tensors(sources[to]))  # blocks before scales, as llama.cpp reads them
    assert convert(start, tmp_path / "out", to=to).status == "already-complete"
    assert verify_checkpoint(tmp_path / "out", start).status == "pass"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_come_back_as_values(sources, checkpoints, tmp_path, dtype):
    convert(checkpoints[dtype], tmp_path / "out", to="hf-bf16")
    assert tensors(tmp_path / "out") == tensors(sources["hf-bf16"])


def test_round_and_round(sources, tmp_path):
    """Hugging Face, Orbax, OpenAI, Orbax, Hugging Face."""
    steps = [("orbax", "mxfp4"), ("openai", None), ("orbax", "mxfp4"), ("hf", None)]
    here = sources["hf"]
    for number, (to, dtype) in enumerate(steps):
        convert(here, tmp_path / str(number), dtype, to=to, verify=False)
        here = tmp_path / str(number)
    assert tensors(here) == tensors(sources["hf"])


def test_misnamed_experts_get_their_names_back(sources, tmp_path):
    def rename(arrays):
        for name in list(arrays):
            suffix = "_blocks" if name.endswith(("gate_up_proj", "down_proj")) else ""
            arrays[name + suffix] = arrays.pop(name)

    wrong = change(sources["hf-bf16"], tmp_path / "wrong", rename)
    convert(wrong, tmp_path / "out", to="hf-bf16")
    assert tensors(tmp_path / "out") == tensors(sources["hf-bf16"])


# --- what loses something ---------------------------------------------------------------------------------------


def test_values_never_become_mxfp4_without_a_word(sources, checkpoints, tmp_path, capsys):
    for source, to, said in ((sources["hf-bf16"], "hf", "--to hf"), (checkpoints["float32"], "openai", "--to openai")):
        assert main([str(source), str(tmp_path / "out"), "--to", to]) == 2
        err = capsys.readouterr().err
        assert f"{said} keeps packed experts as they are, but found " in err
        assert "layers.0.mlp.down.weight and 9 more are values, which lose something as MXFP4" in err
        assert "name the rule: --quantizer best" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rule", ["best", "ocp", "ceil"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_quantized_is_what_the_words_say(sources, tmp_path, rule, dtype):
    """An equation of our own, in float64, applied to what was there: bit for bit."""
    rng = np.random.default_rng(0)

    def train(arrays):
        for name in arrays:
            if name.endswith(("gate_up_proj", "down_proj")) or dtype == "float32":
                wide = arrays[name].astype(np.float32)
                arrays[name] = (wide + 0.01 * rng.standard_normal(wide.shape, np.float32)).astype(dtype)

    trained = change(sources["hf-bf16"], tmp_path / "trained", train)
    result = convert(trained, tmp_path / "out", to="hf", quantizer=rule)
    with Shards(tmp_path / "out") as shards:
        found = {name: shards.read(name) for name in shards.tensors}
    with Shards(trained) as shards:
        for name in shards.tensors:
            if not name.endswith(("gate_up_proj", "down_proj")):
                expected = shards.read(name).astype(BFLOAT16)
                assert found[name].tobytes() == expected.tobytes(), name
                continue
            rows = np.ascontiguousarray(shards.read(name).swapaxes(1, 2))  # [experts, out, in]
            wanted, scales = plain(rows.reshape(-1, 32), rule)
            np.testing.assert_array_equal(codes(found[f"{name}_blocks"]), wanted)
            np.testing.assert_array_equal(found[f"{name}_scales"].reshape(-1), scales)
    lost = result.quantization
    assert lost["rule"] == rule
    assert len(lost["tensors"]) == 10
    assert 0.001 < min(lost["tensors"].values()) <= lost["relative_rmse"] <= max(lost["tensors"].values()) < 0.2
    assert verify_checkpoint(tmp_path / "out", trained).status == "pass"
    assert verify_checkpoint(tmp_path / "out").status == "pass"


@pytest.mark.long
def test_what_training_did_not_touch_keeps_its_bytes(sources, checkpoints, tmp_path, capsys):
    """One block in a hundred is changed: these, and no others, have other bytes."""
    rng = np.random.default_rng(1)
    changed = {}

    def train(arrays):
        for name in [name for name in arrays if name.endswith(("gate_up_proj", "down_proj"))]:
            rows = np.ascontiguousarray(arrays[name].swapaxes(1, 2)).reshape(-1, 32)
            changed[name] = rng.random(len(rows)) < 0.01
            rows[changed[name], 3] = (rows[changed[name], 3].astype(np.float32) + 0.07).astype(BFLOAT16)
            arrays[name] = np.ascontiguousarray(rows.reshape(arrays[name].swapaxes(1, 2).shape).swapaxes(1, 2))

    trained = change(sources["hf-bf16"], tmp_path / "trained", train)
    for like in (sources["hf"], checkpoints["mxfp4"], sources["openai"]):
        out = tmp_path / f"like {like.name}"
        convert(trained, out, to="hf", quantizer="best", like=like)
        before, after = (tensors(side) for side in (sources["hf"], out))
        differ = 0
        for name, mask in changed.items():
            blocks = [np.frombuffer(side[f"{name}_blocks"][1], np.uint8).reshape(-1, 16) for side in (before, after)]
            scales = [np.frombuffer(side[f"{name}_scales"][1], np.uint8) for side in (before, after)]
            other = (blocks[0] != blocks[1]).any(-1) | (scales[0] != scales[1])
            assert not (other & ~mask).any()
            differ += (other & mask).sum()
        assert differ > 0.5 * sum(mask.sum() for mask in changed.values())  # the others are rounded back to where they were
        assert verify_checkpoint(out, trained).status == "pass"
    # Of values that were not changed at all, everything.
    convert(checkpoints["bfloat16"], tmp_path / "all", to="openai", quantizer="ceil", like=sources["hf"])
    assert tensors(tmp_path / "all") == tensors(sources["openai"])
    # and without --like the values, but not the bytes
    convert(checkpoints["bfloat16"], tmp_path / "values", to="hf", quantizer="ceil")
    assert tensors(tmp_path / "values") != tensors(sources["hf"])
    found, expected = values(tmp_path / "values"), values(sources["hf"])
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_values_become_mxfp4_in_orbax_too(sources, checkpoints, tmp_path):
    result = convert(sources["hf-bf16"], tmp_path / "out", "mxfp4", quantizer="best", like=sources["hf"])
    assert result.quantization["relative_rmse"] == 0
    for file in checkpoints["mxfp4"].glob("layers.*/c/**/*"):
        if file.is_file():
            assert (tmp_path / "out" / file.relative_to(checkpoints["mxfp4"])).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "hf-bf16", "--quantizer", "best"], "quantizer: expected packed experts to be asked for"),
        (["--to", "hf", "--dtype", "bfloat16"], "dtype: expected mxfp4 for hf, found 'bfloat16'"),
        (["--to", "hf", "--like", "SRC"], "like: expected a quantizer, for what has changed, found none"),
        (["--to", "hf", "--quantizer", "best", "--like", "BF16"], "expected packed experts, found Hugging Face, bfloat16"),
        (["--to", "hf", "--quantizer", "best", "--like", "OTHER"], "expected a model of the same sizes as"),
        (["--to", "hf", "--tokenizer", "SRC"], "expected a directory with a tokenizer (tokenizer*), found none"),
        (["--to", "gguf"], "'gguf' is not one of 'orbax', 'hf', 'hf-bf16', 'openai'"),
    ],
)
def test_what_does_not_go_together_is_refused(sources, tmp_path, capsys, options, said, small):
    places = {"SRC": sources["hf"], "BF16": sources["hf-bf16"], "OTHER": small}
    options = [str(places.get(option, option)) for option in options]
    source = sources["hf-bf16"] if "--quantizer" in options else sources["hf"]
    assert main([str(source), str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_not_finite_is_named(sources, tmp_path, capsys):
    def break_one(arrays):
        arrays["model.layers.2.mlp.experts.down_proj"][3, 5, 7] = np.nan

    broken = change(sources["hf-bf16"], tmp_path / "broken", break_one)
    assert main([str(broken), str(tmp_path / "out"), "--to", "hf", "--quantizer", "best", "-q"]) == 2
    assert "model.layers.2.mlp.experts.down_proj: expected finite values, found infinity or NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- what lies beside the tensors -------------------------------------------------------------------------------


def test_the_configuration_is_the_readers(sources, checkpoints, tmp_path):
    for to in ("hf", "hf-bf16", "openai"):
        convert(checkpoints["mxfp4"], tmp_path / to, to=to, verify=False)
    packed, plain_, openai = (json.loads((tmp_path / to / "config.json").read_text()) for to in ("hf", "hf-bf16", "openai"))
    assert packed["quantization_config"]["quant_method"] == "mxfp4"
    assert "quantization_config" not in plain_  # vLLM chooses its loader by this key alone
    published = json.loads((sources["hf"] / "config.json").read_text())
    assert {key: packed[key] for key in published} == published
    for found in (packed, plain_):
        assert found["architectures"] == ["GptOssForCausalLM"]
        assert found["rope_scaling"]["truncate"] is found["rope_parameters"]["truncate"] is False
        assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 150000.0
        assert ModelConfig.from_json(found) == ModelConfig.from_json(published)
    assert openai == json.loads((sources["openai"] / "config.json").read_text())


def test_a_tokenizer_comes_from_where_there_is_one(sources, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(sources["openai"]), str(out), "--to", "hf"]) == 0
    assert (
        f"note: without a tokenizer, which {sources['openai']} has not; --tokenizer DIR copies one" in capsys.readouterr().err
    )
    (tmp_path / "tokens").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"):
        (tmp_path / "tokens" / name).write_text(name)
    assert main([str(sources["openai"]), str(out), "--to", "hf", "--overwrite", "--tokenizer", str(tmp_path / "tokens")]) == 0
    assert "note" not in capsys.readouterr().err
    assert (out / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert json.loads((out / "config.json").read_text())["model_type"] == "gpt_oss"


def test_what_a_form_cannot_say_is_refused(sources, tmp_path, capsys):
    source = shutil.copytree(sources["hf"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6, "layer_types": [FULL] * 5}))
    assert main([str(source), str(tmp_path / "out"), "--to", "openai"]) == 2
    err = capsys.readouterr().err
    assert "rms_norm_eps: a config.json of openai can only say 1e-05, not 1e-06" in err
    assert "layer_types: a config.json of openai can only say" in err
    assert main([str(source), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert "note: vLLM cannot serve it: it takes every other layer for a sliding one" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_key_that_nobody_knows_passes_by_name_and_is_left_out(sources, tmp_path, capsys, to):
    source = shutil.copytree(sources["hf"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"moe_flavour": "mild"}))
    asked = [str(source), str(tmp_path / "out"), "--to", to]
    assert main(asked) == 2
    assert "convert-oss --ignore-config-key moe_flavour lets it pass" in capsys.readouterr().err
    assert main([*asked, "--ignore-config-key", "moe_flavour"]) == 0
    assert "moe_flavour" not in json.loads((tmp_path / "out/config.json").read_text())
    assert json.loads((tmp_path / "out/conversion.json").read_text())["form"]["ignored_config_keys"] == ["moe_flavour"]
    assert verify_checkpoint(tmp_path / "out", source).status == "pass"


def test_shards_have_an_index_and_a_size(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_BYTES", 400_000)
    result = convert(sources["hf"], tmp_path / "out", to="hf")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 4
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(len(data) for _, data in tensors(tmp_path / "out").values())
    assert result.bytes_written == index["metadata"]["total_size"]
    assert tensors(tmp_path / "out") == tensors(sources["hf"])


def test_a_dry_run_tells_all_and_writes_nothing(sources, tmp_path, capsys):
    asked = [str(sources["hf-bf16"]), str(tmp_path / "out"), "--to", "hf", "--quantizer", "best"]
    assert main([*asked, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("hf-bf16 -> hf: 98 tensors in 258 chunks\n")
    assert ": quantized, experts hidden inner glu -> experts (inner glu) hidden_groups bytes\n" in out
    assert list(tmp_path.iterdir()) == []
    assert main([*asked, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    result = convert(sources["hf-bf16"], tmp_path / "out", to="hf", quantizer="best")
    for field in ("tensors", "chunks", "bytes_read", "bytes_written", "source_layout", "dtype", "to", "notes"):
        assert found[field] == (getattr(result, field) if field != "bytes_read" else result.bytes_read), field


# --- nothing is lost, nothing half-written looks finished -------------------------------------------------------


def test_a_flipped_bit_in_any_file_is_found_and_named(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "SHARD_BYTES", 1_000_000)
    out = tmp_path / "out"
    convert(sources["hf"], out, to="hf", verify=False)
    for number in range(40):
        path = sorted(path for path in out.iterdir() if path.is_file())[number % 7]
        before = path.read_bytes()
        flip(path, number)
        lines = verify_checkpoint(out).differences
        assert lines, path.name
        if path.suffix == ".safetensors":
            (line,) = lines
            assert " model.layers." in line or " lm_head" in line or " model.embed" in line or "its header" in line
        else:
            assert path.name in lines[0]
        path.write_bytes(before)
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    assert verify_checkpoint(out).differences == [
        f"{out}: {shard.name}: its header does not match its hash in conversion.json; copy it again"
    ]
    shard.unlink()
    assert verify_main([str(out), "-q"]) == 1
    assert f"{shard.name} is missing" in capsys.readouterr().err


def test_an_export_that_was_cut_off_is_taken_up(hf, tmp_path, monkeypatch):
    """After any number of chunks; what was written is not written again."""
    write = ShardStore.write_chunk
    for count in (0, 1, 50, 257):
        out, left = tmp_path / str(count), [count]

        def failing(self, chunk, pieces, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return write(self, chunk, pieces)

        with monkeypatch.context() as patch:
            patch.setattr(ShardStore, "write_chunk", failing)
            with pytest.raises(KeyboardInterrupt):
                convert(hf, out, to="hf")
        assert not out.exists()
        result = convert(hf, out, to="hf")
        assert result.status == "resumed" or count < 50
        assert result.chunks == 258
        assert tensors(out) == tensors(hf)
        assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def test_processes_share_an_export(hf, tmp_path):
    out = tmp_path / "out"
    for index in (1, 2, 3):
        result = convert(hf, out, to="openai", process=(index, 3))
        assert result.status == ("complete" if index == 3 else "share-written")
    convert(hf, tmp_path / "alone", to="openai")
    assert tensors(out) == tensors(tmp_path / "alone")


def test_what_was_written_wrongly_is_told_and_written_again(hf, tmp_path, monkeypatch):
    write, spoilt = ShardStore.write_chunk, []

    def spoiling(self, chunk, pieces):
        digest = write(self, chunk, pieces)
        if chunk.target.name.endswith("layers.1.self_attn.sinks") and not spoilt:
            spoilt.append(chunk)
            with open(self.directory / chunk.target.place.file, "r+b") as file:
                file.seek(chunk.offset)
                file.write(b"\xff\xff")
        return digest

    monkeypatch.setattr(ShardStore, "write_chunk", spoiling)
    with pytest.raises(Different, match=r"model\.layers\.1\.self_attn\.sinks: .*differs from the source"):
        convert(hf, tmp_path / "out", to="hf")
    assert convert(hf, tmp_path / "out", to="hf").status == "resumed"
    assert tensors(tmp_path / "out") == tensors(hf)
    assert not (tmp_path / "out/discarded").exists()


def test_what_another_process_wrote_wrongly_is_written_again_by_whoever_finishes(hf, tmp_path, monkeypatch):
    """The one that finishes does not look into the other's chunks when it goes on: it must know which one was wrong."""
    out, write, spoilt = tmp_path / "out", ShardStore.write_chunk, []

    def spoiling(self, chunk, pieces):
        digest = write(self, chunk, pieces)
        if not spoilt:
            spoilt.append(chunk)
            with open(self.directory / chunk.file, "r+b") as file:
                file.seek(chunk.offset + 1)
                file.write(b"\xff\xfe")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, "write_chunk", spoiling)
        assert convert(hf, out, to="hf", process=(1, 2)).status == "share-written"
    with pytest.raises(Different, match="differs from the source"):
        convert(hf, out, to="hf", process=(2, 2))
    assert convert(hf, out, to="hf", process=(2, 2)).status == "resumed"
    assert tensors(out) == tensors(hf)
    assert not (out / "discarded").exists()


def test_another_rule_is_not_already_complete(sources, tmp_path):
    """The same tensors, of the same sizes, and other bytes."""
    convert(sources["hf-bf16"], tmp_path / "out", to="hf", quantizer="best", verify=False)
    for other in ({"quantizer": "ocp"}, {"quantizer": "best", "like": sources["hf"]}):
        with pytest.raises(InputError, match="found a finished checkpoint"):
            convert(sources["hf-bf16"], tmp_path / "out", to="hf", **other)


def test_a_model_that_was_trained_says_what_to_keep_the_bytes_of(sources, tmp_path):
    source = shutil.copytree(sources["hf-bf16"], tmp_path / "source")
    asked = {"to": "hf", "quantizer": "best", "verify": False}
    (note, _) = convert(source, tmp_path / "one", **asked).notes
    assert note.endswith("--like SRC, the packed checkpoint that it began with, keeps theirs")
    (source / "trained.json").write_text(json.dumps({"base": "/models/base"}))
    (note, _) = convert(source, tmp_path / "two", **asked).notes
    assert note.endswith("--like /models/base keeps theirs")
    assert len(convert(source, tmp_path / "three", **asked, like=sources["hf"]).notes) == 1


def test_another_form_is_refused_where_one_is(hf, tmp_path):
    convert(hf, tmp_path / "out", to="hf", verify=False)
    with pytest.raises(InputError, match="found a finished checkpoint"):
        convert(hf, tmp_path / "out", to="hf-bf16")
    convert(hf, tmp_path / "out", to="hf-bf16", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "conversion.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


# --- read by others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "hf-bf16"])
def test_transformers_loads_it_and_computes_the_same(sources, checkpoints, tmp_path, to):
    import torch
    from transformers import GptOssForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    convert(checkpoints["mxfp4"], tmp_path / "out", to=to)
    logits = []
    for place, packed in ((sources["hf"], True), (tmp_path / "out", to == "hf")):
        asked = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
        model, info = GptOssForCausalLM.from_pretrained(place, dtype=torch.float32, output_loading_info=True, **asked)  # type: ignore
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        with torch.no_grad():
            logits.append(model(torch.arange(40)[None]).logits)
    assert torch.equal(*logits)


@pytest.mark.long
@pytest.mark.parametrize("experts", [24, 96])
def test_pruned_experts_are_no_matter(tmp_path, experts):
    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=1, layer_types=(), num_experts=experts)
    write_checkpoint(tmp_path / "source", cfg)
    convert(tmp_path / "source", tmp_path / "orbax", "mxfp4")
    convert(tmp_path / "orbax", tmp_path / "out", to="hf")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "source")
    assert dialects.read(tmp_path / "out/config.json")["num_experts"] == experts
    report = compare(tmp_path / "source", tmp_path / "orbax", layers=True)
    assert report.verdict == "pass", report.table()
