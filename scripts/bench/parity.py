#!/usr/bin/env python
"""check-parity against one bare forward pass of transformers on the same tokens, each in a process of its own.

    .venv/bin/python scripts/bench/parity.py gpt-oss-20b gpt-oss-20b-orbax [--tokens 320] [--dtype bfloat16] [--no-peer]

The peer loads the whole model in float32 and runs it once: it must fit in memory (2 layers of 20b take 12 GB, all of it
86 GB). Prints seconds, peak memory and the ratio of the two in this run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PEER = """
import json, sys, time, numpy as np, torch, transformers
from oss_model.memory import peak_rss
from parity.prompts import random_prompt

source, tokens = sys.argv[1], int(sys.argv[2])
transformers.logging.set_verbosity_error()
start = time.monotonic()
model = transformers.GptOssForCausalLM.from_pretrained(
    source, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
loaded = time.monotonic()
with torch.no_grad():
    model(torch.from_numpy(random_prompt(model.config.vocab_size, tokens, 0).tokens))
end = time.monotonic()
print(json.dumps({"load": loaded - start, "forward": end - loaded, "peak_rss_bytes": peak_rss()}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--no-peer", action="store_true", help="for models that do not fit in memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [Path(sys.executable).parent / "check-parity", options.source, options.checkpoint, "--layers"]
        command += ["--tokens", str(options.tokens), "--dtype", options.dtype, "--json", report]
        ended = subprocess.run(command, stdout=sys.stderr)
        ours = json.loads(report.read_text())
    print(f"check-parity  exit {ended.returncode}   {ours['seconds']:.1f} s   {ours['peak_rss_bytes'] / 2**30:.2f} GiB")
    if not options.no_peer:
        run = subprocess.run(
            [sys.executable, "-c", PEER, options.source, str(options.tokens)], stdout=subprocess.PIPE, text=True, check=True
        )
        peer = json.loads(run.stdout.splitlines()[-1])
        whole = peer["load"] + peer["forward"]
        peak = f"{peer['peak_rss_bytes'] / 2**30:.2f} GiB"
        print(f"transformers  load {peer['load']:.1f} s, forward {peer['forward']:.1f} s   {peak}")
        print(f"ratio  {ours['seconds'] / whole:.2f} with loading, {ours['seconds'] / peer['forward']:.1f} without")
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
