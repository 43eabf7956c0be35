"""Kill conversions at random moments and take them up again: none may ever be wrong.

    python scripts/stress/kill_convert.py WORK --kills 200
    python scripts/stress/kill_convert.py WORK --kills 200 --to hf --quantizer best

Converts a model of about 200 MB. Each round starts the conversion, kills it (SIGKILL) after a random time, damages
at random what the disk need not have held yet, and goes on until a run ends by itself. Then every file must be the
one an uninterrupted run writes, time stamps excepted, and until then nothing may look complete at the destination.
"""

import argparse
import multiprocessing
import random
import shutil
import sys
import time
from pathlib import Path

import xxhash

STAMPED = ("_CHECKPOINT_METADATA", "conversion.json")


def convert(source: Path, out: Path, to: str, quantizer: str | None) -> None:
    from converter import convert

    convert(source, out, to=to, quantizer=quantizer, verify=False)


def make_source(path: Path, layout: str) -> None:
    from oss_model.config import ModelConfig
    from oss_model.synthetic import write_checkpoint

    cfg = ModelConfig(
        vocab_size=16384, hidden_size=1024, intermediate_size=768, num_hidden_layers=4, num_experts=8, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    write_checkpoint(path, cfg, layout)


def contents(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in STAMPED)
    return {path.relative_to(directory).as_posix(): xxhash.xxh3_128(path.read_bytes()).hexdigest() for path in files}


def damage(partial: Path, chance: random.Random) -> None:
    """What a power loss may do: any file under checkpoint/, and the journal's end, may be gone, short, or zeros."""
    files = sorted(path for path in (partial / "checkpoint").rglob("*") if path.is_file()) if partial.exists() else []
    for path in chance.sample(files, len(files) // 10) + sorted(partial.glob("journal.*")):
        data = path.read_bytes()
        keep = chance.randrange(len(data) + 1)
        if path.parent != partial and chance.random() < 0.3:
            path.unlink()
        else:
            path.write_bytes(data[:keep] + (bytes(len(data) - keep) if chance.random() < 0.5 else b""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a directory for the model and the conversions")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", default="orbax")
    parser.add_argument("--quantizer", help="of a source of values, not packed")
    args = parser.parse_args()
    work, chance = args.work.resolve(), random.Random(args.seed)
    layout = "hf-bf16" if args.quantizer else "hf"
    source, out = work / f"source-{layout}", work / "out"
    partial = work / "out.partial"
    work.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        make_source(source, layout)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["orbax.checkpoint", "converter.conversion", "oss_model.mxfp4"])

    def run():
        process = context.Process(target=convert, args=(source, out, args.to, args.quantizer))
        process.start()
        return process

    for path in (out, partial):
        shutil.rmtree(path, ignore_errors=True)
    run().join()
    start = time.perf_counter()
    shutil.rmtree(out)
    run().join()
    seconds, whole = time.perf_counter() - start, contents(out)
    shutil.rmtree(out)
    kills = finished = wrong = damaged = 0
    while kills < args.kills:
        fresh, start = not partial.exists(), time.perf_counter()
        process = run()
        process.join(chance.uniform(0, 1.3 * seconds))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            if out.exists():  # killed after the last rename
                wrong += contents(out) != whole
                shutil.rmtree(out)
                shutil.rmtree(partial, ignore_errors=True)
            elif chance.random() < 0.3:
                damage(partial, chance)
                damaged += 1
            continue
        if process.exitcode == 0:
            finished += 1
            seconds = min(seconds, time.perf_counter() - start) if fresh else seconds
            good = contents(out) == whole and not partial.exists()
            wrong += not good
        else:
            wrong += 1
        print(f"{kills} kills, {damaged} damaged, {finished} finished, {wrong} wrong", file=sys.stderr)
        shutil.rmtree(out, ignore_errors=True)
    print(f"{kills} SIGKILLs, {damaged} of them with files damaged afterwards; {finished} conversions ended; {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
