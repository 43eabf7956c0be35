"""Layouts that other tools write: read straight, by way of Orbax and into the model; repaired by an export."""

import numpy as np
import pytest
from flax import nnx
from test_converter_export import change, tensors, values

from converter import convert
from converter.audit import verify_checkpoint
from converter.cli import main
from oss_model import create_model_from_checkpoint
from parity.cli import main as check_parity


def torchtitan(arrays: dict) -> None:
    for name in [name for name in arrays if name.endswith(("gate_up_proj", "down_proj"))]:
        arrays[f"{name}_blocks"] = np.ascontiguousarray(arrays.pop(name).swapaxes(1, 2))


def unsloth(arrays: dict) -> None:
    for name in [name for name in arrays if ".mlp.router." in name]:
        arrays[name.replace("router.", "router.linear.")] = arrays.pop(name)
    for name in [name for name in arrays if ".mlp.experts." in name]:
        stem, kind = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
        for number, array in enumerate(arrays.pop(name)):
            arrays[f"{stem}s.{number}.{kind}"] = np.ascontiguousarray(array if kind == "bias" else array.T)


def mlx(arrays: dict) -> None:
    for name in [name for name in arrays if ".mlp.experts." in name]:
        array, kind = arrays.pop(name), "bias" if name.endswith("_bias") else "weight"
        array = array if kind == "bias" else array.swapaxes(1, 2)
        stem = name.rpartition(".")[0]
        halves = {"gate": array[:, ::2], "up": array[:, 1::2]} if "gate_up" in name else {"down": array}
        for half, part in halves.items():
            arrays[f"{stem}.{half}_proj.{kind}"] = np.ascontiguousarray(part)


@pytest.mark.long
@pytest.mark.parametrize("edit", [torchtitan, unsloth, mlx])
def test_what_others_write_is_read(sources, checkpoints, cfg, tmp_path, edit):
    """Straight, by way of Orbax, and into the model."""
    source = change(sources["hf-bf16"], tmp_path / "source", edit)
    assert convert(source, tmp_path / "out", to="hf-bf16").source_layout == edit.__name__
    assert tensors(tmp_path / "out") == tensors(sources["hf-bf16"])
    assert verify_checkpoint(tmp_path / "out", source).status == "pass"
    convert(source, tmp_path / "orbax")
    for file in checkpoints["bfloat16"].glob("layers.*/c/**/*"):
        if file.is_file():
            assert (tmp_path / "orbax" / file.relative_to(checkpoints["bfloat16"])).read_bytes() == file.read_bytes()
    model = create_model_from_checkpoint(source, cfg)
    for path, value in nnx.to_flat_state(nnx.state(model)):
        found = np.asarray(value.get_value(), np.float32)
        np.testing.assert_array_equal(found, values(sources["hf-bf16"])[".".join(map(str, path))])


@pytest.mark.parametrize("edit", [torchtitan, unsloth, mlx])
def test_what_transformers_does_not_load_is_no_reference(sources, checkpoints, tmp_path, capsys, edit):
    source = change(sources["hf-bf16"], tmp_path / "source", edit)
    with pytest.raises(SystemExit, match="2"):
        check_parity([str(source), str(checkpoints["bfloat16"])])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {source}: expected a layout that transformers loads, found {edit.__name__}")
    assert line.endswith("--to hf-bf16 makes one with the same values: give that as SRC")


def test_what_is_missing_of_a_spread_parameter_is_named(sources, tmp_path, capsys):
    def lose_one(arrays):
        unsloth(arrays)
        del arrays["model.layers.1.mlp.experts.down_projs.4.weight"]
        name = "model.layers.1.mlp.experts.gate_up_projs.3.weight"
        arrays[name] = arrays[name].astype(np.float32)

    source = change(sources["hf-bf16"], tmp_path / "source", lose_one)
    assert main([str(source), str(tmp_path / "out")]) == 2
    assert "model.layers.1.mlp.experts.down_projs.4.weight: missing; unsloth's" in capsys.readouterr().err
