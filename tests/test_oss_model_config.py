"""`ModelConfig`: presets, the three dialects of config.json, and the text of every refusal."""

import dataclasses
import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from oss_model import InputError, ModelConfig, layouts
from oss_model.synthetic import hf_config

OTHER_FORM = "; use the model's bfloat16 or MXFP4 form"


def unknown(key: str) -> str:
    return (
        f"{key}: not a key of gpt-oss; it may change the arithmetic, so it is refused; convert-oss --ignore-config-key {key} "
        "lets it pass, if you know that it does not"
    )


PUBLISHED = {  # openai/gpt-oss-20b, config.json: written by transformers 4
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
ORIGINAL = {  # openai/gpt-oss-20b, original/config.json
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}
IN_120B = {
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
}


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def with_rope(**changes) -> dict:
    """The published file with other `rope_scaling`; None takes a key away."""
    rope = PUBLISHED["rope_scaling"] | changes
    return PUBLISHED | {"rope_scaling": {key: value for key, value in rope.items() if value is not None}}


def written_by_transformers_5() -> dict:
    """What transformers 5 makes of the published file, with nothing but Python: one `rope_parameters`."""
    rope = PUBLISHED["rope_scaling"] | {"rope_theta": 150000.0}
    return without(PUBLISHED, "rope_scaling", "rope_theta") | {
        "rope_parameters": rope,
        "swiglu_alpha": 1.702,
        "dtype": "bfloat16",
    }


def faults(config) -> list[str]:
    with pytest.raises(InputError) as caught:
        ModelConfig.from_json(config)
    return caught.value.faults


# --- presets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "layers", "experts", "parameters", "mxfp4_bytes", "bf16_bytes"),
    [
        ("gpt_oss_20b", 24, 32, 20_914_757_184, 13_761_264_768, 41_829_514_368),
        ("gpt_oss_120b", 36, 128, 116_829_156_672, 65_248_815_744, 233_658_313_344),
        ("default", 36, 128, 116_829_156_672, 65_248_815_744, 233_658_313_344),
    ],
)
def test_preset_sizes_are_those_of_the_published_models(preset, layers, experts, parameters, mxfp4_bytes, bf16_bytes):
    cfg = getattr(ModelConfig, preset)()
    assert (cfg.num_hidden_layers, cfg.num_experts) == (layers, experts)
    plain, packed = layouts.parameters(cfg), layouts.parameters(dataclasses.replace(cfg, param_dtype="mxfp4"))
    count = sum(math.prod(shape) for shape, _ in plain.values())
    assert count == parameters
    assert sum(math.prod(shape) * dtype.itemsize for shape, dtype in plain.values()) == bf16_bytes
    assert sum(math.prod(shape) * dtype.itemsize for shape, dtype in packed.values()) == mxfp4_bytes


