"""gpt-oss under tunix: its trainer (full and LoRA), its sampler, and GRPO's log-probabilities, on a small checkpoint.

    ./scripts/tunix          # in an environment of its own: tunix wants an older safetensors than parity does

Every line is something compared with what the model computes without tunix; exit status 1 if one differs.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.rl.common import compute_per_token_logps
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

from converter import convert
from oss_model import ModelConfig, add_lora, create_model_from_checkpoint, generate
from oss_model.synthetic import write_checkpoint
from oss_model.tunix import TunixTransformer

jax.config.update("jax_num_cpu_devices", 4)
PAD, EOS = 0, 1


class Numbers:
    """A tokenizer whose text is the token ids themselves."""

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int | None:
        return None

    def eos_id(self) -> int:
        return EOS

    def pad_id(self) -> int:
        return PAD


def batches(count: int):
    """The same rows every time: a model that trains learns them by heart. The second row ends early."""
    tokens = np.random.default_rng(0).integers(2, 509, (2, 24), dtype=np.int32)
    tokens[1, 18:] = PAD
    return [TrainingInput(input_tokens=tokens, input_mask=tokens != PAD) for _ in range(count)]


def as_model_input(example: TrainingInput) -> dict[str, jax.Array]:
    mask = jnp.asarray(example.input_mask)
    return {
        "input_tokens": jnp.asarray(example.input_tokens),
        "input_mask": mask,
        "positions": build_positions_from_mask(mask),
        "attention_mask": make_causal_attn_mask(mask),
    }


def loss_without_tunix(model, example: TrainingInput) -> float:
    """Mean of -log p over the next tokens, each row by itself: no padding, no mask."""
    losses = []
    for row, mask in zip(example.input_tokens, example.input_mask, strict=True):
        tokens = jnp.asarray(row[mask])[None]
        losses.append(optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]))
    return float(jnp.concatenate(losses, axis=1).mean())


def train(model: TunixTransformer, steps: int = 8) -> tuple[set[str], float, float]:
    """Names of the parameters that moved, and the loss before and after."""
    trainer = PeftTrainer(model, optax.adam(3e-3), TrainingConfig(eval_every_n_steps=1000, max_steps=steps))
    values, loss = parameters(model), float(trainer.loss_fn(model, **as_model_input(batches(1)[0])))
    trainer.with_gen_model_input_fn(as_model_input).train(batches(steps))
    moved = {name for name, value in parameters(model).items() if not np.array_equal(value, values[name])}
    return moved, loss, float(trainer.loss_fn(model, **as_model_input(batches(1)[0])))


def parameters(model: nnx.Module, kind: type = nnx.Variable) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model, kind))}


def main() -> int:
    failures = 0

    def check(what: str, good: bool, found: str) -> None:
        nonlocal failures
        failures += not good
        print(f"{'ok  ' if good else 'FAIL'}  {what:60} {found}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        source = write_checkpoint(Path(scratch) / "source", ModelConfig.tiny())
        paths = {dtype: Path(scratch) / dtype for dtype in ("float32", "mxfp4")}
        for dtype, path in paths.items():
            convert(source, path, dtype=dtype)
        cfg = dataclasses.replace(ModelConfig.tiny(), dtype=jnp.float32)

        def fresh(dtype: str) -> TunixTransformer:
            return TunixTransformer(create_model_from_checkpoint(paths[dtype], cfg))

        # PeftTrainer: every parameter
        model = fresh("float32")
        mask_loss = PeftTrainer(model, optax.sgd(0.0), TrainingConfig(eval_every_n_steps=1000)).loss_fn(
            model, **as_model_input(batches(1)[0])
        )
        expected = loss_without_tunix(model.model, batches(1)[0])
        check(
            "PeftTrainer's loss, padded, is that of each row alone",
            abs(mask_loss - expected) < 1e-4,
            f"{mask_loss:.6f} {expected:.6f}",
        )
        moved, before, after = train(model)
        everything = parameters(model, nnx.Param).keys()
        check("PeftTrainer, full: the loss falls", after < before - 1, f"{before:.3f} -> {after:.3f}")
        check("PeftTrainer, full: every parameter moves", moved == everything, f"{len(moved)} of {len(everything)}")

        # The same on a mesh of the devices there are: tunix looks for `with mesh`, the adapter sets its own
        mesh = jax.make_mesh((2, 2), ("fsdp", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        model = TunixTransformer(create_model_from_checkpoint(paths["float32"], cfg, mesh), mesh)
        with mesh:
            moved, _, on_mesh = train(model)
        good = moved == everything and abs(on_mesh - after) < 0.02
        check("PeftTrainer, full, on fsdp 2 × expert 2: the same loss", good, f"{after:.3f} {on_mesh:.3f}")

        # PeftTrainer: LoRA on attention and experts, over packed MXFP4
        model = fresh("mxfp4")
        add_lora(model.model, [r".*(q|k|v|o)_proj", r".*mlp\.(gate_up|down)"], rank=4, alpha=8, rngs=nnx.Rngs(0))
        moved, before, after = train(model)
        lora = parameters(model, nnx.LoRAParam).keys()
        check("PeftTrainer, LoRA over MXFP4: the loss falls", after < before - 0.3, f"{before:.3f} -> {after:.3f}")
        check("PeftTrainer, LoRA over MXFP4: only LoRA parameters move", moved == lora, f"{len(moved)} of {len(lora)}")

        # qwix's own LoRA, on attention: it finds linear maps by their products
        model = fresh("float32")
        provider = qwix.LoraProvider(module_path=".*attn/(q|k|v|o)_proj", rank=4, alpha=8)
        model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())
        lora = parameters(model, nnx.LoRAParam).keys()
        moved, before, after = train(model)
        check("qwix LoRA on attention: every layer's four maps", len(lora) == 2 * 4 * cfg.num_hidden_layers, f"{len(lora)}")
        check("qwix LoRA on attention: the loss falls", moved == lora and after < before - 0.1, f"{before:.3f} -> {after:.3f}")

        # Sampler: a batch of prompts of different lengths, padded on the left
        model = fresh("mxfp4")
        prompts = [[7, 301, 44, 9, 250, 13, 2, 91, 433, 120, 18, 77, 203, 64, 5], [400, 3], list(range(20, 50))]
        sampler = Sampler(model, Numbers(), CacheConfig(64, cfg.num_hidden_layers, cfg.num_key_value_heads, cfg.head_dim))
        out = sampler([" ".join(map(str, row)) for row in prompts], max_generation_steps=12, return_logits=True)
        ours = generate(model.model, prompts, 12, eos=[EOS])
        theirs = [np.asarray(row).tolist() for row in out.tokens]
        same = [a == b and len(a) == 12 for a, b in zip(ours, theirs, strict=True)]
        check("Sampler, greedy, left-padded: the tokens of generate()", all(same), f"{sum(same)} of {len(same)} rows")

        # GRPO: log-probabilities of completions after left-padded prompts
        rng = np.random.default_rng(1)
        prompt = rng.integers(2, 509, (2, 9), dtype=np.int32)
        prompt[1, :4] = PAD
        completion = rng.integers(2, 509, (2, 14), dtype=np.int32)
        graphdef, state = nnx.split(model)
        found = compute_per_token_logps(graphdef, state, jnp.asarray(prompt), jnp.asarray(completion), pad_id=PAD, eos_id=EOS)
        worst = 0.0
        for n in range(2):
            row = np.concatenate([prompt[n][prompt[n] != PAD], completion[n]])
            log_p = jax.nn.log_softmax(model.model(jnp.asarray(row)[None])[0, -15:-1])
            worst = max(worst, float(jnp.abs(log_p[jnp.arange(14), completion[n]] - found[n]).max()))
        check("GRPO's log-probabilities are those of each row alone", worst < 1e-4, f"{worst:.1e}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
