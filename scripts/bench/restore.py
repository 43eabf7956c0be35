"""How long does plain Orbax take to restore a converted checkpoint, against reading its files?

    python scripts/bench/restore.py CHECKPOINT --devices 1 8 --repeats 3

Each way is a process of its own, its clock started after the imports: a raw read of every file into a small buffer, and
`StandardCheckpointer.restore` and `create_model_from_checkpoint` straight onto 1 and onto 8 devices (simulated on the
host), cut by `fsdp`. Each loads several times, the model before freed; the first time is told apart: memory that a process
touches first costs a virtual machine far more than reading does, whoever touches it.
The files are read once before, so that all ways find them in the page cache; with --disk they are dropped from it each time.
"""

import argparse
import gc
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from oss_model.files import advise


def raw(checkpoint: Path) -> None:
    buffer = bytearray(1 << 18)
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file():
            with open(file, "rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass


def into_memory(checkpoint: Path) -> None:
    """What no loader can be faster than: into new memory in huge pages, a thread a core, nothing checked."""
    files = [(file, file.stat().st_size) for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    memory = mmap.mmap(-1, sum(size for _, size in files), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view, start, parts = memoryview(memory), 0, []
    for file, size in files:
        parts.append((file, view[start : start + size]))
        start += size

    def read(part: tuple[Path, memoryview]) -> None:
        with open(part[0], "rb", buffering=0) as f:
            f.readinto(part[1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, parts))


def drop(checkpoint: Path) -> None:
    """Forget what is in the page cache."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            advise(fd, "DONTNEED")
            os.close(fd)


def restore(checkpoint: Path, loader: str, repeats: int, disk: bool) -> None:
    import jax
    import orbax.checkpoint as ocp
    from flax import nnx

    from oss_model import ModelConfig, create_model_from_checkpoint
    from oss_model.layouts import parameter_name
    from oss_model.memory import peak_rss
    from oss_model.params import abstract_model, stored_config

    cfg, dtypes = stored_config(checkpoint, ModelConfig.from_json(checkpoint / "config.json"))
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    _, state = abstract_model(cfg, mesh)
    for path, variable in nnx.to_flat_state(state):
        a = variable.get_value()
        variable.set_value(jax.ShapeDtypeStruct(a.shape, dtypes[parameter_name(path)], sharding=a.sharding))
    imports, seconds = peak_rss(), []
    for _ in range(repeats + 1):
        if disk:
            drop(checkpoint)
        start = time.perf_counter()
        if loader == "ours":
            loaded = jax.block_until_ready(nnx.state(create_model_from_checkpoint(checkpoint, cfg, mesh)))
        else:
            with ocp.StandardCheckpointer() as checkpointer:
                loaded = jax.block_until_ready(checkpointer.restore(checkpoint, state))
        seconds.append(time.perf_counter() - start)
        del loaded
        gc.collect()
    print(json.dumps([seconds, (peak_rss() - imports) / 1e9]))


def measure(way: str, checkpoint: Path, repeats: int, disk: bool) -> tuple[list[float], float]:
    """Seconds of each time, and peak resident GB above the imports."""
    env = dict(os.environ)
    if way not in ("raw", "memory"):
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={way.split()[1]}"
    command = [sys.executable, __file__, str(checkpoint), "--one", way, "--repeats", str(repeats)] + ["--disk"] * disk
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--no-peer", action="store_true", help="without StandardCheckpointer, which takes twice the memory")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    checkpoint = args.checkpoint.absolute()
    if args.one in ("raw", "memory"):
        seconds = []
        for _ in range(args.repeats + 1):
            if args.disk:
                drop(checkpoint)
            start = time.perf_counter()
            (raw if args.one == "raw" else into_memory)(checkpoint)
            seconds.append(time.perf_counter() - start)
        print(json.dumps([seconds, 0]))
        return
    if args.one:
        restore(checkpoint, args.one.split()[0], args.repeats, args.disk)
        return
    loaders = ("ours",) if args.no_peer else ("orbax", "ours")
    ways = ["raw", "memory", *(f"{loader} {devices}" for devices in args.devices for loader in loaders)]
    raw(checkpoint)
    found = {way: measure(way, checkpoint, args.repeats, args.disk) for way in ways}
    gigabytes = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / 1e9
    print(f"{gigabytes:.2f} GB from the {'disk' if args.disk else 'page cache'}; median of {args.repeats}\n")
    print("| way | devices | first | seconds | GB/s | of a raw read | of one into memory | peak above imports, GB |")
    print("|---|---|---|---|---|---|---|---|")
    names = {
        "raw": "raw read, one thread, into 256 KB",
        "memory": "raw read, a thread a core, into new memory",
        "orbax": "StandardCheckpointer",
        "ours": "create_model_from_checkpoint",
    }
    base, memory = (statistics.median(found[way][0][1:]) for way in ("raw", "memory"))
    for way in ways:
        loader, _, devices = way.partition(" ")
        (first, *rest), peak = found[way]
        median = statistics.median(rest)
        speed = f"{median:.2f} | {gigabytes / median:.2f} | {median / base:.2f} | {median / memory:.2f}"
        print(f"| {names[loader]} | {devices} | {first:.2f} | {speed} | {peak:.1f} |")


if __name__ == "__main__":
    main()