def test_shared_constants_of_the_published_models():
    for cfg in (ModelConfig.gpt_oss_20b(), ModelConfig.gpt_oss_120b()):
        assert (cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size) == (2880, 2880, 201088)
        assert (cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim) == (64, 8, 64)
        assert (cfg.num_experts_per_tok, cfg.sliding_window) == (4, 128)
        assert (cfg.rms_norm_eps, cfg.swiglu_alpha, cfg.swiglu_limit) == (1e-5, 1.702, 7.0)
        assert (cfg.rope_theta, cfg.rope_factor, cfg.rope_beta_fast, cfg.rope_beta_slow) == (150000, 32, 32, 1)
        assert (cfg.rope_original_max_position_embeddings, cfg.max_position_embeddings) == (4096, 131072)
        assert cfg.rope_truncate is False
        assert cfg.layer_types == ("sliding_attention", "full_attention") * (cfg.num_hidden_layers // 2)
        assert cfg.dtype == jnp.bfloat16
        assert cfg.param_dtype is None


def test_in_the_tiny_model_every_size_is_distinct():
    cfg = ModelConfig.tiny()
    sizes = [size for axis, size in cfg.axes.items() if axis != "glu"]
    sizes += [cfg.num_hidden_layers * 1000, cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim]
    sizes += [2 * cfg.intermediate_size, cfg.num_attention_heads // cfg.num_key_value_heads]
    assert len(set(sizes)) == len(sizes)
    assert cfg.num_hidden_layers % 2 == 1
    assert not {cfg.num_experts, cfg.head_dim, cfg.num_attention_heads} & {8, 16, 32, 64}


def test_use_sharding_is_a_field_of_every_preset():
    for preset in (ModelConfig.default, ModelConfig.gpt_oss_120b, ModelConfig.gpt_oss_20b, ModelConfig.tiny):
        assert preset().use_sharding is False
        assert preset(use_sharding=True) == dataclasses.replace(preset(), use_sharding=True)


# --- dialects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [PUBLISHED, written_by_transformers_5(), ORIGINAL], ids=["4.x", "5.x", "original"])
def test_three_dialects_give_the_20b_preset(dialect, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dialect))
    before = json.dumps(dialect)
    for source in (dialect, path, str(path)):
        assert ModelConfig.from_json(source) == ModelConfig.gpt_oss_20b()
    assert json.dumps(dialect) == before, "the object given was changed"


def test_three_dialects_give_the_120b_preset():
    for dialect in (
        PUBLISHED | IN_120B,
        written_by_transformers_5() | IN_120B,
        ORIGINAL | {"num_hidden_layers": 36, "num_experts": 128},
    ):
        assert ModelConfig.from_json(dialect) == ModelConfig.default()


def test_what_transformers_itself_writes(tmp_path):
    from transformers import GptOssConfig

    assert ModelConfig.from_json(GptOssConfig().to_dict()) == ModelConfig.default()
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text(json.dumps(PUBLISHED))
    read = GptOssConfig.from_pretrained(tmp_path / "published")
    assert ModelConfig.from_json(read.to_dict()) == ModelConfig.gpt_oss_20b()
    read.save_pretrained(tmp_path / "written")
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    assert "rope_scaling" not in written
    assert written["rope_parameters"]["rope_theta"] == 150000
    assert ModelConfig.from_json(tmp_path / "written" / "config.json") == ModelConfig.gpt_oss_20b()


def test_transformers_reads_the_same_arithmetic_out_of_our_file(tmp_path):
    from transformers import GptOssConfig

    cfg = dataclasses.replace(ModelConfig.tiny(), rope_truncate=True, rope_factor=4.0, rms_norm_eps=3e-5, swiglu_limit=5.0)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(cfg, quantized=False)))
    theirs = GptOssConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["truncate"] is True
    assert theirs.rope_parameters["factor"] == 4.0
    assert (theirs.rms_norm_eps, theirs.swiglu_limit, theirs.num_local_experts) == (3e-5, 5.0, 9)
    assert ModelConfig.from_json(theirs.to_dict()) == cfg


# Every field that a file can say, with a value that is not the default: a key that is read into the wrong field, or
# not at all, cannot pass.
OTHERWISE = ModelConfig(
    vocab_size=11, hidden_size=13, intermediate_size=17, num_hidden_layers=3, num_attention_heads=38, num_key_value_heads=19,
    head_dim=46, num_experts=29, num_experts_per_tok=5, sliding_window=31,
    layer_types=("full_attention", "full_attention", "sliding_attention"), max_position_embeddings=37, rope_theta=41.0,
    rope_factor=43.0, rope_beta_fast=47.0, rope_beta_slow=53.0, rope_original_max_position_embeddings=59, rope_truncate=True,
    rms_norm_eps=61.0, swiglu_alpha=67.0, swiglu_limit=71.0,
)  # fmt: skip
OTHERWISE_FILE = {
    "model_type": "gpt_oss", "vocab_size": 11, "hidden_size": 13, "intermediate_size": 17, "num_hidden_layers": 3,
    "num_attention_heads": 38, "num_key_value_heads": 19, "head_dim": 46, "num_local_experts": 29, "num_experts_per_tok": 5,
    "sliding_window": 31, "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 37, "rms_norm_eps": 61.0, "swiglu_alpha": 67.0, "swiglu_limit": 71.0,
}  # fmt: skip
OTHERWISE_ROPE = {"rope_type": "yarn", "factor": 43, "beta_fast": 47, "beta_slow": 53, "original_max_position_embeddings": 59}


