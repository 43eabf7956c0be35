"""How long does plain Orbax take to restore a converted checkpoint, against reading its files?

    python scripts/bench_restore.py CHECKPOINT --devices 1 8 --repeats 3

Each measurement is a process of its own, its clock started after the imports: a raw read of every file, and
`StandardCheckpointer.restore` straight onto 1 and onto 8 devices (simulated on the host), cut along experts and rows.
The files are read once before, so that all ways find them in the page cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def raw(checkpoint: Path) -> None:
    buffer = bytearray(1 << 18)
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file():
            with open(file, "rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass


def restore(checkpoint: Path) -> None:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from oss_model import ModelConfig
    from oss_model.params import abstract_model, as_stored, parameter_name

    cfg, _ = as_stored(checkpoint, ModelConfig.from_json(checkpoint / "config.json"))
    mesh = Mesh(np.array(jax.devices()), ("all",))
    _, state = abstract_model(cfg)
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        along = parameter_name(path).endswith(("gate_up.weight", "down.weight", "embedding.weight", "lm_head.weight"))
        spec = PartitionSpec("all") if along and value.shape[0] % len(jax.devices()) == 0 else PartitionSpec()
        variable.set_value(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec)))
    start = time.perf_counter()
    with ocp.StandardCheckpointer() as checkpointer:
        jax.block_until_ready(checkpointer.restore(checkpoint, state))
    print(json.dumps(time.perf_counter() - start))


def measure(way: str, checkpoint: Path) -> float:
    env = dict(os.environ)
    if way != "raw":
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={way}"
    command = [sys.executable, __file__, str(checkpoint), "--one", way]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    checkpoint = args.checkpoint.absolute()
    if args.one == "raw":
        start = time.perf_counter()
        raw(checkpoint)
        print(json.dumps(time.perf_counter() - start))
        return
    if args.one:
        restore(checkpoint)
        return
    ways = ["raw", *map(str, args.devices)]
    raw(checkpoint)
    seconds = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way in ways:
            seconds[way].append(measure(way, checkpoint))
    gigabytes = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / 1e9
    print(f"{gigabytes:.2f} GB; median of {args.repeats}\n\n| way | seconds | GB/s | of a raw read |\n|---|---|---|---|")
    base = statistics.median(seconds["raw"])
    for way in ways:
        median = statistics.median(seconds[way])
        name = "raw read, one thread" if way == "raw" else f"StandardCheckpointer onto {way} device{'s' * (way != '1')}"
        print(f"| {name} | {median:.2f} | {gigabytes / median:.2f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
