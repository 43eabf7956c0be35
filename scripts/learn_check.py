"""Does fine-tuning learn? `scripts/learn` runs this: chats whose answer is the first of four digits, asked anew of others.

    python scripts/learn_check.py WORK [--steps N] [--lora-steps N]

What is asked at the end was never seen in training; chance is 1 in 10. Answers are generated greedily from
what finetune.py left, and have to be right to the last token. Exit status: 0 if enough are.
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType

from oss_model import ModelConfig, create_model_from_checkpoint, generate, load_lora
from oss_model.synthetic import write_checkpoint

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from chatting import chat, write_chats, write_tokenizer  # noqa: E402  # type: ignore[import-not-found]

ENOUGH = {"untrained": 0.0, "full": 0.95, "LoRA over packed experts": 0.8}
DIGITS = "0123456789"
ASKED = 64  # held out
FROZEN = r"(.*norm\..*|.*router\..*)"
MESH = "fsdp=2,expert=2"


def drawn() -> tuple[list[str], list[str]]:
    """To train on, and to be asked: all numbers of four digits, in any order."""
    numbers = np.random.default_rng(0).permutation([f"{n:04}" for n in range(10_000)]).tolist()
    return numbers[ASKED:5000], numbers[:ASKED]


def finetune(source: Path, chats: Path, run: Path, *options: str) -> str:
    command = [sys.executable, ROOT / "scripts/examples/finetune.py", source, chats, run, "--mesh", MESH, *options]
    how = ["--compute", "float32", "--remat", "none", "--length", "128", "--batch", "16", "--schedule", "cosine"]
    done = subprocess.run([*map(str, command), *how], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-2]


def right(model, tokenizer, words: list[str]) -> float:
    """The share of numbers whose answer is the first digit."""
    prompts = [f"<|start|>user<|message|>{word}<|end|><|start|>assistant" for word in words]
    ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    end = tokenizer.token_to_id("<|return|>")
    answers = generate(model, ids, 9, eos=[end])
    said = [tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]
    wanted = [f"<|channel|>final<|message|>{word[0]}" for word in words]
    return float(np.mean([one.removesuffix("<|return|>") == want for one, want in zip(said, wanted, strict=True)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lora-steps", type=int, default=160)
    args = parser.parse_args()
    sizes = {"vocab_size": 512, "intermediate_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8, "num_experts": 16}
    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=2, layer_types=(), dtype=np.float32, **sizes)
    source = write_checkpoint(args.work / "source", cfg)
    tokenizer = write_tokenizer(source)
    seen, words = drawn()
    chats = write_chats(args.work / "chats.jsonl", [chat(word, word[0]) for word in seen])
    mesh = jax.make_mesh((2, 2), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    failed = False

    def told(name: str, model, seconds: float, said: str = "") -> None:
        nonlocal failed
        with jax.set_mesh(mesh):
            share = right(model, tokenizer, words)
        ok = share >= ENOUGH[name]
        failed |= not ok
        print(f"{'ok  ' if ok else 'FAIL'}  {name:<26} {share:6.1%} of {ASKED} right   {seconds:5.1f} s   {said}", flush=True)

    told("untrained", create_model_from_checkpoint(source, dataclasses.replace(cfg, param_dtype="float32"), mesh), 0.0)
    start = time.perf_counter()
    options = ["--freeze", FROZEN, "--learning-rate", "3e-3", "--steps", str(args.steps)]
    said = finetune(source, chats, args.work / "full", *options)
    model = create_model_from_checkpoint(args.work / "full/model", cfg, mesh)
    told("full", model, time.perf_counter() - start, said)

    start = time.perf_counter()
    rules = [word for rule in (r".*(q|k|v|o)_proj", r".*mlp\.(gate_up|down)") for word in ("--lora", rule)]
    said = finetune(source, chats, args.work / "lora", *rules, "--learning-rate", "5e-3", "--steps", str(args.lora_steps))
    packed = dataclasses.replace(cfg, param_dtype=None)
    model = create_model_from_checkpoint(args.work / "lora/base", packed, mesh)
    assert model.cfg.param_dtype == "mxfp4"
    load_lora(model, args.work / "lora/lora")
    told("LoRA over packed experts", model, time.perf_counter() - start, said)

    expected = f"(?!{FROZEN}$).*"
    command = [sys.executable, "-m", "parity", source, args.work / "full/model", "--layers", "--expect-changed", expected]
    judged = subprocess.run([*map(str, command), "--forms", "none"], capture_output=True, text=True)
    failed |= judged.returncode != 0
    print(f"{'FAIL' if judged.returncode else 'ok  '}  check-parity --layers --expect-changed '{expected}'")
    if judged.returncode:
        print(judged.stdout, judged.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