def test_every_key_goes_to_its_own_field():
    rope = OTHERWISE_ROPE | {"truncate": True}
    assert ModelConfig.from_json(OTHERWISE_FILE | {"rope_theta": 41, "rope_scaling": rope}) == OTHERWISE
    assert ModelConfig.from_json(OTHERWISE_FILE | {"rope_parameters": rope | {"rope_theta": 41}}) == OTHERWISE
    original = ModelConfig.from_json({
        "num_hidden_layers": 3, "num_experts": 29, "experts_per_token": 5, "vocab_size": 11, "hidden_size": 13,
        "intermediate_size": 17, "swiglu_limit": 71, "head_dim": 46, "num_attention_heads": 38, "num_key_value_heads": 19,
        "sliding_window": 31, "initial_context_length": 59, "rope_theta": 41, "rope_scaling_factor": 43,
        "rope_ntk_alpha": 53, "rope_ntk_beta": 47,
    })  # fmt: skip
    unsaid = {"layer_types", "max_position_embeddings", "rope_truncate", "rms_norm_eps", "swiglu_alpha"}
    default = ModelConfig(num_hidden_layers=3)
    for field in dataclasses.fields(ModelConfig):
        other = default if field.name in unsaid else OTHERWISE
        assert getattr(original, field.name) == getattr(other, field.name), field.name


@pytest.mark.parametrize("size", ["tiny", "gpt_oss_20b", "gpt_oss_120b"])
def test_the_files_we_write_are_read_back(size):
    cfg = getattr(ModelConfig, size)()
    assert ModelConfig.from_json(hf_config(cfg, quantized=True)) == cfg
    assert ModelConfig.from_json(hf_config(cfg, quantized=False)) == cfg
    original = ModelConfig.from_json(cfg.to_json("openai"))
    assert dataclasses.replace(original, max_position_embeddings=cfg.max_position_embeddings) == cfg


def test_the_published_20b_files_are_written_key_for_key():
    assert hf_config(ModelConfig.gpt_oss_20b(), quantized=True) == PUBLISHED
    assert ModelConfig.gpt_oss_20b().to_json("openai") == ORIGINAL


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("said", "means"), [({}, True), ({"truncate": True}, True), ({"truncate": False}, False)])
def test_absent_truncate_is_true_as_in_transformers(name, said, means, tmp_path):
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    from oss_model import RotaryEmbedding

    rope = {key: value for key, value in PUBLISHED["rope_scaling"].items() if key != "truncate"} | said
    rope |= {"rope_theta": 150000} if name == "rope_parameters" else {}
    file = without(PUBLISHED, "rope_scaling", *(["rope_theta"] if name == "rope_parameters" else [])) | {name: rope}
    cfg = ModelConfig.from_json(file)
    assert cfg.rope_truncate is means
    (tmp_path / "config.json").write_text(json.dumps(file))
    theirs = GptOssRotaryEmbedding(GptOssConfig.from_pretrained(tmp_path)).inv_freq.numpy()
    np.testing.assert_allclose(RotaryEmbedding(cfg).inv_freq, theirs, rtol=1e-6)


def test_both_rope_dicts_may_say_the_same():
    rope = PUBLISHED["rope_scaling"] | {"rope_theta": 150000}
    assert ModelConfig.from_json(PUBLISHED | {"rope_parameters": rope}) == ModelConfig.gpt_oss_20b()
    assert ModelConfig.from_json(PUBLISHED | {"rope_parameters": None}) == ModelConfig.gpt_oss_20b()


