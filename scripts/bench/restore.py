"""How long does plain Orbax take to restore a converted checkpoint, against reading its files?

    python scripts/bench/restore.py CHECKPOINT --devices 1 8 --repeats 3

Each measurement is a process of its own, its clock started after the imports: a raw read of every file, and
`StandardCheckpointer.restore` and `create_model_from_checkpoint` straight onto 1 and onto 8 devices (simulated on the
host), cut by `fsdp`.
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


def restore(checkpoint: Path, loader: str) -> None:
    import jax
    import orbax.checkpoint as ocp
    from flax import nnx

    from oss_model import ModelConfig, create_model_from_checkpoint
    from oss_model.layouts import parameter_name
    from oss_model.memory import peak_rss
    from oss_model.params import abstract_model, as_stored

    cfg, dtypes = as_stored(checkpoint, ModelConfig.from_json(checkpoint / "config.json"))
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    _, state = abstract_model(cfg, mesh)
    for path, variable in nnx.to_flat_state(state):
        a = variable.get_value()
        variable.set_value(jax.ShapeDtypeStruct(a.shape, dtypes[parameter_name(path)], sharding=a.sharding))
    start = time.perf_counter()
    if loader == "ours":
        jax.block_until_ready(nnx.state(create_model_from_checkpoint(checkpoint, cfg, mesh)))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            jax.block_until_ready(checkpointer.restore(checkpoint, state))
    print(json.dumps([time.perf_counter() - start, peak_rss() / 1e9]))


def measure(way: str, checkpoint: Path) -> list[float]:
    """Seconds, and peak resident GB."""
    env = dict(os.environ)
    if way != "raw":
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={way.split()[1]}"
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
        print(json.dumps([time.perf_counter() - start, 0]))
        return
    if args.one:
        restore(checkpoint, args.one.split()[0])
        return
    ways = ["raw", *(f"{loader} {devices}" for devices in args.devices for loader in ("orbax", "ours"))]
    raw(checkpoint)
    found = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way in ways:
            found[way].append(measure(way, checkpoint))
    gigabytes = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / 1e9
    print(f"{gigabytes:.2f} GB; median of {args.repeats}\n")
    print("| way | devices | seconds | GB/s | of a raw read | peak resident, GB |\n|---|---|---|---|---|---|")
    names = {"raw": "raw read, one thread", "orbax": "StandardCheckpointer", "ours": "create_model_from_checkpoint"}
    base = statistics.median(seconds for seconds, _ in found["raw"])
    for way in ways:
        loader, _, devices = way.partition(" ")
        median, peak = statistics.median(seconds for seconds, _ in found[way]), max(peak for _, peak in found[way])
        print(f"| {names[loader]} | {devices} | {median:.2f} | {gigabytes / median:.2f} | {median / base:.2f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
