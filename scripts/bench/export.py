"""How fast is the way back, against raw input and output?

    python scripts/bench/export.py WORK --layers 2

Makes its inputs in WORK: the widths of gpt-oss-20b, any number of layers, as safetensors, as Orbax packed and as bfloat16. Each
measurement is a process of its own; the clock starts after its imports; ways take turns, without verification, the source from
the page cache. What is packed on both sides is bounded by cp, what becomes bfloat16 by a raw write, what is quantized by the
reading.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from convert import cp, raw, remove, size

MODULES = ("orbax.checkpoint", "converter.conversion", "oss_model.quantization", "converter.orbax_source")


class Way(NamedTuple):
    """
    Attributes:
      start: which input.
      bound: "cp", "raw" or "read".
    """

    start: str
    options: dict
    bound: str


def ways(work: Path) -> dict[str, Way]:
    like = {"quantizer": "best", "like": str(work / "hf")}
    return {
        "Orbax packed -> hf": Way("orbax-mxfp4", {"to": "hf"}, "cp"),
        "Orbax packed -> openai": Way("orbax-mxfp4", {"to": "openai"}, "cp"),
        "hf -> openai": Way("hf", {"to": "openai"}, "cp"),
        "Orbax packed -> hf-bf16": Way("orbax-mxfp4", {"to": "hf-bf16"}, "raw"),
        "Orbax bfloat16 -> hf-bf16": Way("orbax-bfloat16", {"to": "hf-bf16"}, "raw"),
        "Orbax bfloat16 -> hf, best": Way("orbax-bfloat16", {"to": "hf", "quantizer": "best"}, "read"),
        "Orbax bfloat16 -> hf, ocp": Way("orbax-bfloat16", {"to": "hf", "quantizer": "ocp"}, "read"),
        "Orbax bfloat16 -> hf, best, like": Way("orbax-bfloat16", {"to": "hf", **like}, "read"),
    }


def inputs(work: Path, layers: int) -> None:
    from converter import convert
    from oss_model.synthetic import main as synthetic

    if not (work / "hf").exists():
        synthetic([str(work / "hf"), "--size", "20b", "--layers", str(layers)])
    for dtype in ("mxfp4", "bfloat16"):
        convert(work / "hf", work / f"orbax-{dtype}", dtype, verify=False)


def child(work: Path, name: str) -> None:
    """One measurement, in this process."""
    import importlib

    from oss_model.memory import peak_rss, rss

    for module in MODULES:
        importlib.import_module(module)
    from converter import convert

    way = ways(work)[name]
    before, start = rss(), time.perf_counter()
    found = convert(work / way.start, work / "out", **way.options, verify=False)
    seconds = time.perf_counter() - start
    lost = (found.quantization or {}).get("relative_rmse")
    print(json.dumps({"seconds": seconds, "peak": peak_rss() - before, "read": found.bytes_read, "lost": lost}))


def timed(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", metavar="WORD", default=[""], help="those whose names have one of these in them")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work.resolve()
    if args.child:
        return child(work, args.child)
    work.mkdir(parents=True, exist_ok=True)
    inputs(work, args.layers)
    out, packed = work / "out", size(work / "hf")
    remove(work / "out.partial")  # of a run that was cut off
    names = [name for name in ways(work) if any(word in name for word in args.ways)]
    rounds: dict[str, list[dict]] = {name: [] for name in names}
    bounds: dict[str, list[float]] = {"cp": [], "raw": []}
    for number in range(args.repeats + 1):  # the first large writes are slower, and thrown away
        remove(out)
        copied = timed(cp, work / "hf", out, 0)
        remove(out)
        written = timed(raw, work, out, packed)
        remove(out)
        for name in names:
            command = [sys.executable, __file__, str(work), "--child", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1]) | {"written": size(out)}
            remove(out)
            if number:
                rounds[name].append(found)
            print(f"round {number}, {name}: {found['seconds']:.2f} s", file=sys.stderr)
        if number:
            bounds["cp"].append(copied / packed)
            bounds["raw"].append(written / packed)
    per_byte = {kind: statistics.median(found) for kind, found in bounds.items()}
    print(f"{args.layers} layers, 20b widths; cp {1e-9 / per_byte['cp']:.2f} GB/s, raw write {1e-9 / per_byte['raw']:.2f} GB/s")
    print("\n| way | GB read | GB written | seconds | GB/s read | of its bound | relative RMSE | peak above imports, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, runs in rounds.items():
        found = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "peak", "read", "written")}
        bound = ways(work)[name].bound
        ratio = f"{found['seconds'] / (per_byte[bound] * found['written']):.2f} {bound}" if bound in per_byte else ""
        lost = "" if runs[0]["lost"] is None else f"{runs[0]['lost']:.4f}"
        print(
            f"| {name} | {found['read'] / 1e9:.2f} | {found['written'] / 1e9:.2f} | {found['seconds']:.2f} | "
            f"{found['read'] / 1e9 / found['seconds']:.2f} | {ratio} | {lost} | {int(found['peak']) >> 20} |"
        )


if __name__ == "__main__":
    main()