def test_older_name_of_rope_type():
    assert ModelConfig.from_json(with_rope(rope_type=None, type="yarn")) == ModelConfig.gpt_oss_20b()


@pytest.mark.parametrize("key", ["layer_types", "max_position_embeddings", "rms_norm_eps", "swiglu_alpha"])
def test_null_and_absent_mean_the_default(key):
    for file in (PUBLISHED | {key: None}, without(PUBLISHED, key)):
        assert ModelConfig.from_json(file) == ModelConfig.gpt_oss_20b()


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow"])
def test_absent_betas_mean_yarns_defaults(key):
    assert ModelConfig.from_json(with_rope(**{key: None})) == ModelConfig.gpt_oss_20b()


@pytest.mark.parametrize(
    "harmless",
    [
        {"hidden_act": "gelu"},  # the reference does not read it
        {"torch_dtype": "bfloat16"},
        {"dtype": "float32"},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "mxfp4", "dequantize": True}},
        {"bos_token_id": 199998, "eos_token_id": [200002, 199999]},
        {"_name_or_path": "x", "use_cache": False, "router_aux_loss_coef": 0.5},
    ],
)
def test_keys_that_leave_the_logits_alone(harmless):
    assert ModelConfig.from_json(PUBLISHED | harmless) == ModelConfig.gpt_oss_20b()


# --- refusals ---------------------------------------------------------------------------------------------------

INTEGERS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "sliding_window", "num_local_experts", "num_experts_per_tok",
            "max_position_embeddings"]  # fmt: skip
NUMBERS = ["rms_norm_eps", "swiglu_alpha", "swiglu_limit", "rope_theta"]


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize("value", ["64", 64.0, True, [64], {}])
def test_integer_of_the_wrong_type(key, value):
    file = without(PUBLISHED, "experts_per_token") | {key: value}
    assert faults(file) == [f"config.json: {key}: expected an integer, found {value!r}"]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["7", False, [7.0], math.nan, math.inf, -math.inf, 10**400])
def test_number_of_the_wrong_type(key, value):
    assert faults(PUBLISHED | {key: value}) == [f"config.json: {key}: expected a finite number, found {value!r}"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("factor", "32", "a finite number"),
        ("beta_fast", True, "a finite number"),
        ("beta_slow", {}, "a finite number"),
        ("rope_theta", "1e5", "a finite number"),
        ("original_max_position_embeddings", 4096.0, "an integer"),
        ("truncate", "false", "true or false"),
        ("truncate", 0, "true or false"),
    ],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_value_of_the_wrong_type(name, key, value, expected):
    rope = PUBLISHED["rope_scaling"] | {"rope_theta": 150000} | {key: value}
    file = without(PUBLISHED, "rope_scaling", "rope_theta", "initial_context_length") | {name: rope}
    assert faults(file) == [f"config.json: {name}.{key}: expected {expected}, found {value!r}"]


@pytest.mark.parametrize("key", [key for key in ORIGINAL if key not in ("rope_theta", "swiglu_limit") and "rope" not in key])
def test_integer_of_the_wrong_type_in_the_original_dialect(key):
    assert faults(ORIGINAL | {key: "8"}) == [f"config.json: {key}: expected an integer, found '8'"]


