"""Kill conversions at random moments and take them up again: none may ever be wrong.

    python scripts/stress/kill_convert.py WORK --kills 200
    python scripts/stress/kill_convert.py WORK --kills 200 --to hf --quantizer best
    python scripts/stress/kill_convert.py WORK --kills 200 --to hf --from-orbax   the way back
    python scripts/stress/kill_convert.py WORK --kills 200 --bucket     to gs://, of tests/gcs_server.py

Converts a model of about 200 MB. Each round starts the conversion, kills it (SIGKILL) after a random time, damages
at random what the disk need not have held yet, and goes on until a run ends by itself. Then every file must be the
one an uninterrupted run writes, time stamps excepted, and until then nothing may look complete at the destination.
A bucket loses nothing that it has said it has: there nothing is damaged, and no chunk may be sent twice.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import xxhash

STAMPED = ("_CHECKPOINT_METADATA", "conversion.json")


def convert(source: Path, out: Path | str, to: str, dtype: str | None, quantizer: str | None) -> None:
    from converter import convert

    convert(source, out, dtype, to=to, quantizer=quantizer, verify=False)


def make_source(path: Path, layout: str) -> None:
    from oss_model.config import ModelConfig
    from oss_model.synthetic import write_checkpoint

    cfg = ModelConfig(
        vocab_size=16384, hidden_size=1024, intermediate_size=768, num_hidden_layers=4, num_experts=8, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    write_checkpoint(path, cfg, layout)


class Disk:
    """Where conversions go to: a directory."""

    def __init__(self, work: Path):
        self.out, self.partial = work / "out", work / "out.partial"

    def contents(self) -> dict[str, str]:
        files = sorted(path for path in self.out.rglob("*") if path.is_file() and path.name not in STAMPED)
        return {path.relative_to(self.out).as_posix(): xxhash.xxh3_128(path.read_bytes()).hexdigest() for path in files}

    def is_begun(self) -> bool:
        return self.partial.exists()

    def looks_complete(self) -> bool:
        return self.out.exists()

    def is_tidy(self) -> bool:
        return not self.partial.exists()

    def damage(self, chance: random.Random) -> bool:
        damage(self.partial, chance)
        return True

    def clear(self) -> None:
        for path in (self.out, self.partial):
            shutil.rmtree(path, ignore_errors=True)


class Prefix:
    """Where conversions go to: a prefix of a bucket, on a server in this process."""

    def __init__(self) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
        from gcs_server import Gcs  # type: ignore[import-not-found]

        self.out, self.server = "gs://bucket/out", Gcs()
        os.environ.update(self.server.environment)

    def contents(self) -> dict[str, str]:
        found = {name: data for name, data in self.server.files("out").items() if name not in STAMPED}
        return {name: xxhash.xxh3_128(data).hexdigest() for name, data in sorted(found.items())}

    def is_begun(self) -> bool:
        return bool(self.server.objects)

    def looks_complete(self) -> bool:
        return bool({"conversion.json", "commit_success.txt"} & self.server.files("out").keys())

    def is_tidy(self) -> bool:
        return max(self.server.wrote.values()) == 1  # nothing was sent twice

    def damage(self, chance: random.Random) -> bool:
        return False

    def clear(self) -> None:
        self.server.objects.clear()
        self.server.wrote.clear()


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
    parser.add_argument("--from-orbax", action="store_true", help="convert a checkpoint that convert-oss wrote")
    parser.add_argument("--bucket", action="store_true", help="convert to gs://")
    args = parser.parse_args()
    work, chance = args.work.resolve(), random.Random(args.seed)
    work.mkdir(parents=True, exist_ok=True)
    layout = "hf-bf16" if args.quantizer else "hf"
    source = work / f"source-{layout}"
    if not source.exists():
        make_source(source, layout)
    if args.from_orbax:
        source, safetensors = work / f"orbax-{layout}", source
        if not source.exists():  # packed, where the export is, unless a quantizer makes it so
            convert(safetensors, source, "orbax", "bfloat16" if args.quantizer or args.to == "hf-bf16" else "mxfp4", None)
    place = Prefix() if args.bucket else Disk(work)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["orbax.checkpoint", "converter.conversion", "oss_model.mxfp4"])

    def run():
        process = context.Process(target=convert, args=(source, place.out, args.to, None, args.quantizer))
        process.start()
        return process

    place.clear()
    run().join()
    start = time.perf_counter()
    place.clear()
    run().join()
    seconds, whole = time.perf_counter() - start, place.contents()
    place.clear()
    kills = finished = wrong = damaged = 0
    while kills < args.kills:
        fresh, start = not place.is_begun(), time.perf_counter()
        process = run()
        process.join(chance.uniform(0, 1.3 * seconds))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            if place.looks_complete():  # killed after the last rename, or the last object but one
                wrong += not whole.items() <= place.contents().items()
                place.clear()
            elif chance.random() < 0.3:
                damaged += place.damage(chance)
            continue
        if process.exitcode == 0:
            finished += 1
            seconds = min(seconds, time.perf_counter() - start) if fresh else seconds
            good = place.contents() == whole and place.is_tidy()
            wrong += not good
        else:
            wrong += 1
        print(f"{kills} kills, {damaged} damaged, {finished} finished, {wrong} wrong", file=sys.stderr)
        place.clear()
    print(f"{kills} SIGKILLs, {damaged} of them with files damaged afterwards; {finished} conversions ended; {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
