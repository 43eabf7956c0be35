"""Do the quantizers of NumPy and of JAX give the same bytes? On many random blocks, near-ties among them.

python scripts/stress/quantizers.py --blocks 10000000
"""

import argparse
import sys

import jax
import ml_dtypes
import numpy as np

from oss_model.quantization import RULES, quantize, quantize_jax

AT_ONCE = 1 << 17


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count, 32]: a third normal, a third on the grid of codes and middles or right beside it, a third of any bits."""
    normal = rng.standard_normal((count // 3, 32), np.float32) * np.exp2(rng.integers(-30, 30, (count // 3, 1))).astype(
        np.float32
    )
    grid = (rng.integers(-32, 33, (count // 3, 32)) * 0.25).astype(np.float32)
    beside = np.nextafter(grid, np.float32(np.inf) * rng.choice([-1, 1], grid.shape).astype(np.float32))
    grid = np.where(rng.random(grid.shape) < 0.3, beside, grid)
    bits = rng.integers(0, 1 << 32, (count - 2 * (count // 3), 32), np.uint32)
    anything = np.where((bits >> 23 & 255) < 254, bits, 0).astype(np.uint32).view(np.float32)
    return np.concatenate([normal, grid, anything])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, compiled = np.random.default_rng(args.seed), jax.jit(quantize_jax, static_argnums=1)
    done = different = 0
    while done < args.blocks:
        values = draw(rng, AT_ONCE)
        for kind in (np.float32, ml_dtypes.bfloat16):
            rule = RULES[done // (2 * AT_ONCE) % len(RULES)]
            cast = values.astype(kind)
            ours, theirs = quantize(cast, rule), compiled(cast, rule)
            other = (ours.blocks != np.asarray(theirs[0])).any((-1, -2)) | (ours.scales != np.asarray(theirs[1])).any(-1)
            different += int(other.sum())
            done += len(values)
        print(f"{done:,} blocks, {different} different", file=sys.stderr)
    print(f"{done:,} blocks, half float32 and half bfloat16: {different} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
