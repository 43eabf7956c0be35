#!/usr/bin/env python
"""What check-parity finds: several mistakes at once, and how small an error may be.

    .venv/bin/python scripts/stress/faults.py --together 100
    .venv/bin/python scripts/stress/faults.py --smallest 20

`--together` puts two or three mistakes of the catalogue into one right port, in one layer or in several, and expects each to be
found at its place and named, and no other one to be named. `--smallest` multiplies every tap of a right port by 1 + delta, and
a channel of one token of each, and prints the smallest delta that is found in every seed, a tap. Exits 1 where something was
missed or something false was said.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from converter import convert
from oss_model import ModelConfig
from oss_model.synthetic import write_checkpoint
from oss_model.taps import LAYER_TAPS
from parity import compare
from parity.candidate import Candidate
from parity.injection.candidate import Faulty
from parity.mistakes.catalogue import CODE, applies
from parity.walk import Call

DELTAS = {True: (1e-4, 3e-5, 1e-5, 3e-6), False: (3e-3, 1e-3, 3e-4, 1e-4)}  # of a whole tap, of a channel of one token
ALSO = {"k_rope": "q_rope", "mlp_norm": "attn_norm"}  # taps that a mistake of another one shows at too: its name is true there
TAPS = [tap for tap in LAYER_TAPS if tap != "expert_choice"]


def pair(root: Path, seed: int) -> tuple[Path, Path]:
    """A small model of this seed, (safetensors, converted)."""
    source = write_checkpoint(root / f"source-{seed}", ModelConfig.tiny(), seed=seed)
    convert(source, root / f"checkpoint-{seed}", verify=False)
    return source, root / f"checkpoint-{seed}"


def together(root: Path, count: int) -> int:
    rng, pairs, read = np.random.default_rng(0), [pair(root, seed) for seed in range(3)], [{}, {}, {}]
    cfg = ModelConfig.tiny()
    settings = Candidate(pairs[0][1]).settings
    known = [fault for fault in CODE if applies(fault, settings) and fault.where in ("layer", "sliding", "full")]
    missed = unnamed = false = 0
    for number in range(count):
        some: list = []
        while len(some) < rng.integers(2, 4):
            fault = known[rng.integers(len(known))]
            layers = [
                n for n in range(cfg.num_hidden_layers) if fault.where == "layer" or cfg.layer_types[n].startswith(fault.where)
            ]
            layer = some[0][1] if some and rng.random() < 0.5 and some[0][1] in layers else int(rng.choice(layers))
            if all((layer, fault.tap) != (other, one.tap) for one, other in some):
                some.append((fault, layer))
        which = number % len(pairs)
        (first, n), *rest = some
        others = [(fault.name, layer) for fault, layer in rest]
        report = compare(pairs[which][0], Faulty(pairs[which][1], first.name, n, read[which], others))
        made = {(layer, fault.tap): fault.name for fault, layer in some}
        found = {(one["layer"], one["tap"]): one["name"] for one in report.findings if one["cause"] != "weights"}
        lost = [place for place in made if place not in found]
        other = [place for place in made if place in found and found[place] is None]
        wrong = [
            (place, name)
            for place, name in found.items()
            if name is not None and name not in made.values() and (place[0], ALSO.get(place[1])) not in made
        ]
        missed, unnamed, false = missed + len(lost), unnamed + len(other), false + len(wrong)
        if lost or other or wrong or report.errors:
            print(f"{made}: missed {lost}, not named {other}, false {wrong} {report.errors}", flush=True)
    print(f"{count} combinations: {missed} mistakes missed, {unnamed} found and not named, {false} named that were not made")
    return missed + false


def smallest(root: Path, seeds: int) -> None:
    """All taps of layer 2 at once: each is judged on the reference's own input."""
    pairs = [pair(root, seed) for seed in range(seeds)]
    right = Call._hook
    print(f"{'tap':<15} {'whole tap':>10} {'one channel of one token':>25}   smallest of {seeds} of {seeds} seeds")
    least: dict[tuple[str, bool], float] = {}
    found = {True: set(TAPS), False: set(TAPS)}  # at every delta so far
    for whole, delta in [(whole, delta) for whole, deltas in DELTAS.items() for delta in deltas]:

        def hook(self, layer, name, value, whole=whole, delta=delta):
            if layer == 2 and name in TAPS:
                factor = jnp.asarray(1 + delta, value.dtype)
                token = (0, 20, ..., 3) if value.ndim > 2 else (20, 3)
                value = value * factor if whole else value.at[token].multiply(factor)
            return right(self, layer, name, value)

        Call._hook = hook
        for source, checkpoint in pairs:
            report = compare(source, checkpoint)
            found[whole] &= {tap.tap for tap in report.taps if tap.layer == 2 and tap.verdict == "fail"}
        least |= {(tap, whole): delta for tap in found[whole]}
        Call._hook = right
    for tap in TAPS:
        print(f"{tap:<15} {least.get((tap, True), np.inf):>10.0e} {least.get((tap, False), np.inf):>25.0e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--together", type=int, metavar="N", help="combinations of mistakes")
    parser.add_argument("--smallest", type=int, metavar="SEEDS", help="seeds that an error must be found in")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if options.smallest:
            smallest(Path(scratch), options.smallest)
        return 1 if options.together and together(Path(scratch), options.together) else 0


if __name__ == "__main__":
    sys.exit(main())
