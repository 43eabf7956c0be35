"""`fuzz.py`, with inputs chosen by what code of ours they reach: atheris, which is libFuzzer for Python.

    pip install atheris
    python scripts/stress/fuzz_guided.py --inputs 20000 --minutes 10 [--only safetensors --only config.json]

An input that comes to lines no other has come to is kept, and damaged further: half the time as `fuzz.py` does it, half as
libFuzzer does. Each format has a process of its own. Prints a row a format, as `fuzz.py` does.
"""

import importlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

atheris: Any = importlib.import_module("atheris")
OURS = ["converter", "oss_model", "parity", "huggingface_hub"]
SCRATCH = "FUZZ_SCRATCH"
with atheris.instrument_imports(include=OURS):
    import fuzz


def main() -> int:
    given = fuzz.arguments(__doc__).parse_args()
    if SCRATCH in os.environ:
        explore(given, Path(os.environ[SCRATCH]))
    given.keep.mkdir(exist_ok=True)
    wrong = 0
    for name in given.only or fuzz.FORMATS:
        with tempfile.TemporaryDirectory() as scratch:
            said = {"inputs": given.inputs, "minutes": given.minutes, "only": name, "seed": given.seed, "keep": given.keep}
            command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in said.items())]
            done = subprocess.run(command, env=os.environ | {SCRATCH: scratch}, stderr=subprocess.DEVNULL)
            if done.returncode not in (0, 1):
                print(f"{name:32} ended by itself, exit {done.returncode}", flush=True)
            wrong += done.returncode != 0
    return int(wrong > 0)


def explore(given: Any, scratch: Path) -> NoReturn:
    """In a process of its own, which ends with it: libFuzzer does not come back."""
    (name,) = given.only
    with atheris.instrument_imports(include=OURS):  # what functions import, too
        target = fuzz.targets(scratch / "targets")[name]
        right = target.use()
    whole, counts, start = target.file.read_bytes(), Counter(), time.process_time()
    length = 8 + int.from_bytes(whole[:8], "little") if target.header else len(whole)
    fed, after = whole[:length], whole[length:]  # of safetensors the header alone
    (scratch / "corpus").mkdir()
    (scratch / "corpus/whole").write_bytes(fed)

    def one(data: bytes) -> None:
        target.file.write_bytes(data + after)
        found = fuzz.outcome(target, right)
        counts[found] += 1
        if fuzz.is_wrong(found):
            (given.keep / f"{name.replace(' ', '-')}-guided-{counts.total()}").write_bytes(data + after)
        seconds = time.process_time() - start
        if counts.total() >= given.inputs and seconds >= given.minutes * 60:
            print(fuzz.row(name, counts, seconds), flush=True)
            os._exit(int(any(map(fuzz.is_wrong, counts))))

    def damaged(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            try:
                return fuzz.damaged(data, target.header, rng)[:most]
            except (ValueError, RecursionError):  # no JSON any more
                pass
        return atheris.Mutate(data, most)

    options = [f"-seed={given.seed + 1}", f"-max_len={4 * len(fed) + 1000}", "-rss_limit_mb=0", "-timeout=600"]
    atheris.Setup([sys.argv[0], *options, str(scratch / "corpus")], one, custom_mutator=damaged)
    with fuzz.bounded_memory():
        atheris.Fuzz()
    raise AssertionError("libFuzzer ends the process")


if __name__ == "__main__":
    sys.exit(main())
