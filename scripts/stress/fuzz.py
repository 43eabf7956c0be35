"""What do files from strangers do? Every JSON text and header that is read, damaged at random.

A line and an exit code, or a right result; never a traceback, ten seconds, or 500 MB.

    python scripts/stress/fuzz.py --inputs 20000 [--only safetensors --only config.json] [--seed 0]

Half of the inputs are JSON with a value, a key or a piece of structure changed into something hostile, half are bytes. What is
accepted must be what was there before the damage, or what the safetensors library reads too. Prints a row a format.
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from converter import convert
from converter.adapters import convert_adapter
from converter.audit import verify_checkpoint
from converter.errors import Different
from converter.inspection import inspect
from oss_model import ModelConfig, add_lora, create_model_from_checkpoint, eos_tokens, hub, save_lora
from oss_model.exits import BUG, ending
from oss_model.params import Loader
from oss_model.shards import Checkpoint
from oss_model.synthetic import write_checkpoint
from parity.recording import Recording

SECONDS, BYTES = 10.0, 500 << 20
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**60, 2**63, -(2**63), 10**400, 0.5, math.nan, math.inf, -math.inf, -0.0,
    "", " ", "../x", "../../../../x", "/etc/passwd", "..", "a/b", "\x00", "é\u202e", "x" * 10_000, "BF16", "U8",
    "mxfp4", "bfloat16",
    [], [[]], {}, {"": {}}, [0] * 1000, ["a"], [2**40, 2**40],
]  # fmt: skip
FORMATS = (
    "safetensors", "index", "config.json", "generation_config.json", "adapter_config.json", "adapter_model", "lora.json",
    "_METADATA", "zarr.json", "conversion.json", "conversion.json, inspected", "export's conversion.json", "recording",
    "hub's info", "hub's tree", "hub's headers",
)  # fmt: skip


class Target(NamedTuple):
    """
    Attributes:
      file: that is damaged.
      header: whether it is a safetensors file, whose header alone is JSON.
      use: what is done with it; its result is what is compared with that of the whole file, if it is accepted.
    """

    file: Path
    header: bool
    use: Callable[[], Any]


def targets(root: Path) -> dict[str, Target]:
    """Small checkpoints, and what commands do with them."""
    import dataclasses

    from flax import nnx

    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=1, layer_types=())
    hf = write_checkpoint(root / "hf", cfg)
    sharded = shutil.copytree(hf, root / "sharded")
    with Checkpoint(hf).shards as shards:
        named = dict.fromkeys(shards.tensors, "model.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": named}))
    orbax, plain = root / "orbax", root / "plain"
    convert(hf, orbax, verify=False)
    shutil.copytree(orbax, plain)
    (plain / "conversion.json").unlink()
    model = create_model_from_checkpoint(orbax, ModelConfig.from_json(orbax))
    add_lora(model, r".*q_proj", 2, rngs=nnx.Rngs(0))
    save_lora(model, root / "lora")
    convert_adapter(root / "lora", root / "peft", "peft", hf)
    served = root / "served"
    convert(orbax, served, to="hf-bf16", verify=False)
    from parity import compare

    compare(hf, orbax, layers=False, tokens=8, record=root / "golden")
    (array,) = orbax.glob("layers.0.attn.q_proj.weight.value")

    def signature(directory: Path) -> Any:
        with Checkpoint(directory).shards as shards:
            return shards.signature()

    def loaded(directory: Path) -> Any:
        with Loader(directory) as loader:
            return {name: (tuple(shape), str(dtype)) for name, (shape, dtype) in loader.stored.items()}

    def adapted(directory: Path, to: str) -> Any:
        shutil.rmtree(root / "adapted", ignore_errors=True)
        return convert_adapter(directory, root / "adapted", to, hf)

    def verified(directory: Path) -> str:
        found = verify_checkpoint(directory)
        if found.differences:
            raise Different(found.differences)
        return found.status

    return {
        "safetensors": Target(hf / "model.safetensors", True, lambda: signature(hf)),
        "index": Target(sharded / "model.safetensors.index.json", False, lambda: signature(sharded)),
        "config.json": Target(hf / "config.json", False, lambda: ModelConfig.from_json(hf)),
        "generation_config.json": Target(hf / "generation_config.json", False, lambda: eos_tokens(hf)),
        "adapter_config.json": Target(root / "peft/adapter_config.json", False, lambda: adapted(root / "peft", "orbax-lora")),
        "adapter_model": Target(root / "peft/adapter_model.safetensors", True, lambda: adapted(root / "peft", "orbax-lora")),
        "lora.json": Target(root / "lora/lora.json", False, lambda: adapted(root / "lora", "peft")),
        "_METADATA": Target(plain / "_METADATA", False, lambda: loaded(plain)),
        "zarr.json": Target(array / "zarr.json", False, lambda: loaded(orbax)),
        "conversion.json": Target(orbax / "conversion.json", False, lambda: verified(orbax)),
        "conversion.json, inspected": Target(orbax / "conversion.json", False, lambda: inspect(orbax).layout),
        "export's conversion.json": Target(served / "conversion.json", False, lambda: verified(served)),
        "recording": Target(root / "golden/manifest.json", False, lambda: Recording(root / "golden").sizes),
    } | hub_targets(root / "hub")


def hub_targets(root: Path) -> dict[str, Target]:
    """What a hub says of a repository, of the files in it, and in the headers of one: each lies in a file, as it is sent."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from hub_server import Answer, Hub  # type: ignore[import-not-found]

    (root / "there").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (root / "there" / name).write_text(name)
    served = Hub({"": root / "there"}, "nobody/nothing")  # a name that no directory has
    files = {kind: root / f"{kind}.json" for kind in ("info", "tree", "headers")}

    def learn(kind: str, answer: Answer) -> Answer:
        status, headers, data = answer
        if kind in files:
            files[kind].write_bytes(data)
        if kind.endswith(" model.safetensors"):
            length = {"X-Linked-Size": str(len("model.safetensors"))} if kind.startswith("HEAD") else {}
            heads[kind] = {"status": status, "headers": headers | {"Content-Length": str(len("model.safetensors"))} | length}
        return answer

    def say(kind: str, answer: Answer) -> Answer | bytes:
        status, headers, data = answer
        if kind in files:
            return status, headers, files[kind].read_bytes()
        if not kind.endswith(" model.safetensors"):
            return answer
        text = files["headers"].read_bytes()
        try:
            said = json.loads(text)[kind]
            lines = [f"HTTP/1.1 {said['status']} OK", *(f"{key}: {value}" for key, value in said["headers"].items())]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # bytes that were JSON: a line a header
            own = text.partition(kind.encode())[2].partition(b'"headers": ')[2].partition(b"}")[0]
            return b"HTTP/1.1 200 OK\r\n" + own.translate(None, b'"{').replace(b", ", b"\r\n") + b"\r\n\r\n" + data
        return "\r\n".join([*lines, "", ""]).encode(errors="surrogatepass") + data

    def downloaded() -> dict[str, bytes]:
        """Into a cache of its own each time. Waiting is not waited for."""
        from huggingface_hub import constants

        home, waits = root / "home", []
        cache = str(home / "cache" / str(next(numbers)))
        try:
            with mock.patch.multiple(constants, HF_HUB_CACHE=cache, **served.constants), mock.patch("time.sleep", waits.append):
                directory = hub.local(served.repository)
            found = [path.resolve() for path in directory.iterdir()]
            assert all(path.is_relative_to(home.resolve()) for path in found), "reads outside its cache"
            return {path.name: path.read_bytes() for path in directory.iterdir()}
        finally:
            there = {path.relative_to(root).parts[:2] for path in root.rglob("*")}
            shutil.rmtree(home, ignore_errors=True)
            assert there <= known | {("home",), ("home", "cache")}, "writes outside its cache"
            assert sum(waits) < 3600, "waits for hours"

    numbers, heads = itertools.count(), {}
    known = {path.relative_to(root).parts for path in root.rglob("*")} | {(file.name,) for file in files.values()}
    served.says = learn
    downloaded()
    files["headers"].write_text(json.dumps(heads))
    served.says = say
    return {f"hub's {kind}": Target(file, False, downloaded) for kind, file in files.items()}