@pytest.mark.parametrize("key", ["rope_theta", "swiglu_limit", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta"])
def test_number_of_the_wrong_type_in_the_original_dialect(key):
    assert faults(ORIGINAL | {key: "8"}) == [f"config.json: {key}: expected a finite number, found '8'"]


@pytest.mark.parametrize("value", ["sliding_attention", 3, ["chunked_attention"] * 24, [[]] * 24, {"sliding_attention": 1}])
def test_layer_types_of_the_wrong_type(value):
    expected = "a list of 'sliding_attention' and 'full_attention'"
    assert faults(PUBLISHED | {"layer_types": value}) == [f"config.json: layer_types: expected {expected}, found {value!r}"]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (PUBLISHED | {"model_type": "llama"}, ["model_type: expected 'gpt_oss', found 'llama'; this is another model"]),
        (PUBLISHED | {"model_type": None}, ["model_type: expected 'gpt_oss', found None; this is another model"]),
        (PUBLISHED | {"attention_bias": False}, ["attention_bias: only True is implemented, found False"]),
        (PUBLISHED | {"attention_dropout": 0.1}, ["attention_dropout: only 0 is implemented, found 0.1"]),
        (PUBLISHED | {"tie_word_embeddings": True}, ["tie_word_embeddings: only False is implemented, found True"]),
        (PUBLISHED | {"is_encoder_decoder": True}, ["is_encoder_decoder: only False is implemented, found True"]),
        (
            PUBLISHED | {"quantization_config": {"quant_method": "gptq"}},
            [f"quantization_config.quant_method: only 'mxfp4' is implemented, found {{'quant_method': 'gptq'}}{OTHER_FORM}"],
        ),
        (
            PUBLISHED | {"quantization_config": {"bits": 4, "group": 64}},
            [f"quantization_config.quant_method: only 'mxfp4' is implemented, found {{'bits': 4, 'group': 64}}{OTHER_FORM}"],
        ),
        (
            PUBLISHED | {"quantization_config": {}},
            [f"quantization_config.quant_method: only 'mxfp4' is implemented, found {{}}{OTHER_FORM}"],
        ),
        (
            PUBLISHED | {"quantization_config": "mxfp4"},
            [f"quantization_config.quant_method: only 'mxfp4' is implemented, found 'mxfp4'{OTHER_FORM}"],
        ),
        (
            PUBLISHED | {"num_shared_experts": 1},
            [unknown("num_shared_experts")],
        ),
        (
            ORIGINAL | {"rms_norm_eps": 1e-5},
            [unknown("rms_norm_eps")],
        ),
        (
            PUBLISHED | {"experts_per_token": 2},
            ["experts_per_token: found 2, but 4 elsewhere in the file; keep one"],
        ),
        (PUBLISHED | {"num_experts": 31}, ["num_experts: found 31, but 32 elsewhere in the file; keep one"]),
        (
            PUBLISHED | {"initial_context_length": 8192},
            ["initial_context_length: found 8192, but 4096 elsewhere in the file; keep one"],
        ),
        (
            without(PUBLISHED, "rope_scaling"),
            ["rope_parameters or rope_scaling: missing; without YaRN every position is rotated wrongly"],
        ),
        (
            PUBLISHED | {"rope_scaling": None},
            ["rope_parameters or rope_scaling: missing; without YaRN every position is rotated wrongly"],
        ),
        (PUBLISHED | {"rope_scaling": "yarn"}, ["rope_scaling: expected an object, found 'yarn'"]),
        (with_rope(rope_type="linear"), ["rope_scaling.rope_type: only 'yarn' is implemented, found 'linear'"]),
        (with_rope(rope_type=None), ["rope_scaling.rope_type: only 'yarn' is implemented, found None"]),
        (with_rope(type="linear"), ["rope_scaling.rope_type: only 'yarn' is implemented, found 'linear'"]),
        (
            with_rope(attention_factor=1.5),
            ["rope_scaling.attention_factor: not implemented, and it would change the rotation"],
        ),
        (with_rope(factor=None), ["rope_scaling.factor: missing; is this the config.json of a gpt-oss model?"]),
        (without(PUBLISHED, "rope_theta"), ["rope_theta: missing; is this the config.json of a gpt-oss model?"]),
        (
            PUBLISHED | {"rope_parameters": PUBLISHED["rope_scaling"] | {"rope_theta": 10000, "factor": 8.0}},
            # The first of the two is believed, so what it contradicts is named: the top level, then `rope_scaling`.
            [
                "rope_parameters.rope_theta: found 10000, but 150000 elsewhere in the file; keep one",
                "rope_scaling.factor: found 32.0, but 8.0 elsewhere in the file; keep one",
            ],
        ),
        (
            PUBLISHED | {"rope_parameters": without(PUBLISHED["rope_scaling"], "truncate")},
            ["rope_scaling.truncate: found False, but True elsewhere in the file; keep one"],
        ),
        (
            without(PUBLISHED, "sliding_window", "head_dim"),
            [f"{key}: missing; is this the config.json of a gpt-oss model?" for key in ("head_dim", "sliding_window")],
        ),
        (
            without(ORIGINAL, "rope_ntk_alpha", "num_experts", "rope_scaling_factor"),
            [f"{key}: missing; is this the config.json of a gpt-oss model?" for key in ("num_experts", "rope_scaling_factor")],
        ),
        (PUBLISHED | {"head_dim": 0}, ["head_dim: expected a positive number, found 0"]),
        (
            without(PUBLISHED, "layer_types") | {"num_hidden_layers": 2**31},
            ["num_hidden_layers: expected at most 1000, found 2147483648"],
        ),
        (PUBLISHED | {"num_local_experts": 10**30}, [f"num_experts: expected at most 1000, found {10**30}"]),
        (PUBLISHED | {"rope_theta": -1.0}, ["rope_theta: expected a positive number, found -1.0"]),
        (PUBLISHED | {"num_hidden_layers": 23}, ["layer_types: expected 23 entries, one a layer, found 24"]),
        (
            PUBLISHED | {"num_attention_heads": 63},
            ["num_attention_heads: expected a multiple of num_key_value_heads = 8, found 63"],
        ),
        (PUBLISHED | {"head_dim": 63}, ["head_dim: expected an even number, for rotation in pairs, found 63"]),
        (
            without(PUBLISHED, "experts_per_token") | {"num_experts_per_tok": 33},
            ["num_experts_per_tok: expected at most num_experts = 32, found 33"],
        ),
    ],
)  # fmt: skip
def test_refused_with_exactly_this_text(file, expected, tmp_path):
    assert faults(file) == [f"config.json: {line}" for line in expected]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(file))
    assert faults(path) == [f"{path}: {line}" for line in expected]


