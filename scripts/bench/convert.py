"""How fast is convert-oss, against raw input and output and against other ways to the same result?

    python scripts/bench/convert.py WORK --layers 2 6
    python scripts/bench/convert.py WORK --layers 2 --peers --repeats 1

Makes its input in WORK: the widths of gpt-oss-20b, any number of layers. Every measurement is a process of its own;
the clock starts after its imports. All ways take turns, the first large write is thrown away (a fresh disk is slower),
and medians are printed as the table that docs/benchmarks.md holds. The source is read from the page cache.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

BUFFER = 1 << 18  # the fastest found: calls of 1 MiB and more cost the kernel three times as much a byte


def raw(source: Path, out: Path, nbytes: int) -> None:
    """Write and fsync that many bytes, on one thread: what no converter can be faster than."""
    buffer = os.urandom(BUFFER)
    with open(out, "wb", buffering=0) as f:
        for start in range(0, nbytes, BUFFER):
            f.write(buffer[: min(BUFFER, nbytes - start)])
        os.fsync(f.fileno())


def cp(source: Path, out: Path, nbytes: int) -> None:
    """cp and fsync: the bound for experts that stay packed."""
    subprocess.run(["cp", "-r", source, out], check=True)
    for file in out.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def convert(source: Path, out: Path, nbytes: int) -> None:
    from converter import convert

    convert(source, out, verify=False)


def convert_verified(source: Path, out: Path, nbytes: int) -> None:
    from converter import convert

    convert(source, out)


def convert_mxfp4(source: Path, out: Path, nbytes: int) -> None:
    from converter import convert

    convert(source, out, "mxfp4", verify=False)


def standard_checkpointer(source: Path, out: Path, nbytes: int) -> None:
    """Everything decoded in memory, then StandardCheckpointer.save with its defaults."""
    import orbax.checkpoint as ocp

    from oss_model import mxfp4
    from oss_model.shards import Checkpoint

    checkpoint = Checkpoint(source)
    arrays = {entry.model: entry.to_model(checkpoint.read(entry)) for entry in checkpoint.entries()}
    for name in [name for name in arrays if name.endswith("blocks")]:
        stem = name.removesuffix("blocks")
        arrays[stem + "weight"] = mxfp4.decode(arrays.pop(name), arrays.pop(stem + "scales"))
    tree: dict = {}
    for name, array in arrays.items():
        *path, leaf = [*name.split("."), "value"]
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(out.resolve(), tree)
        checkpointer.wait_until_finished()


def transformers(source: Path, out: Path, nbytes: int) -> None:
    """transformers: load dequantized, save_pretrained."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    config = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(out)


WAYS = {  # name in the table -> (function, modules imported before the clock starts)
    "raw write + fsync, one thread": (raw, ()),
    "convert-oss, not verified": (convert, ("orbax.checkpoint", "converter.conversion", "oss_model.mxfp4")),
    "convert-oss": (convert_verified, ("orbax.checkpoint", "converter.conversion", "oss_model.mxfp4")),
    "cp + fsync of the source": (cp, ()),
    "convert-oss --dtype mxfp4, not verified": (
        convert_mxfp4,
        ("orbax.checkpoint", "converter.conversion", "oss_model.mxfp4"),
    ),
    "StandardCheckpointer.save, in memory": (
        standard_checkpointer,
        ("orbax.checkpoint", "oss_model.shards", "oss_model.mxfp4"),
    ),
    "transformers: dequantize, save_pretrained": (transformers, ("torch", "transformers", "accelerate")),
}
OURS = [way for way in WAYS if way.startswith(("raw", "cp", "convert-oss"))]


def child(way: str, source: Path, out: Path, nbytes: int) -> None:
    """One measurement, in this process: prints seconds, CPU seconds, peak memory above the imports."""
    import importlib

    from oss_model.memory import peak_rss, rss

    function, modules = WAYS[way]
    for module in modules:
        importlib.import_module(module)
    before, start, cpu = rss(), time.perf_counter(), os.times()
    function(source, out, nbytes)
    seconds, after = time.perf_counter() - start, os.times()
    spent = sum(after[:4]) - sum(cpu[:4])  # user and system, of children too
    print(json.dumps({"seconds": seconds, "cpu": spent, "peak": peak_rss() - before}))


