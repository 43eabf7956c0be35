"""How fast is the model, beside transformers on the same weights? Prefill and a token after it, on this machine's CPU.

    python scripts/bench/model.py --dtype bfloat16 --lengths 128 512 1024
    python scripts/bench/model.py --dtype float32
    python scripts/bench/model.py --memory           # temporaries of attention and experts against the length
    python scripts/bench/model.py --compile          # seconds to compile against depth

Layers of 20b widths with the whole vocabulary and random weights. The ways take turns in one run, compile time apart, the best
of some rounds each; transformers with its experts as transposed views (its fast form) by grouped_mm and by eager, of which
the better counts.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oss_model import ModelConfig, Transformer, cross_entropy, init_cache
from oss_model.scanned import ScannedTransformer, period


def config(layers: int, dtype: str) -> ModelConfig:
    cfg = dataclasses.replace(ModelConfig.gpt_oss_20b(), num_hidden_layers=layers, layer_types=())
    return dataclasses.replace(cfg, dtype=np.dtype(dtype), param_dtype=dtype)


def ours(cfg: ModelConfig, lengths: list[int]) -> dict[str, Callable[[], object]]:
    """Name -> what to time; compiled already. Parameters are arguments: split once, no graph is walked at a call."""
    graphdef, state = nnx.split(Transformer(cfg, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    ways: dict[str, Callable[[], object]] = {}
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    for length in lengths:
        tokens = jnp.asarray(rng.integers(0, cfg.vocab_size, (1, length)), jnp.int32)
        ways[f"prefill {length}"] = lambda tokens=tokens: jax.block_until_ready(forward(state, tokens))
    fill = jax.jit(lambda state, tokens, cache: nnx.merge(graphdef, state).stream(tokens, cache=cache)[1])
    step = jax.jit(lambda state, tokens, cache: nnx.merge(graphdef, state)(tokens, cache=cache), donate_argnums=2)
    cache = [fill(state, jnp.zeros((1, 1024), jnp.int32), init_cache(cfg, 1, 1100))]

    def token():
        logits, cache[0] = step(state, jnp.ones((1, 1), jnp.int32), cache[0])
        jax.block_until_ready(logits)

    return ways | {"a token after 1024": token}


def theirs(cfg: ModelConfig, lengths: list[int]) -> dict[str, dict[str, Callable[[], object]]]:
    """Way to compute experts -> name -> what to time, of one model."""
    import torch
    from transformers import DynamicCache, GptOssConfig, GptOssForCausalLM

    said = cfg.to_json()
    config = GptOssConfig(**{k: v for k, v in said.items() if k not in ("architectures", "quantization_config", "torch_dtype")})
    config._attn_implementation = "eager"
    torch.set_default_dtype(getattr(torch, cfg.dtype.name))
    model = GptOssForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.02)
            if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
                parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)

    def forward(experts, ids, **kwargs):
        model.config._experts_implementation = experts
        with torch.no_grad():
            return model(ids, **kwargs)

    rng, cache = np.random.default_rng(0), DynamicCache(config=config)
    forward("eager", torch.zeros(1, 1024, dtype=torch.long), past_key_values=cache, use_cache=True, logits_to_keep=1)
    one = torch.ones(1, 1, dtype=torch.long)
    sides: dict[str, dict[str, Callable[[], object]]] = {"grouped_mm": {}, "eager": {}}
    for experts, ways in sides.items():
        for length in lengths:
            ids = torch.from_numpy(rng.integers(0, cfg.vocab_size, (1, length)))
            ways[f"prefill {length}"] = lambda ids=ids, experts=experts: forward(experts, ids, use_cache=False)
        ways["a token after 1024"] = lambda experts=experts: forward(experts, one, past_key_values=cache, use_cache=True)
    return sides


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speed(layers: int, dtype: str, lengths: list[int], rounds: int) -> None:
    cfg = config(layers, dtype)
    best: dict[str, dict[str, float]] = {}
    sides = {"ours": ours(cfg, lengths)} | theirs(cfg, lengths)
    for name in sides["ours"]:
        for ways in sides.values():
            ways[name]()  # compiles
        for _ in range(rounds):
            for side, ways in sides.items():
                took = seconds(ways[name])
                best.setdefault(name, {})[side] = min(took, best.get(name, {}).get(side, took))
    print(f"{layers} layers of 20b, {dtype}, {cpu()}, best of {rounds}\n")
    print("| | ours, s | transformers grouped_mm, s | eager, s | ours over the better |\n|---|---|---|---|---|")
    for name, took in best.items():
        ratio = took["ours"] / min(took["grouped_mm"], took["eager"])
        print(f"| {name} | {took['ours']:.3f} | {took['grouped_mm']:.3f} | {took['eager']:.3f} | {ratio:.2f} |", flush=True)


def memory() -> None:
    """XLA's count of temporaries, one layer, forward and backward with respect to its input and parameters."""
    print(f"one layer of 20b, bfloat16, forward and backward, {cpu()}\n")
    print("| tokens | sliding, GB | full, GB |\n|---|---|---|")
    for length in (2048, 4096, 8192, 32768):
        cells = []
        for kind in ("sliding_attention", "full_attention"):
            cfg = dataclasses.replace(config(1, "bfloat16"), layer_types=(kind,), remat="block")
            graphdef, state = nnx.split(nnx.eval_shape(lambda cfg=cfg: Transformer(cfg, rngs=nnx.Rngs(0)).layers[0]))
            cells.append(_layer_temporaries(cfg, graphdef, state, length))
        print(f"| {length} | {cells[0] / 1e9:.2f} | {cells[1] / 1e9:.2f} |", flush=True)


