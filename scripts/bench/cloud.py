"""How fast is convert-oss to gs://, against a plain loop that uploads the same bytes to the same place?

    python scripts/bench/cloud.py WORK --layers 1 3

The place is the server of tests/gcs_server.py, in a process of its own on this machine: what is measured is our part of it,
not a network. Makes its input in WORK: the widths of gpt-oss-20b with 8 experts, and its conversion on the disk, whose files
the loop uploads by google-cloud-storage, from as many threads. All ways take turns; each is a process of its own, its clock
starts after its imports, and the first round is thrown away. Medians are printed, and the peak of resident memory above the
imports, which must not grow with the model.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def loop(source: Path, files: Path, address: str) -> None:
    """Each file, read and uploaded: what no conversion can be faster than."""
    import io
    import threading

    from google.cloud import storage

    from converter.bucket_store import WORKERS

    local, (bucket, _, prefix) = threading.local(), address.removeprefix("gs://").partition("/")

    def upload(file: Path) -> None:
        if not hasattr(local, "bucket"):
            local.bucket = storage.Client().bucket(bucket)
        data = file.read_bytes()
        blob = local.bucket.blob(f"{prefix}/{file.relative_to(files).as_posix()}")
        blob.upload_from_file(io.BytesIO(data), size=len(data), checksum="crc32c")

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(upload, (path for path in files.rglob("*") if path.is_file())))


def convert(source: Path, files: Path, address: str) -> None:
    from converter import convert

    convert(source, address, verify=False)


def convert_verified(source: Path, files: Path, address: str) -> None:
    from converter import convert

    convert(source, address)


def load(source: Path, files: Path, address: str) -> None:
    """What a round before has written."""
    from oss_model import ModelConfig, create_model_from_checkpoint

    create_model_from_checkpoint(address, ModelConfig.from_json(address))


_OURS = ("orbax.checkpoint", "converter.conversion", "oss_model.mxfp4", "google.cloud.storage")
WAYS: dict[str, tuple[Callable[[Path, Path, str], None], tuple[str, ...]]] = {
    "a plain loop": (loop, ("google.cloud.storage", "converter.bucket_store")),
    "convert-oss, not verified": (convert, _OURS),
    "convert-oss": (convert_verified, _OURS),
    "create_model_from_checkpoint": (load, ("oss_model.params", "google.cloud.storage")),
}


def child(way: str, source: Path, files: Path, address: str) -> None:
    """One measurement, in this process."""
    function, modules = WAYS[way]
    for module in modules:
        importlib.import_module(module)
    from oss_model.memory import peak_rss, rss

    before, start = rss(), time.perf_counter()
    function(source, files, address)
    print(json.dumps({"seconds": time.perf_counter() - start, "memory": peak_rss() - before}))


def make(work: Path, layers: int) -> tuple[Path, Path]:
    from converter import convert
    from oss_model.config import ModelConfig
    from oss_model.synthetic import write_checkpoint

    source, files = work / f"source-{layers}", work / f"files-{layers}"
    if not files.exists():
        cfg = ModelConfig(vocab_size=16384, num_hidden_layers=layers, num_experts=8)
        write_checkpoint(source, cfg)
        convert(source, files, verify=False)
    return source, files


def measure(work: Path, layers: int, repeats: int) -> None:
    source, files = make(work, layers)
    size = sum(path.stat().st_size for path in files.rglob("*") if path.is_file())
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for turn in range(repeats + 1):
        # A new one each time: it keeps what it is sent in memory.
        server = subprocess.Popen(
            [sys.executable, ROOT / "tests/gcs_server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        env = os.environ | {"STORAGE_EMULATOR_HOST": server.stdout.readline().strip()}
        for way in WAYS:
            address = "gs://bucket/" + ("convert-oss" if way.startswith("create") else way.replace(", ", "-").replace(" ", "-"))
            called = [sys.executable, __file__, str(work), "--child", way, str(source), str(files), address]
            said = subprocess.run(called, env=env, capture_output=True, text=True, check=True).stdout
            if turn:  # the first touch of memory is slow, for all
                found[way].append(json.loads(said))
        server.kill()
        server.wait()
    plain = statistics.median(one["seconds"] for one in found["a plain loop"])
    print(f"\n{layers} layers, {size / 1e9:.2f} GB, {repeats} rounds")
    for way, results in found.items():
        seconds, memory = (statistics.median(one[key] for one in results) for key in ("seconds", "memory"))
        against = f", {seconds / plain:.2f} times the loop" if way.startswith("convert") else ""
        print(f"{way:30} {seconds:6.2f} s  {size / seconds / 1e6:6.0f} MB/s  {memory / 1e6:6.0f} MB{against}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a directory for the models")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=4, metavar=("WAY", "SOURCE", "FILES", "ADDRESS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        way, source, files, address = args.child
        child(way, Path(source), Path(files), address)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    for layers in args.layers:
        measure(args.work.resolve(), layers, args.repeats)


if __name__ == "__main__":
    main()