def measure(way: str, source: Path, out: Path, nbytes: int) -> dict:
    remove(out)
    os.sync()
    done = subprocess.run(
        [sys.executable, __file__, out.parent, "--child", way, str(source), str(nbytes)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["bytes"] = size(out)
    return found


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def bench(work: Path, size_name: str, layers: int, repeats: int, ways: list[str]) -> str:
    """Measure all ways on one input, in turn; returns the table."""
    source, out = work / f"source-{size_name}-{layers}", work / "out"
    if not source.exists():
        command = [sys.executable, "-m", "oss_model.synthetic", source, "--size", size_name, "--layers", layers]
        subprocess.run([str(part) for part in command], check=True)
    nbytes = measure("convert-oss, not verified", source, out, 0)["bytes"]  # also the large write that is thrown away
    rounds: dict[str, list[dict]] = {way: [] for way in ways}
    for number in range(repeats):
        for way in ways:
            found = measure(way, source, out, nbytes)
            rounds[way].append(found)
            print(f"{layers} layers, round {number + 1}, {way}: {found['seconds']:.2f} s", file=sys.stderr)
    remove(out)
    medians = {way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in rounds.items()}
    copied, raw_write = medians.get("cp + fsync of the source"), medians.get("raw write + fsync, one thread")
    bounds = {way: copied if "mxfp4" in way or way.startswith("cp") else raw_write for way in ways}
    lines = [
        f"{layers} layers, {size_name} widths: {size(source) / 1e9:.2f} GB in, {nbytes / 1e9:.2f} GB out as bfloat16; "
        f"median of {repeats}",
        "",
        "| way | GB written | seconds | GB/s | of its bound | CPU s/GB | peak above imports, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, found in medians.items():
        bound = bounds[way]
        ratio = f"{found['seconds'] / bound['seconds']:.2f}" if bound else ""
        out_gb = found["bytes"] / 1e9
        lines.append(
            f"| {way} | {out_gb:.2f} | {found['seconds']:.2f} | {out_gb / found['seconds']:.2f} | {ratio} | "
            f"{found['cpu'] / out_gb:.2f} | {int(found['peak']) >> 20} |"
        )
    return "\n".join(lines)


def bench_decode() -> str:
    """Decoding alone, in memory, on two threads: one expert's gate_up of 20b each."""
    import threading

    import ml_dtypes
    import numpy as np

    from oss_model import mxfp4

    rng = np.random.default_rng(0)
    blocks = np.frombuffer(rng.bytes(5760 * 90 * 16), np.uint8).reshape(5760, 90, 16)
    scales = rng.integers(110, 126, (5760, 90), np.uint8)
    outs = [np.empty(blocks.size * 2, ml_dtypes.bfloat16) for _ in range(2)]
    rates = []
    for _ in range(20):
        threads = [threading.Thread(target=mxfp4.decode, args=(blocks, scales), kwargs={"out": out}) for out in outs]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rates.append(sum(out.nbytes for out in outs) / (time.perf_counter() - start) / 1e9)
    return f"MXFP4 decoded in memory on 2 threads: {statistics.median(rates):.2f} GB/s of bfloat16 (best {max(rates):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--size", choices=("20b", "120b"), default="20b", help="whose widths (default: 20b)")
    parser.add_argument("--layers", type=int, nargs="+", default=[2], help="one table each (default: 2)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="also transformers and StandardCheckpointer (much memory, slow)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        way, source, nbytes = args.child
        return child(way, Path(source), args.work / "out", int(nbytes))
    args.work.mkdir(parents=True, exist_ok=True)
    print(bench_decode())
    for layers in args.layers:
        print("\n" + bench(args.work.resolve(), args.size, layers, args.repeats, list(WAYS) if args.peers else OURS))


if __name__ == "__main__":
    main()