def _layer_temporaries(cfg: ModelConfig, graphdef, state, length: int) -> int:
    from oss_model import RotaryEmbedding
    from oss_model.attention import Tokens

    at = Tokens(jnp.arange(length, dtype=jnp.int32)[None], None, True)

    def loss(state, x):
        out, _ = nnx.merge(graphdef, state)(x, at, RotaryEmbedding(cfg)(at.positions))
        return out.astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((1, length, cfg.hidden_size), cfg.dtype)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def compiling() -> None:
    print(f"a training step's loss and gradients, 512 tokens of 20b widths, {cpu()}\n")
    print("| layers | a layer each, s | scanned, s |\n|---|---|---|")
    for layers in (2, 8, 24):
        cfg, cells = dataclasses.replace(config(layers, "bfloat16"), remat="block"), []
        for change in (lambda model: model, stacked):
            graphdef, state = nnx.split(
                nnx.eval_shape(lambda cfg=cfg, change=change: change(Transformer(cfg, rngs=nnx.Rngs(0))))
            )
            loss = lambda state, tokens, graphdef=graphdef: cross_entropy(nnx.merge(graphdef, state), tokens)[0]  # noqa: E731
            lowered = jax.jit(jax.grad(loss)).lower(state, jax.ShapeDtypeStruct((1, 513), jnp.int32))
            cells.append(seconds(lowered.compile))
        print(f"| {layers} | {cells[0]:.1f} | {cells[1]:.1f} |", flush=True)


def stacked(model: Transformer) -> Transformer:
    """As `scanned` gives it, without values: one layer of each kind, whose parameters have an axis more."""
    turn = period(model.cfg.layer_types)
    turns = model.cfg.num_hidden_layers // turn
    layers = list(model.layers[:turn])
    for layer in layers:
        state = nnx.state(layer)
        for _, variable in nnx.to_flat_state(state):
            variable.set_value(jnp.broadcast_to(variable.get_value()[None], (turns, *variable.get_value().shape)))
        nnx.update(layer, state)
    return ScannedTransformer(model, layers)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "an unknown CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.memory:
        memory()
    elif options.compile:
        compiling()
    else:
        speed(options.layers, options.dtype, options.lengths, options.rounds)


if __name__ == "__main__":
    main()
