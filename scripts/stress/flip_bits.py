"""Flip one bit of a checkpoint, N times: is each refused while loading and found by verify-oss, its tensor named?

    python scripts/stress/flip_bits.py CHECKPOINT --count 200

CHECKPOINT is changed in place and put right again, also when interrupted; a copy is safer. Half of the bits are anywhere in it,
half in the chunk of a tensor drawn first, so that small ones have their share. In what is no tensor's, such as conversion.json,
only verify-oss is asked.
"""

import argparse
import random
from pathlib import Path

import jax
from flax import nnx

from converter.audit import verify_checkpoint
from oss_model import InputError, ModelConfig, create_model_from_checkpoint


def flip(file: Path, at: int, bit: int) -> None:
    with open(file, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1 << bit]))


def refused(checkpoint: Path, cfg: ModelConfig, tensor: str) -> bool:
    """Whether loading it names the tensor."""
    try:
        jax.block_until_ready(nnx.state(create_model_from_checkpoint(checkpoint, cfg)))
    except InputError as e:
        return any(tensor in fault for fault in e.faults)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cfg, draw = ModelConfig.from_json(args.checkpoint / "config.json"), random.Random(args.seed)
    files = sorted(file for file in args.checkpoint.rglob("*") if file.is_file() and file.stat().st_size)
    by_tensor: dict[str, list[Path]] = {}
    for file in files:
        if "c" in (parts := file.relative_to(args.checkpoint).parts):
            by_tensor.setdefault(parts[0], []).append(file)
    loaded = found = chunks = 0
    for n in range(args.count):
        anywhere = draw.choices(files, [file.stat().st_size for file in files])[0]
        file = anywhere if n % 2 else draw.choice(by_tensor[draw.choice(sorted(by_tensor))])
        at, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
        name = file.relative_to(args.checkpoint).parts[0].removesuffix(".value")
        flip(file, at, bit)
        try:
            if f"{name}.value" in by_tensor and file.name != "zarr.json":
                chunks += 1
                loaded += refused(args.checkpoint, cfg, name)
            found += any(name in line for line in verify_checkpoint(args.checkpoint).differences)
        finally:
            flip(file, at, bit)
        print(
            f"\r{n + 1}: refused while loading {loaded} of {chunks}, found by verify-oss {found} of {n + 1}", end="", flush=True
        )
    print()
    raise SystemExit(loaded < chunks or found < args.count)


if __name__ == "__main__":
    main()
