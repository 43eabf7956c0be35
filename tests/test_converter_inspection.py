"""inspect-oss: what it says of each form, and what it advises works."""

import json
import shlex
import shutil

import orbax.checkpoint as ocp
import pytest
from flax import nnx

from converter.cli import inspect_main, main, verify_main
from oss_model import add_lora, create_model_from_checkpoint, save_lora


def inspect(path, tmp_path) -> dict:
    assert inspect_main([str(path), "--json", str(tmp_path / "found.json")]) == 0
    return json.loads((tmp_path / "found.json").read_text())


def test_each_form_is_told(sources, checkpoints, tmp_path, capsys):
    for name, source in sources.items():
        found = inspect(source, tmp_path)
        assert (found["form"], found["layout"], found["made_from"]) == ("safetensors", name, None)
        assert found["config"]["num_experts"] == 9
        assert found["nbytes"] == sum(nbytes for _, nbytes in found["dtypes"].values())
        assert sum(found["scales"].values()) == (0 if name == "hf-bf16" else 64_800)
    found = inspect(checkpoints["mxfp4"], tmp_path)
    assert (found["form"], found["tensors"], found["dtypes"]["uint8"][0]) == ("orbax", 98, 20)
    assert found["made_from"]["source"] == {"path": str(sources["hf"].resolve()), "layout": "hf"}
    assert inspect_main([str(sources["hf"])]) == 0
    out = capsys.readouterr().out
    assert f"{sources['hf']}: Hugging Face, MXFP4\n    5 layers, 9 experts of which 4 compute, hidden 96" in out
    assert "MXFP4 scales 2^-7 to 2^-2" in out
    assert inspect_main([str(sources["hf"]), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "hf"


def test_a_published_model_is_known_by_its_sizes():
    from converter.inspection import PUBLISHED

    assert PUBLISHED == {(24, 32, 2880, 201088): "gpt-oss-20b", (36, 128, 2880, 201088): "gpt-oss-120b"}


@pytest.mark.parametrize("kind", ["hf", "hf-bf16", "openai", "mxfp4", "float32", "plain"])
def test_what_it_advises_works(sources, checkpoints, cfg, tmp_path, kind):
    places = {**sources, **checkpoints}
    if kind == "plain":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "plain", nnx.state(create_model_from_checkpoint(checkpoints["bfloat16"], cfg)))
        (tmp_path / "plain/config.json").write_text(json.dumps(cfg.to_json()))
        places["plain"] = tmp_path / "plain"
    advice = [line for line in inspect(places[kind], tmp_path)["what_to_do"] if line.startswith("convert-oss")]
    assert len(advice) >= 3
    for number, line in enumerate(advice):
        command = shlex.split(line.replace(" OUT", f" {tmp_path / str(number)}"), comments=True)[1:]
        assert main([*command, "-q", "--no-verify"]) == 0, line


def test_what_it_advises_is_of_the_checkpoint_itself(checkpoints, cfg, tmp_path):
    """Where a directory above it was given: other commands look for no item."""
    shutil.copytree(checkpoints["bfloat16"], tmp_path / "run/model")
    advice = inspect(tmp_path / "run", tmp_path)["what_to_do"]
    assert f"verify-oss {tmp_path / 'run/model'}" in advice
    assert verify_main([str(tmp_path / "run/model"), "-q"]) == 0
    create_model_from_checkpoint(tmp_path / "run/model", cfg)
    assert f"create_model_from_checkpoint({str(tmp_path / 'run/model')!r}, cfg)" in advice


def test_updates_are_told(checkpoints, cfg, tmp_path, capsys):
    model = create_model_from_checkpoint(checkpoints["mxfp4"], cfg)
    add_lora(model, r".*(q|o)_proj", 3, 6, rngs=nnx.Rngs(0))
    save_lora(model, tmp_path / "lora")
    found = inspect(tmp_path / "lora", tmp_path)
    assert (found["form"], len(found["updates"])) == ("orbax-lora", 10)
    assert found["updates"]["layers.0.attn.q_proj"] == {"rank": 3, "alpha": 6.0}
    assert main([str(tmp_path / "lora"), str(tmp_path / "peft"), "--to", "peft", "--base", str(checkpoints["mxfp4"])]) == 0
    found = inspect(tmp_path / "peft", tmp_path)
    assert (found["form"], found["made_from"]) == ("peft", {"model": str(checkpoints["mxfp4"])})
    assert found["updates"]["model.layers.0.self_attn.q_proj"] == {"rank": 3, "alpha": 6.0}
    assert inspect_main([str(tmp_path / "peft")]) == 0
    assert "    and 7 more\n" in capsys.readouterr().out


def test_what_is_none_of_them_is_a_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, said in (("empty", "expected *.safetensors files, found none"), ("file", "expected a directory, found a file")):
        assert inspect_main([str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert inspect_main([str(tmp_path / "none")]) == 2
    assert "expected a directory, found nothing" in capsys.readouterr().err
