"""Synthetic checkpoints: the same model in every layout, shards as published, and weights under which every part matters."""

import dataclasses
import errno
import filecmp
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from oss_model import InputError, ModelConfig, create_model_from_checkpoint, layouts, mxfp4, synthetic
from oss_model.shards import INDEX, Checkpoint
from oss_model.synthetic import main, write_checkpoint
from oss_model.taps import tapping

SMALL = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=2, layer_types=())


def parameters(directory: Path) -> dict[str, np.ndarray]:
    """Every parameter of the model in `directory`, experts decoded."""
    source = Checkpoint(directory)
    with source.shards:
        found = {entry.model: entry.to_model(source.read(entry)) for entry in source.entries()}
    for stem in [name.removesuffix(".blocks") for name in found if name.endswith(".blocks")]:
        found[f"{stem}.weight"] = mxfp4.decode(found.pop(f"{stem}.blocks"), found.pop(f"{stem}.scales"))
    return found


def assert_same_values(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert one[name].tobytes() == other[name].tobytes(), name


# --- seeds and layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "hf-bf16", "openai"])
def test_same_seed_same_bytes(sources, cfg, layout, tmp_path):
    again = write_checkpoint(tmp_path / "again", cfg, layout)
    names = sorted(path.name for path in sources[layout].iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert filecmp.cmpfiles(sources[layout], again, names, shallow=False) == (names, [], [])


def test_all_layouts_hold_the_same_model(sources):
    expected = parameters(sources["hf"])
    assert expected.keys() == layouts.parameters(ModelConfig.tiny()).keys()
    for layout in ("hf-bf16", "openai"):
        assert_same_values(parameters(sources[layout]), expected)


def test_another_seed_is_another_model_in_every_tensor():
    one, other = (
        {e.model: b"".join(piece.tobytes() for piece in synthetic._pieces(e, SMALL, seed)) for e in entries}
        for seed, entries in ((seed, layouts.entries(layouts.HF_MXFP4, SMALL)) for seed in (0, 1))
    )
    assert [name for name in one if one[name] == other[name]] == []
    assert len(set(one.values())) == len(one), "two tensors of one model are the same"


def test_the_config_beside_the_tensors(sources):
    for layout, directory in sources.items():
        said = ModelConfig.from_json(directory / "config.json")
        assert dataclasses.replace(said, max_position_embeddings=32768) == ModelConfig.tiny()
        config = json.loads((directory / "config.json").read_text())
        assert ("quantization_config" in config) == (layout == "hf")
        assert (directory / "generation_config.json").exists() == (layout != "openai")


# --- shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "openai"])
@pytest.mark.parametrize("limit", [1, 30_000, 700_000])
def test_shards_of_any_size_are_the_same_checkpoint(sources, cfg, layout, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SHARD_BYTES", limit)
    out = write_checkpoint(tmp_path / "out", cfg, layout)
    checkpoint = Checkpoint(out)  # index and shards agree, or this raises
    assert_same_values(parameters(out), parameters(sources[layout]))
    index = json.loads((out / INDEX).read_text())
    count = len(set(index["weight_map"].values()))
    assert count > 2
    # Zero-based, and "of" is one less than the count, as published.
    assert set(index["weight_map"].values()) == {f"model-{i:05d}-of-{count - 1:05d}.safetensors" for i in range(count)}
    sizes: dict[str, list[int]] = {}
    for name, file in index["weight_map"].items():
        sizes.setdefault(file, []).append(checkpoint.shards.tensors[name].nbytes)
    assert all(sum(tensors) <= limit or len(tensors) == 1 for tensors in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    if limit == 1:
        assert count == len(index["weight_map"])


def test_published_number_of_shards_and_bytes():
    """Three files for 20b. 120b is cut in 15 by OpenAI, of unequal sizes; ours are as large as those of 20b."""
    shards = {}
    for size in ("20b", "120b"):
        cfg = synthetic.SIZES[size]()
        packed = {entry.checkpoint for entry in layouts.entries(layouts.HF_MXFP4, cfg) if entry.packed}
        shapes = layouts.checkpoint_shapes(layouts.HF_MXFP4, cfg)
        tensors = {name: (shape, "U8" if name in packed else "BF16") for name, shape in shapes.items()}
        shards[size] = synthetic._split(tensors)
        assert {name for shard in shards[size] for name in shard} == tensors.keys()
        total = sum(synthetic._nbytes(tensor) for tensor in tensors.values())
        assert total == {"20b": 13_761_264_768, "120b": 65_248_815_744}[size]
    assert len(shards["20b"]) == 3


def test_large_tensors_come_in_pieces(monkeypatch):
    """A piece of the embedding is limited, and the pieces are the tensor, whichever layout they are for."""
    monkeypatch.setattr(synthetic, "PIECE_BYTES", 10_000)
    for layout in (layouts.HF_MXFP4, layouts.HF_BF16, layouts.OPENAI):
        for entry in layouts.entries(layout, SMALL):
            pieces = list(synthetic._pieces(entry, SMALL, seed=0))
            assert sum(len(piece) for piece in pieces) == entry.checkpoint_shape[0], entry.checkpoint
            assert {piece.shape[1:] for piece in pieces} == {entry.checkpoint_shape[1:]}
            if entry.model == "embedding.weight":
                assert len(pieces) == 10
                assert max(piece.nbytes for piece in pieces) <= 10_000


# --- statistics -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Statistics:
    """Of one layer, over a long prompt."""

    gates_above: float  # share of the chosen experts' gates above the clamp
    ups_beyond: float  # share of their ups beyond it, on either side
    sinks: np.ndarray  # [heads]: the sinks' mean share of the attention
    tokens: np.ndarray  # [experts]: how many tokens chose the expert
    weights: np.ndarray  # [tokens, k]
    residual: float  # root mean square of the layer's output
    attention: float  # of what attention adds to the residual stream
    experts: float  # of what the experts add


def watch(directory: Path, cfg: ModelConfig, length: int) -> list[Statistics]:
    model = create_model_from_checkpoint(directory, dataclasses.replace(cfg, param_dtype="bfloat16"))
    seen: dict = {}

    def hook(layer, name, value):
        seen[layer, name] = np.asarray(value)
        return value

    tokens = np.random.default_rng(5).integers(0, cfg.vocab_size, (1, length), dtype=np.int32)
    with tapping(hook):
        model(jnp.asarray(tokens))
    ahead = np.arange(length)[:, None] - np.arange(length)[None]
    found = []
    for n, block in enumerate(model.layers):
        choice = seen[n, "expert_choice"]
        weight, bias = (np.asarray(p[...], np.float32) for p in (block.mlp.gate_up.weight, block.mlp.gate_up.bias))
        flat = weight.reshape(-1, weight.shape[-1])
        both = (seen[n, "mlp_norm"][0] @ flat.T).reshape(length, *bias.shape) + bias[None]
        chosen = np.take_along_axis(both, choice[:, :, None, None], axis=1)
        q, k = seen[n, "q_rope"][0], np.repeat(seen[n, "k_rope"][0], cfg.num_attention_heads // cfg.num_key_value_heads, 1)
        logits = np.einsum("lnd,mnd->nlm", q, k) * cfg.head_dim**-0.5
        visible = (ahead >= 0) & ((ahead < cfg.sliding_window) | (cfg.layer_types[n] == "full_attention"))
        keys = np.where(visible[None], np.exp(logits), 0).sum(-1)
        sink = np.exp(np.asarray(block.attn.sinks[...], np.float32))[:, None]
        found.append(
            Statistics(
                gates_above=float((chosen[:, :, 0] > cfg.swiglu_limit).mean()),
                ups_beyond=float((np.abs(chosen[:, :, 1]) > cfg.swiglu_limit).mean()),
                sinks=(sink / (keys + sink)).mean(-1),
                tokens=np.bincount(choice.reshape(-1), minlength=cfg.num_experts),
                weights=seen[n, "expert_weights"],
                **{
                    name: float(np.sqrt(np.mean(seen[n, tap] ** 2)))
                    for name, tap in (("residual", "layer_out"), ("attention", "attn_out"), ("experts", "mlp_out"))
                },
            )
        )
    return found


@pytest.fixture(scope="module")
def statistics(sources, cfg) -> list[Statistics]:
    return watch(sources["hf"], cfg, length=200)


@pytest.mark.long
def test_the_clamps_are_reached_but_do_not_rule(statistics):
    for layer in statistics:
        assert 0.02 < layer.gates_above < 0.2
        assert 0.04 < layer.ups_beyond < 0.3


def test_sinks_are_in_play_in_every_layer(statistics):
    for layer in statistics:
        assert layer.sinks.max() > 0.05
        assert 0.02 < layer.sinks.mean() < 0.5
        assert layer.sinks.max() > 3 * layer.sinks.min(), "which sink belongs to which head would not matter"


def test_routing_is_not_degenerate(statistics):
    for layer in statistics:
        share = layer.tokens / layer.tokens.sum()
        assert share.min() > 0.3 / len(share), "an expert is starved"
        assert share.max() < 2 / len(share), "an expert takes all"
        assert share.max() / share.min() > 1.2, "the router prefers nobody"
        assert 0.3 < layer.weights.max(1).mean() < 0.7  # of four: neither uniform nor one alone
        assert (layer.weights > 0).all()


def test_the_residual_stream_is_bounded_and_every_block_adds_to_it(statistics):
    for n, layer in enumerate(statistics):
        # Random additions of one size: the sum grows as the square root of the depth, and no faster.
        assert 1 < layer.residual < 8 * np.sqrt(n + 1)
        assert layer.attention > 0.03 * layer.residual
        assert layer.experts > 0.3 * layer.residual


def test_the_window_is_shorter_than_the_tests_prompts(cfg, prompt):
    assert 2 * cfg.sliding_window < prompt.shape[1]
    assert (prompt < cfg.vocab_size).all()


@pytest.mark.long
def test_the_clamps_are_reached_at_the_published_width(tmp_path):
    cfg = ModelConfig(
        vocab_size=50, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=2880,
        num_experts=3, num_experts_per_tok=2, dtype=np.float32,
    )  # fmt: skip
    [layer] = watch(write_checkpoint(tmp_path / "wide", cfg), cfg, length=20)
    assert 0.005 < layer.gates_above < 0.2
    assert 0.01 < layer.ups_beyond < 0.3
    assert 1 < layer.residual < 8


# --- what others make of it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_loads_both_of_its_layouts(sources, sharded, tmp_path, monkeypatch):
    import torch
    from transformers import GptOssForCausalLM, Mxfp4Config

    directories = {layout: sources[layout] for layout in ("hf", "hf-bf16")}
    if sharded:
        monkeypatch.setattr(synthetic, "SHARD_BYTES", 500_000)
        directories = {layout: write_checkpoint(tmp_path / layout, SMALL, layout) for layout in directories}
    states = {}
    for layout, directory in directories.items():
        packed = {"quantization_config": Mxfp4Config(dequantize=True)} if layout == "hf" else {}
        loaded: Any = GptOssForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True, **packed)
        model, said = loaded
        assert {key: list(value) for key, value in said.items() if key.endswith("_keys")} == {
            "missing_keys": [],
            "unexpected_keys": [],
            "mismatched_keys": [],
        }
        states[layout] = model.state_dict()
    assert states["hf"].keys() == states["hf-bf16"].keys()
    for name, value in states["hf"].items():
        assert torch.equal(value, states["hf-bf16"][name]), name
    ours = parameters(directories["hf"])
    down = states["hf"]["model.layers.1.mlp.experts.down_proj"].float().numpy()
    np.testing.assert_array_equal(down.transpose(0, 2, 1), ours["layers.1.mlp.down.weight"].astype(np.float32))


# --- refusals and the command line ------------------------------------------------------------------------------


def refused(out: Path, cfg: ModelConfig, layout: str = "hf") -> list[str]:
    with pytest.raises(InputError) as caught:
        write_checkpoint(out, cfg, layout)
    return caught.value.faults


def test_what_a_config_json_cannot_say_is_refused(tmp_path):
    out = tmp_path / "out"
    other = dataclasses.replace(SMALL, rms_norm_eps=1e-6, swiglu_alpha=1.0, layer_types=("full_attention",) * 2)
    can_only = "a config.json of {} can only say {!r}, not {!r}"
    assert refused(out, other, "openai") == [
        "layer_types: " + can_only.format("openai", ("sliding_attention", "full_attention"), ("full_attention",) * 2),
        "rms_norm_eps: " + can_only.format("openai", 1e-5, 1e-6),
        "swiglu_alpha: " + can_only.format("openai", 1.702, 1.0),
    ]
    assert refused(out, other, "hf") == ["swiglu_alpha: " + can_only.format("transformers4", 1.702, 1.0)]
    assert refused(out, dataclasses.replace(SMALL, hidden_size=100)) == [
        "hidden_size: expected a multiple of 32, the MXFP4 block, found 100"
    ]
    assert not out.exists()


def test_only_a_new_or_empty_directory_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    write_checkpoint(tmp_path / "empty", SMALL)
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine").write_text("kept")
    file.write_text("kept")
    for out in (full, file):
        assert refused(out, SMALL) == [f"{out}: expected a new or empty directory, found something; give another name"]
    assert [path.name for path in full.iterdir()] == ["mine"]
    assert file.read_text() == "kept"


def test_command_line(tmp_path):
    out = tmp_path / "new" / "out"
    arguments = ["--layers", "2", "--experts", "5", "--layout", "openai", "--seed", "3"]
    run = subprocess.run([sys.executable, "-m", "oss_model.synthetic", str(out), *arguments], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    checkpoint = Checkpoint(out)
    assert checkpoint.layout is layouts.OPENAI
    assert (checkpoint.cfg.num_hidden_layers, checkpoint.cfg.num_experts) == (2, 5)
    expected = write_checkpoint(tmp_path / "same", dataclasses.replace(SMALL, num_experts=5), "openai", seed=3)
    assert filecmp.cmp(out / "model.safetensors", expected / "model.safetensors", shallow=False)


def test_command_line_defaults(sources, tmp_path):
    assert main([str(tmp_path / "out")]) == 0
    names = [path.name for path in sources["hf"].iterdir()]
    assert filecmp.cmpfiles(sources["hf"], tmp_path / "out", names, shallow=False)[0] == names


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--layers", "0"], ["num_hidden_layers: expected a positive number, found 0"]),
        (["--layers", "-1"], ["num_hidden_layers: expected a positive number, found -1"]),
        (["--experts", "3"], ["num_experts_per_tok: expected at most num_experts = 3, found 4"]),
        (
            ["--layers", "0", "--experts", "0"],
            [
                "num_hidden_layers: expected a positive number, found 0",
                "num_experts: expected a positive number, found 0",
            ],
        ),
    ],
)
def test_command_line_with_sizes_that_make_no_model(arguments, lines, tmp_path, capsys):
    assert main([str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr() == ("", "".join(f"error: {line}\n" for line in lines))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: OUT"),
        (["OUT", "--size", "7b"], "argument --size: invalid choice: '7b'"),
        (["OUT", "--layout", "gguf"], "argument --layout: invalid choice: 'gguf'"),
        (["OUT", "--layers", "two"], "argument --layers: invalid int value: 'two'"),
        (["OUT", "--seed", "-1"], "argument --seed: expected 0 or more, found -1"),
    ],
)
def test_command_line_usage(arguments, message, tmp_path, capsys):
    assert main([str(tmp_path / "out") if argument == "OUT" else argument for argument in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert line.endswith(" (try python -m oss_model.synthetic --help)")
    assert list(tmp_path.iterdir()) == []


def test_command_line_with_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path)]) == 2
    problem = "expected a new or empty directory, found something; give another name"
    assert capsys.readouterr().err == f"error: {tmp_path}: {problem}\n"
    out = tmp_path / "file" / "out"
    assert main([str(out)]) == 2
    problem = "below a file, where only a directory can have anything in it; give another place"
    assert capsys.readouterr().err == f"error: {out}: {problem}\n"


def test_command_line_on_a_full_disk(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synthetic, "write_shard", full)
    out = tmp_path / "out"
    assert main([str(out)]) == 3
    problem = f"the disk is full; make room, remove {out}, which is not whole, and run this again"
    assert capsys.readouterr().err == f"error: {out}: {problem}\n"