def damaged(data: bytes, header: bool, rng: random.Random) -> bytes:
    before, text, after = b"", data, b""
    if header:
        length = int.from_bytes(data[:8], "little")
        before, text, after = data[:8], data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.5:
        return _bytes_changed(data if not header or rng.random() < 0.2 else before + text, rng) + (after if header else b"")
    tree = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        tree = _value_changed(tree, rng)
    found = json.dumps(tree).encode(errors="surrogatepass")
    if rng.random() < 0.05:
        found = b"[" * 100_000 + found
    if rng.random() < 0.1 and found.startswith(b"{") and len(found) > 2:  # a key twice
        found = found[:-1] + b"," + found[1:]
    return (len(found).to_bytes(8, "little") if header else b"") + found + after


def _value_changed(tree: Any, rng: random.Random) -> Any:
    """Somewhere in it, in place if it can be."""
    path, node = [], tree
    while isinstance(node, dict | list) and node and (not path or rng.random() < 0.7):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append((node, key))
        node = node[key]
    if not path:
        return copy.deepcopy(rng.choice(HOSTILE))
    parent, key = path[-1]
    how = rng.random()
    if how < 0.15:
        del parent[key]
    elif how < 0.25 and isinstance(parent, dict):
        parent[str(rng.choice(HOSTILE))[:200]] = parent.pop(key)
    elif how < 0.4 and isinstance(node, int) and not isinstance(node, bool):
        parent[key] = node + rng.choice((-1, 1, 8, -8, 2**32))
    else:
        parent[key] = copy.deepcopy(rng.choice(HOSTILE))
    return tree


