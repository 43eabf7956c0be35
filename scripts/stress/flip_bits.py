"""Flip one bit of a checkpoint, N times: is each refused while loading and found by verify-oss, its tensor named?

    python scripts/stress/flip_bits.py CHECKPOINT --count 200

CHECKPOINT, Orbax or an export, is changed in place and put right again, also when interrupted; a copy is safer. Half of the
bits are anywhere in it, half in a tensor drawn first, so that small ones have their share. In what is no tensor's, such as
conversion.json, and in safetensors, which carry no checksums, only verify-oss is asked.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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


class Part(NamedTuple):
    """Bytes start to stop of a file, by what `verify-oss` should name; `tensor`: whether that is one."""

    file: Path
    start: int
    stop: int
    name: str
    tensor: bool


def parts_of(file: Path, checkpoint: Path) -> Iterator[Part]:
    size, where = file.stat().st_size, file.relative_to(checkpoint).parts
    if file.suffix != ".safetensors":
        chunk = "c" in where
        yield Part(file, 0, size, where[0].removesuffix(".value"), chunk)
        return
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    yield Part(file, 0, 8 + length, file.name, False)
    for name, about in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in about["data_offsets"])
            yield Part(file, start, stop, name, True)


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
    parts = [part for file in files for part in parts_of(file, args.checkpoint)]
    by_tensor: dict[str, list[Part]] = {}
    for part in parts:
        if part.tensor:
            by_tensor.setdefault(part.name, []).append(part)
    loaded = found = chunks = 0
    for n in range(args.count):
        anywhere = draw.choices(parts, [part.stop - part.start for part in parts])[0]
        file, start, stop, name, tensor = anywhere if n % 2 else draw.choice(by_tensor[draw.choice(sorted(by_tensor))])
        at, bit = draw.randrange(start, stop), draw.randrange(8)
        flip(file, at, bit)
        try:
            if tensor and file.suffix != ".safetensors":
                chunks += 1
                loaded += refused(args.checkpoint, cfg, name)
            found += any(name in line for line in verify_checkpoint(args.checkpoint).differences)
        finally:
            flip(file, at, bit)
    print(f"refused while loading {loaded} of {chunks}, found by verify-oss {found} of {args.count}")
    raise SystemExit(loaded < chunks or found < args.count)


if __name__ == "__main__":
    main()
