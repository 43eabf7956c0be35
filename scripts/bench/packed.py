"""How much memory does a model with packed experts take, and how soon are there logits?

    python scripts/bench/packed.py CHECKPOINT      # made with convert-oss --dtype mxfp4

A raw read of the checkpoint's files for comparison, then one process: restore, the first forward pass of 16 tokens, op by
op, each expert on its own tokens (`expert_path="loop"`), and the second.
"""

import argparse
import dataclasses
import time
from pathlib import Path

from restore import raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    checkpoint = parser.parse_args().checkpoint.absolute()
    start = time.perf_counter()
    raw(checkpoint)
    reading = time.perf_counter() - start

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from oss_model import ModelConfig, create_model_from_checkpoint
    from oss_model.memory import peak_rss, rss

    before = rss()
    start = time.perf_counter()
    cfg = dataclasses.replace(ModelConfig.from_json(checkpoint / "config.json"), expert_path="loop")
    model = create_model_from_checkpoint(checkpoint, cfg)
    restoring, resident, peak = time.perf_counter() - start, rss(), peak_rss()
    stored = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))
    tokens, forward = jnp.arange(16, dtype=jnp.int32)[None], []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(model(tokens))
        forward.append(time.perf_counter() - start)

    def above(nbytes: int) -> str:
        return f"{(nbytes - before) / 1e9:.2f} GB above the imports, {(nbytes - before) / stored:.3f} of what is stored"

    print("| | |\n|---|---|")
    print(f"| parameters as stored | {stored / 1e9:.2f} GB |")
    print(f"| resident after loading | {above(resident)} |")
    print(f"| resident after two forward passes | {above(rss())} |")
    print(f"| peak while loading, all in | {peak / 1e9:.2f} GB |")
    print(f"| raw read of the files | {reading:.1f} s |")
    print(f"| loading | {restoring:.1f} s, {restoring / reading:.2f} of it |")
    print(f"| first logits, 16 tokens | {forward[0]:.1f} s later |")
    print(f"| second forward pass | {forward[1]:.1f} s |")


if __name__ == "__main__":
    main()
