"""Several processes restore one checkpoint onto one mesh: what does each read, against its share?

    python scripts/bench/processes.py CHECKPOINT --processes 1 2 4 --axis fsdp [--step OUT]

Each process has one CPU device and knows the others by jax.distributed, as hosts of a cluster would. Bytes read are those
of the process's read calls (/proc/self/io); its share is the bytes of the shards it ends up with. With --step they
then generate, train a step together and save the model with plain Orbax under OUT.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def worker(checkpoint: Path, axis: str, out: Path | None, index: int, count: int, port: int) -> dict:
    import jax

    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, index)
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    from flax import nnx
    from jax.sharding import AxisType

    from oss_model import ModelConfig, create_model_from_checkpoint, generate
    from oss_model.memory import peak_rss

    mesh = jax.make_mesh((count,), (axis,), axis_types=(AxisType.Auto,))
    cfg = ModelConfig.from_json(checkpoint / "config.json")
    before, start = bytes_read(), time.perf_counter()
    model = create_model_from_checkpoint(checkpoint, cfg, mesh)
    jax.block_until_ready(nnx.state(model))
    seconds, read = time.perf_counter() - start, bytes_read() - before
    shards = [shard for a in jax.tree.leaves(nnx.state(model)) for shard in a.addressable_shards]
    found = {"seconds": seconds, "read": read, "share": sum(s.data.nbytes for s in shards), "peak": peak_rss()}
    if out is None:
        return found

    @nnx.jit
    def step(model, tokens):
        def loss(model):
            picked = jnp.take_along_axis(jax.nn.log_softmax(model(tokens)[:, :-1]), tokens[:, 1:, None], axis=-1)
            return -picked.mean()

        value, grads = nnx.value_and_grad(loss)(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g.astype(p.dtype), nnx.state(model, nnx.Param), grads))
        return value

    tokens = jnp.arange(8 * 16, dtype=jnp.int32).reshape(8, 16) * 7 % cfg.vocab_size
    with jax.set_mesh(mesh):
        text = generate(model, [[1, 2, 3], [4]], 4)
        loss = step(model, jax.device_put(tokens, jax.NamedSharding(mesh, jax.P())))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(out.absolute(), nnx.state(model))
    return found | {"loss": float(loss), "text": text}


def launch(checkpoint: Path, axis: str, out: Path | None, count: int) -> list[dict]:
    """What each process found."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, __file__, str(checkpoint), "--axis", axis]
    command += ["--step", str(out / f"by-{count}")] if out else []
    # What a process would read of compiled programs is no part of its share.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    children = [
        subprocess.Popen([*command, "--one", f"{n},{count},{port}"], stdout=subprocess.PIPE, text=True, env=env)
        for n in range(count)
    ]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit(f"a process failed: {[child.returncode for child in children]}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--axis", choices=["fsdp", "tensor", "expert"], default="fsdp")
    parser.add_argument("--step", type=Path, metavar="OUT")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(worker(args.checkpoint, args.axis, args.step, *map(int, args.one.split(",")))))
        return
    results = {count: launch(args.checkpoint, args.axis, args.step, count) for count in args.processes}
    if args.json:
        print(json.dumps(results))
        return
    print(f"{args.axis}; the worst process of each run\n\n| processes | share | read | of its share | seconds | peak memory |")
    print("|---|---|---|---|---|---|")
    for count, found in results.items():
        worst = max(found, key=lambda f: f["read"] / f["share"])
        sizes = " | ".join(f"{worst[name] / 1e9:.2f} GB" for name in ("share", "read"))
        seconds, peak = (max(f[name] for f in found) for name in ("seconds", "peak"))
        print(f"| {count} | {sizes} | {worst['read'] / worst['share']:.3f} | {seconds:.1f} | {peak / 1e9:.2f} GB |")


if __name__ == "__main__":
    main()