def _bytes_changed(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        how, at = rng.randrange(5), rng.randrange(len(found) + 1)
        if how == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del found[at:]
        elif how == 2:
            found[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif how == 3:
            del found[at : at + rng.choice((1, 4, 64))]
        else:
            found[at:at] = found[at : at + 32]
    return bytes(found)


def tried(name: str, target: Target, inputs: int, rng: random.Random, keep: Path) -> Counter[str]:
    """How many inputs ended how; one that ended wrongly is kept."""
    whole, counts = target.file.read_bytes(), Counter()
    right = target.use()
    for number in range(inputs):
        bad = damaged(whole, target.header, rng)
        target.file.write_bytes(bad)
        found = outcome(target, right)
        counts[found] += 1
        if is_wrong(found):
            (keep / f"{name.replace(' ', '-')}-{number}").write_bytes(bad)
    target.file.write_bytes(whole)
    return counts


def outcome(target: Target, right: Any) -> str:
    """
    Args:
      right: the result of what was there before the damage.
    """
    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = "as before" if target.use() == right else "accepted"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        code = ending(error)[0]
        found = "a line" if code in (1, 2, 3) else f"CRASH {type(error).__name__}" if code == BUG else f"exit {code}"
    if time.monotonic() - start > SECONDS:
        found = "SLOW"
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 > BYTES:
        found = "LARGE"
    return found


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """What would take all of it is seen to be LARGE, and takes nothing from others on the machine."""
    pages, before = int(Path("/proc/self/statm").read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def is_wrong(found: str) -> bool:
    return found.isupper() or found.startswith(("CRASH", "exit"))


def row(name: str, counts: Counter[str], seconds: float) -> str:
    said = ", ".join(f"{count:,} {how}" for how, count in counts.most_common())
    return f"{name:32} {counts.total():>7,} inputs {seconds:6.0f} s   {said}"


def arguments(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="of each format, at the least")
    parser.add_argument("--minutes", type=float, default=0.0, help="of CPU time of each format, at the least")
    parser.add_argument("--only", action="append", metavar="FORMAT", choices=FORMATS, help="one of them, several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzzed"), help="where inputs that ended wrongly go")
    return parser


def main(argv: list[str] | None = None) -> int:
    given = arguments(__doc__).parse_args(argv)
    given.keep.mkdir(exist_ok=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        found = targets(Path(scratch))
        with bounded_memory():
            for name in given.only or found:
                start, counts = time.process_time(), Counter()
                rng = random.Random(f"{given.seed} {name}")
                while (left := given.inputs - counts.total()) > 0 or time.process_time() - start < given.minutes * 60:
                    counts += tried(name, found[name], min(200, left) if left > 0 else 200, rng, given.keep)
                wrong += sum(count for how, count in counts.items() if is_wrong(how))
                print(row(name, counts, time.process_time() - start), flush=True)
    print(f"{wrong} ended wrongly" + (f": see {given.keep}" if wrong else ""))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