@pytest.mark.parametrize("key", [*INTEGERS[:-1], "swiglu_limit", "rope_theta"])
def test_null_where_there_is_no_default(key):
    file = without(PUBLISHED, "experts_per_token") | {key: None}
    expected = "a finite number" if key in NUMBERS else "an integer"
    assert faults(file) == [f"config.json: {key}: expected {expected}, found None"]


def test_a_limit_that_transformers_4_does_not_write_is_its_codes():
    """`limit = 7.0` in its modeling_gpt_oss.py; a key of its own came later. OpenAI's own files always say."""
    assert ModelConfig.from_json(without(PUBLISHED, "swiglu_limit")).swiglu_limit == 7.0
    with pytest.raises(InputError, match="swiglu_limit: missing"):
        ModelConfig.from_json(without(ORIGINAL, "swiglu_limit"))


def test_all_faults_at_once_in_the_order_of_the_table():
    file = without(with_rope(rope_type="linear", mscale=1.0, factor="x"), "sliding_window")
    file |= {"vocab_size": "big", "head_dim": None, "attention_bias": False, "zzz": 1, "aaa": 2}
    assert faults(file) == [
        "config.json: vocab_size: expected an integer, found 'big'",
        "config.json: head_dim: expected an integer, found None",
        "config.json: rope_scaling.rope_type: only 'yarn' is implemented, found 'linear'",
        "config.json: rope_scaling.factor: expected a finite number, found 'x'",
        "config.json: rope_scaling.mscale: not implemented, and it would change the rotation",
        "config.json: attention_bias: only True is implemented, found False",
        f"config.json: {unknown('aaa')}",
        f"config.json: {unknown('zzz')}",
        "config.json: sliding_window: missing; is this the config.json of a gpt-oss model?",
    ]
    with pytest.raises(InputError) as caught:
        ModelConfig.from_json(file)
    assert str(caught.value) == "\n".join(caught.value.faults)


