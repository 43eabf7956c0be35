"""What do data, logging and checkpoints cost? finetune.py's loop against its bare compiled step, in turn, in one process.

    python scripts/bench/training.py [--steps 100] [--repeats 3]

The tiny model, batch 8, length 256, a save every 50 steps. Seconds a step after the first, which compiles; the loop's until
all is saved.
"""

import argparse
import dataclasses
import datetime
import statistics
import tempfile
import time
from pathlib import Path

import jax
from flax import nnx

from oss_model import ModelConfig, create_model_from_checkpoint
from oss_model.scanned import scanned
from oss_model.synthetic import write_checkpoint
from oss_model.training import Data, Training, optimizer, train, train_step
from oss_model.training.data import put


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        source = write_checkpoint(work / "source", ModelConfig.tiny(), "hf-bf16")
        cfg = dataclasses.replace(ModelConfig.from_json(source), param_dtype="float32")
        text = work / "text.txt"
        text.write_text("Every layer is compared with the reference, and the first difference is named.\n" * 100)
        data = Data(text, source, 8, 256, datetime.date.today())
        how = Training(options.steps + 1)

        def bare() -> float:
            descent = optimizer(how.rate, how.clip, how.weight_decay)
            model = scanned(create_model_from_checkpoint(source, cfg, mesh))  # as `train` has it
            graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
            moments = descent.init(params)
            with jax.set_mesh(mesh):
                step = jax.jit(train_step(graphdef, descent), donate_argnums=(0, 1))
                batch = put(data(1), mesh)
                for _ in range(2):  # the second compiles, too: the optimizer's counts are placed as they came out of the first
                    params, moments, found = step(params, moments, frozen, batch)
                jax.block_until_ready((params, found))
                start = time.perf_counter()
                for _ in range(options.steps):
                    params, moments, found = step(params, moments, frozen, batch)
                jax.block_until_ready((params, found))
            return (time.perf_counter() - start) / options.steps

        def whole(run: Path) -> float:
            said: list[float] = []
            model = create_model_from_checkpoint(source, cfg, mesh)
            train(model, nnx.Param, data, None, how, mesh, run, lambda _: said.append(time.perf_counter()))
            return (time.perf_counter() - said[0]) / options.steps

        pairs = [(bare(), whole(work / f"run{n}")) for n in range(options.repeats)]
    for n, name in enumerate(("bare step", "finetune's loop")):
        print(f"{name:<16} {statistics.median(pair[n] for pair in pairs) * 1e3:.1f} ms a step")
    print(f"ratio            {statistics.median(loop / step for step, loop in pairs):.3f}")


if __name__ == "__main__":
    main()