def test_file_that_is_no_config(tmp_path):
    path = tmp_path / "config.json"
    assert faults(path) == [f"{path}: expected a gpt-oss config.json, found no file"]
    path.write_text("[1, 2]")
    assert faults(path) == [f"{path}: expected a JSON object, found list"]
    path.write_text('{"model_type": "gpt_oss"')
    [fault] = faults(path)
    assert fault.startswith(f"{path}: expected a JSON object, found something unreadable (Expecting ',' delimiter")
    path.write_bytes(b"\xff\xfe")
    [fault] = faults(path)
    assert fault.startswith(f"{path}: expected a JSON object, found something unreadable ('utf-8' codec can't decode")
    path.write_text("[" * 100_000)
    [fault] = faults(path)
    assert fault.startswith(f"{path}: expected a JSON object, found something unreadable (maximum recursion depth")
    (tmp_path / "directory.json").mkdir()
    where = tmp_path / "directory.json"
    assert faults(where) == [f"{where}/config.json: expected a gpt-oss config.json, found no file"]


def test_a_directory_stands_for_its_config(sources):
    assert ModelConfig.from_json(sources["hf"]) == ModelConfig.from_json(sources["hf"] / "config.json")


def test_it_shows_what_is_not_as_in_120b():
    assert repr(ModelConfig.default()) == "ModelConfig()"
    assert repr(ModelConfig.gpt_oss_20b()) == "ModelConfig(num_hidden_layers=24, num_experts=32)"
    cfg = dataclasses.replace(ModelConfig.tiny(), dtype=jnp.float32, layer_types=("full_attention",) * 5, param_dtype="float32")
    assert eval(repr(cfg)) == cfg
    assert len(repr(cfg)) < 450


@pytest.mark.parametrize("dtype", [jnp.float32, np.float32, np.dtype("float32"), "float32"])
def test_param_dtype_is_given_as_dtype_is(dtype):
    assert dataclasses.replace(ModelConfig.tiny(), param_dtype=dtype).param_dtype == "float32"


def test_an_empty_object_names_every_key_of_the_original():
    said = [line.split(": ")[1] for line in faults({})]
    assert sorted(said) == sorted(set(ORIGINAL) - {"rope_ntk_alpha", "rope_ntk_beta"})


# --- the dataclass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, np.float32, "float32", np.dtype("float32"), jnp.dtype("float32")])
def test_replace_dtype(dtype):
    cfg = dataclasses.replace(ModelConfig.tiny(), dtype=dtype)
    assert cfg.dtype == jnp.float32
    assert cfg != ModelConfig.tiny()
    assert dataclasses.replace(cfg, dtype=jnp.bfloat16) == ModelConfig.tiny()


def test_equal_configs_hash_equal():
    one, other = ModelConfig.tiny(), ModelConfig.tiny()
    assert hash(one) == hash(other)
    assert {one: "found"}[other] == "found"
    assert hash(dataclasses.replace(one, dtype="float32")) == hash(dataclasses.replace(one, dtype=jnp.float32))
    assert hash(one) != hash(dataclasses.replace(one, sliding_window=12))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_no_field_can_be_set(field):
    """What is compiled for a configuration stays right: under jit it is static, and a changed one would not be seen."""
    cfg = ModelConfig.tiny()
    with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{field}'"):
        setattr(cfg, field, getattr(cfg, field))


def test_replace_is_the_way_to_another_configuration():
    cfg = dataclasses.replace(ModelConfig.tiny(), sliding_window=12, dtype="float32")
    assert (cfg.sliding_window, cfg.dtype, cfg.layer_types) == (12, jnp.float32, ModelConfig.tiny().layer_types)
    fewer = dataclasses.replace(cfg, num_hidden_layers=2, layer_types=())
    assert fewer.layer_types == ("sliding_attention", "full_attention")


def test_other_layer_types_are_kept():
    types = ("full_attention", "sliding_attention", "full_attention")
    assert ModelConfig(num_hidden_layers=3, layer_types=types).layer_types == types
    assert ModelConfig(num_hidden_layers=3).layer_types == ("sliding_attention", "full_attention", "sliding_attention")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": np.float16}, ["dtype: expected bfloat16 or float32, found float16"]),
        ({"dtype": "bf17"}, ["dtype: expected bfloat16 or float32, found bf17"]),
        ({"dtype": None}, ["dtype: expected bfloat16 or float32, found float64"]),
        ({"param_dtype": "int8"}, ["param_dtype: expected None or one of bfloat16, float32, mxfp4, found 'int8'"]),
        ({"expert_path": "fast"}, ["expert_path: expected one of auto, loop, scan, grouped, pairs, ragged, found 'fast'"]),
        ({"num_hidden_layers": 6}, ["layer_types: expected 6 entries, one a layer, found 5"]),
        (
            {"param_dtype": "mxfp4", "hidden_size": 100, "intermediate_size": 161},
            [
                "hidden_size: expected a multiple of 32, the MXFP4 block, found 100",
                "intermediate_size: expected a multiple of 32, the MXFP4 block, found 161",
            ],
        ),
        (
            {"vocab_size": 0, "rms_norm_eps": -1e-5},
            ["vocab_size: expected a positive number, found 0", "rms_norm_eps: expected a positive number, found -1e-05"],
        ),
    ],
)
def test_a_config_that_cannot_be_computed_with(changes, expected):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(ModelConfig.tiny(), **changes)
    assert caught.value.faults == expected


WRONG_TYPES = """
from oss_model import InputError, ModelConfig

print(ModelConfig(num_hidden_layers=1, layer_types=["full_attention"]).layer_types)
for changes in (
    {"use_sharding": 1, "rope_truncate": None},
    {"layer_types": 5},
    {"vocab_size": "1", "head_dim": 2.5, "rope_theta": float("nan"), "num_hidden_layers": None},
):
    try:
        ModelConfig(**changes)
    except InputError as e:
        print(e)
"""


def test_wrong_types_given_from_python():
    # In a process of its own: in this one jaxtyping checks the types first.
    run = subprocess.run([sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "('full_attention',)",
        "rope_truncate: expected true or false, found None",
        "use_sharding: expected true or false, found 1",
        "layer_types: expected a list of 'sliding_attention' and 'full_attention', found 5",
        "vocab_size: expected an integer, found '1'",
        "num_hidden_layers: expected an integer, found None",
        "head_dim: expected an integer, found 2.5",
        "rope_theta: expected a finite number, found nan",
    ]


def test_what_others_write_and_means_nothing_passes():
    """Of published fine-tunes, and of old releases of transformers, at the values that they have in every model."""
    harmless = {
        "unsloth_fixed": True,
        "unsloth_version": "2025.8",
        "model_name": "x",
        "pruned_from_num_experts": 32,
        "top_p": 0.9,
    }
    neutral = {"torchscript": False, "is_decoder": False, "pruned_heads": {}, "tie_encoder_decoder": False, "max_length": 20}
    assert ModelConfig.from_json(PUBLISHED | harmless | neutral) == ModelConfig.from_json(PUBLISHED)
    assert faults(PUBLISHED | {"pruned_heads": {"0": [1]}}) == [
        "config.json: pruned_heads: only {} is implemented, found {'0': [1]}"
    ]


def test_an_unknown_key_is_ignored_by_its_name_alone():
    file = PUBLISHED | {"moe_flavour": 1, "secret": 2}
    assert ModelConfig.from_json(file, ignore=["moe_flavour", "secret"]) == ModelConfig.from_json(PUBLISHED)
    with pytest.raises(InputError) as caught:
        ModelConfig.from_json(file, ignore=["moe_flavour", "head_dim", "other"])
    assert caught.value.faults == [
        f"config.json: {unknown('secret')}",
        "config.json: head_dim: expected an unknown key, to be ignored, found a known one",
        "config.json: other: expected an unknown key, to be ignored, found none",
    ]
